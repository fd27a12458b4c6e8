from pathlib import Path

import pytest

from agent.settings import Settings, SettingsError
from agent.tools import create_tools
from graphs import Graph, secret_files, settings
from servers import Model

GOOD = '''
from dataclasses import dataclass
from langchain_core.tools import tool


@dataclass
class Word:
    text: str


@tool
def shout(text: str) -> str:
    """Say it loudly."""
    return Word(text).text.upper()


tools = [shout]
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "loud.py").write_text(GOOD)
    return tmp_path


def test_a_file_and_a_name_add_a_tool(plugin: Path, model: Model) -> None:
    toolbox = create_tools(settings(tools_dir=plugin, tools=("loud",)))
    assert toolbox.names[-1] == "shout"
    assert Graph(model, toolbox).say('[[tool shout {"text": "hello"}]]').answer == "The tool says: HELLO"


def test_a_file_that_is_not_named_is_not_loaded(plugin: Path) -> None:
    assert "shout" not in create_tools(settings(tools_dir=plugin)).names


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no such file (AGENT_TOOLS names bad)"),
        ("def broken(:\n", "line 1: "),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("x = 1\n", "it must define `tools`, a list of LangChain tools"),
        ("tools = []\n", "it must define `tools`"),
        ("tools = 'shout'\n", "it must define `tools`"),
        ("def f(): pass\ntools = [f]\n", "is no LangChain tool (is @tool missing?)"),
        (GOOD + "shout.name = 'bad name'\n", "the tool name 'bad name' must be 1 to 64 of"),
        (GOOD + "shout.description = ' '\n", "the tool shout has no description"),
        (GOOD + "shout.name = 'calculator'\n", "two tools are named calculator"),
        (GOOD + "tools = [shout, shout]\n", "the tool shout is in"),
    ],
)
def test_errors_name_the_file_and_what_is_wrong(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "bad.py").write_text(text)
    with pytest.raises(SettingsError) as error:
        create_tools(settings(tools_dir=tmp_path, tools=("bad",)))
    assert reason in str(error.value)
    assert str(tmp_path / "bad.py") in str(error.value) or "two tools" in reason
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../loud", "/etc/passwd", "a.b", "loud.py", "x" * 65])
def test_names_are_no_paths(plugin: Path, name: str) -> None:
    environ = {"AGENT_TOOLS_DIR": str(plugin), "AGENT_TOOLS": name, **secret_files(plugin / "loud.txt")}
    (plugin / "loud.txt").write_text("x")
    with pytest.raises(SettingsError, match=r"AGENT_TOOLS=.*names of files in AGENT_TOOLS_DIR"):
        Settings.from_environment(environ)
    assert Settings.from_environment(environ | {"AGENT_TOOLS": "loud, other"}).tools == ("loud", "other")

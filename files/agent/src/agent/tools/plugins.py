"""Tools that a user adds: a Python file in AGENT_TOOLS_DIR, named in AGENT_TOOLS, with a list `tools` in it."""

import importlib.util
import re
import sys
from pathlib import Path

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from agent.settings import SettingsError

TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class PluginError(SettingsError):
    """Names the file and says what is wrong with it."""


def load_plugins(directory: Path, names: tuple[str, ...]) -> list[BaseTool]:
    tools: list[BaseTool] = []
    sources: dict[str, Path] = {}
    for name in names:
        path = directory / f"{name}.py"
        for tool in _load(path, name):
            if tool.name in sources:
                raise PluginError(f"{path}: the tool {tool.name} is in {sources[tool.name]} already")
            sources[tool.name] = path
            tools.append(tool)
    return tools


def _load(path: Path, name: str) -> list[BaseTool]:
    if not path.is_file():
        raise PluginError(f"{path}: there is no such file (AGENT_TOOLS names {name})")
    module_name = f"agent_plugin_{name.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path}: this is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Where pickling, dataclasses and type annotations look for what a class or function belongs to.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise PluginError(f"{path}: line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{path}: {type(error).__name__}: {error}") from error
    found = getattr(module, "tools", None)
    if not isinstance(found, list | tuple) or not found:
        raise PluginError(f"{path}: it must define `tools`, a list of LangChain tools")
    for tool in found:
        _check(path, tool)
    return list(found)


def _check(path: Path, tool: object) -> None:
    if not isinstance(tool, BaseTool):
        raise PluginError(f"{path}: {tool!r:.80} in `tools` is no LangChain tool (is @tool missing?)")
    if not TOOL_NAME.fullmatch(tool.name):
        raise PluginError(f"{path}: the tool name {tool.name!r:.80} must be 1 to 64 of the characters A-Z a-z 0-9 _ -")
    if not tool.description.strip():
        raise PluginError(f"{path}: the tool {tool.name} has no description, so the model cannot know when to use it")
    try:
        convert_to_openai_tool(tool)
    except Exception as error:
        raise PluginError(f"{path}: the arguments of {tool.name} cannot be described: {error}") from error

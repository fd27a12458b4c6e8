"""Where the secrets are kept, and that a file that is added to keeps everything else: tables over the two functions, without Ansible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils._secrets_file import SecretsFileError, edited, location

HOME = Path("/home/ada")


def made(root: Path, *names: str) -> list[str]:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if name.endswith("/") else path.write_text("")
    return [str(root / inventory) for inventory in ("one", "two")]


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        pytest.param(["one/group_vars/all/"], "one/group_vars/all/secrets.yml", id="the directory of prod's form"),
        pytest.param(["one/group_vars/all.yml"], "one/group_vars/agent_stack_secrets.yml", id="a file that a directory would hide"),
        pytest.param(["one/hosts.ini"], "one/group_vars/agent_stack_secrets.yml", id="no variables yet"),
        pytest.param(["one/group_vars/all/secrets.yml"], "one/group_vars/all/secrets.yml", id="there already"),
        pytest.param(["one/group_vars/all/", "one/group_vars/agent_stack_secrets.yml"], "one/group_vars/agent_stack_secrets.yml", id="a directory made later"),
        pytest.param(["one/hosts", "two/group_vars/all/secrets.yml"], "two/group_vars/all/secrets.yml", id="two inventories, of which the second has them"),
        pytest.param(["one/group_vars/all/", "two/group_vars/all/"], "one/group_vars/all/secrets.yml", id="two inventories without any"),
    ],
)
def test_where_they_are_kept(tmp_path: Path, there: list[str], expected: str) -> None:
    assert location(made(tmp_path, *there), "agent", HOME) == tmp_path / expected


def test_hosts_of_the_command_line_have_a_place_that_no_directory_changes() -> None:
    assert location([], "agent.example.com", HOME) == HOME / ".config/agent-stack/agent.example.com/secrets.yml"


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (["one/group_vars/all/secrets.yml", "two/group_vars/agent_stack_secrets.yml"], "allowed is one of them"),
        (["one/group_vars/all/secrets.yml", "one/group_vars/agent_stack_secrets.yml"], "allowed is one of them"),
        (["one/group_vars/all/secrets.yml", "one/group_vars/all.yml"], "Ansible ignores"),
        (["one/hosts", "two/group_vars/all/main.yml", "two/group_vars/all.yaml"], "Move the file to all/main.yml"),
    ],
)
def test_what_is_refused(tmp_path: Path, there: list[str], words: str) -> None:
    with pytest.raises(SecretsFileError, match=words):
        location(made(tmp_path, *there), "agent", HOME)


BLOCK = """---
# Keep this file.
agent_stack_secrets:
  # from the vault of the team
  one: !unsafe '{{ not a template }}'  # why
  two: "quoted"

other: [1, 2]  # kept
"""


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        pytest.param("", {"b": "2", "a": "1"}, "---\n# Made.\ns:\n  a: '1'\n  b: '2'\n", id="a new file"),
        pytest.param("# mine\n", {"a": "x"}, "# mine\ns:\n  a: x\n", id="a comment alone"),
        pytest.param("other: 1\n", {"a": "x"}, "other: 1\ns:\n  a: x\n", id="other variables"),
        pytest.param("other: 1", {"a": "x"}, "other: 1\ns:\n  a: x\n", id="no newline at the end"),
        pytest.param("s:\nother: 1\n", {"a": "x"}, "s:\n  a: x\nother: 1\n", id="an empty one"),
        pytest.param("s: {}\nother: 1\n", {"a": "x"}, "s:\n  a: x\nother: 1\n", id="an empty mapping"),
        pytest.param("s: {b: y}\n", {"b": "y", "a": "x"}, "s: {a: x, b: y}\n", id="a flow"),
        pytest.param("s: {b: y,}  # c\n", {"b": "y", "a": "x"}, "s: {a: x, b: y,}  # c\n", id="a flow with a comma at its end"),
        pytest.param("s: {b: y, c: z}\n", {"c": "z"}, "s: {c: z}\n", id="less in a flow"),
        pytest.param("s:\n    b: y\n", {"b": "y", "a": "x"}, "s:\n    a: x\n    b: y\n", id="a wider indentation"),
        pytest.param("s:\n  b: y # old\n  c: z\n", {"c": "z"}, "s:\n  c: z\n", id="one less"),
        pytest.param("s:\n  b: y\n  c: z\n", {"b": "y"}, "s:\n  b: y\n", id="the last less"),
        pytest.param("s:  # c\n  b: y\n  c: z\nt: 1\n", {}, "s: {}  # c\nt: 1\n", id="all less"),
        pytest.param("s:\nt: 1\n", {}, "s: {}\nt: 1\n", id="nothing, which is null"),
        pytest.param("s: {b: y}\n", {}, "s: {}\n", id="all less in a flow"),
        pytest.param("s:\n  b: y # why\n", {"b": "new"}, "s:\n  b: new # why\n", id="another value"),
        pytest.param("s:\n  b: y\nt: 1\n", {}, "s: {}\nt: 1\n", id="none left"),
        pytest.param("s:\n  b: |\n    y\n    z\n  c: z\n", {"c": "z"}, "s:\n  c: z\n", id="a long one less"),
        pytest.param(
            "s:\n  b: y\n", {"b": "y", "1": "no", "no": "1.5"}, "s:\n  '1': 'no'\n  'no': '1.5'\n  b: y\n", id="what YAML would take for something else"
        ),
    ],
)
def test_a_file_is_changed_and_no_more_than_that(text: str, values: dict[str, str], expected: str) -> None:
    assert edited(text, "s", values, "Made.") == expected


def test_comments_and_tags_stay() -> None:
    """To the letter: only a line is added."""
    changed = edited(BLOCK, "agent_stack_secrets", {"one": "{{ not a template }}", "two": "quoted", "three": "x"})
    assert changed.splitlines() == [*BLOCK.splitlines()[:4], "  three: x", *BLOCK.splitlines()[4:]]


def test_an_inline_vault_value_is_not_touched() -> None:
    text = "s:\n  one: !vault |\n    $ANSIBLE_VAULT;1.1;AES256\n    6162\n  two: x\n"
    assert edited(text, "s", {"one": "decrypted", "two": "x", "three": "y"}) == text.replace("s:\n", "s:\n  three: y\n")


@pytest.mark.parametrize("text", ["s: &a {b: y}\nt: *a\n--- \nu: 1\n", "? s\n: - a\n", "s: [a]\n"])
def test_a_form_that_cannot_be_changed_is_refused(text: str) -> None:
    with pytest.raises((SecretsFileError, yaml.YAMLError)):
        edited(text, "s", {"b": "y", "a": "x"})


def test_what_is_written_is_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        f"name-{number}": text for number, text in enumerate(["a b", "'", '"', "# x", "{{ x }}", ": ", "\n", "ü", "null", "0x1", "x" * 200])
    }
    assert yaml.safe_load(edited("", "s", values))["s"] == values

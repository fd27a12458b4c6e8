"""The checker of the documents: a table of what is fine and what is a fault, for each rule."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import docs

REPOSITORY = "https://github.com/selfhosted/agent_stack"
LONG = " ".join(["word"] * 26)
SHORT = " ".join(["word"] * 25)
TREE = docs.Tree(
    documents={"docs/a.md": "# Title\n\n## The `x` file: a walk\n\n## Twice\n\n## Twice\n"},
    files=frozenset({"docs/a.md", "README.md", "site.yml", "roles/redis/tasks/main.yml", "roles/redis/README.md", "files/0001_runs.sql", "Makefile"}),
    targets=frozenset({"test", "check"}),
    repository=REPOSITORY,
)
SPECS: dict[str, Any] = {
    "main": {
        "options": {
            "r_model": {"description": "The model.", "type": "str", "required": True},
            "r_port": {"description": ["C(80) or V(81).", "See O(r_model=a)."], "type": "int", "default": 80},
            "r_on": {"description": "Switch.", "type": "bool", "default": False},
            "r_list": {"description": "Names.", "type": "list", "default": []},
            "r_password": {"description": "Secret.", "type": "str", "default": "{{ agent_stack_secrets.r_password }}"},
            "r_kind": {"description": "Which I(kind) a|b.", "type": "str", "default": "a", "choices": ["a", "b"]},
            "r_text": {"description": "Text.", "type": "str", "default": "x" * 41},
        }
    },
    "check": {"options": {}},
    "other": {"options": {"r_name": {"description": "Name.", "type": "str", "required": True}}},
}
SPECS["check"]["options"] = SPECS["main"]["options"]


def messages(faults: Any) -> list[str]:
    return [f"{fault.line}: {fault.message}" for fault in faults]


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (f"{SHORT}.\n", []),
        (f"{LONG}.\n", ["1: a sentence has 26 words"]),
        (f"- {LONG}.\n", ["1: a sentence has 26 words"]),
        (f"| a | b |\n|---|---|\n| x | {LONG}. |\n", ["3: a sentence has 26 words"]),
        ("| a | b |\n|---|---|\n| x | One. Two. |\n", []),
        ("One sentence.\nAnother one.\n", []),
        ("One sentence. Another one.\n", ["1: the line has 2 sentences"]),
        ("One sentence. `code` begins another.\n", ["1: the line has 2 sentences"]),
        ("It takes 0.5 s, e.g. Here.\n", []),
        ("A sentence that goes\non.\n", ["1: the sentence goes on in the next line"]),
        ("Do this:\n`make test`.\n", []),
        (f"`{LONG}` is one word.\n", []),
        (f"```\n{LONG}. Two.\n```\n", []),
        (f"## {LONG}. Two.\n", []),
        ("word" * 41 + ".\n", ["1: the line has 165 columns"]),
        (f"[link](https://example.com/{'x' * 200}).\n", []),
        ("A line.  \nAnother.\n", ["1: the line ends with spaces"]),
        (f"{docs.BEGIN}\n\n| a |\n|---|\n| {LONG}. |\n\n{docs.END}\n", []),
    ],
)
def test_lines(text: str, faults: list[str]) -> None:
    found = messages(docs.check_lines("docs/a.md", text))
    assert len(found) == len(faults)
    assert all(one.startswith(start) for one, start in zip(found, faults, strict=True)), found


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ("One (see there). Two.", ["One (see there).", "Two."]),
        ("Version 2.19. Then", ["Version 2.19.", "Then"]),
        ("agent.example.com answers.", ["agent.example.com answers."]),
        ("Nothing, i.e. None.", ["Nothing, i.e. None."]),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert docs.sentences(text) == parts


@pytest.mark.parametrize(
    ("text", "lines"),
    [("**Fetching.** It is fetched.\n", [1]), ("- **Fetching.** It is.\n", []), ("It is **bold**.\n", []), ("Text.\n\n**A**\n", [3])],
)
def test_pseudo_headings(text: str, lines: list[int]) -> None:
    assert [fault.line for fault in docs.check_pseudo_headings("a.md", text)] == lines


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("roles/redis/README.md", "".join(f"## {name}\n\n" for name in docs.ROLE_SECTIONS), ""),
        (
            "roles/redis/README.md",
            "## Needs\n\n## Does\n",
            "the sections are Needs, Does; allowed are Does, Needs, Example, A re-run, Limits, Variables, in this order",
        ),
        ("docs/a.md", "## Anything\n", ""),
        ("README.md", "".join(f"## {name}\n\n" for name in docs.README_SECTIONS), ""),
        ("README.md", "".join(f"## {name}\n\n" for name in docs.README_SECTIONS if name != "Support"), "sections are missing: Support"),
    ],
)
def test_sections(file: str, text: str, words: str) -> None:
    assert "; ".join(messages(docs.check_sections(file, text))) == (f"1: {words}" if words else "")


@pytest.mark.parametrize(
    ("file", "text", "faults"),
    [
        ("README.md", f"[redis]({REPOSITORY}/blob/main/roles/redis/README.md)\n", []),
        ("README.md", "`roles/redis/README.md`\n", ["1: there is no link to roles/redis/README.md"]),
        ("docs/a.md", "Nothing.\n", []),
    ],
)
def test_every_role_is_linked(file: str, text: str, faults: list[str]) -> None:
    assert messages(docs.check_roles(file, text, TREE)) == faults


@pytest.mark.parametrize(
    ("span", "fault"),
    [
        ("site.yml", ""),
        ("roles/redis/tasks/main.yml", ""),
        ("roles/redis/tasks/", ""),
        ("roles/redis/tasks/main.yml:12", ""),
        ("roles/redis/tasks/missing.yml", "there is no roles/redis/tasks/missing.yml"),
        ("roles/<component>/tasks/main.yml", ""),
        ("roles/<component>/vars/main.yml", "there is no roles/<component>/vars/main.yml"),
        ("files/<number>_<name>.sql", ""),
        ("roles/redis/{README.md,tasks/main.yml}", ""),
        ("roles/redis/{README.md,vars}", "there is no roles/redis/{README.md,vars}"),
        ("tasks/main.yml", ""),
        ("tasks/missing.yml", "there is no tasks/missing.yml"),
        ("/opt/agent-stack/vllm", ""),
        ("application/json", ""),
        ("make test", ""),
        ("make test check", ""),
        ("make missing", "make missing is no target of the Makefile"),
        ("X=1 make missing", "make missing is no target of the Makefile"),
        ("python site.yml roles/none.py", "there is no roles/none.py"),
    ],
)
def test_paths_and_targets(span: str, fault: str) -> None:
    found = messages(docs.check_code("roles/redis/README.md", f"Text.\n\nSee `{span}`.\n", TREE))
    assert found == ([f"3: {fault}"] if fault else [])


@pytest.mark.parametrize(
    ("file", "target", "fault"),
    [
        ("docs/a.md", "../site.yml", ""),
        ("docs/a.md", "../roles/redis", ""),
        ("docs/a.md", "../none.yml", "the link leads to none.yml, which does not exist"),
        ("docs/a.md", "#title", ""),
        ("docs/a.md", "#the-x-file-a-walk", ""),
        ("docs/a.md", "#twice-1", ""),
        ("docs/a.md", "#twice-2", "the link leads to #twice-2, which is no heading of docs/a.md"),
        ("roles/redis/README.md", "../../docs/a.md#none", "the link leads to #none, which is no heading of docs/a.md"),
        ("docs/a.md", "https://example.com/none", ""),
        ("README.md", f"{REPOSITORY}/blob/main/docs/a.md#title", ""),
        ("README.md", f"{REPOSITORY}/tree/main/roles", ""),
        ("README.md", f"{REPOSITORY}/raw/main/none.png", "the link leads to none.png, which does not exist"),
        ("README.md", f"{REPOSITORY}/issues", ""),
        ("README.md", "docs/a.md", f"the link to docs/a.md is relative; Galaxy shows this page elsewhere, so begin with {REPOSITORY}/blob/main/"),
    ],
)
def test_links(file: str, target: str, fault: str) -> None:
    for text in (f"One.\n[two]({target}).\n", f"One.\n![two]({target}).\n"):
        assert messages(docs.check_links(file, text, TREE)) == ([f"2: {fault}"] if fault else [])


def test_the_table_says_what_the_specs_say() -> None:
    rows = docs.table(SPECS).splitlines()
    assert "| `r_model` | required | The model. |" in rows
    assert "| `r_port` | `80` | `80` or `81`. See `r_model=a`. |" in rows
    assert "| `r_on` | `false` | Switch. |" in rows
    assert "| `r_list` | none | Names. |" in rows
    assert "| `r_password` | generated | Secret. |" in rows
    assert "| `r_kind` | `a` | Which *kind* a\\|b. One of `a`, `b`. |" in rows
    assert "| `r_text` | see `defaults/main.yml` | Text. |" in rows
    # An entry point that takes the same is not shown twice.
    assert [row for row in rows if row.startswith("Entry point")] == ["Entry point `other`:"]
    assert rows.count("| `r_model` | required | The model. |") == 1


def test_an_old_table_is_a_fault_until_it_is_written() -> None:
    old = f"# Role\n\n{docs.BEGIN}\nold\n{docs.END}\n\nEnd.\n"
    assert messages(docs.check_generated("README.md", old, SPECS)) == ["3: the table of variables is old: python tools/docs.py write"]
    new = docs.with_table(old, SPECS)
    assert new.startswith("# Role\n\n")
    assert new.endswith("\n\nEnd.\n")
    assert docs.with_table(new, SPECS) == new
    assert messages(docs.check_generated("README.md", new, SPECS)) == []
    assert messages(docs.check_generated("README.md", "# Role\n", SPECS)) == [f"1: the marks {docs.BEGIN} and {docs.END} are missing"]


def test_documents_are_found_before_they_are_committed(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "new.md").write_text("# New\n\nSee `docs/none.md`. And `make missing`.\n")
    (tmp_path / "ignored.md").write_text(f"{LONG}.\n")
    (tmp_path / ".gitignore").write_text("ignored.md\n")
    (tmp_path / "Makefile").write_text("## make test   all\ntest:\n")
    (tmp_path / "galaxy.yml").write_text(f"repository: {REPOSITORY}\n")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    assert [str(fault) for fault in docs.check(tmp_path)] == [
        "docs/new.md:3: make missing is no target of the Makefile",
        "docs/new.md:3: the line has 2 sentences; the second one begins a line: And CODE.",
        "docs/new.md:3: there is no docs/none.md",
    ]


@pytest.mark.parametrize("arguments", [[], ["all"], ["check", "more"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(arguments) == 2
    assert "usage: python tools/docs.py write|check" in capsys.readouterr().err

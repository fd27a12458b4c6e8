"""Keep the documents true: write what is generated, and check what can be checked.

    python tools/docs.py write      write the variables' tables of the roles' READMEs from meta/argument_specs.yml
    python tools/docs.py check      print FILE:LINE: MESSAGE for every fault, and exit 1 if there is one

The rules: one sentence a line, at most 160 columns and 25 words; every path, link, anchor and make target that is named
exists; generated parts are fresh; all roles' READMEs have the same sections. Markdown is read by markdown-it-py.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
# Written by antsibull-changelog, in a style of its own.
GENERATED_DOCUMENTS = frozenset({"CHANGELOG.md"})
LONGEST_LINE = 160
MOST_WORDS = 25
BEGIN, END = "<!-- variables: begin -->", "<!-- variables: end -->"
ROLE_SECTIONS = ("Does", "Needs", "Example", "A re-run", "Limits", "Variables")
# What Red Hat's and Ansible's templates for the README of a collection ask for.
README_SECTIONS = ("Requirements", "Installation", "Use cases", "Testing", "Support", "Release notes", "Related information", "License information")
LONGEST_DEFAULT = 40

# A code span stands for one word in a sentence, whatever is in it.
CODE = "CODE"
SENTENCE_END = re.compile(r"""[.?!][*_"')\]]*\s+(?=["'(\[*_]*[A-Z0-9])""")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|etc)\.\s")
ENDS_A_LINE = re.compile(r"""[.?!:][*_"')\]]*$""")
PLACEHOLDER = re.compile(r"<[a-z_ ]+>")
MARKUP = re.compile(r"\b([CVIBOMPU])\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
TARGET = re.compile(r"^(?:[A-Z_]+=\S+ )*make((?: [a-z][a-z-]*)+)$")


@dataclass(frozen=True, order=True)
class Fault:
    """Something that is wrong in one line of a document."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Line:
    """A line of prose as it is read. `last` says that its paragraph ends here; `table` that it is a cell."""

    number: int
    text: str
    last: bool = True
    table: bool = False


@dataclass(frozen=True)
class Tree:
    """What documents may name. `repository` is the address under which the files can be read on the web."""

    documents: Mapping[str, str]
    files: frozenset[str]
    targets: frozenset[str]
    repository: str

    @cached_property
    def paths(self) -> frozenset[str]:
        """All files, and all directories above them."""
        return self.files | {str(parent) for name in self.files for parent in PurePosixPath(name).parents}

    @cached_property
    def tops(self) -> frozenset[str]:
        return frozenset(name.partition("/")[0] for name in self.files)

    def has(self, path: str) -> bool:
        """Say whether the path exists. `<name>` and `*` stand for any name, and one must exist."""
        path = path.rstrip("/")
        pattern = PLACEHOLDER.sub("*", path)
        return path in self.paths if "*" not in pattern else any(PurePosixPath(known).match("/" + pattern) or _matches(known, pattern) for known in self.paths)


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(PurePosixPath(part).match(wanted) for part, wanted in zip(parts, patterns, strict=True))


# -- reading ---------------------------------------------------------------------------------------------------------


def parse(text: str) -> list[Token]:
    """Return the blocks of a document. A block's `map` holds its first line, from 0, and the line after its last."""
    return MarkdownIt("commonmark").enable("table").parse(text)


def prose(text: str) -> Iterator[Line]:
    """Yield the lines of paragraphs, list items and table cells; neither headings nor code."""
    kind, row = "", 0
    for token in parse(text):
        if token.type.endswith("_open") and token.type in {"heading_open", "paragraph_open", "td_open", "th_open", "tr_open"}:
            kind = token.type
            row = token.map[0] if token.map else row
        if token.type != "inline" or kind == "heading_open":
            continue
        lines = _plain(token).split("\n")
        for offset, line in enumerate(lines):
            yield Line(row + offset + 1, line, last=offset == len(lines) - 1, table=kind in {"td_open", "th_open"})


def _plain(token: Token) -> str:
    parts = {"code_inline": CODE, "softbreak": "\n", "hardbreak": "\n", "image": ""}
    return "".join(parts.get(child.type, child.content if child.type == "text" else "") for child in token.children or [])


def sentences(text: str) -> list[str]:
    """Split a line into its sentences."""
    marks = ABBREVIATION.sub(lambda found: found[0].replace(".", "\0"), text)
    return [part.replace("\0", ".") for part in re.split(r"\n", SENTENCE_END.sub(lambda found: found[0].rstrip() + "\n", marks)) if part.strip()]


def anchors(text: str) -> set[str]:
    """Return what a link into the document may name, as GitHub makes it of the headings."""
    found: set[str] = set()
    tokens = parse(text)
    for heading, inline in itertools.pairwise(tokens):
        if heading.type == "heading_open":
            words = "".join(child.content for child in inline.children or [])
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            number = next(number for number in range(1000) if (f"{slug}-{number}" if number else slug) not in found)
            found.add(f"{slug}-{number}" if number else slug)
    return found


def headings(text: str, tag: str) -> list[str]:
    tokens = parse(text)
    return [inline.content for heading, inline in itertools.pairwise(tokens) if heading.type == "heading_open" and heading.tag == tag]


# -- checks: each takes a document, and yields faults ------------------------------------------------------------------


def check_lines(file: str, text: str) -> Iterator[Fault]:
    """One sentence a line, and neither longer than a reader can hold."""
    skipped = _generated_lines(text)
    for number, line in enumerate(text.splitlines(), 1):
        shown = re.sub(r"\]\([^)]*\)", "]()", line)
        if len(shown) > LONGEST_LINE and not line.lstrip().startswith("|"):
            yield Fault(file, number, f"the line has {len(shown)} columns without its links; allowed are {LONGEST_LINE}")
        if line != line.rstrip():
            yield Fault(file, number, "the line ends with spaces")
    for found in prose(text):
        if found.number in skipped:
            continue
        parts = sentences(found.text)
        for sentence in parts:
            if (words := len(sentence.split())) > MOST_WORDS:
                yield Fault(file, found.number, f"a sentence has {words} words; allowed are {MOST_WORDS}: {_start(sentence)}")
        if len(parts) > 1 and not found.table:
            yield Fault(file, found.number, f"the line has {len(parts)} sentences; the second one begins a line: {_start(parts[1])}")
        if not found.last and not ENDS_A_LINE.search(found.text.rstrip()):
            yield Fault(file, found.number, f"the sentence goes on in the next line: {_start(found.text)}")


def check_pseudo_headings(file: str, text: str) -> Iterator[Fault]:
    """A paragraph does not begin with bold words in place of a heading."""
    for token in parse(text):
        if token.type == "inline" and token.level == 1 and token.map and token.content.startswith("**"):
            yield Fault(file, token.map[0] + 1, f"bold words begin a paragraph; make them a heading: {_start(token.content)}")


def check_sections(file: str, text: str) -> Iterator[Fault]:
    """All roles' READMEs have the same sections, and the collection's has those that a certification asks for."""
    found = headings(text, "h2")
    if re.fullmatch(r"roles/[a-z_]+/README\.md", file) and tuple(found) != ROLE_SECTIONS:
        yield Fault(file, 1, f"the sections are {', '.join(found)}; allowed are {', '.join(ROLE_SECTIONS)}, in this order")
    if file == "README.md" and (missing := [name for name in README_SECTIONS if name not in found]):
        yield Fault(file, 1, f"sections are missing: {', '.join(missing)}")


def check_roles(file: str, text: str, tree: Tree) -> Iterator[Fault]:
    """The collection's README leads to that of every role."""
    if file == "README.md":
        for role in sorted(name for name in tree.files if re.fullmatch(r"roles/[a-z_]+/README\.md", name)):
            if f"({tree.repository}/blob/main/{role})" not in text:
                yield Fault(file, 1, f"there is no link to {role}")


def check_code(file: str, text: str, tree: Tree) -> Iterator[Fault]:
    """Every path and every make target that a code span names exists."""
    home = PurePosixPath(file).parent
    for number, token in _inline(text):
        if token.type != "code_inline":
            continue
        if target := TARGET.match(token.content):
            for name in target[1].split():
                if name not in tree.targets:
                    yield Fault(file, number, f"make {name} is no target of the Makefile")
            continue
        # Paths stand alone, or before arguments; ansible-playbook and its like come first only in code blocks.
        for word in token.content.split():
            path = re.sub(r"(::[\w:\[\]-]+|:\d+|[.,;])$", "", word)
            if not re.fullmatch(r"[\w.*<>{},@ -]+(/[\w.*<>{},@ -]+)+/?|[\w.-]+\.(md|yml|toml|ini|cfg)", path):
                continue
            inside = path.partition("/")[0] in tree.tops or ("/" in path and tree.has(str(home / path.partition("/")[0])))
            if inside and not all(tree.has(one) or tree.has(str(home / one)) for one in _alternatives(path)):
                yield Fault(file, number, f"there is no {path}")


def check_links(file: str, text: str, tree: Tree) -> Iterator[Fault]:
    """Every link to a file of the repository, and to a heading of a document, leads somewhere."""
    for number, token in _inline(text):
        if token.type not in {"link_open", "image"}:
            continue
        target = str(token.attrGet("href") or token.attrGet("src") or "")
        path, _, anchor = target.partition("#")
        if found := re.match(rf"{re.escape(tree.repository)}/(?:blob|tree|raw)/main/?(.*)", path):
            path = found[1] or "."
        elif re.match(r"[a-z]+:", path):
            continue
        elif file == "README.md" and path:
            yield Fault(file, number, f"the link to {target} is relative; Galaxy shows this page elsewhere, so begin with {tree.repository}/blob/main/")
            continue
        else:
            path = _normal(PurePosixPath(file).parent / path) if path else file
        if path not in tree.paths:
            yield Fault(file, number, f"the link leads to {path}, which does not exist")
        elif anchor and anchor not in anchors(tree.documents.get(path, "")):
            yield Fault(file, number, f"the link leads to #{anchor}, which is no heading of {path}")


def check_generated(file: str, text: str, specs: Mapping[str, Any] | None) -> Iterator[Fault]:
    """The variables' table says what argument_specs.yml says."""
    if specs is None:
        return
    if BEGIN not in text or END not in text:
        yield Fault(file, 1, f"the marks {BEGIN} and {END} are missing")
    elif with_table(text, specs) != text:
        yield Fault(file, text[: text.index(BEGIN)].count("\n") + 1, "the table of variables is old: python tools/docs.py write")


def _inline(text: str) -> Iterator[tuple[int, Token]]:
    """Yield what stands in lines, with the number of its line."""
    skipped = _generated_lines(text)
    row = 0
    for token in parse(text):
        row = token.map[0] if token.map else row
        number = row + 1
        for child in token.children or []:
            if number not in skipped:
                yield number, child
            number += child.type in {"softbreak", "hardbreak"}


def _generated_lines(text: str) -> range:
    if BEGIN not in text or END not in text:
        return range(0)
    return range(text[: text.index(BEGIN)].count("\n") + 1, text[: text.index(END)].count("\n") + 2)


def _alternatives(path: str) -> list[str]:
    """Spell out `a/{b,c}`."""
    if not (found := re.search(r"\{([^{}]*)\}", path)):
        return [path]
    return [one for word in found[1].split(",") for one in _alternatives(path[: found.start()] + word + path[found.end() :])]


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts = parts[:-1]
        elif part != ".":
            parts.append(part)
    return "/".join(parts) or "."


def _start(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- the table of a role's variables -----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads Ansible's `!unsafe` as text."""


_Loader.add_constructor("!unsafe", lambda loader, node: str(node.value))


def read_specs(path: Path) -> dict[str, Any]:
    specs = yaml.load(path.read_text("utf-8"), Loader=_Loader)  # noqa: S506  a safe loader with one more tag
    return dict(specs["argument_specs"])


def table(specs: Mapping[str, Any]) -> str:
    """Return one table for the role, and one for each other entry point that takes something else."""
    parts = []
    for name, entry in specs.items():
        options = entry.get("options") or {}
        if not options or (name != "main" and options == (specs["main"].get("options") or {})):
            continue
        if name != "main":
            parts.append(f"Entry point `{name}`:\n")
        rows = [f"| `{option}` | {_default(found)} | {_description(found)} |" for option, found in options.items()]
        parts.append("\n".join(["| variable | default | what it is |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def with_table(text: str, specs: Mapping[str, Any]) -> str:
    """Return the document with its table written anew between the marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{table(specs)}\n{END}{tail}"


def _default(option: Mapping[str, Any]) -> str:
    if option.get("required"):
        return "required"
    value = option.get("default")
    if value in ("", [], {}, None):
        return "none"
    if isinstance(value, str) and "agent_stack_secrets." in value:
        return "generated"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else ", ".join(value) if isinstance(value, list) else str(value).strip()
    return f"`{_cell(text)}`" if len(text) <= LONGEST_DEFAULT or "{{" in text else "see `defaults/main.yml`"


def _description(option: Mapping[str, Any]) -> str:
    given = option["description"]
    text = " ".join(" ".join(given if isinstance(given, list) else [given]).split())
    text = MARKUP.sub(lambda found: f"*{found[2]}*" if found[1] in "IB" else f"`{found[2]}`", text)
    choices = [f"`{choice}`" for choice in option.get("choices") or []]
    if any(choice not in text for choice in choices):
        text += f" One of {', '.join(choices)}."
    return _cell(text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# -- the repository ----------------------------------------------------------------------------------------------------


def read_tree(root: Path) -> Tree:
    """Read what git knows or would add, so that a document that was not committed yet is checked too."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    files = frozenset(name for name in listed if name and (root / name).exists())
    documents = {name: (root / name).read_text("utf-8") for name in sorted(files) if name.endswith(".md") and name not in GENERATED_DOCUMENTS}
    targets = frozenset(re.findall(r"^## make ([a-z-]+)", (root / "Makefile").read_text("utf-8"), re.MULTILINE))
    repository = yaml.safe_load((root / "galaxy.yml").read_text("utf-8"))["repository"]
    return Tree(documents, files, targets, str(repository))


def specs_of(root: Path, file: str) -> dict[str, Any] | None:
    """Return the argument specs of the role whose README this is, or None for any other document."""
    path = root / file
    return read_specs(path.parent / "meta" / "argument_specs.yml") if re.fullmatch(r"roles/[a-z_]+/README\.md", file) else None


def check(root: Path) -> list[Fault]:
    tree = read_tree(root)
    faults: list[Fault] = []
    for file, text in tree.documents.items():
        faults += check_lines(file, text)
        faults += check_pseudo_headings(file, text)
        faults += check_sections(file, text)
        faults += check_roles(file, text, tree)
        faults += check_code(file, text, tree)
        faults += check_links(file, text, tree)
        faults += check_generated(file, text, specs_of(root, file))
    return sorted(faults)


def write(root: Path) -> None:
    for file, text in read_tree(root).documents.items():
        specs = specs_of(root, file)
        if specs is not None and BEGIN in text and END in text:
            (root / file).write_text(with_table(text, specs), "utf-8")


def main(arguments: list[str]) -> int:
    if arguments == ["write"]:
        write(ROOT)
        return 0
    if arguments == ["check"]:
        faults = check(ROOT)
        print(*faults, sep="\n", end="\n" if faults else "")
        return 1 if faults else 0
    print(f"usage: python tools/docs.py write|check, not {' '.join(arguments) or 'nothing'}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

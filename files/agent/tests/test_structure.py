"""The shape of the package: which wing may import which, and what there is only one of."""

import ast
from pathlib import Path

import pytest

import agent

SOURCE = Path(agent.__file__).parent
# What each wing may import besides itself and the modules that all share. Whatever is not named here is above it.
WINGS: dict[str, set[str]] = {
    "storage": set(),
    "access": {"storage"},
    "tools": set(),
    "llm": {"tools"},
    "runs": {"llm", "storage"},
    "api": {"access", "runs", "services", "storage", "tools"},
}
SHARED = {"errors", "http_client", "logs", "metrics", "settings", "tokens", "tracing", "wire"}
# What is made or reached in one file only.
ONCE = {
    "from_pool": "storage/redis.py",
    "AsyncClient": "http_client.py",
    "AsyncConnectionPool": "storage/postgres.py",
}


def imported(text: str) -> set[str]:
    """The wings and modules of the package that a module's text imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.ImportFrom(module="agent", names=names):
                found |= {each.name for each in names}
            case ast.ImportFrom(module=str(module)) if module.startswith("agent."):
                found.add(module.split(".")[1])
            case ast.Import(names=names):
                found |= {each.name.split(".")[1] for each in names if each.name.startswith("agent.")}
    return found


def called(text: str) -> set[str]:
    names = {node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
    return {name.attr for name in names if isinstance(name, ast.Attribute)} | {name.id for name in names if isinstance(name, ast.Name)}


def modules(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(SOURCE)): path.read_text() for path in sorted(folder.rglob("*.py"))}


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_what_is_below_it(wing: str) -> None:
    allowed = WINGS[wing] | SHARED | {wing}
    found = {name: imported(text) - allowed for name, text in modules(SOURCE / wing).items()}
    assert found
    assert {name: above for name, above in found.items() if above} == {}


def test_every_folder_of_modules_is_a_wing() -> None:
    assert {path.parent.name for path in SOURCE.rglob("*.py") if path.parent != SOURCE} == WINGS.keys()


@pytest.mark.parametrize("module", sorted(SHARED))
def test_what_all_share_imports_no_wing(module: str) -> None:
    assert imported((SOURCE / f"{module}.py").read_text()) <= SHARED


@pytest.mark.parametrize("name", ONCE)
def test_it_is_made_in_one_file(name: str) -> None:
    assert [module for module, text in modules(SOURCE).items() if name in called(text)] == [ONCE[name]]


def test_only_two_files_know_where_the_services_are_kept() -> None:
    """The routes ask `services(request)`, which has a type."""
    assert {module for module, text in modules(SOURCE).items() if "app.state" in text} == {"app.py", "services.py"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import json\nfrom pathlib import Path", set()),
        ("from agent import logs", {"logs"}),
        ("from agent.api import chat", {"api"}),
        ("import agent.app", {"app"}),
        ("from agent.runs.engine import Engine", {"runs"}),
    ],
)
def test_imports_are_found(text: str, found: set[str]) -> None:
    assert imported(text) == found

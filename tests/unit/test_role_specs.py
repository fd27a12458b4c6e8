"""Each role's argument_specs say the same as its defaults, values included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _components

ROLES = sorted((Path(__file__).resolve().parents[2] / "roles").iterdir())
CASTS: dict[str, Any] = {"str": str, "path": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}


class Loader(yaml.SafeLoader):
    """Reads Ansible's `!unsafe`: without it Ansible would template a documented default, and could print a secret with it."""


Loader.add_constructor("!unsafe", lambda loader, node: str(node.value))


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=Loader) or {}  # noqa: S506  a safe loader with one more tag


def options(role: Path) -> dict[str, Any]:
    specs = read(role / "meta" / "argument_specs.yml")["argument_specs"]
    return {name: option for entry in specs.values() for name, option in entry["options"].items()}


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_spec_equals_defaults(role: Path) -> None:
    documented = {name: option["default"] for name, option in options(role).items() if "default" in option}
    assert documented == read(role / "defaults" / "main.yml")


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_options_without_default_are_required(role: Path) -> None:
    assert [name for name, option in options(role).items() if ("default" in option) == bool(option.get("required"))] == []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_option_is_described_and_its_default_has_its_type(role: Path) -> None:
    for name, option in options(role).items():
        assert option["description"], name
        default = option.get("default")
        if default is not None and not (isinstance(default, str) and "{{" in default):
            assert isinstance(default, CASTS[option["type"]]), name


@pytest.mark.parametrize("role", [role for role in ROLES if role.name != "agent_stack"], ids=lambda role: role.name)
def test_check_takes_what_main_takes(role: Path) -> None:
    specs = read(role / "meta" / "argument_specs.yml")["argument_specs"]
    assert specs["check"] == specs["main"]


def test_every_role_is_checked_before_the_first_change() -> None:
    checked = _components.checked(_components.load(ROLES[0].parent).values(), ROLES[0].parent)
    checked.remove("agent_stack")
    assert sorted([*checked, "agent_stack"]) == [role.name for role in ROLES]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_no_documented_default_is_a_secret_that_ansible_would_template(role: Path) -> None:
    lines = (role / "meta" / "argument_specs.yml").read_text().splitlines()
    assert [line for line in lines if "default:" in line and "agent_stack_secrets." in line and "!unsafe" not in line] == []

"""The example in each role's README works as it is written: its inputs are complete, and it is a play that Ansible takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT

pytestmark = pytest.mark.play

OWN = "selfhosted.agent_stack."


def example(role: str) -> Any:
    """The first block of YAML below the heading."""
    text = (ROOT / "roles" / role / "README.md").read_text()
    found = re.search(r"^## Example\n.*?^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, role
    return yaml.safe_load(found[1])


PLAYS = {path.parent.name: example(path.parent.name) for path in sorted(ROOT.glob("roles/*/README.md")) if isinstance(example(path.parent.name), list)}


def checked(role: str, play: dict[str, Any]) -> dict[str, Any]:
    """The play for a host of its own, up to where a host would be looked at: its roles are there and do not run, and their inputs are checked."""
    names = [entry["role"] for entry in play["roles"]]
    if OWN + "agent_stack" in names:
        parts: list[tuple[str, str, dict[str, str]]] = [
            (OWN + "agent_stack", "secrets", {"__agent_stack_secrets_state": "read"}),
            (OWN + "agent_stack", "check_all", {}),
        ]
    else:
        parts = [(name, "check", {}) for name in names]
    tasks = [{"ansible.builtin.include_role": {"name": name, "tasks_from": tasks, "public": True}, "vars": variables} for name, tasks, variables in parts]
    # A run ends where all hosts of a play have failed, so that one bad example would hide the others.
    rescued = {"block": tasks, "rescue": [{"ansible.builtin.debug": {"var": "ansible_failed_result.msg"}}]}
    return {**play, "hosts": role, "gather_facts": False, "roles": [{**entry, "when": False} for entry in play["roles"]], "post_tasks": [rescued]}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("examples")
    (directory / "proxy.pem").write_text("")
    shared = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    (directory / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": dict.fromkeys(PLAYS, shared)}}))
    (directory / "play.yml").write_text(yaml.safe_dump([checked(role, play) for role, (play,) in PLAYS.items()]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def test_most_roles_have_a_play_for_an_example() -> None:
    assert len(PLAYS) >= 8


@pytest.mark.parametrize("role", PLAYS)
def test_the_example_lacks_no_variable(played: str, role: str) -> None:
    recap = played[played.index("PLAY RECAP") :]
    (line,) = [line for line in recap.splitlines() if line.split(":")[0].strip() == role]
    assert "failed=0" in line, played
    assert "rescued=0" in line, played
    assert "changed=0" in line

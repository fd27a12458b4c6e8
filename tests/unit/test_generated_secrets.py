"""The file of secrets, through Ansible itself: created once, never changed, encrypted if there is a vault password."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.play

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - selfhosted.agent_stack.generated_secrets:
        path: {path}
        variable: agent_stack_secrets
        names: [one, two]
        state: {state}
      register: result
    - ansible.builtin.debug:
        msg: "created={{{{ result.created | sort | join(',') }}}} one={{{{ result.secrets.one }}}}"
"""


def play(path: Path, *arguments: str, state: str = "present") -> subprocess.CompletedProcess[str]:
    playbook = path.parent.parent / "play.yml"
    playbook.write_text(PLAYBOOK.format(path=path, state=state))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", str(playbook), *arguments]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "group_vars" / "secrets.yml"


@pytest.fixture(autouse=True)
def _directory(path: Path) -> None:
    path.parent.mkdir()


def test_creates_once_and_keeps(path: Path) -> None:
    first = play(path)
    assert "created=one,two" in first.stdout, first.stdout + first.stderr
    assert "changed=1" in first.stdout
    content = path.read_text()
    values = yaml.safe_load(content)["agent_stack_secrets"]
    assert sorted(values) == ["one", "two"]
    assert all(re.fullmatch(r"[A-Za-z0-9]{32}", value) for value in values.values())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    second = play(path)
    assert "created= " in second.stdout
    assert "changed=0" in second.stdout
    assert path.read_text() == content


def test_adds_what_is_missing_and_keeps_what_is_there(path: Path) -> None:
    path.write_text("agent_stack_secrets: {one: 'odd \"$%'}\nother: [1, 2]\n")
    assert "created=two" in play(path).stdout
    content = yaml.safe_load(path.read_text())
    assert content["agent_stack_secrets"]["one"] == 'odd "$%'
    assert content["other"] == [1, 2]


@pytest.mark.parametrize(("state", "arguments"), [("read", ()), ("present", ("--check",))])
def test_writes_nothing_where_it_must_not(path: Path, state: str, arguments: tuple[str, ...]) -> None:
    result = play(path, *arguments, state=state)
    assert re.search(r"created=one,two one=\w{32}", result.stdout), result.stdout + result.stderr
    assert not path.exists()


def test_encrypts_with_the_vault_password(path: Path, tmp_path: Path) -> None:
    password = tmp_path / "vault-password"
    password.write_text("a vault password\n")
    vault = ("--vault-password-file", str(password))
    assert "created=one,two" in play(path, *vault).stdout
    content = path.read_text()
    assert content.startswith("$ANSIBLE_VAULT;1.1;AES256")
    second = play(path, *vault)
    assert "created= " in second.stdout, second.stdout + second.stderr
    assert path.read_text() == content


def test_refuses_a_file_that_it_cannot_read_or_understand(path: Path) -> None:
    for content, message in [
        ("- a list\n", "must hold YAML variables"),
        ("agent_stack_secrets: text\n", "must be a mapping"),
        ("a: [", "Cannot read"),
    ]:
        path.write_text(content)
        result = play(path)
        assert message in result.stdout + result.stderr, result.stdout + result.stderr
        assert path.read_text() == content

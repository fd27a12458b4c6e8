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

# The day on which each was made, at the end.
MADE = r"agent_stack_secrets_made:\n  two: '\d{4}-\d\d-\d\d'\n"
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


@pytest.mark.parametrize(("configured", "label"), [("second", "second"), ("", "first")])
def test_encrypts_with_the_identity_that_ansible_is_told_to_use(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: str, label: str
) -> None:
    monkeypatch.setenv("ANSIBLE_VAULT_ENCRYPT_IDENTITY", configured)
    arguments = []
    for identity in ("first", "second"):
        (tmp_path / identity).write_text(f"the password of {identity}\n")
        arguments += ["--vault-id", f"{identity}@{tmp_path / identity}"]
    assert "created=one,two" in play(path, *arguments).stdout
    assert path.read_text().startswith(f"$ANSIBLE_VAULT;1.2;AES256;{label}\n")


def test_an_identity_without_a_password_is_named(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSIBLE_VAULT_ENCRYPT_IDENTITY", "third")
    (tmp_path / "first").write_text("a vault password\n")
    result = play(path, "--vault-id", f"first@{tmp_path / 'first'}")
    assert "no vault password was given for the identity third" in " ".join((result.stdout + result.stderr).split())
    assert not path.exists()


def test_a_file_that_was_encrypted_keeps_its_identity(path: Path, tmp_path: Path) -> None:
    arguments = []
    for identity in ("first", "second"):
        (tmp_path / identity).write_text(f"the password of {identity}\n")
        arguments += ["--vault-id", f"{identity}@{tmp_path / identity}"]
    vault = str(Path(sys.executable).parent / "ansible-vault")
    path.write_text("# of the team\nagent_stack_secrets: {one: x}\n")
    subprocess.run([vault, "encrypt", *arguments, "--encrypt-vault-id", "second", str(path)], check=True, capture_output=True)
    assert "created=two" in play(path, *arguments).stdout
    assert path.read_text().startswith("$ANSIBLE_VAULT;1.2;AES256;second\n")
    shown = subprocess.run([vault, "view", *arguments, str(path)], check=True, capture_output=True, text=True).stdout
    assert re.fullmatch(rf"# of the team\nagent_stack_secrets: \{{two: \w{{32}}, one: x\}}\n{MADE}", shown)


def test_a_plain_file_is_encrypted_once_there_is_a_vault_password(path: Path, tmp_path: Path) -> None:
    """Also where it lacks nothing."""
    assert "changed=1" in play(path).stdout
    values = yaml.safe_load(path.read_text())["agent_stack_secrets"]
    password = tmp_path / "vault-password"
    password.write_text("a vault password\n")
    vault = ("--vault-password-file", str(password))
    second = play(path, *vault)
    assert "created= " in second.stdout
    assert "changed=1" in second.stdout
    assert path.read_text().startswith("$ANSIBLE_VAULT;1.1;AES256")
    third = play(path, *vault)
    assert f"one={values['one']}" in third.stdout
    assert "changed=0" in third.stdout


def test_values_of_inline_vaults_are_no_plain_file(path: Path, tmp_path: Path) -> None:
    password = tmp_path / "vault-password"
    password.write_text("a vault password\n")
    vault = ("--vault-password-file", str(password))
    program = str(Path(sys.executable).parent / "ansible-vault")
    made = [
        subprocess.run([program, "encrypt_string", *vault, f"the value of {name}", "--name", name], check=True, capture_output=True, text=True).stdout
        for name in ("one", "two")
    ]
    content = "agent_stack_secrets:\n" + "".join(f"  {line}\n" for text in made for line in text.splitlines())
    path.write_text(content)
    path.chmod(0o600)
    result = play(path, *vault)
    assert "one=the value of one" in result.stdout, result.stdout + result.stderr
    assert "changed=0" in result.stdout
    assert path.read_text() == content


def test_a_file_that_others_can_read_is_closed(path: Path) -> None:
    path.write_text("agent_stack_secrets: {one: x, two: y}  # kept\n")
    path.chmod(0o644)
    assert "changed=1" in play(path).stdout
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "agent_stack_secrets: {one: x, two: y}  # kept\n"
    assert "changed=0" in play(path).stdout


def test_a_template_in_an_unsafe_value_and_comments_stay(path: Path) -> None:
    content = "# ours\nagent_stack_secrets:\n  one: !unsafe 'a {{ b }}'  # from the team's vault\n"
    path.write_text(content)
    assert "created=two" in play(path).stdout
    assert sorted(path.read_text().splitlines()) == sorted(
        [*content.splitlines(), *re.findall(r"  two: \w{32}", path.read_text()), *re.findall(MADE, path.read_text())[0].splitlines()]
    )


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

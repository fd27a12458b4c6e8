"""Rotation in the file of secrets and what playbooks/rotate.yml may rotate, through Ansible itself."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.selfhosted.agent_stack.plugins.plugin_utils import _components
from programs import ROOT

pytestmark = pytest.mark.play

OLD = {name: f"old-{name}-of-32-characters-xxxxxxx" for name in ("one", "two", "three")}
PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - selfhosted.agent_stack.rotated_secrets:
        path: {path}
        variable: agent_stack_secrets
        names: {names}
        state: {state}
      register: result
    - ansible.builtin.debug:
        msg: "created={{{{ result.created | sort | join(',') }}}} previous={{{{ result.previous.keys() | sort | join(',') }}}}"
"""


def ansible(playbook: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", str(playbook), *arguments]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def rotate(file: Path, state: str, *names: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    playbook = file.with_name("play.yml")
    playbook.write_text(PLAYBOOK.format(path=file, names=json.dumps(names), state=state))
    return ansible(playbook, *arguments)


def content(file: Path) -> dict[str, dict[str, Any]]:
    read: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())
    return read


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "secrets.yml"
    file.write_text(yaml.safe_dump({"other": "stays", "agent_stack_secrets": OLD}) + "# a comment\n")
    file.chmod(0o600)
    return file


def test_new_values_stand_beside_the_old_ones_until_the_end(file: Path) -> None:
    begun = rotate(file, "begun", "one", "two")
    assert "created=one,two previous=one,two" in begun.stdout, begun.stdout + begun.stderr
    found = content(file)
    new = found["agent_stack_secrets"]
    assert found["agent_stack_secrets_previous"] == {name: OLD[name] for name in ("one", "two")}
    assert new["three"] == OLD["three"]
    assert not set(new.values()) & {OLD["one"], OLD["two"]}
    assert set(found["agent_stack_secrets_made"]) == {"one", "two"}
    # Killed here and run again, with another name: what was begun keeps its new value.
    again = rotate(file, "begun", "one", "two", "three")
    assert "created=three previous=one,three,two" in again.stdout, again.stdout + again.stderr
    assert {name: content(file)["agent_stack_secrets"][name] for name in ("one", "two")} == {name: new[name] for name in ("one", "two")}
    assert content(file)["agent_stack_secrets_previous"] == OLD
    new = content(file)["agent_stack_secrets"]
    assert "changed=1" in rotate(file, "ended").stdout
    assert content(file)["agent_stack_secrets"] == new
    assert content(file)["agent_stack_secrets_previous"] == {}
    other: Any = content(file)["other"]
    assert other == "stays"
    assert "# a comment" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "changed=0" in rotate(file, "ended").stdout


def test_check_mode_writes_nothing(file: Path) -> None:
    before = file.read_bytes()
    said = rotate(file, "begun", "one", arguments=("--check",))
    assert "created=one" in said.stdout
    assert "changed=1" in said.stdout
    assert file.read_bytes() == before


def test_an_encrypted_file_stays_encrypted(file: Path, tmp_path: Path) -> None:
    password = tmp_path / "vault"
    password.write_text("secret")
    tool = str(Path(sys.executable).parent / "ansible-vault")
    subprocess.run([tool, "encrypt", "--vault-password-file", str(password), str(file)], check=True, capture_output=True)
    said = rotate(file, "begun", "one", arguments=("--vault-password-file", str(password)))
    assert "created=one" in said.stdout, said.stdout + said.stderr
    assert file.read_text().startswith("$ANSIBLE_VAULT;")
    text = subprocess.run([tool, "view", "--vault-password-file", str(password), str(file)], check=True, capture_output=True, text=True).stdout
    assert yaml.safe_load(text)["agent_stack_secrets_previous"] == {"one": OLD["one"]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("agent_stack_secrets: {two: abc}\n", "has no one; allowed to rotate are the secrets that it has."),
        ("agent_stack_secrets_previous: [one]\nagent_stack_secrets: {one: abc}\n", "agent_stack_secrets_previous in .* must be a mapping"),
    ],
)
def test_a_file_that_cannot_be_rotated_stays_as_it_is(file: Path, text: str, sentence: str) -> None:
    file.write_text(text)
    said = rotate(file, "begun", "one")
    assert said.returncode != 0
    assert re.search(sentence, " ".join((said.stdout + said.stderr).split())), said.stdout + said.stderr
    assert file.read_text() == text


# What the playbook makes of its variable. Every default of the roles counts, as in the real play.
CHOICE = """
- hosts: localhost
  connection: local
  gather_facts: false
  vars:
    agent_stack_domain: agent.example.com
    agent_stack_secrets_file: {file}
    agent_stack_secrets: "{{{{ lookup('selfhosted.agent_stack.secrets', agent_stack_secrets_file) }}}}"
    __agent_stack_secrets: {{made: {{redis_agent_password: "2026-05-01"}}}}
  tasks:
    - ansible.builtin.import_role: {{name: selfhosted.agent_stack.agent_stack, tasks_from: rotate}}
      vars: {{agent_stack_rotate: "{{{{ rotate | default([]) }}}}"}}
    - ansible.builtin.debug: {{msg: "wanted={{{{ __agent_stack_rotate.created | sort | join(',') }}}}."}}
    - ansible.builtin.meta: end_play
    - ansible.builtin.import_role: {{name: selfhosted.agent_stack.postgres, tasks_from: refused}}
    - ansible.builtin.import_role: {{name: selfhosted.agent_stack.redis, tasks_from: refused}}
    - ansible.builtin.import_role: {{name: selfhosted.agent_stack.agent, tasks_from: proxy_secret}}
      vars: {{agent_secrets_expected: {{}}}}
    - ansible.builtin.import_role: {{name: selfhosted.agent_stack.nginx_certbot, tasks_from: refused}}
    - ansible.builtin.import_role: {{name: selfhosted.agent_stack.monitoring, tasks_from: configure}}
"""
SECRETS = _components.secret_list(_components.load(ROOT / "roles").values())
NAMES = [secret["name"] for secret in SECRETS if not secret["kept"]]
KEPT = [secret["name"] for secret in SECRETS if secret["kept"]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, f"wanted={','.join(NAMES)}."),
        ({"rotate": ["redis_agent_password"]}, "wanted=redis_agent_password."),
        ({"rotate": "redis_agent_password,agent_proxy_secret"}, "wanted=agent_proxy_secret,redis_agent_password."),
        ({"rotate": ["redis"]}, f"rotate has redis; allowed are {', '.join(NAMES)}."),
        ({"rotate": ["postgres_backup_cipher_pass"]}, "which is not rotated: every backup that was made with it could not be read any more; allowed are"),
        ({"rotate": ["monitoring_grafana_password"]}, "which is not rotated: Grafana reads it on its first start only"),
        ({"redis_agent_password": "of-the-inventory"}, f"wanted={','.join(name for name in NAMES if name != 'redis_agent_password')}."),
        ({"redis_agent_password": "of-the-inventory", "rotate": ["redis_agent_password"]}, "which is not rotated: the inventory gives it"),
    ],
)
def test_what_is_rotated(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    file = tmp_path / "secrets.yml"
    values = {name: f"secret-of-{name}" for name in [*NAMES, *KEPT]}
    file.write_text(yaml.safe_dump({"agent_stack_secrets": values}))
    file.chmod(0o600)
    playbook = tmp_path / "play.yml"
    playbook.write_text(CHOICE.format(file=file))
    result = ansible(playbook, "--check", "-e", json.dumps(given))
    said = " ".join((result.stdout + result.stderr).split())
    assert says in said
    assert "secret-of-" not in said
    if "allowed are" not in says and "not rotated" not in says:
        assert "redis_agent_password of redis" in said
        assert "made 2026-05-01" in said
        assert "made before their days were noted: not rotated, every backup" in said

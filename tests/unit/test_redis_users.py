"""The file of Redis' users, as the role writes it: one password of each, two while it is rotated."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT

pytestmark = pytest.mark.play

PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.copy:
        content: "{{{{ lookup('ansible.builtin.template', '{root}/roles/redis/templates/users.acl.j2') }}}}"
        dest: "{file}"
        mode: "0600"
"""


def digest(password: str) -> str:
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


@pytest.mark.parametrize(
    ("previous", "agent", "exporter"),
    [
        ({}, ["new agent"], ["new exporter"]),
        ({"redis_agent_password": "old agent"}, ["new agent", "old agent"], ["new exporter"]),
        ({"redis_exporter_password": "old exporter", "agent_proxy_secret": "x"}, ["new agent"], ["new exporter", "old exporter"]),
    ],
)
def test_both_passwords_count_while_one_is_rotated(tmp_path: Path, previous: dict[str, str], agent: list[str], exporter: list[str]) -> None:
    file = tmp_path / "users.acl"
    (tmp_path / "play.yml").write_text(PLAYBOOK.format(root=ROOT, file=file))
    given = {
        "ansible_python_interpreter": sys.executable,
        "redis_agent_password": "new agent",
        "redis_exporter_password": "new exporter",
        "agent_stack_secrets_previous": previous,
    }
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", str(tmp_path / "play.yml"), "-e", json.dumps(given)]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = file.read_text().splitlines()
    assert lines[0] == "user default off resetchannels -@all"
    assert lines[1].startswith(f"user agent on {' '.join(map(digest, agent))} ~agent:* ")
    assert lines[2].startswith(f"user exporter on {' '.join(map(digest, exporter))} resetchannels ")
    assert lines[3] == "user health on nopass resetchannels -@all +ping"
    assert len(lines) == 4

"""Data of a service that has another uid than before: the service stops, everything changes hands, and a second run does nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from programs import ROOT

PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: selfhosted.agent_stack.agent_stack, tasks_from: owners}
      vars:
        agent_stack_component_name: redis
        agent_stack_owned:
          - {path: "{{ playbook_dir }}/data/redis", owner: 10003, service: redis}
          - {path: "{{ playbook_dir }}/data/right", owner: 10004, service: right}
          - {path: "{{ playbook_dir }}/data/missing", owner: 10005, service: missing}
"""


def play(directory: Path, *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-c", "local", "play.yml", *arguments]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}
    values = {"ansible_python_interpreter": sys.executable, "agent_stack_root": str(directory / "root")}
    result = subprocess.run(
        [*command, "-e", yaml.safe_dump(values, default_flow_style=True)], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.play
@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users, which root alone may")
def test_data_changes_hands_once_and_whole(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    (tmp_path / "root" / "redis").mkdir(parents=True)
    (tmp_path / "root" / "redis" / "compose.yml").write_text("services: {}\n")
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    docker.chmod(0o755)
    deep = tmp_path / "data" / "redis" / "appendonlydir"
    deep.mkdir(parents=True)
    (deep / "appendonly.aof.1.incr.aof").write_text("data")
    (tmp_path / "data" / "redis" / "elsewhere").symlink_to("/etc/hostname")
    (tmp_path / "data" / "right").mkdir()
    (tmp_path / "data" / "right" / "left as it is").write_text("x")
    everything = [tmp_path / "data" / "redis", *(tmp_path / "data" / "redis").rglob("*")]
    for path in everything:
        os.lchown(path, 999, 999)
    os.chown(tmp_path / "data" / "right", 10004, 10004)
    before = os.stat("/etc/hostname").st_uid
    assert "changed=0" in play(tmp_path, "--check")
    assert {path.lstat().st_uid for path in everything} == {999}
    assert "changed=2" in play(tmp_path)
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in everything} == {(10003, 10003)}
    assert (deep / "appendonly.aof.1.incr.aof").read_text() == "data"
    assert os.stat("/etc/hostname").st_uid == before
    assert (tmp_path / "data" / "right" / "left as it is").stat().st_uid == 0
    stop = f"compose --file {tmp_path}/root/redis/compose.yml stop redis\n"
    assert (tmp_path / "calls").read_text() == stop
    assert "changed=0" in play(tmp_path)
    assert (tmp_path / "calls").read_text() == stop
    # A run that was cut off in the middle of it: the directory itself is the last to change hands.
    os.chown(tmp_path / "data" / "redis", 999, 999)
    assert "changed=2" in play(tmp_path)
    assert {path.lstat().st_uid for path in everything} == {10003}

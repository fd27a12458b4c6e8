"""What the role `nvidia_toolkit` takes and refuses, before it asks any host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.include_role:
        name: selfhosted.agent_stack.nvidia_toolkit
        tasks_from: check
"""
SHARED = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "vllm_device": "cpu"}
TAKEN: list[dict[str, str]] = [
    {},
    {"nvidia_toolkit_version": ""},
    {"nvidia_toolkit_version": "1.21.0~rc.2-1", "nvidia_toolkit_cuda_version": "12.8"},
    {"nvidia_toolkit_repository": "http://127.0.0.1:8099", "nvidia_toolkit_repository_key": "file:///etc/apt/nvidia.asc"},
    {"nvidia_toolkit_repository": "https://user:word@mirror.example.com/nvidia/stable/deb"},
]
REFUSED = [
    ("nvidia_toolkit_version", "latest", "a package version such as 1.20.1-1, or nothing"),
    ("nvidia_toolkit_version", "1.20.1", "a package version such as 1.20.1-1, or nothing"),
    ("nvidia_toolkit_cuda_version", "13", "a version of CUDA such as 13.0"),
    ("nvidia_toolkit_repository", "mirror.example.com/deb", "a URL without a slash at its end"),
    ("nvidia_toolkit_repository", "https://mirror.example.com/deb/", "a URL without a slash at its end"),
    ("nvidia_toolkit_repository", "https://mirror.example.com/deb\nTrusted: yes", "a URL without a slash at its end"),
    ("nvidia_toolkit_repository_key", "ABCD1234", "a URL"),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one play says that has a host for each case."""
    directory = tmp_path_factory.mktemp("play")
    hosts: dict[str, dict[str, str]] = {f"taken-{number}": values for number, values in enumerate(TAKEN)}
    hosts |= {f"refused-{number}": {name: value} for number, (name, value, _) in enumerate(REFUSED)}
    (directory / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": SHARED}}))
    (directory / "play.yml").write_text(PLAYBOOK)
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


@pytest.mark.parametrize("number", range(len(TAKEN)))
def test_what_is_taken(output: str, number: int) -> None:
    (recap,) = [line for line in output.splitlines() if line.startswith(f"taken-{number} ") and "ok=" in line]
    assert "failed=0" in recap, output


@pytest.mark.parametrize(("number", "case"), list(enumerate(REFUSED)))
def test_what_is_refused(output: str, number: int, case: tuple[str, str, str]) -> None:
    name, value, allowed = case
    (recap,) = [line for line in output.splitlines() if line.startswith(f"refused-{number} ") and "ok=" in line]
    assert "failed=1" in recap
    assert "changed=0" in recap
    assert f"{name} is " in output
    assert f"allowed is {allowed}." in output
    assert value.split()[0] in output

"""What a model server's container is, for hosts as unlike as they can be: rendered by Ansible, and compared with a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm_cases
import yaml
from programs import ROOT

ROLE = ROOT / "roles" / "vllm"
TABLE = ROOT / "tests" / "unit" / "data" / "vllm_services.json"
SERVICE = {
    "definition": "{{ lookup('ansible.builtin.template', '" + str(ROLE / "templates" / "server.yml.j2") + "') | from_yaml }}",
    "fetch": "{{ __vllm_fetch_command }}",
    "follower": "{{ __vllm_follower if __vllm_shared else '' }}",
    "strategy": "{{ __vllm_strategy }}",
    "side_by_side_utilization": "{{ __vllm_plan.swap.gpu_memory_utilization | default(0) if vllm_swap_strategy == 'auto' else 0 }}",
    "weights_mib": "{{ __vllm_plan.weights_mib | default(0) | int * vllm_tensor_parallel_size | int }}",
    "tool_call": "{{ '--tool-call-parser' in __vllm_model_arguments }}",
}


def render(directory: Path, inventory: dict[str, Any], service: Any) -> dict[str, Any]:
    """Have Ansible evaluate an expression on every host that runs a model server, with the roles' defaults and variables."""
    defaults: dict[str, Any] = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "agent_stack_image_source": "registry"}
    for name in ("agent_stack", "vllm"):
        defaults = yaml.safe_load((ROOT / "roles" / name / "defaults" / "main.yml").read_text()) | defaults
    (directory / "group_vars").mkdir()
    (directory / "group_vars" / "all.yml").write_text(yaml.safe_dump(defaults))
    (directory / "hosts.yml").write_text(yaml.safe_dump(inventory))
    copy = {"content": "{{ __service | to_json }}", "dest": f"{directory}/{{{{ inventory_hostname }}}}.json", "mode": "0600"}
    play = {
        "hosts": "all:!front",
        "gather_facts": False,
        "vars_files": [str(ROOT / "roles" / name / "vars" / "main.yml") for name in ("agent_stack", "vllm")],
        "vars": {"role_path": str(ROLE)},
        "tasks": [{"ansible.builtin.copy": copy, "vars": {"__service": service}}],
    }
    (directory / "play.yml").write_text(yaml.safe_dump([play]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return {file.stem: json.loads(file.read_text()) for file in directory.glob("*.json")}


@pytest.mark.parametrize("name", vllm_cases.inventories())
def test_ansible_comes_to_what_the_table_says(name: str, tmp_path: Path) -> None:
    rendered = render(tmp_path, vllm_cases.inventories()[name], SERVICE)
    table = json.loads(TABLE.read_text())
    assert rendered
    for host, service in rendered.items():
        assert service == table[host], host


def test_the_table_has_a_row_for_every_host() -> None:
    assert sorted(json.loads(TABLE.read_text())) == sorted(vllm_cases.names())

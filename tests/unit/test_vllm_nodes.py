"""What the role writes for hosts that share a model: rendered by Ansible for a head, its two followers, and a host that serves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT

ROLE = ROOT / "roles" / "vllm"
VARIABLES = {
    "ansible_connection": "local",
    "ansible_python_interpreter": sys.executable,
    "agent_stack_component_revision": "0",
    "role_path": str(ROLE),
    "vllm_device": "cuda",
    "vllm_model": "Qwen/Qwen3-32B",
    "vllm_tensor_parallel_size": 2,
    "agent_stack_image_source": "registry",
}
INVENTORY = {
    "all": {
        "vars": VARIABLES,
        "hosts": {"front": {}},
        "children": {
            "inference": {"hosts": {"head": {"vllm_peer_address": "10.0.0.1"}, "alone": {"vllm_peer_address": "10.0.0.9"}}},
            "followers": {
                "hosts": {"second": {"vllm_peer_address": "10.0.0.2", "vllm_head": "head"}, "third": {"vllm_peer_address": "fd00::3", "vllm_head": "head"}}
            },
        },
    }
}
TEMPLATES = {"servers.cfg.j2": "servers", "compose.yml.j2": "compose", "follower.yml.j2": "follower"}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nodes")
    # Where a role's task finds the templates of the role agent_stack that it runs.
    (directory / "templates").symlink_to(ROOT / "roles" / "agent_stack" / "templates")
    (directory / "hosts.yml").write_text(yaml.safe_dump(INVENTORY))
    tasks: list[dict[str, Any]] = [
        {"ansible.builtin.template": {"src": str(ROLE / "templates" / template), "dest": f"{directory}/{{{{ inventory_hostname }}}}-{name}", "mode": "0600"}}
        for template, name in TEMPLATES.items()
    ]
    # What a plan may say where both models fit at once.
    planned = {"swap": {"strategy": "side_by_side"}}
    for name, content in (("strategy", "{{ __vllm_service.strategy }}"), ("server", "{{ __vllm_service.definition | to_json }}")):
        tasks.append({"ansible.builtin.copy": {"content": content, "dest": f"{directory}/{{{{ inventory_hostname }}}}-{name}", "mode": "0600"}})
    files = [str(ROOT / "roles" / name / "vars" / "main.yml") for name in ("agent_stack", "vllm")]
    # As a role's defaults are, below the inventory.
    defaults: dict[str, Any] = {}
    for name in ("agent_stack", "vllm"):
        defaults |= yaml.safe_load((ROOT / "roles" / name / "defaults" / "main.yml").read_text())
    (directory / "group_vars").mkdir()
    (directory / "group_vars" / "all.yml").write_text(yaml.safe_dump({name: value for name, value in defaults.items() if name not in VARIABLES}))
    (directory / "play.yml").write_text(
        yaml.safe_dump([{"hosts": "all", "gather_facts": False, "vars_files": files, "vars": {"__vllm_plan": planned}, "tasks": tasks}])
    )
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    result = subprocess.run(
        command, cwd=directory, env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


def read(rendered: Path, name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((rendered / name).read_text()))


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_each_host_knows_its_place(rendered: Path) -> None:
    servers = {name: read(rendered, f"{name}-server") for name in ("head", "second", "third")}
    for rank, (name, server) in enumerate(servers.items()):
        command = server["command"]
        assert value(command, "--node-rank") == str(rank), name
        assert value(command, "--nnodes") == value(command, "--pipeline-parallel-size") == "3"
        assert value(command, "--tensor-parallel-size") == "2"
        assert value(command, "--master-addr") == "10.0.0.1"
        assert value(command, "--distributed-executor-backend") == "mp"
        assert server["network_mode"] == "host"
        assert server["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "cdi"
        assert "/opt/agent-stack/vllm/nodes:/etc/agent-stack:ro" in server["volumes"]
    ports = {value(server["command"], "--master-port") for server in servers.values()}
    assert len(ports) == 1
    assert 29500 <= int(*ports) < 30500


def test_the_head_listens_on_a_socket_alone(rendered: Path) -> None:
    head = read(rendered, "head-server")
    assert head["entrypoint"] == ["python3", "/etc/agent-stack/node.py", "serve", "10.0.0.1", "vllm", "serve"]
    assert value(head["command"], "--uds") == "/run/vllm/api.sock"
    assert "--host" not in head["command"]
    assert "--headless" not in head["command"]
    assert "s.connect('/run/vllm/api.sock')" in head["healthcheck"]["test"][-1]
    text = (rendered / "head-servers").read_text()
    assert text.count("  server blue unix@/run/vllm/blue/api.sock ") == 2
    assert "/opt/agent-stack/vllm/sockets:/run/vllm:ro" in read(rendered, "head-compose")["services"]["gateway"]["volumes"]


@pytest.mark.parametrize(("name", "address"), [("second", "10.0.0.2"), ("third", "fd00::3")])
def test_a_follower_waits_for_the_head(rendered: Path, name: str, address: str) -> None:
    project = read(rendered, f"{name}-follower")
    server = project["services"]["server"]
    port = value(server["command"], "--master-port")
    assert server["entrypoint"] == ["python3", "/etc/agent-stack/node.py", "follow", address, "10.0.0.1", port, "vllm", "serve"]
    assert "--headless" in server["command"]
    assert "--uds" not in server["command"]
    # Nothing asks it for anything; the head's server says how both are.
    assert "healthcheck" not in server
    assert project["name"] == f"agent-stack-vllm-{port}"
    assert project["services"]["fetch"]["entrypoint"][-2:] == ["--hub", "Qwen/Qwen3-32B"]


def test_two_models_that_hosts_share_are_never_awake_at_once(rendered: Path) -> None:
    assert (rendered / "head-strategy").read_text() == "sleep"
    assert (rendered / "alone-strategy").read_text() == "side_by_side"


def test_a_host_that_serves_alone_is_as_before(rendered: Path) -> None:
    alone = read(rendered, "alone-server")
    assert alone["entrypoint"] == ["python3", "/etc/agent-stack/serve.py", "serve"]
    assert value(alone["command"], "--host") == "0.0.0.0"
    assert not {"--nnodes", "--uds", "--headless"} & set(alone["command"])
    assert "network_mode" not in alone
    assert "unix@" not in (rendered / "alone-servers").read_text()
    assert not any("/run/vllm" in volume for volume in read(rendered, "alone-compose")["services"]["gateway"]["volumes"])


def test_the_front_is_none_of_them(rendered: Path) -> None:
    text = (rendered / "front-servers").read_text()
    assert "server host-head 10.0.0.1:8443" in text
    assert "server host-alone 10.0.0.9:8443" in text
    assert "host-second" not in text
    assert "host-third" not in text

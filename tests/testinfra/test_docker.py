"""Read-only questions to the running engine; usable against production."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

NETWORKS = {"data": True, "edge": False, "egress": False, "inference": True, "model": True, "monitor": False}


@pytest.fixture(scope="module")
def info(host: Host) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(host.check_output("docker info --format '{{json .}}'"))
    return answer


def test_engine_keeps_containers_through_its_own_restart(info: dict[str, Any]) -> None:
    assert info["LiveRestoreEnabled"] is True


def test_containers_log_within_limits(host: Host) -> None:
    ids = host.check_output("docker ps --quiet").split()
    configs = {json.dumps(item["HostConfig"]["LogConfig"]) for item in json.loads(host.check_output("docker inspect {}".format(" ".join(ids))))}
    assert configs == {json.dumps({"Type": "json-file", "Config": {"max-file": "3", "max-size": "50m"}})}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_as_closed_as_it_should_be(host: Host, name: str) -> None:
    (network,) = json.loads(host.check_output("docker network inspect %s", f"agent-stack-{name}"))
    assert network["Internal"] is NETWORKS[name]
    if name in {"edge", "monitor"}:
        assert network["Options"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"


def test_nobody_is_in_the_docker_group(host: Host) -> None:
    assert host.group("docker").members == []


def test_stack_starts_on_boot(host: Host) -> None:
    assert host.service("agent-stack.target").is_enabled
    for component in ("postgres", "redis", "vllm", "vllm-blue", "agent", "monitoring"):
        unit = host.service(f"agent-stack@{component}.service")
        assert (unit.is_enabled, unit.is_running) == (True, True), host.run(f"systemctl status --no-pager {unit.name}").stdout


def test_unit_is_sandboxed(host: Host) -> None:
    assert host.run("systemd-analyze security --no-pager --threshold=20 agent-stack@redis.service").rc == 0

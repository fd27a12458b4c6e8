"""Read-only questions to the running engine; usable against production."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

# Keys of daemon.json that the role sets.
OURS = {"icc", "live-restore", "log-driver", "log-opts", "no-new-privileges"}
SLOTS = "/var/lib/agent-stack/vllm/swap.json"
NETWORKS = {"data": True, "edge": False, "egress": False, "inference": True, "model": True, "monitor": False}


@pytest.fixture(scope="module")
def info(host: Host) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(host.check_output("docker info --format '{{json .}}'"))
    return answer


def test_engine_keeps_containers_through_its_own_restart(info: dict[str, Any]) -> None:
    assert info["LiveRestoreEnabled"] is True


def test_settings_of_others_survive(host: Host, info: dict[str, Any]) -> None:
    """What daemon.json held before the role came, which left it beside the new one, is still in force."""
    before = host.run('cat "$(ls -tr /etc/docker/daemon.json.*~ | head -n 1)"')
    if before.rc != 0:
        pytest.skip("there was no daemon.json before the role came")
    now = json.loads(host.file("/etc/docker/daemon.json").content_string)
    theirs = {key: value for key, value in json.loads(before.stdout).items() if key not in OURS}
    assert {key: now.get(key) for key in theirs} == theirs
    assert set(theirs.get("labels", [])) <= set(info["Labels"])


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
    slot = json.loads(host.file(SLOTS).content_string)["active"]
    wanted = host.check_output("systemctl show --property Wants --value agent-stack.target").split()
    for component in ("postgres", "redis", "vllm", f"vllm-{slot}", "agent", "monitoring"):
        unit = host.service(f"agent-stack@{component}.service")
        assert unit.is_running, host.run(f"systemctl status --no-pager {unit.name}").stdout
        assert unit.name in wanted
    assert not host.file(f"/opt/agent-stack/vllm-{slot}/standby").exists


def test_unit_is_sandboxed(host: Host) -> None:
    assert host.run("systemd-analyze security --no-pager --threshold=20 agent-stack@redis.service").rc == 0


def test_no_two_containers_run_as_one_user(host: Host) -> None:
    """What runs as the same user reads the other's secrets through /proc, and nobody's user is the host's too."""
    ids = host.check_output("docker ps --quiet --filter name=^agent-stack-").split()
    users = {item["Name"]: item["Config"]["User"].partition(":")[0] for item in json.loads(host.check_output("docker inspect {}".format(" ".join(ids))))}
    # Two slots of one model are one program.
    own = {name.replace("vllm-green", "vllm-blue"): user for name, user in users.items()}
    assert len(set(own.values())) == len(own), own
    assert not {"", "0", "root", "65534", "nobody"} & set(own.values())

"""The firewall, asked of the kernel: read-only, so it may be pointed at a production host (as root)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

PROGRAM = "/opt/agent-stack/firewall"


@pytest.fixture(scope="module")
def chains(host: Host) -> dict[str, dict[str, Any]]:
    """The base chains of the table, by name."""
    items = json.loads(host.check_output("nft --json list table inet agent_stack"))["nftables"]
    return {item["chain"]["name"]: item["chain"] for item in items if "chain" in item}


def test_the_rules_in_force_are_those_that_were_written(host: Host, chains: dict[str, dict[str, Any]]) -> None:
    assert host.check_output(f"python3 -B {PROGRAM}/firewall.py state {PROGRAM}") == "current"
    assert {name: chain["hook"] for name, chain in chains.items() if name != "host"} == {"loopback": "prerouting", "containers": "forward"}
    assert host.check_output("nft list chain inet agent_stack containers").splitlines()[-3].strip() == "drop"


def test_they_are_kept_in_force_from_boot_on(host: Host) -> None:
    unit = host.service("agent-stack-firewall.service")
    assert (unit.is_running, unit.is_enabled) == (True, True), host.run("journalctl -u agent-stack-firewall -n 30 --no-pager").stdout
    assert "docker.service" in host.check_output("systemctl show --property Before --value agent-stack-firewall.service").split()


def test_unit_is_sandboxed(host: Host) -> None:
    assert host.run("systemd-analyze security --no-pager --threshold=20 agent-stack-firewall.service").rc == 0

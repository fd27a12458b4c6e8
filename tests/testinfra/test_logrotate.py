"""Rotation of the host's own logs, as logrotate reads it: read-only, so it may be pointed at a production host (as root)."""

from __future__ import annotations

import re

import pytest
from testinfra.backend.base import CommandResult
from testinfra.host import Host


@pytest.fixture(scope="module")
def rules(host: Host) -> CommandResult:
    return host.run("/usr/sbin/logrotate --debug /etc/logrotate.conf")


def test_all_rules_of_the_host_are_valid(rules: CommandResult) -> None:
    assert rules.rc == 0, rules.stderr
    assert "error:" not in rules.stderr


@pytest.mark.parametrize("pattern", ["/var/log/nginx/*.log", "/var/log/agent-stack/*.log"])
def test_a_log_has_one_rule_with_a_size_limit(rules: CommandResult, pattern: str) -> None:
    found = [line for line in rules.stderr.splitlines() if line.startswith("rotating pattern:") and pattern in line]
    assert len(found) == 1
    assert re.search(r"after 1 days.*log files >= \d+ are rotated earlier", found[0])


def test_container_logs_are_left_to_docker(rules: CommandResult) -> None:
    assert "/var/lib/docker" not in rules.stderr


def test_sizes_are_looked_at_every_minute(host: Host) -> None:
    timer = host.service("logrotate.timer")
    assert timer.is_running
    assert timer.is_enabled
    schedule = host.check_output("systemctl show logrotate.timer --property=TimersCalendar --value")
    assert re.findall(r"OnCalendar=([^;]+?) ;", schedule) == ["*-*-* *:*:00"]

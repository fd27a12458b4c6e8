"""What runs again must change nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Play

SECONDS = 90


def starts(containers: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {name: (item["Id"], item["State"]["StartedAt"]) for name, item in containers.items()}


def test_second_run_changes_nothing_and_restarts_nothing(play: Callable[..., Play], containers: Callable[[], dict[str, dict[str, Any]]]) -> None:
    before = starts(containers())
    result = play()
    assert result.returncode == 0, result.output[-3000:]
    assert (result.recap["changed"], result.recap["failed"]) == (0, 0), result.output[-6000:]
    assert starts(containers()) == before
    print(f"second run: {result.seconds:.0f} s")
    assert result.seconds < SECONDS


# A component in containers, and a service of the host.
@pytest.mark.parametrize("role", ["redis", "nginx_certbot"])
def test_one_role_alone(play: Callable[..., Play], role: str) -> None:
    result = play("--tags", role)
    assert result.returncode == 0, result.output[-3000:]
    assert result.recap["changed"] == 0
    # Every role's inputs are checked, whatever the tag is, and a GPU is looked for.
    roles = set(re.findall(r"^TASK \[selfhosted\.agent_stack\.(\w+) : (?!Check|Driver|Validating)", result.output, re.M))
    assert roles - {"agent_stack"} == {role}
    assert f"selfhosted.agent_stack.{role} : Verify" in result.output


def test_check_mode_sees_what_would_change(play: Callable[..., Play], containers: Callable[[], dict[str, dict[str, Any]]]) -> None:
    before = starts(containers())
    result = play("--check", "--diff", "--tags", "redis", "-e", "redis_maxmemory_mib=96")
    assert result.returncode == 0, result.output[-3000:]
    assert "+maxmemory 96mb" in result.output
    assert result.recap["changed"] > 0
    assert starts(containers()) == before

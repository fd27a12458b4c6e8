"""What runs again must change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def test_one_role_alone(play: Callable[..., Play]) -> None:
    result = play("--tags", "redis")
    assert result.returncode == 0, result.output[-3000:]
    assert result.recap["changed"] == 0
    assert "selfhosted.agent_stack.redis : Verify" in result.output
    assert "selfhosted.agent_stack.postgres : Configure" not in result.output


def test_check_mode_sees_what_would_change(play: Callable[..., Play], containers: Callable[[], dict[str, dict[str, Any]]]) -> None:
    before = starts(containers())
    result = play("--check", "--diff", "--tags", "redis", "-e", "redis_maxmemory_mib=96")
    assert result.returncode == 0, result.output[-3000:]
    assert "+maxmemory 96mb" in result.output
    assert result.recap["changed"] > 0
    assert starts(containers()) == before

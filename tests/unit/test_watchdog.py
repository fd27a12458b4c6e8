"""The watchdog restarts what is stuck, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_api import Progress
from programs import load

STALL = 120


watchdog = load("roles/vllm/files/watchdog.py")

BUSY = [Progress(step, step * 10, 3) for step in range(100)]
STUCK = Progress(5, 50, 3)
IDLE = Progress(5, 50, 0)
AWAY = None


def looks(*seen: Any, every: float = 20, container: str = "a") -> list[str]:
    """What the watchdog says at each look, one every 20 seconds."""
    memory = watchdog.Memory()
    return [watchdog.judge(memory, watchdog.Look(container, one), 1000 + number * every, STALL) for number, one in enumerate(seen)]


@pytest.mark.parametrize(
    ("seen", "first"),
    [
        pytest.param(BUSY, None, id="busy"),
        pytest.param([IDLE] * 50, None, id="idle"),
        pytest.param([STUCK] * 6, None, id="not stuck for long enough"),
        pytest.param([STUCK] * 8, 6, id="stuck"),
        pytest.param([*BUSY[:5], *[STUCK] * 10], 11, id="stuck after work"),
        pytest.param([STUCK] * 5 + [IDLE] + [STUCK] * 5, None, id="the request that was stuck went away"),
        pytest.param([STUCK] * 5 + [Progress(6, 51, 3)] + [Progress(6, 51, 3)] * 5, None, id="one step is enough"),
        pytest.param([Progress(5, 50 + number % 2, 3) for number in range(50)], None, id="tokens alone move"),
        pytest.param([AWAY] * 100, None, id="loading"),
        pytest.param([IDLE] + [AWAY] * 6, 6, id="answers no more"),
        pytest.param([IDLE] + [AWAY] * 5 + [IDLE] + [AWAY] * 5, None, id="away for a moment, twice"),
    ],
)
def test_judgement(seen: list[Any], first: int | None) -> None:
    found = looks(*seen)
    assert next((number for number, reason in enumerate(found) if reason), None) == first


def test_a_restarted_server_begins_anew() -> None:
    memory = watchdog.Memory()
    for number in range(6):
        assert watchdog.judge(memory, watchdog.Look("a", STUCK), number * 20, STALL) == ""
    for number in range(6, 30):
        assert watchdog.judge(memory, watchdog.Look("b", None), number * 20, STALL) == ""


def test_a_lost_gpu_is_reason_enough() -> None:
    assert watchdog.judge(watchdog.Memory(), watchdog.Look("a", IDLE, gpu_lost=True), 0, STALL) == "gpu_lost"


CONFIG = {"stall_seconds": STALL, "restarts_per_hour": 3}


def test_the_budget() -> None:
    memory = watchdog.Memory()
    restarted: list[float] = []
    failed = 0
    for number in range(540):  # three hours, in which each restart helps for nothing
        now = number * 20.0

        def restart(*_: Any, at: float = now) -> None:
            restarted.append(at)

        failed += watchdog.act(CONFIG, memory, watchdog.Look("a", STUCK), "blue", now, restart)
    per_hour = [sum(hour * 3600 <= at < (hour + 1) * 3600 for at in restarted) for hour in range(3)]
    assert max(per_hour) == 3
    assert all(later - earlier >= 3600 for earlier, later in zip(restarted, restarted[3:], strict=False))
    assert failed == memory.given_up > 100
    assert memory.counts["stalled"] == len(restarted)


def test_a_container_that_does_not_run_is_dockers_affair() -> None:
    memory = watchdog.Memory()
    assert watchdog.act(CONFIG, memory, None, "blue", 0, lambda *_: pytest.fail("restarted")) == 0


def test_the_metrics() -> None:
    memory = watchdog.Memory(given_up=2)
    memory.counts["stalled"] = 4
    text = watchdog.metrics(memory)
    assert 'agent_stack_vllm_watchdog_restarts_total{reason="stalled"} 4\n' in text
    assert 'agent_stack_vllm_watchdog_restarts_total{reason="gpu_lost"} 0\n' in text
    assert "agent_stack_vllm_watchdog_given_up_total 2\n" in text
    assert text.endswith("agent_stack_vllm_watchdog_recovered_total 0\n")

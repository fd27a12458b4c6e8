"""What dies comes back: every container's process killed, and the host restarted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import demo
import host as test_host

Containers = Callable[[], dict[str, dict[str, Any]]]
# The project's promise: any one container's process killed, and /ready answers again within this.
SECONDS = 30


def test_killed_containers_come_back(on_host: Callable[..., str], containers: Containers, wait_until_ready: Callable[[float], float]) -> None:
    wait_until_ready(60)
    durations = {}
    for name, item in sorted(containers().items()):
        # The process itself, because Docker takes `docker kill` for a wish and would not restart the container.
        on_host("kill", "-9", str(item["State"]["Pid"]))
        started = time.monotonic()
        while True:
            state = containers().get(name, {}).get("State", {})
            healthy = state.get("Health", {}).get("Status", "healthy") == "healthy"
            back = state.get("Running") and state["Pid"] != item["State"]["Pid"] and healthy
            if back:
                wait_until_ready(SECONDS)
                break
            assert time.monotonic() - started < SECONDS, f"{name} is not back after {SECONDS} s: {state}"
            time.sleep(0.5)
        durations[name] = round(time.monotonic() - started, 1)
        assert durations[name] < SECONDS, durations
    print(f"back after: {durations}")
    assert {f"agent-stack-vllm-{demo.active_slot()}-server-1", "agent-stack-postgres-postgres-1", "agent-stack-agent-agent-1"} <= set(durations)


def converse(on_host: Callable[..., str]) -> None:
    """Have a turn with the agent, asked as nginx asks."""
    secret = "$(cat /opt/agent-stack/agent/secrets/proxy_secret)"
    curl = f"curl --silent --show-error --fail --header 'X-Forwarded-User: drill' --header \"X-Proxy-Secret: {secret}\""
    answer = on_host("sh", "-c", f"""{curl} --json '{{"message": "Hello"}}' http://127.0.0.1:8080/chat""")
    assert json.loads(answer)["response"]


def test_restarted_host_brings_everything_back(on_host: Callable[..., str], containers: Containers, wait_until_ready: Callable[[float], float]) -> None:
    before = set(containers())
    converse(on_host)
    count = ("docker", "exec", "-i", "agent-stack-postgres-postgres-1", "psql", "--username=postgres", "--dbname=agent", "-At")
    rows = int(on_host(*count, stdin="SELECT count(*) FROM checkpoints"))
    assert rows > 0
    started = time.monotonic()
    test_host.run("docker", "restart", "--time", "180", demo.NAME)
    test_host.up(demo.NAME, demo.DOMAIN, [])
    wait_until_ready(180)
    print(f"ready {time.monotonic() - started:.0f} s after the restart was asked for, its shutdown included")
    deadline = time.monotonic() + 120
    while set(containers()) != before and time.monotonic() < deadline:
        time.sleep(1)
    assert set(containers()) == before
    for component in ("postgres", "redis", "vllm", f"vllm-{demo.active_slot()}", "agent", "monitoring"):
        unit = f"agent-stack@{component}.service"
        while on_host("systemctl", "is-active", unit, check=False) == "activating" and time.monotonic() < deadline:
            time.sleep(1)
        assert on_host("systemctl", "is-active", unit, check=False) == "active", on_host("systemctl", "status", "--no-pager", unit, check=False)
    assert int(on_host(*count, stdin="SELECT count(*) FROM checkpoints")) == rows


def starts(containers: Containers) -> dict[str, str]:
    return {name: item["State"]["StartedAt"] for name, item in containers().items()}


def test_systemd_stops_starts_and_restarts_the_whole(on_host: Callable[..., str], containers: Containers, wait_until_ready: Callable[[float], float]) -> None:
    """The same containers come back, so one model and not two; start and restart return when they are healthy, stop returns at once."""
    before = starts(containers)
    slot = demo.active_slot()
    on_host("systemctl", "stop", "agent-stack.target")
    deadline = time.monotonic() + 90
    while starts(containers) and time.monotonic() < deadline:
        time.sleep(1)
    assert starts(containers) == {}
    for order in ("start", "restart"):
        on_host("systemctl", order, "agent-stack.target")
        now = starts(containers)
        assert set(now) == set(before)
        assert not set(now.items()) & set(before.items())
        assert {item["State"]["Health"]["Status"] for item in containers().values()} == {"healthy"}
        wait_until_ready(10)
        before = now
    assert demo.active_slot() == slot


def test_systemd_reloads_one_component(on_host: Callable[..., str], containers: Containers, wait_until_ready: Callable[[float], float]) -> None:
    before = starts(containers)
    on_host("systemctl", "reload", "agent-stack@redis.service")
    now = starts(containers)
    assert set(now) == set(before)
    assert set(dict(set(now.items()) - set(before.items()))) == {"agent-stack-redis-redis-1"}
    wait_until_ready(30)

"""The bench against the real service, with little of everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

import load
from bench_agent import MODEL, OURS, Bench, Cell
from rows import copy_of, fill
from services import BENCH, servers, tree


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def alive(pid: int) -> bool:
    try:
        return state(pid) != "Z"
    except FileNotFoundError:
        return False


def test_frozen_lost_and_copied() -> None:
    with ExitStack() as stack:
        bench = Bench(0.2)
        bench.start(stack, [OURS])
        service = bench.services[0]
        family = tree(service.pid)
        assert len(family) >= 3, "a supervisor and two workers"
        servers.wait_until(lambda: {state(pid) for pid in family} == {"T"}, "a service that is not measured is stopped")

        bench.warm_up()
        bench.round(0, [Cell("chat", 0, 2)])
        assert bench.verify() == {OURS: len(bench.threads[OURS])}
        assert not bench.problems
        assert bench.rate(OURS, Cell("chat", 0, 2)) > 0
        assert bench.added(OURS, Cell("chat", 0, 2), "p50") > 0

        # Copies are turns like those that they were made from: they can be continued.
        threads, copies = fill(bench.postgres, "agent", 500)
        copied = {copy_of(thread, number) for thread in threads for number in range(copies)}
        assert copied <= bench._recorded("agent")
        assert bench.postgres.rows("agent", "SELECT count(*) FROM checkpoints WHERE thread_id = ANY(%s)", list(copied))[0][0] >= 500

        bench.verify()
        assert "recorded but not acknowledged" in bench.problems[0]
        bench.problems.clear()
        bench.threads[OURS] += copied
        lost = bench.threads[OURS][0]
        bench.postgres.rows("agent", "DELETE FROM checkpoints WHERE thread_id = %s", lost)
        bench.verify()
        assert f"{OURS}: 1 turns were acknowledged but not recorded" in bench.problems
    servers.wait_until(lambda: not any(alive(pid) for pid in family), "nothing is left running")


def test_extra_calls_of_the_model_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        bench = Bench(0.1)
        bench.start(stack, [])
        calls = iter((0, 7))
        monkeypatch.setattr(bench.model, "calls", lambda: next(calls))
        monkeypatch.setattr(load, "run", _no_turns)
        bench._measure(_Nobody(bench), Cell("chat", 0, 1))  # type: ignore[arg-type]
        assert "7 calls of the model for 3 turns" in bench.problems[0]


class _Nobody:
    name = "nobody"
    pid = os.getpid()

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def target(self, mode: str) -> load.Target:
        return load.Target(0, "/", "")


async def _no_turns(*_: object, **__: object) -> load.Sample:
    return load.Sample(1.0, answered=3, latencies=[0.1] * 3, first_tokens=[0.1] * 3)


@pytest.mark.parametrize(("p50", "rate", "within"), [(4.9, 200, True), (5.1, 200, False), (4.9, 199, False)])
def test_the_limits_are_judged(p50: float, rate: float, within: bool) -> None:
    bench = Bench(1)
    bench.services = [_Named(OURS), _Named("guide-sync")]  # type: ignore[list-item]
    for name, added, turns in ((MODEL, 1.0, 1000.0), (OURS, 1.0 + p50, rate), ("guide-sync", 10.0, 100.0)):
        for mode in ("chat", "stream"):
            for clients in (1, 64):
                figures = bench.figures[name, Cell(mode, 0, clients)]
                for values in (figures.p50, figures.p95, figures.first_token):
                    values.append(added)
                figures.rate.append(turns)
    summary = bench.summary()
    assert (summary["within_limits"], summary["added_p50_ms"]) == (within, p50)


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name


def test_the_last_line_is_what_was_promised() -> None:
    command = [sys.executable, str(BENCH / "bench_agent.py"), "--quick", "--seconds", "1", "--only", OURS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["added_p50_ms"] > 0
    assert result["turns_per_s_at_64"] > 0
    assert result["ratio_to_fastest_peer_at_64"] is None
    assert result["within_limits"] is None
    assert result["problems"] == 0
    assert "| the model alone |" in run.stdout

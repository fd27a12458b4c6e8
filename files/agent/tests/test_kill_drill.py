"""A small sample of the drill, whose full run is not for every day."""

import pytest

from drills.kill_drill import Drill

# Its servers are its own.
pytestmark = pytest.mark.server


def test_a_few_kills_lose_and_double_nothing() -> None:
    report = Drill(seed=7, clients=6).run(kills=5, postgres_kills=2, turns=20)
    assert {name: report[name] for name in ("lost", "doubled", "wedged", "broken")} == {
        "lost": 0,
        "doubled": 0,
        "wedged": 0,
        "broken": [],
    }
    assert report["acknowledged"] >= 20
    assert min(report[name] for name in ("approvals", "crons", "copies", "histories")) >= 1
    assert (report["worker_kills"], report["postgres_kills"]) == (5, 2)

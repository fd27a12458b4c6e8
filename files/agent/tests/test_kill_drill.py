"""A small sample of the drill, whose full run is not for every day."""

from drills.kill_drill import Drill


def test_a_few_kills_lose_and_double_nothing() -> None:
    report = Drill(seed=7, clients=6).run(kills=5, postgres_kills=2)
    assert {name: report[name] for name in ("lost", "doubled", "wedged", "broken")} == {
        "lost": 0,
        "doubled": 0,
        "wedged": 0,
        "broken": [],
    }
    assert report["acknowledged"] >= 20
    assert min(report[name] for name in ("approvals", "crons", "copies", "histories")) >= 1
    assert (report["worker_kills"], report["postgres_kills"]) == (5, 2)

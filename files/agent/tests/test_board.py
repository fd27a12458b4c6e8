"""The board that the parts of the engine share: what is kept, for whom, and who is woken."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import pytest

from agent.errors import StorageUnavailable
from agent.runs import board as boards
from agent.runs.board import ActiveRun, Board
from agent.runs.events import EventLog
from agent.runs.records import Run, RunOptions

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def run_of(owner: str = "user:ada", run_id: str = "run") -> Run:
    return Run(run_id, "thread", owner, None, "running", 1, 1, None, None, RunOptions(), None, None, NOW, NOW)


def on_board(test: Callable[[Board], Awaitable[None]]) -> None:
    async def run() -> None:
        await test(Board())

    asyncio.run(run())


@pytest.mark.parametrize(
    ("active", "kept", "owner", "found"),
    [
        (True, False, "user:ada", "active"),
        (False, True, "user:ada", "kept"),
        (True, True, "user:ada", "active"),
        (True, True, "user:bob", None),
        (False, False, "user:ada", None),
    ],
)
def test_events_are_there_for_the_owner_alone(active: bool, kept: bool, owner: str, found: str | None) -> None:
    async def test(board: Board) -> None:
        logs: dict[str | None, EventLog | None] = {None: None, "kept": EventLog(1)}
        if active:
            board.active["run"] = ActiveRun(run_of(), 0)
            logs["active"] = board.active["run"].log
        if kept:
            board.keep(run_of(), logs["kept"])
        assert board.log_of(owner, "run") is logs[found]

    on_board(test)


def test_what_is_forgotten_is_kept_no_longer() -> None:
    async def test(board: Board) -> None:
        board.keep(run_of(), EventLog(1))
        board.forget("run")
        board.forget("another one")
        assert board.log_of("user:ada", "run") is None

    on_board(test)


@pytest.mark.parametrize(
    ("limit", "size", "seconds", "left"),
    [
        (3, 1000, 60.0, ["2", "3", "4"]),
        (10, 1000, 60.0, ["0", "1", "2", "3", "4"]),
        (10, 1000, -1.0, []),
        (10, 25, 60.0, ["3", "4"]),  # each has 12 bytes
        (10, 11, 60.0, []),
    ],
)
def test_only_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch, limit: int, size: int, seconds: float, left: list[str]) -> None:
    monkeypatch.setattr(boards, "MAX_KEPT_LOGS", limit)
    monkeypatch.setattr(boards, "MAX_KEPT_BYTES", size)
    monkeypatch.setattr(boards, "KEEP_LOG_SECONDS", seconds)

    async def test(board: Board) -> None:
        for number in range(5):
            log = EventLog(1)
            log.publish("values", {"a": "1234"})
            log.publish("token", {"a": "1234"})
            assert log.size == 12
            board.keep(run_of(run_id=str(number)), log)
        assert [str(number) for number in range(5) if board.log_of("user:ada", str(number))] == left

    on_board(test)


def test_all_who_listen_to_a_run_are_woken_and_nobody_else() -> None:
    async def test(board: Board) -> None:
        with board.listening("run") as first, board.listening("run") as second, board.listening("other") as other:
            board.wake("run")
            board.wake("a run that nobody listens to")
            assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)
        with board.listening("run") as again:
            assert not again.is_set()

    on_board(test)


def test_the_first_reason_to_stop_counts() -> None:
    async def test(board: Board) -> None:
        active = ActiveRun(run_of(), 0)
        active.stop("interrupt")
        active.stop("lost")
        assert active.reason == "interrupt"

    on_board(test)


@pytest.mark.parametrize(("error", "logged"), [(None, []), (StorageUnavailable(), []), (ValueError("x"), ["a task failed"])])
def test_work_that_nobody_waits_for_is_remembered_and_its_failure_logged(caplog: pytest.LogCaptureFixture, error: Exception | None, logged: list[str]) -> None:
    async def work() -> None:
        if error is not None:
            raise error

    async def test(board: Board) -> None:
        board.spawn(work())
        assert len(board.tasks) == 1
        await asyncio.sleep(0.01)
        assert not board.tasks

    with caplog.at_level(logging.ERROR, "agent.runs.board"):
        on_board(test)
    assert [record.getMessage() for record in caplog.records] == logged

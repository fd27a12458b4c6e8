"""Keeping the threads going: a sign of life, the workers' channel, and the runs that a dead worker left behind."""

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable

from agent.errors import StorageUnavailable
from agent.metrics import Metrics
from agent.runs.board import ActiveRun, Board
from agent.runs.ledger import Channel, Ledger
from agent.runs.runner import GIVE_UP_SECONDS, Runner
from agent.storage.postgres import bounded

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.5
SCAN_SECONDS = 1.0
# A worker that does not beat for so long, and is not connected, is dead.
DEAF_SECONDS = 3.0
# One that is connected may be slow. By then it is dead all the same.
DEAD_SECONDS = 8.0
FORGET_SECONDS = 3600.0
MAX_RUNNING = 512  # of those that nobody here waits for


class Takeover:
    def __init__(
        self,
        board: Board,
        ledger: Ledger,
        runner: Runner,
        channel: Callable[[Callable[[str], None]], Channel],
        metrics: Metrics,
    ) -> None:
        self._board = board
        self._ledger = ledger
        self._runner = runner
        self._channel = channel(self._heard)
        self._metrics = metrics
        self._in_touch_since = -math.inf
        self._scan: asyncio.Task[None] | None = None
        self.tasks: list[asyncio.Task[None]] = []

    async def announce(self) -> None:
        """Before the first run: a worker that nobody has heard of is a dead one."""
        with contextlib.suppress(StorageUnavailable):
            await bounded(self._ledger.beat(FORGET_SECONDS), GIVE_UP_SECONDS)

    def start(self) -> None:
        self.tasks = [asyncio.create_task(work) for work in (self._channel.listen(), self._beat(), self._pick_up())]
        self._scan = self.tasks[-1]
        for task in self.tasks:
            task.add_done_callback(self._task_ended)

    def stop_scanning(self) -> None:
        """Take over nothing more. The signs of life go on."""
        if self._scan is not None:
            self._scan.cancel()

    async def _beat(self) -> None:
        while True:
            try:
                await self._ledger.beat(FORGET_SECONDS)
            except StorageUnavailable:
                self._in_touch_since = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)

    async def _pick_up(self) -> None:
        """Take over what dead workers left, and what no worker noticed."""
        while True:
            await asyncio.sleep(SCAN_SECONDS)
            for state, count in self._ledger.connections().items():
                self._metrics.connections.labels(state).set(count)
            with contextlib.suppress(StorageUnavailable):
                # A cancellation is told once on the channel, which may be broken at that moment.
                if mine := [run_id for run_id, active in self._board.active.items() if active.reason is None]:
                    for run_id in await self._ledger.to_stop(mine):
                        if (stopped := self._board.active.get(run_id)) is not None:
                            await self._obey(stopped)
                # After Postgres was away, the others must have had time to show that they live.
                others = time.monotonic() > self._in_touch_since + DEAD_SECONDS
                left = await self._ledger.claim_left(list(self._board.active), DEAF_SECONDS, DEAD_SECONDS, MAX_RUNNING, others=others)
                for run in left:
                    extra = {"run_id": run.run_id, "thread_id": run.thread_id, "attempt": run.attempt}
                    logger.info("a run is taken over", extra=extra)
                    self._metrics.runs_taken_over.inc()
                    self._runner.start(run)
                    self._board.wake(run.run_id)
                if len(self._board.active) < MAX_RUNNING:
                    for thread_id in await self._ledger.free_threads(MAX_RUNNING - len(self._board.active)):
                        await self._runner.claim(thread_id)
                for status, count in (await self._ledger.counts()).items():
                    self._metrics.runs.labels(status).set(count)

    def _heard(self, message: str) -> None:
        what, _, run_id = message.partition(" ")
        if what == "done":
            self._board.wake(run_id)
        elif what == "cancel" and (active := self._board.active.get(run_id)) is not None:
            self._board.spawn(self._obey(active))

    async def _obey(self, active: ActiveRun) -> None:
        run = await self._ledger.find(active.run.run_id)
        if run is None:
            active.stop("lost")
        elif run.cancel is not None and not run.final:
            active.stop(run.cancel)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """None of them ends by itself, and without any of them a worker fails those who count on it."""
        if self._board.closing or task.cancelled():
            return
        logger.critical("the worker ends: a part of it failed", exc_info=task.exception())
        signal.raise_signal(signal.SIGTERM)  # in order, and another one takes its place

"""The board of a worker: the runs that it works on, the ended ones that it keeps, and who waits for news of a run."""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from agent.errors import StorageUnavailable
from agent.runs.events import EventLog
from agent.runs.records import Outcome, Run

logger = logging.getLogger(__name__)

KEEP_LOG_SECONDS = 60.0
MAX_KEPT_LOGS = 500
MAX_KEPT_BYTES = 32 << 20

Reason = Literal["interrupt", "rollback", "stop", "lost"]


class ActiveRun:
    """A run that this worker works on."""

    def __init__(self, run: Run, deadline: float) -> None:
        self.run = run
        self.log = EventLog(run.attempt)
        self.deadline = deadline
        self.started = time.monotonic()
        self.work: asyncio.Task[Outcome] | None = None
        self.driver: asyncio.Task[None] | None = None
        self.reason: Reason | None = None
        self.done: asyncio.Future[Run | None] = asyncio.get_running_loop().create_future()

    def stop(self, reason: Reason) -> None:
        if self.reason is None:
            self.reason = reason
            if self.work is not None:
                self.work.cancel()


@dataclass(slots=True)
class KeptRun:
    """A run that ended here, and what it published."""

    run: Run
    log: EventLog
    until: float


class Board:
    """What the parts of the engine share. Nothing of it outlives the process."""

    def __init__(self) -> None:
        self.active: dict[str, ActiveRun] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        # Runs whose client gave up waiting and will most likely send its request again.
        self.expected: set[str] = set()
        # The worker stops: it takes no run any more, and who waits is told so.
        self.closing = False
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._kept: OrderedDict[str, KeptRun] = OrderedDict()
        self._kept_bytes = 0

    def keep(self, run: Run, log: EventLog) -> None:
        now = time.monotonic()
        self.forget(run.run_id)
        self._kept[run.run_id] = KeptRun(run, log, now + KEEP_LOG_SECONDS)
        self._kept_bytes += log.size
        while self._kept and (len(self._kept) > MAX_KEPT_LOGS or self._kept_bytes > MAX_KEPT_BYTES or next(iter(self._kept.values())).until < now):
            self.forget(next(iter(self._kept)))

    def forget(self, run_id: str) -> None:
        """Keep its events no longer."""
        if (kept := self._kept.pop(run_id, None)) is not None:
            self._kept_bytes -= kept.log.size

    def log_of(self, owner: str, run_id: str) -> EventLog | None:
        """What the run published here, if it did and is the owner's."""
        for here in (self.active.get(run_id), self._kept.get(run_id)):
            if here is not None and here.run.owner == owner:
                return here.log
        return None

    @contextlib.contextmanager
    def listening(self, run_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the run comes to run here, and for those who watch it when it has ended."""
        news = asyncio.Event()
        self._waiting.setdefault(run_id, set()).add(news)
        try:
            yield news
        finally:
            self._waiting[run_id].discard(news)
            if not self._waiting[run_id]:
                del self._waiting[run_id]

    def wake(self, run_id: str) -> None:
        """There is news of the run."""
        for news in self._waiting.get(run_id, ()):
            news.set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Work that nobody waits for. The engine does, for a moment, when it closes."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, StorageUnavailable):
                return  # logged where it happened; the scan makes up for it
            logger.error("a task failed", exc_info=error)

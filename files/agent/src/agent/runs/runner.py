"""Working on runs: each is one attempt, from its start to the statement that records its end."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
from langchain_core.runnables import RunnableConfig

from agent.errors import MIB, Cancelled, ServiceError, StorageUnavailable, ThreadTooLarge, TurnTimeout
from agent.llm.graph import Agent
from agent.metrics import Metrics
from agent.runs.attempt import Attempt
from agent.runs.board import ActiveRun, Board
from agent.runs.checkpoints import RunSaver, ThreadSaver
from agent.runs.events import BroadcastLog, EventLog, EventStreams
from agent.runs.ledger import Ledger
from agent.runs.records import Batch, Finished, Outcome, Run, RunLost, describe_failure, last_words
from agent.settings import Settings
from agent.tracing import Tracing

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
# How long a driver may take to give up a dead connection, before its run is left to itself.
GIVE_UP_SECONDS = 1.0
# The longest that OpenAI's clients wait before they send a request again, and the way here.
RETRY_SECONDS = 10.0
CLAIM_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)


class Runner:
    def __init__(
        self,
        settings: Settings,
        graph: Agent,
        saver: ThreadSaver,
        board: Board,
        ledger: Ledger,
        streams: EventStreams,
        tools: Callable[[], Sequence[str]],
        metrics: Metrics,
        tracing: Tracing,
        finished: Finished | None,
    ) -> None:
        self._settings = settings
        self._graph = graph
        self._saver = saver
        self._board = board
        self._ledger = ledger
        self._streams = streams
        self._tools = tools
        self._metrics = metrics
        self._tracing = tracing
        self._finished = finished

    def start(self, run: Run) -> None:
        """Work on a run that is this worker's."""
        timeout = self._settings.turn_timeout_seconds
        if run.options.waited and run.attempt == run.first_attempt:
            timeout -= max(0.0, (datetime.now(UTC) - run.created_at).total_seconds())
        active = ActiveRun(run, asyncio.get_running_loop().time() + timeout)
        self._board.active[run.run_id] = active
        self._metrics.turns_running.inc()
        active.driver = asyncio.create_task(self._drive(active))

    async def claim(self, thread_id: str) -> Run | None:
        """Take the next run of a free thread."""
        if self._board.closing:
            return None
        with contextlib.suppress(StorageUnavailable):
            run = await self._ledger.claim_pending(thread_id)
            if run is not None:
                self.start(run)
                self._board.wake(run.run_id)
            return run
        return None

    async def claim_soon(self, run: Run) -> None:
        """The thread may have become free while the run was recorded as waiting for it."""
        await self.claim(run.thread_id)
        for wait in CLAIM_SECONDS:
            if run.run_id in self._board.active or self._board.closing:
                return
            await asyncio.sleep(wait)
            await self.claim(run.thread_id)

    def saver(self, run: Run) -> RunSaver:
        """The checkpointer of an attempt. Raises RunLost when it stores for a run that is no longer this worker's."""

        async def save(batch: Batch) -> None:
            with self._metrics.save_seconds.time():
                await self._ledger.save(run, batch)

        limit = self._settings.thread_mib * MIB
        return RunSaver(self._saver, run.run_id, run.options.metadata, save, history=run.options.history, limit=limit)

    async def _drive(self, active: ActiveRun) -> None:
        run = active.run
        final: Run | None = None
        try:
            final = await self._attempt(active)
        except RunLost:
            logger.warning("a run was taken over", extra={"run_id": run.run_id, "thread_id": run.thread_id})
            self._board.spawn(self._forget(run))
        except Exception:
            logger.exception("a run was left", extra={"run_id": run.run_id, "thread_id": run.thread_id})
        finally:
            if self._board.active.get(run.run_id) is active:
                del self._board.active[run.run_id]
            self._metrics.turns_running.dec()
            active.log.close()
            if not active.done.done():
                active.done.set_result(final)
            if final is not None and run.options.stream:
                self._board.keep(final, active.log)

    async def _attempt(self, active: ActiveRun) -> Run | None:
        run = active.run
        if run.options.stream:
            self._publish(active, "metadata", {"run_id": run.run_id, "thread_id": run.thread_id, "attempt": run.attempt})
        saver = self.saver(run)
        attempt = Attempt(run, self._graph, saver, self._config(active), frozenset(self._tools()), self._log(active), self._metrics)
        outcome, error = await self._work(active, attempt)
        if active.reason == "stop" and error is not None:
            await self._ledger.hand_back(run)
            return None
        if active.reason == "rollback" and error is not None:
            await self._ledger.roll_back(run)
            outcome = Outcome("interrupted", "idle", error=describe_failure(Cancelled()))
            more = True
        else:
            outcome, more = await self._store(run, saver, outcome)
        run.status, run.result, run.error = outcome.status, outcome.result, outcome.error
        self._note(active, outcome)
        spent = attempt.spent(self._settings.context_tokens)
        if run.options.stream:
            for event, data in last_words(run):
                self._publish(active, event, data)
        if run.options.on_completion == "delete":
            self._board.spawn(self._delete_thread(run))
        if self._finished is not None:
            self._board.spawn(self._finished(run.owner, run.run_id, spent))
        if more and not self._board.closing:
            self._board.spawn(self.claim(run.thread_id))
        return run

    async def _forget(self, run: Run) -> None:
        """Whoever took a run over tells the limits of its end. One that was deleted has nobody else."""
        if self._finished is not None and await self._ledger.find(run.run_id) is None:
            await self._finished(run.owner, run.run_id, 0)

    def _config(self, active: ActiveRun) -> RunnableConfig:
        run = active.run
        configurable: dict[str, Any] = {
            "thread_id": run.thread_id,
            "owner": run.owner,
            "run_id": run.run_id,
            "deadline": active.deadline,
            "model": run.options.model,
            "system_prompt": run.options.system_prompt,
            "tools": run.options.tools,
        }
        if run.options.checkpoint_id:
            configurable |= {"checkpoint_id": run.options.checkpoint_id, "checkpoint_ns": ""}
        limit = run.options.recursion_limit or self._settings.recursion_limit
        return {
            "configurable": configurable,
            "recursion_limit": min(limit, self._settings.recursion_limit),
            "metadata": {"run_id": run.run_id, **run.options.metadata},
        }

    async def _work(self, active: ActiveRun, attempt: Attempt) -> tuple[Outcome, BaseException | None]:
        """Do the turn within its time, and put whatever comes of it into an outcome."""
        run = active.run
        try:
            if run.cancel is not None:
                active.stop(run.cancel)
            if active.reason is not None:
                raise asyncio.CancelledError
            if run.options.kind == "update":
                # Its client is gone, and it changed nothing.
                return Outcome("error", None, error=describe_failure(ServiceError())), None
            if run.attempt - run.first_attempt >= MAX_ATTEMPTS:
                raise ServiceError
            active.work = asyncio.create_task(self._traced(attempt, run))
            left = active.deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait({active.work}, timeout=max(0.0, left))
            if not done:
                active.work.cancel()
                await asyncio.wait({active.work}, timeout=GIVE_UP_SECONDS)
                raise TurnTimeout
            return active.work.result(), None
        except asyncio.CancelledError as error:
            if active.reason is None:
                raise
            kept = active.reason == "interrupt" and await self._keep_written(attempt, run)
            return Outcome("interrupted", "idle" if kept else "interrupted", error=describe_failure(Cancelled())), error
        except RunLost:
            raise
        except TurnTimeout as error:
            return Outcome("timeout", "error", error=describe_failure(error)), error
        except ServiceError as error:
            return Outcome("error", "error", error=describe_failure(error)), error
        except Exception as error:
            logger.exception("internal error", extra={"run_id": run.run_id, "thread_id": run.thread_id})
            return Outcome("error", "error", error=describe_failure(ServiceError())), error

    async def _keep_written(self, attempt: Attempt, run: Run) -> bool:
        """Stopping must not fail of it: where the text cannot be kept, only the question is."""
        try:
            async with asyncio.timeout(GIVE_UP_SECONDS):
                return await attempt.keep_written()
        except RunLost:
            raise
        except Exception:
            logger.exception("a stopped answer was not kept", extra={"run_id": run.run_id, "thread_id": run.thread_id})
            return False

    async def _traced(self, attempt: Attempt, run: Run) -> Outcome:
        with self._tracing.span("run", {"run_id": run.run_id, "thread_id": run.thread_id, "attempt": run.attempt}):
            return await attempt.work()

    async def _store(self, run: Run, saver: RunSaver, outcome: Outcome) -> tuple[Outcome, bool]:
        """Record the end, however long Postgres takes to come back: how it ended, and whether another run waits."""
        try:
            batch = saver.batch(final=True)
        except ThreadTooLarge as error:
            outcome, batch = Outcome("error", "error", error=describe_failure(error)), Batch()
        except (TypeError, ValueError):  # half a surrogate pair, for one
            outcome, batch = self._without(run, outcome), Batch()
        wait = 0.1
        while True:
            try:
                with self._metrics.save_seconds.time():
                    return outcome, await self._ledger.finish(run, batch, outcome, saver.saved)
            except StorageUnavailable as error:
                if self._board.closing:
                    raise  # the next start finds the run unfinished and works on it again
                if _is_permanent(error) and batch != Batch():
                    # Postgres takes none of it, today or tomorrow, and the thread must not wait for ever.
                    outcome, batch = self._without(run, outcome), Batch()
                    continue
                await asyncio.sleep(wait)
                wait = min(wait * 2, 2.0)

    def _without(self, run: Run, outcome: Outcome) -> Outcome:
        """The outcome of a run whose messages cannot be stored."""
        logger.error("an answer cannot be stored", extra={"run_id": run.run_id})
        if outcome.status != "success":
            return outcome
        return Outcome("error", "error", error=describe_failure(ServiceError()))

    def _note(self, active: ActiveRun, outcome: Outcome) -> None:
        code = "ok" if outcome.status == "success" else str((outcome.error or {}).get("code"))
        self._metrics.turns.labels(code).inc()
        self._metrics.turn_seconds.observe(time.monotonic() - active.started)
        if outcome.status != "success":
            run = active.run
            extra = {"run_id": run.run_id, "thread_id": run.thread_id, "status": outcome.status, "code": code}
            logger.info("a run has no answer", extra=extra)

    async def _delete_thread(self, run: Run) -> None:
        if run.run_id in self._board.expected:
            await asyncio.sleep(RETRY_SECONDS)
            self._board.expected.discard(run.run_id)
        with contextlib.suppress(StorageUnavailable):
            await self._ledger.delete_thread(run.owner, run.thread_id)

    def _log(self, active: ActiveRun) -> EventLog:
        if not active.run.options.resumable:
            return active.log
        return BroadcastLog(active.log, self._streams, active.run.run_id)

    def _publish(self, active: ActiveRun, event: str, data: Any) -> None:
        self._log(active).publish(event, data)


def _is_permanent(error: StorageUnavailable) -> bool:
    """Whether Postgres is there and refused what it was given."""
    cause = error.__cause__
    return isinstance(cause, psycopg.DatabaseError) and not isinstance(cause, psycopg.OperationalError)

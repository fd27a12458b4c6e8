"""Runs: accepted is recorded, one runner a thread, and whoever waits for one may go away and come back.

A run belongs to the worker that its row names. Nothing of a run is stored but by the statement that checks this, so a
worker that was taken for dead, and is not, can do no harm: it learns at its next statement that the run is not its own.
"""

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypedDict
from uuid import UUID, uuid4

import orjson
import psycopg
from langchain_core.runnables import RunnableConfig
from redis.exceptions import RedisError

from agent.errors import (
    Cancelled,
    InvalidRequest,
    NotFound,
    ServiceError,
    ShuttingDown,
    StorageUnavailable,
    ThreadBusy,
    TurnConflict,
    TurnTimeout,
)
from agent.llm.graph import Agent
from agent.metrics import Metrics
from agent.runs._langgraph import CHECKPOINTER, without_internal
from agent.runs.attempt import Attempt
from agent.runs.checkpoints import RunSaver, TurnSaver
from agent.runs.events import ATTEMPT, Event, EventLog, EventStreams
from agent.runs.ledger import (
    FINAL,
    Batch,
    Channel,
    Finished,
    Ledger,
    Outcome,
    Run,
    RunLost,
    RunOptions,
    RunStatus,
    Strategy,
    bounded,
)
from agent.settings import Settings
from agent.tracing import Tracing

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.5
SCAN_SECONDS = 1.0
# A worker that does not beat for so long, and is not connected, is dead.
DEAF_SECONDS = 3.0
# One that is connected may be slow. By then it is dead all the same.
DEAD_SECONDS = 8.0
FORGET_SECONDS = 3600.0
MAX_ATTEMPTS = 3
MAX_RUNNING = 512  # of those that nobody here waits for
STOP_SECONDS = 5.0
# How long a driver may take to give up a dead connection, before its run is left to itself.
GIVE_UP_SECONDS = 1.0
POLL_SECONDS = 1.0
CLAIM_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
KEEP_LOG_SECONDS = 60.0
MAX_KEPT_LOGS = 500


class Messages(TypedDict):
    """One or more new messages, as LangChain or OpenAI write them. The first gets the run's id unless it has one."""

    messages: list[Any]


class Resume(TypedDict):
    """The answer to the interrupt that the thread waits at."""

    resume: Any


# None goes on from the checkpoint as it is.
RunInput = Messages | Resume | None
Reason = Literal["interrupt", "rollback", "stop", "lost"]


def new_run_id() -> str:
    """A UUID that begins with the time, as version 7 does: runs of one hour stand together in the index."""
    milliseconds = time.time_ns() // 1_000_000
    random = uuid4().int & ((1 << 74) - 1)
    return str(UUID(int=milliseconds << 80 | 0x7 << 76 | (random >> 62) << 64 | 0b10 << 62 | random & ((1 << 62) - 1)))


class Active:
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
class _Kept:
    run: Run
    log: EventLog
    until: float


class Engine:
    def __init__(
        self,
        settings: Settings,
        graph: Agent,
        saver: TurnSaver,
        ledger: Ledger,
        streams: EventStreams,
        channel: Callable[[Callable[[str], None]], Channel],
        tools: Callable[[], Sequence[str]],
        metrics: Metrics,
        tracing: Tracing,
        finished: Finished | None = None,
    ) -> None:
        self._settings = settings
        self._graph = graph
        self._saver = saver
        self._ledger = ledger
        self._streams = streams
        self._channel = channel(self._heard)
        self._tools = tools
        self._metrics = metrics
        self._tracing = tracing
        self._finished = finished
        self._active: dict[str, Active] = {}
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._services: list[asyncio.Task[None]] = []
        self._closing = False
        self._in_touch_since = -math.inf

    @property
    def worker(self) -> str:
        return self._ledger.worker

    async def start(self) -> None:
        with contextlib.suppress(StorageUnavailable):
            # Before the first run: a worker that nobody has heard of is a dead one.
            await bounded(self._ledger.beat(FORGET_SECONDS), GIVE_UP_SECONDS)
        self._streams.start()
        self._services = [
            asyncio.create_task(service) for service in (self._channel.listen(), self._beat(), self._pick_up())
        ]
        for service in self._services:
            service.add_done_callback(self._service_ended)

    async def close(self) -> None:
        """Give running runs a moment, then hand them back: another worker, or the next start, goes on with them."""
        self._closing = True
        for service in self._services[2:]:
            service.cancel()
        drivers = [active.driver for active in self._active.values() if active.driver is not None]
        if drivers:
            await asyncio.wait(drivers, timeout=STOP_SECONDS)
        for active in list(self._active.values()):
            active.stop("stop")
        drivers = [driver for driver in drivers if not driver.done()]
        if drivers:
            await asyncio.wait(drivers, timeout=STOP_SECONDS)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GIVE_UP_SECONDS)
        for task in (*self._services, *self._tasks, *drivers):
            task.cancel()
        await asyncio.gather(*self._services, *self._tasks, *drivers, return_exceptions=True)
        with contextlib.suppress(StorageUnavailable, TimeoutError):
            async with asyncio.timeout(GIVE_UP_SECONDS):
                await self._ledger.leave()
        await self._streams.close()

    # Accepting

    async def submit(
        self,
        owner: str,
        thread_id: str | None,
        run_input: RunInput,
        options: RunOptions | None = None,
        *,
        run_id: str | None = None,
        turn_id: str | None = None,
        strategy: Strategy = "enqueue",
        create_thread: bool = True,
        thread_metadata: dict[str, Any] | None = None,
    ) -> Run:
        """Record a run and start it as soon as its thread is free. It is recorded when this returns.

        The same owner and turn id again give the run that exists already; one that failed here, and not by its own
        fault, is tried again. Raises NotFound (a foreign thread, or none and not create_thread), ThreadBusy
        ("reject"), TurnConflict (the turn id was used for something else), StorageUnavailable, ShuttingDown.
        """
        if self._closing:
            raise ShuttingDown
        options = options or RunOptions()
        if options.strategy != strategy:
            options = replace(options, strategy=strategy)
        now = datetime.now(UTC)
        run = Run(
            run_id=run_id or new_run_id(),
            thread_id=thread_id or str(uuid4()),
            owner=owner,
            turn_id=turn_id,
            status="pending",
            attempt=1,
            first_attempt=1,
            cancel=None,
            input=run_input,
            options=options,
            result=None,
            error=None,
            created_at=now,
            updated_at=now,
        )
        metadata = orjson.dumps(thread_metadata or {}).decode()
        reject = strategy == "reject"
        for _ in range(5):
            if await self._ledger.insert(run, metadata, create_thread=create_thread, reject=reject):
                return await self._accepted(run)
            if (known := await self._known(run, given_thread=thread_id)) is not None:
                return known
            thread_owner = await self._ledger.thread_owner(run.thread_id)
            if thread_owner not in (None, owner) or (thread_owner is None and not create_thread):
                raise NotFound
            if reject and await self._ledger.list(run.thread_id, ("pending", "running"), 1, 0):
                raise ThreadBusy
            # The thread came, went or became busy between the parts of the statement.
        raise ThreadBusy

    async def _accepted(self, run: Run) -> Run:
        if run.status == "running":
            self._start_run(run)
            return run
        if run.options.strategy in ("interrupt", "rollback"):
            for other in await self._ledger.others_on(run):
                await self._cancel(other, "rollback" if run.options.strategy == "rollback" else "interrupt")
        self._spawn(self._claim_soon(run))
        return run

    async def _known(self, run: Run, given_thread: str | None) -> Run | None:
        """The run that this one repeats."""
        same = await self._ledger.find(run.run_id)
        if same is not None and same.owner == run.owner and same.input == run.input:
            # Recorded by a statement whose answer got lost.
            if same.status == "running" and same.run_id not in self._active:
                self._start_run(same)
            return same
        if run.turn_id is None:
            return None
        known = await self._ledger.find_turn(run.owner, run.turn_id)
        if known is None:
            return None
        if known.input != run.input or (given_thread and given_thread != known.thread_id):
            raise TurnConflict
        known.created = False
        if known.status not in ("error", "timeout") or (known.error or {}).get("status", 500) < 500:
            return known
        reopened = await self._ledger.reopen(known)
        if reopened is None:  # somebody else was faster
            return await self._ledger.find(known.run_id)
        self._kept.pop(reopened.run_id, None)
        reopened.created = False
        self._spawn(self._claim_soon(reopened))
        return reopened

    # Working

    def _start_run(self, run: Run) -> None:
        timeout = self._settings.turn_timeout_seconds
        if run.options.waited and run.attempt == run.first_attempt:
            timeout -= max(0.0, (datetime.now(UTC) - run.created_at).total_seconds())
        active = Active(run, asyncio.get_running_loop().time() + timeout)
        self._active[run.run_id] = active
        self._metrics.turns_running.inc()
        active.driver = asyncio.create_task(self._drive(active))

    async def _drive(self, active: Active) -> None:
        run = active.run
        final: Run | None = None
        try:
            final = await self._attempt(active)
        except RunLost:
            logger.warning("a run was taken over", extra={"run_id": run.run_id, "thread_id": run.thread_id})
            self._spawn(self._forget(run))
        except Exception:
            logger.exception("a run was left", extra={"run_id": run.run_id, "thread_id": run.thread_id})
        finally:
            if self._active.get(run.run_id) is active:
                del self._active[run.run_id]
            self._metrics.turns_running.dec()
            active.log.close()
            if not active.done.done():
                active.done.set_result(final)
            if final is not None and run.options.stream:
                self._keep(final, active.log)

    async def _attempt(self, active: Active) -> Run | None:
        run = active.run
        if run.options.stream:
            self._tell(active, "metadata", {"run_id": run.run_id, "thread_id": run.thread_id, "attempt": run.attempt})
        saver = RunSaver(self._saver, run.run_id, run.options.metadata, self._saving(run), history=run.options.history)
        attempt = Attempt(
            run, self._graph, saver, self._config(active), frozenset(self._tools()), self._log(active), self._metrics
        )
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
            self._tell_end(active)
        if run.options.on_completion == "delete":
            self._spawn(self._delete_thread(run))
        if self._finished is not None:
            self._spawn(self._finished(run.owner, run.run_id, spent))
        if more and not self._closing:
            self._spawn(self._claim(run.thread_id))
        return run

    async def _forget(self, run: Run) -> None:
        """Whoever took a run over tells the limits of its end. One that was deleted has nobody else."""
        if self._finished is not None and await self._ledger.find(run.run_id) is None:
            await self._finished(run.owner, run.run_id, 0)

    def _config(self, active: Active) -> RunnableConfig:
        run = active.run
        configurable: dict[str, Any] = {
            "thread_id": run.thread_id,
            "owner": run.owner,
            "run_id": run.run_id,
            "deadline": active.deadline,
            "model": run.options.model,
        }
        if run.options.checkpoint_id:
            configurable |= {"checkpoint_id": run.options.checkpoint_id, "checkpoint_ns": ""}
        limit = run.options.recursion_limit or self._settings.recursion_limit
        return {
            "configurable": configurable,
            "recursion_limit": min(limit, self._settings.recursion_limit),
            "metadata": {"run_id": run.run_id, **run.options.metadata},
        }

    def _saving(self, run: Run) -> Callable[[Batch], Awaitable[None]]:
        async def save(batch: Batch) -> None:
            with self._metrics.save_seconds.time():
                await self._ledger.save(run, batch)

        return save

    async def _work(self, active: Active, attempt: Attempt) -> tuple[Outcome, BaseException | None]:
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
            return Outcome("interrupted", "interrupted", error=describe_failure(Cancelled())), error
        except RunLost:
            raise
        except TurnTimeout as error:
            return Outcome("timeout", "error", error=describe_failure(error)), error
        except ServiceError as error:
            return Outcome("error", "error", error=describe_failure(error)), error
        except Exception as error:
            logger.exception("internal error", extra={"run_id": run.run_id, "thread_id": run.thread_id})
            return Outcome("error", "error", error=describe_failure(ServiceError())), error

    async def _traced(self, attempt: Attempt, run: Run) -> Outcome:
        with self._tracing.span("run", {"run_id": run.run_id, "thread_id": run.thread_id, "attempt": run.attempt}):
            return await attempt.work()

    async def _store(self, run: Run, saver: RunSaver, outcome: Outcome) -> tuple[Outcome, bool]:
        """Record the end, however long Postgres takes to come back: how it ended, and whether another run waits."""
        try:
            batch = saver.batch(final=True)
        except (TypeError, ValueError):  # half a surrogate pair, for one
            outcome, batch = self._without(run, outcome), Batch()
        wait = 0.1
        while True:
            try:
                with self._metrics.save_seconds.time():
                    return outcome, await self._ledger.finish(run, batch, outcome)
            except StorageUnavailable as error:
                if self._closing:
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

    def _note(self, active: Active, outcome: Outcome) -> None:
        code = "ok" if outcome.status == "success" else str((outcome.error or {}).get("code"))
        self._metrics.turns.labels(code).inc()
        self._metrics.turn_seconds.observe(time.monotonic() - active.started)
        if outcome.status != "success":
            run = active.run
            extra = {"run_id": run.run_id, "thread_id": run.thread_id, "status": outcome.status, "code": code}
            logger.info("a run has no answer", extra=extra)

    async def _delete_thread(self, run: Run) -> None:
        with contextlib.suppress(StorageUnavailable):
            await self._ledger.delete_thread(run.owner, run.thread_id)

    # Telling

    def _log(self, active: Active) -> EventLog:
        if not active.run.options.resumable:
            return active.log
        return _Teller(active.log, lambda event: self._streams.put(active.run.run_id, event))

    def _tell(self, active: Active, event: str, data: Any) -> None:
        self._log(active).add(event, data)

    def _tell_end(self, active: Active) -> None:
        for event, data in _last_words(active.run):
            self._tell(active, event, data)

    def _keep(self, run: Run, log: EventLog) -> None:
        now = time.monotonic()
        self._kept[run.run_id] = _Kept(run, log, now + KEEP_LOG_SECONDS)
        while self._kept and (len(self._kept) > MAX_KEPT_LOGS or next(iter(self._kept.values())).until < now):
            self._kept.popitem(last=False)

    async def events(self, owner: str, run_id: str, after: int = 0) -> AsyncGenerator[Event]:
        """What the run told after this event, and then what it tells; ends with the run. Raises NotFound."""
        run: Run | None = None
        with self._listening(run_id) as told:
            while True:
                told.clear()
                if (log := self._log_of(owner, run_id)) is not None and log.reaches(after):
                    async for event in log.follow(after):
                        after = event.id
                        yield event
                        if event.event == "end":
                            return
                if self._closing:
                    return
                # It waits for its thread; or it runs, or ran, in another worker; or it goes on there.
                try:
                    run = await self.get(owner, run_id)
                except (NotFound, StorageUnavailable) as error:
                    if run is None:
                        raise
                    if isinstance(error, NotFound):
                        break
                waits = run.status == "pending"
                if not (waits or run.options.resumable):
                    break
                try:
                    while events := await self._read_streams(run_id, after, told):
                        for event in events:
                            if event.id not in (after + 1, event.id // ATTEMPT * ATTEMPT + 1):
                                raise _Gap
                            after = event.id
                            yield event
                            if event.event == "end":
                                return
                except _Gap:
                    break  # what is missing cannot be told any more, but the end can
                except (RedisError, OSError):
                    if not waits:
                        break
                    # Nothing is missed before it runs, and it may come to run here.
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(told.wait(), POLL_SECONDS)
                else:
                    if run.final:
                        break
        run = await self._end_of(owner, run)
        for number, (name, data) in enumerate(_last_words(run), after + 1):
            yield Event(number, name, data)

    def _log_of(self, owner: str, run_id: str) -> EventLog | None:
        for here in (self._active.get(run_id), self._kept.get(run_id)):
            if here is not None and here.run.owner == owner:
                return here.log
        return None

    async def _read_streams(self, run_id: str, after: int, told: asyncio.Event) -> list[Event]:
        """What other workers told; nothing after a second of silence, or when there is news of the run."""
        read, news = asyncio.create_task(self._streams.read(run_id, after)), asyncio.create_task(told.wait())
        try:
            await asyncio.wait({read, news}, return_when=asyncio.FIRST_COMPLETED)
            return read.result() if read.done() else []
        finally:
            read.cancel()
            news.cancel()
            await asyncio.gather(read, news, return_exceptions=True)

    async def _end_of(self, owner: str, run: Run) -> Run:
        try:
            return run if run.final else await self.wait(owner, run.run_id)
        except NotFound:
            # Rolled back, or deleted with its thread.
            return replace(run, status="interrupted", result=None, error=describe_failure(Cancelled()))

    # Waiting

    async def wait(self, owner: str, run_id: str, seconds: float | None = None) -> Run:
        """The run once it is final, whichever worker runs it. Raises TurnTimeout after so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                return await self._wait(owner, run_id)
        except TimeoutError:
            raise TurnTimeout from None

    async def _wait(self, owner: str, run_id: str) -> Run:
        active = self._active.get(run_id)
        if active is not None and active.run.owner == owner:
            done = await asyncio.shield(active.done)
            if done is not None:
                return done
        with self._listening(run_id) as told:
            run = await self._ledger.watch(run_id)
            while True:
                if run is None or run.owner != owner:
                    raise NotFound
                if run.final:
                    return run
                if self._closing:
                    raise ShuttingDown
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        if (active := self._active.get(run_id)) is not None:
                            done = await asyncio.shield(active.done)
                            if done is not None:
                                return done
                        await told.wait()
                with contextlib.suppress(StorageUnavailable):
                    run = await self._ledger.find(run_id)

    @contextlib.contextmanager
    def _listening(self, run_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the run comes to run here, and for those who watch it when it has ended."""
        told = asyncio.Event()
        self._waiting.setdefault(run_id, set()).add(told)
        try:
            yield told
        finally:
            self._waiting[run_id].discard(told)
            if not self._waiting[run_id]:
                del self._waiting[run_id]

    # Asking

    async def get(self, owner: str, run_id: str) -> Run:
        """Raises NotFound."""
        active = self._active.get(run_id)
        run = active.run if active is not None else await self._ledger.find(run_id)
        if run is None or run.owner != owner:
            raise NotFound
        return run

    async def list(
        self, owner: str, thread_id: str, limit: int = 10, offset: int = 0, status: str | None = None
    ) -> list[Run]:
        """Newest first. Raises NotFound for a foreign thread."""
        await self._check_owner(owner, thread_id)
        return await self._ledger.list(thread_id, (status,) if status else None, limit, offset)

    async def active(self, owner: str, thread_id: str) -> Sequence[Run]:
        """The running run and those that wait behind it, oldest first."""
        await self._check_owner(owner, thread_id)
        return await self._ledger.list(thread_id, ("running", "pending"), 1000, 0, oldest_first=True)

    async def delete(self, owner: str, run_id: str) -> None:
        """Forget a final run (not what it said). Raises ThreadBusy while it is not final."""
        await self.get(owner, run_id)
        if not await self._ledger.delete(run_id):
            raise ThreadBusy
        self._kept.pop(run_id, None)

    async def _check_owner(self, owner: str, thread_id: str) -> None:
        if await self._ledger.thread_owner(thread_id) != owner:
            raise NotFound

    # Stopping

    async def cancel(self, owner: str, run_id: str, *, wait: bool = False, rollback: bool = False) -> None:
        """Stop a run in whichever worker it is. With rollback its checkpoints and the run itself go as well."""
        run = await self.get(owner, run_id)
        await self._cancel(run_id, "rollback" if rollback else "interrupt")
        if wait:
            with contextlib.suppress(NotFound):
                await self.wait(owner, run.run_id)

    async def _cancel(self, run_id: str, action: Literal["interrupt", "rollback"]) -> None:
        asked = await self._ledger.cancel(run_id, action)
        if asked is None:
            return
        was, owner = asked
        if was == "pending":
            if action == "rollback":
                await self._ledger.delete(run_id)
            if self._finished is not None:
                await self._finished(owner, run_id, 0)
        elif (active := self._active.get(run_id)) is not None:
            active.stop(action)

    async def update_state(
        self,
        owner: str,
        thread_id: str,
        values: Any,
        as_node: str | None = None,
        checkpoint_id: str | None = None,
    ) -> dict[str, Any]:
        """Change a thread by hand and return the configurable of the new checkpoint. ThreadBusy while it is busy."""
        await self._check_owner(owner, thread_id)
        now = datetime.now(UTC)
        run = Run(
            new_run_id(), thread_id, owner, None, "pending", 1, 1, None, None, RunOptions(kind="update"), None, None,
            now, now,
        )  # fmt: skip
        if not await self._ledger.insert(run, "{}", create_thread=False, reject=True):
            raise ThreadBusy
        configurable = {"thread_id": thread_id, "checkpoint_ns": ""}
        if checkpoint_id:
            configurable["checkpoint_id"] = checkpoint_id
        # Where the change is refused, the thread stays what it was.
        outcome, batch = Outcome("error", None), Batch()
        try:
            saver = RunSaver(self._saver, run.run_id, {}, self._saving(run), history="step")
            config: RunnableConfig = {"configurable": {**configurable, CHECKPOINTER: saver}}
            written = await self._graph.aupdate_state(config, values, as_node)
            config = {"configurable": {**written["configurable"], CHECKPOINTER: saver}}
            waits = bool((await self._graph.aget_state(config)).next)
            batch = saver.batch(final=True)
            outcome = Outcome("success", "interrupted" if waits else "idle")
        except (TypeError, ValueError) as error:
            raise InvalidRequest("The state cannot be changed like this.") from error
        finally:
            await asyncio.shield(self._ledger.finish(run, batch, outcome))
            await self._ledger.delete(run.run_id)
        return without_internal(written["configurable"])

    # Keeping the threads going

    async def _claim(self, thread_id: str) -> Run | None:
        """Take the next run of a free thread."""
        if self._closing:
            return None
        with contextlib.suppress(StorageUnavailable):
            run = await self._ledger.claim_pending(thread_id)
            if run is not None:
                self._start_run(run)
                self._wake(run.run_id)
            return run
        return None

    async def _claim_soon(self, run: Run) -> None:
        """The thread may have become free while the run was recorded as waiting for it."""
        await self._claim(run.thread_id)
        for wait in CLAIM_SECONDS:
            if run.run_id in self._active or self._closing:
                return
            await asyncio.sleep(wait)
            await self._claim(run.thread_id)

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
                if mine := [run_id for run_id, active in self._active.items() if active.reason is None]:
                    for run_id in await self._ledger.to_stop(mine):
                        if (stopped := self._active.get(run_id)) is not None:
                            await self._obey(stopped)
                # After Postgres was away, the others must have had time to show that they live.
                others = time.monotonic() > self._in_touch_since + DEAD_SECONDS
                left = await self._ledger.claim_left(
                    list(self._active), DEAF_SECONDS, DEAD_SECONDS, MAX_RUNNING, others=others
                )
                for run in left:
                    extra = {"run_id": run.run_id, "thread_id": run.thread_id, "attempt": run.attempt}
                    logger.info("a run is taken over", extra=extra)
                    self._metrics.runs_taken_over.inc()
                    self._start_run(run)
                    self._wake(run.run_id)
                if len(self._active) < MAX_RUNNING:
                    for thread_id in await self._ledger.free_threads(MAX_RUNNING - len(self._active)):
                        await self._claim(thread_id)
                for status, count in (await self._ledger.counts()).items():
                    self._metrics.runs.labels(status).set(count)

    def _heard(self, message: str) -> None:
        what, _, run_id = message.partition(" ")
        if what == "done":
            self._wake(run_id)
        elif what == "cancel" and (active := self._active.get(run_id)) is not None:
            self._spawn(self._obey(active))

    async def _obey(self, active: Active) -> None:
        run = await self._ledger.find(active.run.run_id)
        if run is None:
            active.stop("lost")
        elif run.cancel is not None and not run.final:
            active.stop(run.cancel)

    def _wake(self, run_id: str) -> None:
        for told in self._waiting.get(run_id, ()):
            told.set()

    def _service_ended(self, service: asyncio.Task[None]) -> None:
        """None of them ends by itself, and without any of them a worker fails those who count on it."""
        if self._closing or service.cancelled():
            return
        logger.critical("the worker ends: a part of it failed", exc_info=service.exception())
        signal.raise_signal(signal.SIGTERM)  # in order, and another one takes its place

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, StorageUnavailable):
                return  # logged where it happened; the scan makes up for it
            logger.error("a task failed", exc_info=error)


class _Teller(EventLog):
    """The same log, and each event goes to the other workers as well."""

    def __init__(self, log: EventLog, put: Callable[[Event], None]) -> None:
        self._inner = log
        self._put = put

    def add(self, event: str, data: Any) -> Event:
        added = self._inner.add(event, data)
        self._put(added)
        return added


class _Gap(Exception):
    """Redis lost events that come before those that it has."""


def _is_permanent(error: StorageUnavailable) -> bool:
    """Whether Postgres is there and refused what it was given."""
    cause = error.__cause__
    return isinstance(cause, psycopg.DatabaseError) and not isinstance(cause, psycopg.OperationalError)


def describe_failure(error: ServiceError) -> dict[str, Any]:
    """As a run keeps it."""
    failure = {"code": error.code, "message": error.message, "status": error.status}
    return failure | ({"retry_after": error.retry_after} if error.retry_after else {})


def failure_of(run: Run) -> ServiceError:
    """The error of a run that has no answer, as it was raised."""
    told = run.error or {}
    error = ServiceError(told.get("message"), retry_after=told.get("retry_after"))
    error.code = told.get("code", ServiceError.code)
    error.status = told.get("status", ServiceError.status)
    return error


def _last_words(run: Run) -> list[tuple[str, Any]]:
    result = run.result or {}
    words: list[tuple[str, Any]] = []
    if run.status == "success":
        if result.get("usage", {}).get("total_tokens"):
            words.append(("usage", result["usage"]))
    else:
        told = run.error or {}
        failure = {"code": told.get("code"), "message": told.get("message")}
        words.append(("error", failure | ({"retry_after": told["retry_after"]} if told.get("retry_after") else {})))
    end: dict[str, Any] = {"status": run.status, "response": result.get("response", "")}
    if result.get("interrupts"):
        end["interrupts"] = result["interrupts"]
    words.append(("end", end))
    return words


__all__ = [
    "FINAL",
    "Active",
    "Engine",
    "Event",
    "Messages",
    "Resume",
    "Run",
    "RunInput",
    "RunOptions",
    "RunStatus",
    "Strategy",
    "describe_failure",
    "failure_of",
    "new_run_id",
]

"""Runs: accepted is recorded, one runner a thread, and whoever waits for one may go away and come back.

A run belongs to the worker that its row names. Nothing of a run is stored but by the statement that checks this, so a
worker that was taken for dead, and is not, can do no harm: it learns at its next statement that the run is not its own.

The parts share a board: the runner works on runs, the followers read and wait, the takeover keeps the threads going.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import orjson
from langchain_core.runnables import RunnableConfig

from agent.errors import InvalidRequest, NotFound, ShuttingDown, StorageUnavailable, ThreadBusy, TurnConflict
from agent.llm.graph import Agent
from agent.metrics import Metrics
from agent.runs._langgraph import CHECKPOINTER, without_internal
from agent.runs.board import Board
from agent.runs.checkpoints import ThreadSaver
from agent.runs.crons import Due
from agent.runs.events import EventStreams
from agent.runs.followers import Followers
from agent.runs.ledger import Channel, Ledger
from agent.runs.records import Batch, Finished, Outcome, Run, RunInput, RunOptions, Strategy, new_run
from agent.runs.runner import GIVE_UP_SECONDS, RETRY_SECONDS, Runner
from agent.runs.takeover import Takeover
from agent.settings import Settings
from agent.tracing import Tracing

STOP_SECONDS = 5.0


class Engine:
    def __init__(
        self,
        settings: Settings,
        graph: Agent,
        saver: ThreadSaver,
        ledger: Ledger,
        streams: EventStreams,
        channel: Callable[[Callable[[str], None]], Channel],
        tools: Callable[[], Sequence[str]],
        metrics: Metrics,
        tracing: Tracing,
        finished: Finished | None = None,
    ) -> None:
        self._graph = graph
        self._ledger = ledger
        self._streams = streams
        self._finished = finished
        self._board = Board()
        self._runner = Runner(settings, graph, saver, self._board, ledger, streams, tools, metrics, tracing, finished)
        self._takeover = Takeover(self._board, ledger, self._runner, channel, metrics)
        self.followers = Followers(self._board, ledger, streams)

    @property
    def worker(self) -> str:
        return self._ledger.worker

    async def start(self) -> None:
        await self._takeover.announce()
        self._streams.start()
        self._takeover.start()

    async def close(self) -> None:
        """Give running runs a moment, then hand them back: another worker, or the next start, goes on with them."""
        self._board.closing = True
        self._takeover.stop_scanning()
        drivers = [active.driver for active in self._board.active.values() if active.driver is not None]
        if drivers:
            await asyncio.wait(drivers, timeout=STOP_SECONDS)
        for active in list(self._board.active.values()):
            active.stop("stop")
        drivers = [driver for driver in drivers if not driver.done()]
        if drivers:
            await asyncio.wait(drivers, timeout=STOP_SECONDS)
        if self._board.tasks:
            await asyncio.wait(self._board.tasks, timeout=GIVE_UP_SECONDS)
        tasks = (*self._takeover.tasks, *self._board.tasks, *drivers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
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
        if self._board.closing:
            raise ShuttingDown
        options = options or RunOptions()
        if options.strategy != strategy:
            options = replace(options, strategy=strategy)
        run = new_run(run_id, thread_id, owner, turn_id, run_input, options)
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

    async def fire(self, due: Due, run_input: RunInput, options: RunOptions, run_id: str) -> Run | None:
        """Record the run of a cron, and with it that its time is used up. None where another worker was faster, or with "reject" the thread is busy.

        Raises StorageUnavailable, ShuttingDown.
        """
        if self._board.closing:
            raise ShuttingDown
        run = new_run(run_id, due.cron.thread_id, due.cron.owner, None, run_input, options)
        return await self._accepted(run) if await self._ledger.fire(run, due) else None

    async def _accepted(self, run: Run) -> Run:
        if run.status == "running":
            self._runner.start(run)
            return run
        if run.options.strategy in ("interrupt", "rollback"):
            for other in await self._ledger.others_on(run):
                await self._cancel(other, "rollback" if run.options.strategy == "rollback" else "interrupt")
        self._board.spawn(self._runner.claim_soon(run))
        return run

    async def _known(self, run: Run, given_thread: str | None) -> Run | None:
        """The run that this one repeats."""
        same = await self._ledger.find(run.run_id)
        if same is not None and same.owner == run.owner and same.input == run.input:
            # Recorded by a statement whose answer got lost.
            if same.status == "running" and same.run_id not in self._board.active:
                self._runner.start(same)
            return same
        if run.turn_id is None:
            return None
        known = await self._ledger.find_turn(run.owner, run.turn_id)
        if known is None:
            return None
        if known.input != run.input or (given_thread and given_thread != known.thread_id):
            raise TurnConflict
        return await self.reopen(known)

    # Sent again by a client that says so

    async def find_retried(self, owner: str, thread_id: str | None, request: str, retry: int, seconds: float) -> Run | None:
        """The run that this request began within so many seconds, as an earlier attempt of its client."""
        return await self._ledger.find_retried(owner, thread_id, request, retry, seconds)

    async def reopen(self, known: Run) -> Run | None:
        """The run itself, or its next try where it failed here and not by its own fault."""
        known.created = False
        if not is_worth_another_try(known):
            return known
        reopened = await self._ledger.reopen(known)
        if reopened is None:  # somebody else was faster
            return await self._ledger.find(known.run_id)
        self._board.forget(reopened.run_id)
        reopened.created = False
        self._board.spawn(self._runner.claim_soon(reopened))
        return reopened

    # Stopping

    async def cancel(self, owner: str, run_id: str, *, wait: bool = False, rollback: bool = False) -> None:
        """Stop a run in whichever worker it is. With rollback its checkpoints and the run itself go as well."""
        run = await self.followers.get(owner, run_id)
        await self._cancel(run_id, "rollback" if rollback else "interrupt")
        if wait:
            with contextlib.suppress(NotFound):
                await self.followers.wait(owner, run.run_id)

    def cancel_unless_retried(self, run: Run, retry: int) -> None:
        """Stop a run whose client gave up waiting for its try of this number, unless another comes soon, to any worker."""
        self._board.expected.add(run.run_id)

        async def wait_and_cancel() -> None:
            await asyncio.sleep(RETRY_SECONDS)
            stored = await self._ledger.find(run.run_id)
            if stored is not None and stored.options.retry <= retry:
                await self._cancel(run.run_id, "interrupt")

        self._board.spawn(wait_and_cancel())

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
        elif (active := self._board.active.get(run_id)) is not None:
            active.stop(action)

    # Threads and their runs

    async def list(self, owner: str, thread_id: str, limit: int = 10, offset: int = 0, status: str | None = None) -> list[Run]:
        """Newest first. Raises NotFound for a foreign thread."""
        await self._check_owner(owner, thread_id)
        return await self._ledger.list(thread_id, (status,) if status else None, limit, offset)

    async def delete(self, owner: str, run_id: str) -> None:
        """Forget a final run (not what it said). Raises ThreadBusy while it is not final."""
        await self.followers.get(owner, run_id)
        if not await self._ledger.delete(run_id):
            raise ThreadBusy
        self._board.forget(run_id)

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
        run = new_run(None, thread_id, owner, None, None, RunOptions(kind="update"))
        if not await self._ledger.insert(run, "{}", create_thread=False, reject=True):
            raise ThreadBusy
        configurable = {"thread_id": thread_id, "checkpoint_ns": ""}
        if checkpoint_id:
            configurable["checkpoint_id"] = checkpoint_id
        # Where the change is refused, the thread stays what it was.
        outcome, batch, saver = Outcome("error", None), Batch(), self._runner.saver(run)
        try:
            config: RunnableConfig = {"configurable": {**configurable, CHECKPOINTER: saver}}
            written = await self._graph.aupdate_state(config, values, as_node)
            config = {"configurable": {**written["configurable"], CHECKPOINTER: saver}}
            waits = bool((await self._graph.aget_state(config)).next)
            batch = saver.batch(final=True)
            outcome = Outcome("success", "interrupted" if waits else "idle")
        except (TypeError, ValueError) as error:
            raise InvalidRequest("The state cannot be changed like this.") from error
        finally:
            await asyncio.shield(self._ledger.finish(run, batch, outcome, saver.saved))
            await self._ledger.delete(run.run_id)
        return without_internal(written["configurable"])

    async def _check_owner(self, owner: str, thread_id: str) -> None:
        if await self._ledger.thread_owner(thread_id) != owner:
            raise NotFound


def is_worth_another_try(run: Run) -> bool:
    return run.status in ("error", "timeout") and (run.error or {}).get("status", 500) >= 500

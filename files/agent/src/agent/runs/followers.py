"""Followers of a run: those who read its events and those who wait for its end, in whichever worker it is."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace

from redis.exceptions import RedisError

from agent.errors import Cancelled, NotFound, ShuttingDown, StorageUnavailable, TurnTimeout
from agent.runs.board import Board
from agent.runs.events import ATTEMPT, Event, EventStreams
from agent.runs.ledger import Ledger
from agent.runs.records import Run, describe_failure, last_words

POLL_SECONDS = 1.0
# Events that are read at once, and how large that many may have been.
FEW, MANY = 8, 500
SMALL_BYTES = 64 * 1024


class Followers:
    def __init__(self, board: Board, ledger: Ledger, streams: EventStreams) -> None:
        self._board = board
        self._ledger = ledger
        self._streams = streams

    async def get(self, owner: str, run_id: str) -> Run:
        """Raises NotFound."""
        active = self._board.active.get(run_id)
        run = active.run if active is not None else await self._ledger.find(run_id)
        if run is None or run.owner != owner:
            raise NotFound
        return run

    async def events(self, owner: str, run_id: str, after: int = 0) -> AsyncGenerator[Event]:
        """What the run published after this event, and then what it publishes; ends with the run. Raises NotFound."""
        run: Run | None = None
        with self._board.listening(run_id) as news:
            while True:
                news.clear()
                if (log := self._board.log_of(owner, run_id)) is not None and log.reaches(after):
                    async for event in log.subscribe(after):
                        after = event.id
                        yield event
                        if event.event == "end":
                            return
                if self._board.closing:
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
                    # Many at once where they are small, and few where each has a whole state in it.
                    many = FEW
                    while (read := await self._read_streams(run_id, after, many, news))[0]:
                        events, size = read
                        many = MANY if size < SMALL_BYTES else FEW
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
                        await asyncio.wait_for(news.wait(), POLL_SECONDS)
                else:
                    if run.final:
                        break
        run = await self._end_of(owner, run)
        for number, (name, data) in enumerate(last_words(run), after + 1):
            yield Event(number, name, data)

    async def _read_streams(self, run_id: str, after: int, count: int, news: asyncio.Event) -> tuple[list[Event], int]:
        """What other workers broadcast; nothing after a second of silence, or when there is news of the run."""
        read, woken = asyncio.create_task(self._streams.read(run_id, after, count)), asyncio.create_task(news.wait())
        try:
            await asyncio.wait({read, woken}, return_when=asyncio.FIRST_COMPLETED)
            return read.result() if read.done() else ([], 0)
        finally:
            read.cancel()
            woken.cancel()
            await asyncio.gather(read, woken, return_exceptions=True)

    async def _end_of(self, owner: str, run: Run) -> Run:
        try:
            return run if run.final else await self.wait(owner, run.run_id)
        except NotFound:
            # Rolled back, or deleted with its thread.
            return replace(run, status="interrupted", result=None, error=describe_failure(Cancelled()))

    async def wait(self, owner: str, run_id: str, seconds: float | None = None) -> Run:
        """The run once it is final, whichever worker runs it. Raises TurnTimeout after so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                return await self._wait(owner, run_id)
        except TimeoutError:
            raise TurnTimeout from None

    async def _wait(self, owner: str, run_id: str) -> Run:
        active = self._board.active.get(run_id)
        if active is not None and active.run.owner == owner:
            done = await asyncio.shield(active.done)
            if done is not None:
                return done
        with self._board.listening(run_id) as news:
            run = await self._ledger.watch(run_id)
            while True:
                if run is None or run.owner != owner:
                    raise NotFound
                if run.final:
                    return run
                if self._board.closing:
                    raise ShuttingDown
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        if (active := self._board.active.get(run_id)) is not None:
                            done = await asyncio.shield(active.done)
                            if done is not None:
                                return done
                        await news.wait()
                with contextlib.suppress(StorageUnavailable):
                    run = await self._ledger.find(run_id)


class _Gap(Exception):
    """Redis lost events that come before those that it has."""

"""What a run tells while it works: numbered events, kept for as long as somebody may come back for them.

A follower in the run's own worker reads them from memory. For one in another worker, or after that worker died, those
of a resumable run are in a Redis stream too, written behind the run's back: Redis can be slow or away and the run does
not notice. A gap in the stream is seen by the numbers, and its reader is then given the end without the middle.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from langchain_core.messages import BaseMessage
from langgraph.types import Interrupt
from pydantic import BaseModel
from redis.exceptions import RedisError

from agent.settings import Settings
from agent.storage.redis import create_redis

logger = logging.getLogger(__name__)

KEY_PREFIX = "agent:events"
KEEP_SECONDS = 600
# Who was there until the end comes back soon or not at all, and Redis is small.
KEEP_ENDED_SECONDS = 120
# Numbers start at attempt * ATTEMPT: those of a second attempt come after all of the first, which may still be talking.
ATTEMPT = 1_000_000
WRITE_SECONDS = 1
AWAY_SECONDS = 2
BLOCK_SECONDS = 1.0
MAX_QUEUED = 20_000
MAX_READERS = 512
# Each has a whole state in it.
LARGE = frozenset({"values", "checkpoints", "debug"})


@dataclass(frozen=True, slots=True)
class Event:
    """`event` is one of

    metadata  the first of each attempt: {"run_id", "thread_id", "attempt"}
    token     {"text"}: a piece of the answer ("tokens" was asked for)
    reasoning {"text"}: a piece of what the model thinks before it answers ("tokens" was asked for)
    tool      {"name", "id", "state": "start" | "end", "status"?: "success" | "error"} ("tools" was asked for)
    status    {"state": "waiting" | "restarted", ...}: what it is waiting for, or that text since the last tool is void
    messages, values, updates, custom   as LangGraph streams them, as JSON ("messages" is [chunk, metadata]);
              "EVENT|NAMESPACE" from a subgraph, where subgraphs were asked for
    usage     {"input_tokens", "output_tokens", "total_tokens"}
    error     {"code", "message", "status", "retry_after"?: seconds, "refused"?: status of the model server}
    end       the last one: {"status", "response"}
    """

    id: int
    event: str
    data: Any


class EventLog:
    """The events of one attempt of a run, in this process."""

    def __init__(self, attempt: int) -> None:
        self._first = attempt * ATTEMPT + 1
        self._events: list[Event] = []
        self._waiting: set[asyncio.Future[None]] = set()
        self.closed = False
        # Bytes of the events that have a whole state in them. All others are small.
        self.size = 0

    def publish(self, event: str, data: Any) -> Event:
        published = Event(self._first + len(self._events), event, plain(data))
        self._events.append(published)
        if event in LARGE:
            self.size += len(to_json(published.data))
        self._wake()
        return published

    def close(self) -> None:
        """No more will come: the run ended, or goes on elsewhere."""
        self.closed = True
        self._wake()

    def reaches(self, after: int) -> bool:
        """Whether everything after that event is here."""
        return after == 0 or after >= self._first - 1

    async def subscribe(self, after: int) -> AsyncGenerator[Event]:
        """The events after this one, those to come included, until the log is closed."""
        index = max(0, after - self._first + 1)
        while True:
            while index < len(self._events):
                yield self._events[index]
                index += 1
            if self.closed:
                return
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)


class EventStreams:
    """The events of resumable runs in Redis, for the other workers."""

    def __init__(self, settings: Settings) -> None:
        self._redis = create_redis(settings, connections=MAX_READERS, seconds=WRITE_SECONDS, blocking=True)
        self._queue: deque[tuple[str, Event]] = deque()
        self._wake = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._writer = asyncio.create_task(self._write_for_ever())

    async def close(self) -> None:
        if self._writer is not None:
            for _ in range(20):
                if not self._queue:
                    break
                await asyncio.sleep(0.05)
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        await self._redis.aclose()

    def broadcast(self, run_id: str, event: Event) -> None:
        if len(self._queue) < MAX_QUEUED:  # what is dropped is a gap, which the readers see
            self._queue.append((run_id, event))
            self._wake.set()

    async def read(self, run_id: str, after: int, count: int) -> tuple[list[Event], int]:
        """At most so many of the events after this one, and their bytes; none where there was none for BLOCK_SECONDS.

        Raises RedisError or OSError.
        """
        async with asyncio.timeout(BLOCK_SECONDS + WRITE_SECONDS):
            answer: Any = await self._redis.xread({_key(run_id): f"{after}-0"}, count=count, block=int(BLOCK_SECONDS * 1000))
        entries: list[tuple[bytes, dict[bytes, bytes]]] = [entry for _, found in answer or () for entry in found]
        events = [Event(int(number.partition(b"-")[0]), fields[b"e"].decode(), orjson.loads(fields[b"d"])) for number, fields in entries]
        return events, sum(len(fields[b"d"]) for _, fields in entries)

    async def _write_for_ever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), 500))]
                try:
                    async with asyncio.timeout(WRITE_SECONDS):
                        await self._write(batch)
                except (RedisError, OSError) as error:
                    logger.warning("events not kept", extra={"error": type(error).__name__, "events": len(batch)})
                    await asyncio.sleep(AWAY_SECONDS)
                    self._queue.clear()

    async def _write(self, batch: Iterable[tuple[str, Event]]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        keep: dict[str, int] = {}
        for run_id, event in batch:
            key = _key(run_id)
            keep[key] = KEEP_ENDED_SECONDS if event.event == "end" else KEEP_SECONDS
            pipeline.xadd(key, {"e": event.event, "d": to_json(event.data)}, id=f"{event.id}-0")
        for key, seconds in keep.items():
            pipeline.expire(key, seconds)
        # A number that is too small comes from an attempt that was overtaken: its events are not wanted.
        await pipeline.execute(raise_on_error=False)


class BroadcastLog(EventLog):
    """The same log, and each event goes to the other workers as well."""

    def __init__(self, log: EventLog, streams: EventStreams, run_id: str) -> None:
        self._log = log
        self._streams = streams
        self._run_id = run_id

    def publish(self, event: str, data: Any) -> Event:
        published = self._log.publish(event, data)
        self._streams.broadcast(self._run_id, published)
        return published


def _key(run_id: str) -> str:
    return f"{KEY_PREFIX}:{run_id}"


def to_json(value: Any) -> bytes:
    return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS)


def plain(value: Any) -> Any:
    """The same as JSON's types, a LangChain message as the LangGraph API writes it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, BaseMessage):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [plain(inner) for inner in value]
    if isinstance(value, Interrupt):
        return {"value": plain(value.value), "id": value.id}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return str(value)

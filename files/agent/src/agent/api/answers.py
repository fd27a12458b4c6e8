"""What goes out: JSON, and bodies that are sent while they come about."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent.access.in_flight import SMALL_BYTES, STALL_SECONDS, InFlight
from agent.errors import RateLimited
from agent.runs.events import plain

# How the documents describe a stream: each of its events is one of these.
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events.",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
                }
            }
        },
    }
}
Weigh = Callable[[int], contextlib.AbstractContextManager[None]]
# Shorter than any proxy's patience with a silent connection.
HEARTBEAT_SECONDS = 15


def _as_it_is(size: int) -> contextlib.AbstractContextManager[None]:
    """For bodies that are never large."""
    return contextlib.nullcontext()


def dump(value: Any) -> bytes:
    return orjson.dumps(value, plain, orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z)


def pick(value: Mapping[str, Any], fields: Sequence[str] | None) -> dict[str, Any]:
    """The wanted fields. `values.messages` is one channel of the values."""
    if fields is None:
        return dict(value)
    picked = {field: value[field] for field in fields if field in value}
    channels = [field.partition(".")[2] for field in fields if field.startswith("values.")]
    if channels and "values" not in picked:
        picked["values"] = {name: value["values"][name] for name in channels if name in value["values"]}
    return picked


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump(content)


class Weighed(Response):
    """A body that may be large. What an owner's clients do not read is bounded, and whoever reads nothing is cut off."""

    media_type = "application/json"

    def __init__(self, body: bytes, owner: str, in_flight: InFlight) -> None:
        super().__init__(body)
        self._owner = owner
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._in_flight.of(self._owner, len(self.body)):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with contextlib.suppress(ClientDisconnect):
                await send_slices(send, bytes(self.body), more=False)


async def send_slices(send: Send, body: bytes, *, more: bool) -> None:
    """Send a body, or a piece of one, in slices. Raises ClientDisconnect where the client reads none of them."""
    if len(body) <= SMALL_BYTES:
        await send({"type": "http.response.body", "body": body, "more_body": more})
        return
    for end in range(SMALL_BYTES, len(body) + SMALL_BYTES, SMALL_BYTES):
        piece = body[end - SMALL_BYTES : end]
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await send({"type": "http.response.body", "body": piece, "more_body": more or end < len(body)})
        except TimeoutError:
            raise ClientDisconnect from None


def sse(event: str, data: Any, event_id: str | None = None) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so a line each is enough."""
    head = f"event: {event}\n" if event_id is None else f"id: {event_id}\nevent: {event}\n"
    return b"%sdata: %s\n\n" % (head.encode(), dump(data))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Live(Response):
    """A body that comes piece by piece, with a heartbeat in its pauses, until its end or until the client hangs up."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes],
        *,
        media_type: str,
        heartbeat: bytes,
        headers: Mapping[str, str],
        on_disconnect: Callable[[], Awaitable[None]] | None = None,
        weigh: Weigh = _as_it_is,
    ) -> None:
        """weigh: entered with the size of a piece while it is sent; raises ServiceError where that is too much"""
        self.status_code = 200
        self.background = None
        self.body = b""
        self.media_type = media_type
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["Content-Length"]
        self._pieces = pieces
        self._heartbeat = heartbeat
        self._on_disconnect = on_disconnect
        self._weigh = weigh
        self._ended = False
        self._gone = False
        self._quiet_since = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None  # a coroutine runs in a task
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        helpers = [asyncio.create_task(self._watch(receive, task)), asyncio.create_task(self._beat(send))]
        try:
            async for piece in self._pieces:
                self._quiet_since = asyncio.get_running_loop().time()
                with self._weigh(len(piece)):
                    await send_slices(send, piece, more=True)
            self._ended = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not self._gone:
                raise
            task.uncancel()
        except (ClientDisconnect, RateLimited):
            self._gone = True  # it reads nothing; what is left of the body is not sent
        finally:
            for helper in helpers:
                helper.cancel()
            await self._pieces.aclose()
        if self._gone and self._on_disconnect:
            await self._on_disconnect()

    async def _watch(self, receive: Receive, task: asyncio.Task[Any]) -> None:
        await _disconnected(receive)
        if not self._ended:
            self._gone = True
            task.cancel()

    async def _beat(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._quiet_since = loop.time()
        while True:
            await asyncio.sleep(max(0.0, self._quiet_since + HEARTBEAT_SECONDS - loop.time()))
            if loop.time() - self._quiet_since >= HEARTBEAT_SECONDS:
                self._quiet_since = loop.time()
                with contextlib.suppress(OSError):
                    await send({"type": "http.response.body", "body": self._heartbeat, "more_body": True})


class Attended(Response):
    """An answer that is worked on only while the client waits for it."""

    def __init__(
        self,
        work: Callable[[], Coroutine[Any, Any, Response]],
        on_disconnect: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__()
        self._work = work
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
        if work.done():
            await work.result()(scope, receive, send)
        elif self._on_disconnect:
            await self._on_disconnect()


def event_stream(
    pieces: AsyncGenerator[bytes],
    headers: Mapping[str, str] | None = None,
    on_disconnect: Callable[[], Awaitable[None]] | None = None,
    weigh: Weigh = _as_it_is,
) -> Live:
    return Live(
        pieces,
        media_type="text/event-stream",
        heartbeat=b": heartbeat\n\n",
        headers=headers or {},
        on_disconnect=on_disconnect,
        weigh=weigh,
    )


def late_json(
    pieces: AsyncGenerator[bytes],
    headers: Mapping[str, str] | None = None,
    on_disconnect: Callable[[], Awaitable[None]] | None = None,
    weigh: Weigh = _as_it_is,
) -> Live:
    """JSON that may be long in coming: blank lines before it keep the connection open and mean nothing."""
    return Live(pieces, media_type="application/json", heartbeat=b"\n", headers=headers or {}, on_disconnect=on_disconnect, weigh=weigh)

"""A closed-loop load generator: each client sends its next request when the last one is answered in full.

Raw protocols on uvloop: it shares the machine with what it measures, so it must cost next to nothing.
"""

from __future__ import annotations

import asyncio
import gc
import math
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import httptools

from model import FIRST_WORD, LAST_WORD

THREAD_ID = re.compile(rb'"thread_id":\s*"([A-Za-z0-9_-]+)"')
# For answers that are under way when the time is up.
DRAIN_SECONDS = 60
ARRIVAL_SECONDS = 0.003


@dataclass(frozen=True)
class Target:
    """Where to send what. In `body` and `headers` %CLIENT% becomes the number of the client, and %THREAD% its thread."""

    port: int
    path: str
    body: str
    headers: str = ""
    # Whether the answer names the thread that it belongs to.
    names_thread: bool = False
    # How many events an answer has at least: a stream that comes in one piece is none.
    events: int = 0


@dataclass
class Sample:
    """What was seen in one window. Times are in seconds."""

    seconds: float
    completed: int = 0
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    # Of the whole run, warm-up and drain included.
    answered: int = 0
    threads: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.completed / self.seconds


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; not a number where there are no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass
class Window:
    """When it is counted. It opens when all clients have come."""

    opens: float = math.inf
    closes: float = math.inf


class Client(asyncio.Protocol):
    """One connection with one request under way at a time."""

    def __init__(self, target: Target, number: int, sample: Sample, window: Window, threads: deque[str] | None) -> None:
        self._target = target
        self._number = number
        self._sample = sample
        self._window = window
        self._threads = threads
        self._started = 0.0
        self._first: float | None = None
        self._body = bytearray()
        self._parser: httptools.HttpResponseParser
        self._transport: asyncio.Transport
        self.done = asyncio.get_running_loop().create_future()

    def _request(self) -> bytes:
        body = self._target.body.replace("%CLIENT%", str(self._number))
        if self._threads is not None:
            body = body.replace("%THREAD%", self._threads[0])
            self._threads.rotate(-1)
        head = f"POST {self._target.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += self._target.headers.replace("%CLIENT%", str(self._number))
        return f"{head}Content-Length: {len(body.encode())}\r\n\r\n{body}".encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport by class, but in all they do.
        self._transport = cast(asyncio.Transport, transport)
        # Where every request is the same there is nothing to build again.
        self._fixed = b"" if self._threads is not None else self._request()
        self._next()

    def _next(self) -> None:
        if time.perf_counter() >= self._window.closes:
            self._finish()
            return
        self._parser = httptools.HttpResponseParser(self)
        self._body.clear()
        self._first = None
        request = self._fixed or self._request()
        self._started = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    def on_body(self, body: bytes) -> None:
        self._body += body
        if self._first is None and FIRST_WORD in self._body:
            self._first = time.perf_counter()

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        status = self._parser.get_status_code()
        # Judged by its text and not only by its status: a stream that breaks off with an error is a 200, too.
        whole = LAST_WORD in self._body and b"event: error" not in self._body and self._body.count(b"data:") >= self._target.events
        if status != 200 or self._first is None or not whole:
            self._fail(f"{status}: {bytes(self._body[-200:])!r}")
            return
        self._sample.answered += 1
        if self._target.names_thread:
            named = THREAD_ID.search(self._body)
            if named is None:
                self._fail("the answer does not name its thread")
                return
            self._sample.threads.append(named[1].decode())
        if self._window.opens <= now <= self._window.closes:
            self._sample.completed += 1
        # By its start: by its end a slow answer would fall out of a short window more often than a fast one.
        if self._window.opens <= self._started:
            self._sample.latencies.append(now - self._started)
            self._sample.first_tokens.append(self._first - self._started)
        # Not from here: the parser is still at work on this answer.
        asyncio.get_running_loop().call_soon(self._next)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self._fail(f"connection lost: {error}")

    def _fail(self, reason: str) -> None:
        """An error ends this client: errors make the run fail, there is nothing to gain from going on."""
        self._sample.errors.append(reason)
        self._finish()

    def abort(self) -> None:
        self._transport.abort()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        self._transport.close()


async def run(target: Target, clients: int, seconds: float, *, warm: float = 0.0, threads: deque[str] | None = None) -> Sample:
    """Load `target` for `warm` seconds uncounted and then for `seconds`, and wait for the answers that are under way.

    Each turn starts a new thread, unless `threads` are given: each turn goes to the first one, which then becomes the last.
    """
    sample = Sample(seconds)
    loop = asyncio.get_running_loop()
    window = Window()
    connections: list[tuple[asyncio.BaseTransport, Client]] = []
    gc.collect()
    gc.disable()
    try:
        for number in range(clients):
            client = partial(Client, target, number, sample, window, threads)
            try:
                connections.append(await loop.create_connection(client, "127.0.0.1", target.port))
            except OSError as error:
                sample.errors.append(f"cannot connect: {error}")
                break
            # One after the other, as users arrive: a connection then goes to a worker that is free. All at once they
            # would go to whichever process wakes up first, and a service would be measured with one of its workers.
            await asyncio.sleep(ARRIVAL_SECONDS)
        window.opens = time.perf_counter() + warm
        window.closes = window.opens + seconds
        if connections:
            _, late = await asyncio.wait([connected.done for _, connected in connections], timeout=warm + seconds + DRAIN_SECONDS)
            sample.errors += ["no answer in time"] * len(late)
    finally:
        gc.enable()
    for _, connected in connections:
        connected.abort()
    return sample

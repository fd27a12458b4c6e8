"""HTTP/1.1 as the model client and the page fetcher need it: one request, one streamed answer, every step bounded.

A general client spends half a millisecond of CPU on each request, which is a sixth of what a whole turn may cost here.
This one leaves the parsing to httptools (C) and knows no redirects, cookies, proxies or encodings.
"""

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httptools
import httpx

CONNECT_SECONDS = 3
READ_BYTES = 1 << 16
MAX_HEAD_BYTES = 1 << 16
# Shorter than what servers wait (uvicorn, and so vLLM, closes after 5 s): a request on a closing connection is lost.
IDLE_SECONDS = 4
MAX_IDLE = 128


class WireError(Exception):
    """The exchange failed."""


class ConnectError(WireError):
    """There is no connection: nothing was sent."""


class BrokenError(WireError):
    """The connection ended too early, or what came is not HTTP."""


class TooLargeError(WireError):
    """The answer is longer than its reader allows."""


class _Parser:
    """What httptools calls while it reads one answer."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body: list[bytes] = []
        self.status = 0
        self.complete = False
        self.reusable = False
        self._http = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        try:
            self._http.feed_data(data)
        except httptools.HttpParserError as error:
            raise BrokenError("not HTTP") from error

    def on_message_begin(self) -> None:
        self.reusable = False  # more than one answer to one request: nobody knows whose the next one is

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._http.get_status_code()
        if status >= 200:
            self.status = status
        else:
            self.headers.clear()  # "100 Continue" and the like come before the answer

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        self.reusable = bool(self.status and not self.complete and self._http.should_keep_alive())
        self.complete = bool(self.status)

    def on_end_of_connection(self) -> None:
        bounded = "content-length" in self.headers or "chunked" in self.headers.get("transfer-encoding", "").lower()
        if not self.status or bounded:
            raise BrokenError("the connection was closed in the middle of the answer")
        self.complete = True


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.idle_since = 0.0

    @classmethod
    async def open(cls, host: str, port: int, tls: ssl.SSLContext | None, server_name: str) -> Self:
        """Connect to a host name or an address; the certificate must be of `server_name`."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                streams = await asyncio.open_connection(host, port, ssl=tls, server_hostname=server_name if tls else None)
        except (OSError, TimeoutError, UnicodeError) as error:
            raise ConnectError(type(error).__name__) from error
        return cls(*streams)

    @property
    def usable(self) -> bool:
        return time.monotonic() - self.idle_since < IDLE_SECONDS and not self.reader.at_eof() and not self.writer.is_closing()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may be gone already
            self.writer.close()


class Answer:
    """An answer whose head has been read. Use as a context manager: leaving it frees the connection."""

    def __init__(self, connection: Connection, parser: _Parser, idle: deque[Connection] | None) -> None:
        self.status = parser.status
        self.headers: Mapping[str, str] = parser.headers
        self._connection = connection
        self._parser = parser
        self._idle = idle

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # A cancelled or unread exchange leaves bytes on the way: such a connection cannot be used again.
        if self._idle is not None and self._parser.reusable and len(self._idle) < MAX_IDLE:
            self._connection.idle_since = time.monotonic()
            self._idle.append(self._connection)
        else:
            self._connection.close()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, piece by piece as the network delivers it."""
        parser = self._parser
        while True:
            if parser.body:
                data = b"".join(parser.body)
                parser.body.clear()
                yield data
            if parser.complete:
                return
            await _receive(self._connection, parser)

    async def read(self, limit: int) -> bytes:
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise TooLargeError(f"more than {limit} bytes")
        return bytes(body)


async def exchange(connection: Connection, request: bytes, idle: deque[Connection] | None = None) -> Answer:
    """Send a request and wait for the head of its answer."""
    parser = _Parser()
    received = 0
    try:
        connection.writer.write(request)
        while not parser.status:
            received += await _receive(connection, parser)
            if received > MAX_HEAD_BYTES and not parser.status:
                raise BrokenError("the head of the answer is too long")
    except BaseException:
        connection.close()
        raise
    return Answer(connection, parser, idle)


async def _receive(connection: Connection, parser: _Parser) -> int:
    try:
        data = await connection.reader.read(READ_BYTES)
    except OSError as error:
        raise BrokenError(type(error).__name__) from error
    if data:
        parser.feed(data)
    else:
        parser.on_end_of_connection()
    return len(data)


class Client:
    """Requests to one server, over as many kept connections as there are requests at once."""

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(base_url)
        self._host = parts.hostname or ""
        self._tls = httpx.create_ssl_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path
        self._head = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": parts.netloc} | dict(headers)).items())
        self._idle: deque[Connection] = deque()

    async def post(self, path: str, body: bytes, *, fresh: bool = False) -> Answer:
        """Send a JSON body. `fresh` asks for a new connection, after a kept one turned out to be dead."""
        request = (f"POST {self._path}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body
        connection = None if fresh else self._kept()
        if connection is None:
            connection = await Connection.open(self._host, self._port, self._tls, self._host)
        return await exchange(connection, request, self._idle)

    def _kept(self) -> Connection | None:
        # The one used last comes first, so that those above the usual need grow old and go.
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        return None

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

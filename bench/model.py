"""A model server that is never the bottleneck: one fixed answer, in one piece or as a stream, at a pace that can be set.

    python model.py PORT

Speaks just enough of the OpenAI API for the clients of the services under test. Every generation counts as one call;
GET /_calls tells how many there were, POST /_pace/MS sets the milliseconds before each token.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import cast

import httptools
import uvloop

# One word is one token.
WORDS = ("Alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima", "mike", "november", "oscar", "Omega")
FIRST_WORD = WORDS[0].encode()
LAST_WORD = WORDS[-1].encode()
ANSWER = " ".join(WORDS)
NAME = "agent-model"

# The client libraries take the id of an answer for the id of the message, so every answer has one of its own.
ID = b"chatcmpl-000000000000"
USAGE = b'"usage":{"prompt_tokens":40,"completion_tokens":%d,"total_tokens":%d}' % (len(WORDS), 40 + len(WORDS))
COMPLETION = (
    b'{"id":"' + ID + b'","object":"chat.completion","created":1700000000,"model":"agent-model","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"' + ANSWER.encode() + b'"},"finish_reason":"stop","logprobs":null}],' + USAGE + b"}"
)
COMPLETION_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(choices: bytes, more: bytes = b"") -> bytes:
    head = b'data: {"id":"' + ID + b'","object":"chat.completion.chunk","created":1700000000,"model":"agent-model","choices":['
    return _chunk(head + choices + b"]" + more + b"}\n\n")


def _delta(delta: bytes, reason: bytes = b"null") -> bytes:
    return _event(b'{"index":0,"delta":{' + delta + b'},"finish_reason":' + reason + b"}")


RESPONSE = COMPLETION_HEAD % len(COMPLETION) + COMPLETION
STREAM_FIRST = STREAM_HEAD + _delta(b'"role":"assistant","content":""')
STREAM_TOKENS = [_delta(b'"content":"%s"' % word.encode()) for word in [WORDS[0], *(f" {word}" for word in WORDS[1:])]]
STREAM_STOP = _delta(b"", b'"stop"')
STREAM_USAGE = _event(b"", b"," + USAGE)
STREAM_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class State:
    """What all connections share."""

    def __init__(self) -> None:
        self.pace = 0.0
        self.calls = 0
        self.ids = itertools.count(1)

    def next_id(self) -> bytes:
        self.calls += 1
        return b"chatcmpl-%012d" % next(self.ids)


class Connection(asyncio.Protocol):
    def __init__(self, state: State) -> None:
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport by class, but in all they do.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url.endswith(b"/chat/completions"):
            self._generate(self._state.next_id())
        elif self._url.startswith(b"/_pace/"):
            self._state.pace = float(self._url[len(b"/_pace/") :]) / 1000
            self._reply(b"{}")
        elif self._url == b"/_calls":
            self._reply(b"%d" % self._state.calls)
        elif self._url.endswith(b"/models"):
            self._reply(b'{"object":"list","data":[{"id":"agent-model","object":"model","created":0,"owned_by":"bench"}]}')
        elif self._url == b"/health":
            self._reply(b"{}")
        else:
            self._send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    def _reply(self, body: bytes) -> None:
        self._send(COMPLETION_HEAD % len(body) + body)

    def _generate(self, answer_id: bytes) -> None:
        body = self._body.replace(b" ", b"")
        pace = self._state.pace
        if b'"stream":true' not in body:
            response = RESPONSE.replace(ID, answer_id)
            if pace:
                self._loop.call_later(pace * len(WORDS), self._send, response)
            else:
                self._send(response)
            return
        end = STREAM_STOP + (STREAM_USAGE if b'"include_usage":true' in body else b"") + STREAM_END
        pieces = [STREAM_FIRST, *STREAM_TOKENS, end]
        if not pace:
            self._send(b"".join(pieces).replace(ID, answer_id))
            return
        self._send(STREAM_FIRST.replace(ID, answer_id))
        started = self._loop.time()
        for number, piece in enumerate(STREAM_TOKENS, 1):
            last = end if number == len(STREAM_TOKENS) else b""
            self._loop.call_at(started + number * pace, self._send, (piece + last).replace(ID, answer_id))

    def _send(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


async def serve(port: int) -> None:
    state = State()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(state), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))

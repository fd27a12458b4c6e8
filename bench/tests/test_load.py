"""The load generator must count what happened, no more and no less."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Iterator

import pytest
import uvloop

import load
from load import Target
from services import Model, model_target

WHOLE = b'{"response":"Alpha Omega","thread_id":"t-1"}'


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    server = Model()
    yield server
    server.remove()


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([5.0], 0.5, 5.0), ([3.0, 1.0, 2.0], 0.5, 2.0), ([1.0, 2.0, 3.0, 4.0], 0.5, 2.0), ([float(n) for n in range(1, 101)], 0.95, 95.0)],
)
def test_percentile_is_the_nearest_rank(values: list[float], share: float, expected: float) -> None:
    assert load.percentile(values, share) == expected


def test_percentile_of_nothing_is_no_number() -> None:
    assert load.percentile([], 0.5) != load.percentile([], 0.5)


@pytest.mark.parametrize("mode", ["chat", "stream"])
def test_every_call_is_counted_once(model: Model, mode: str) -> None:
    before = model.calls()
    sample = uvloop.run(load.run(model_target(model.port, mode), 8, 0.2, warm=0.1))
    assert not sample.errors
    assert sample.answered == model.calls() - before
    assert 0 < sample.completed <= len(sample.latencies) + 8
    assert len(sample.latencies) < sample.answered  # those of the warm-up are not measured


@pytest.mark.parametrize(("mode", "first"), [("chat", 0.315), ("stream", 0.018)])
def test_the_model_keeps_its_pace(model: Model, mode: str, first: float) -> None:
    model.pace(20)
    try:
        sample = uvloop.run(load.run(model_target(model.port, mode), 2, 0.5))
    finally:
        model.pace(0)
    assert not sample.errors
    assert min(sample.latencies) >= 0.315  # the loop's clock ticks in milliseconds
    assert first <= min(sample.first_tokens) < first + 0.25


def answer_with(answer: bytes, target: Target, clients: int = 1, threads: deque[str] | None = None) -> tuple[load.Sample, list[bytes]]:
    """Load a server that has this one answer, and return what it was asked, too."""
    asked: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split()[0])
                asked.append(head + await reader.readexactly(length))
                writer.write(answer)
                if b"close" in answer:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def both() -> load.Sample:
        async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            where = Target(port, target.path, target.body, target.headers, target.names_thread, target.events)
            return await load.run(where, clients, 0.05, threads=threads)

    return uvloop.run(both()), asked


def response(status: str, body: bytes, *, more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (response("500 Internal Server Error", WHOLE), "500"),
        (response("200 OK", b'{"response":"Alpha"}'), "200"),
        (response("200 OK", WHOLE.replace(b"thread_id", b"other")), "does not name its thread"),
        (response("200 OK", WHOLE + b"\n\nevent: error\n\n"), "200"),
        (response("200 OK", WHOLE)[:-5] + b"", "connection lost"),
        (b"SMTP/1.1 250 close\r\n\r\n", "not HTTP"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(answer: bytes, reason: str) -> None:
    if reason == "connection lost":
        answer = answer.replace(b"\r\n", b"\r\nX: close\r\n", 1)
    sample, _ = answer_with(answer, Target(0, "/chat", "{}", names_thread=True))
    assert sample.errors
    assert reason in sample.errors[0]
    assert sample.completed == len(sample.latencies) == len(sample.threads) == 0


def test_a_stream_in_one_piece_is_no_stream() -> None:
    sample, _ = answer_with(response("200 OK", b"data: Alpha Omega\n\n"), Target(0, "/chat/stream", "{}", events=16))
    assert sample.errors


def test_nobody_there_is_an_error() -> None:
    sample = uvloop.run(load.run(Target(1, "/", "{}"), 1, 0.05))
    assert "cannot connect" in sample.errors[0]


def test_each_client_is_a_user_and_each_thread_has_its_turn() -> None:
    threads = deque(str(number) for number in range(100_000))
    target = Target(0, "/chat", '{"thread_id":"%THREAD%"}', "X-Forwarded-User: user-%CLIENT%\r\n")
    sample, asked = answer_with(response("200 OK", WHOLE), target, clients=3, threads=threads)
    assert not sample.errors
    used = [json.loads(request.partition(b"\r\n\r\n")[2])["thread_id"] for request in asked]
    assert len(set(used)) == len(used) == sample.answered
    assert {request.partition(b"X-Forwarded-User: ")[2].split()[0] for request in asked} == {b"user-0", b"user-1", b"user-2"}

"""The model's client against a server that misbehaves in every way a test can think of."""

import asyncio
import json
import re
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from agent.errors import ModelFailed, ModelUnavailable
from agent.llm.model import ChatModel, ContextOverflow, create_model
from agent.llm.turn import TURN, Turn
from agent.settings import Settings
from graphs import secret_files
from servers import Model, find_program, free_port

ASK: list[BaseMessage] = [SystemMessage("be brief"), HumanMessage("hello")]
CALL = {"id": "call-1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'}}
USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "total_tokens": 18,
    "prompt_tokens_details": {"cached_tokens": 5},
    "completion_tokens_details": {"reasoning_tokens": 3},
}

Write = Callable[[bytes], Awaitable[None]]
Script = Callable[[int, dict[str, Any], Write], Awaitable[None]]


class Server:
    """Answers the n-th request (from 0) by what its script writes, then closes or keeps the connection."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.port = free_port()
        self.requests: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Server"]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
        try:
            yield self
        finally:
            server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                body = await reader.readexactly(int(re.search(r"(?i)content-length: (\d+)", head)[1]))
                self.heads.append(head)
                self.requests.append(json.loads(body))

                async def write(data: bytes) -> None:
                    writer.write(data)
                    await writer.drain()

                await self.script(len(self.requests) - 1, self.requests[-1], write)
        except (EOFError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def model(url: str, **settings: Any) -> ChatModel:
    return ChatModel(
        model="agent-model",
        base_url=url,
        api_key=SecretStr("secret-key"),
        max_completion_tokens=100,
        use_responses_api=False,
        **{"hold_seconds": 0, **settings},
    )


def completion(message: dict[str, Any], **more: Any) -> bytes:
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "served",
        "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    return json.dumps(answer | more).encode()


def http(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def error(status: str, message: str = "no", headers: str = "") -> bytes:
    return http(json.dumps({"error": {"message": message, "code": int(status[:3])}}).encode(), status, headers)


def events(*deltas: dict[str, Any], finish: str | None = "stop", usage: bool = True, done: bool = True) -> list[bytes]:
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "served"}
    found = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if finish:
        found.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage:
        found.append({"choices": [], "usage": USAGE})
    lines = [b"data: " + json.dumps(base | event).encode() + b"\n\n" for event in found]
    return lines + [b"data: [DONE]\n\n"] * done


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n" * end


def always(data: bytes, *, close: bool = False) -> Script:
    async def script(number: int, request: dict[str, Any], write: Write) -> None:
        await write(data)
        if close:
            raise EOFError

    return script


def in_turn(*answers: bytes) -> Script:
    """Each request gets the next answer; the last one is repeated."""

    async def script(number: int, request: dict[str, Any], write: Write) -> None:
        await write(answers[min(number, len(answers) - 1)])

    return script


def run(script: Script, use: Callable[[Server], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        async with Server(script).running() as server, asyncio.timeout(20):
            return await use(server)

    return asyncio.run(main())


async def collect(client: BaseChatModel, messages: list[BaseMessage] = ASK, **more: Any) -> list[AIMessageChunk]:
    return [chunk async for chunk in client.astream(messages, **more)]


def total(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


class TestTheSameAsChatOpenAI:
    """The lean client sends what langchain-openai sends, and makes of the answer what it makes."""

    MESSAGES = (
        SystemMessage("be brief"),
        HumanMessage("hello \U0001f600"),
        HumanMessage([{"type": "text", "text": "a block"}]),
        HumanMessage("named", name="ada"),
        AIMessage("", tool_calls=[{"name": "calculator", "args": {"expression": "1+1"}, "id": "call-1"}]),
        AIMessage("with words", tool_calls=[{"name": "calculator", "args": {}, "id": "call-2"}]),
        AIMessage("", invalid_tool_calls=[{"name": "x", "args": "{", "id": "call-3", "error": None}]),
        ToolMessage("2", tool_call_id="call-1", name="calculator"),
        AIMessage("two", usage_metadata={"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}),
        AIMessage("", additional_kwargs={"tool_calls": [CALL | {"index": 0}]}),
    )
    TOOLS = ({"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}},)

    @pytest.mark.parametrize("stream", [False, True])
    def test_requests(self, stream: bool) -> None:
        answer = SSE_HEAD + chunked(*events({"content": "x"})) if stream else http(completion({"content": "x"}))

        async def use(server: Server) -> None:
            settings = {
                "model": "agent-model",
                "base_url": server.url,
                "api_key": SecretStr("secret-key"),
                "temperature": 0.5,
                "max_completion_tokens": 77,
                "use_responses_api": False,
                "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
                "stream_usage": True,
            }
            for client in (ChatOpenAI(**settings), ChatModel(**settings)):
                if stream:
                    await collect(client, list(self.MESSAGES), tools=list(self.TOOLS))
                else:
                    await client.ainvoke(list(self.MESSAGES), tools=list(self.TOOLS))
            theirs, ours = server.requests
            for request in (theirs, ours):
                for message in request["messages"]:
                    for call in message.get("tool_calls", ()):  # white space in JSON is nobody's business
                        text = call["function"]["arguments"]
                        call["function"]["arguments"] = json.loads(text) if text != "{" else text
            theirs.pop("stream", None), ours.pop("stream", None)
            assert ours == theirs
            assert all("authorization: bearer secret-key" in head.lower() for head in server.heads)

        run(always(answer), use)

    @pytest.mark.parametrize(
        "message",
        [
            {"content": "an answer"},
            {"content": None, "tool_calls": [CALL]},
            {"content": "words", "tool_calls": [CALL, CALL | {"id": "call-2"}]},
            {"content": ""},
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_answers(self, message: dict[str, Any], stream: bool) -> None:
        delta = dict(message)
        if "tool_calls" in delta:
            delta["tool_calls"] = [call | {"index": index} for index, call in enumerate(message["tool_calls"])]
        answer = SSE_HEAD + chunked(*events(delta)) if stream else http(completion(message))

        async def use(server: Server) -> None:
            theirs, ours = [
                total(await collect(client)) if stream else await client.ainvoke(ASK)
                for client in (
                    ChatOpenAI(model="m", base_url=server.url, api_key=SecretStr("k"), stream_usage=True),
                    model(server.url),
                )
            ]
            for name in ("content", "tool_calls", "invalid_tool_calls", "type"):
                assert getattr(ours, name) == getattr(theirs, name), name
            assert ours.usage_metadata == theirs.usage_metadata
            assert ours.response_metadata["finish_reason"] == theirs.response_metadata["finish_reason"]
            assert ours.response_metadata["model_name"] == theirs.response_metadata["model_name"] == "served"
            assert ours.id
            assert theirs.id

        run(always(answer), use)


class TestStreams:
    def test_pieces_that_come_apart_are_handed_on_apart(self) -> None:
        pieces = events({"content": "one "}, {"content": "two "}, {"content": "three"})

        async def script(number: int, request: dict[str, Any], write: Write) -> None:
            await write(SSE_HEAD)
            for piece in pieces:
                await write(chunked(piece, end=False))
                await asyncio.sleep(0.05)
            await write(b"0\r\n\r\n")

        chunks = run(script, lambda server: collect(model(server.url)))
        assert [chunk.text for chunk in chunks if chunk.text] == ["one ", "two ", "three"]

    def test_pieces_that_come_together_are_one(self) -> None:
        pieces = events({"content": "one "}, {"content": "two "}, {"content": "three"})
        chunks = run(always(SSE_HEAD + chunked(*pieces)), lambda server: collect(model(server.url)))
        assert [chunk.text for chunk in chunks if chunk.text] == ["one two three"]

    def test_any_cut_of_the_bytes_gives_the_same(self) -> None:
        stream = b"".join(
            [
                b": keep-alive\n\n",
                b"event: message\r\n",
                *(event.replace(b"\n", b"\r\n") for event in events({"content": "gr\u00fc\u00df \U0001f600"}, {})),
            ]
        )

        async def script(number: int, request: dict[str, Any], write: Write) -> None:
            await write(SSE_HEAD)
            for start in range(0, len(stream), 7):
                await write(chunked(stream[start : start + 7], end=False))
                await asyncio.sleep(0)
            await write(b"0\r\n\r\n")

        assert total(run(script, lambda server: collect(model(server.url)))).text == "gr\u00fc\u00df \U0001f600"

    def test_a_tool_call_in_pieces(self) -> None:
        def delta(**call: Any) -> dict[str, Any]:
            return {"tool_calls": [call]}

        pieces = events(
            delta(index=0, id="a", type="function", function={"name": "calculator", "arguments": ""}),
            delta(index=0, function={"arguments": '{"expression": '}),
            delta(index=1, id="b", type="function", function={"name": "current_time", "arguments": ""}),
            delta(index=0, function={"arguments": '"2*3"}'}),
            finish="tool_calls",
        )
        whole = total(run(always(SSE_HEAD + chunked(*pieces)), lambda server: collect(model(server.url))))
        assert [(call["name"], call["args"], call["id"]) for call in whole.tool_calls] == [
            ("calculator", {"expression": "2*3"}, "a"),
            ("current_time", {}, "b"),
        ]

    def test_the_connection_is_kept(self) -> None:
        async def use(server: Server) -> int:
            client = model(server.url)
            for _ in range(3):
                await collect(client)
                await client.ainvoke(ASK)
            return server.connections

        async def script(number: int, request: dict[str, Any], write: Write) -> None:
            stream = request.get("stream")
            await write(SSE_HEAD + chunked(*events({"content": "x"})) if stream else http(completion({"content": "x"})))

        assert run(script, use) == 1

    def test_leaving_early_closes_the_connection(self) -> None:
        """The server sees it and stops generating."""
        gone = asyncio.Event()

        async def script(number: int, request: dict[str, Any], write: Write) -> None:
            await write(SSE_HEAD)
            try:
                while True:
                    await write(chunked(*events({"content": "x"}, finish=None, usage=False, done=False), end=False))
                    await asyncio.sleep(0.01)
            except ConnectionError:
                gone.set()
                raise

        async def use(server: Server) -> None:
            task = asyncio.create_task(collect(model(server.url)))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(gone.wait(), 5)

        run(script, use)


class TestReasoning:
    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
    def test_it_stands_beside_the_answer(self, name: str) -> None:
        answer = run(
            always(http(completion({"content": "4", name: "two and two"}))),
            lambda server: model(server.url).ainvoke(ASK),
        )
        assert answer.text == "4"
        assert answer.additional_kwargs == {"reasoning_content": "two and two"}

    def test_the_model_is_not_shown_it_again(self) -> None:
        async def use(server: Server) -> dict[str, Any]:
            await model(server.url).ainvoke([*ASK, AIMessage("4", additional_kwargs={"reasoning_content": "two and two"}), *ASK])
            return server.requests[-1]

        sent = run(always(http(completion({"content": "4"}))), use)
        assert sent["messages"][2] == {"role": "assistant", "content": "4"}

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
    def test_a_stream_tells_once_that_the_model_thinks(self, name: str) -> None:
        told: list[dict[str, str]] = []

        async def use(server: Server) -> list[AIMessageChunk]:
            TURN.set(Turn(asyncio.get_running_loop().time() + 10, told.append))
            return await collect(model(server.url))

        chunks = run(always(SSE_HEAD + chunked(*events({name: "two"}, {name: "and"}, {"content": "4"}))), use)
        assert total(chunks).text == "4"
        assert total(chunks).additional_kwargs == {"reasoning_content": "twoand"}
        assert told == [{"type": "status", "state": "thinking"}]


GARBAGE = {
    "html": http(b"<html>not JSON"),
    "half a surrogate pair": http(b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "no choices": http(b'{"choices": []}'),
    "null choices": http(b'{"choices": null}'),
    "a list": http(b"[]"),
    "a number for text": http(completion({"content": 7})),
    "arguments that are no JSON": http(completion({"content": None, "tool_calls": [CALL | {"function": {"name": "x", "arguments": "{oops"}}]})),
    "half of the arguments": http(completion({"content": None, "tool_calls": [CALL | {"function": {"name": "x", "arguments": '{"a": 1'}}]})),
    "arguments that are a list": http(completion({"content": None, "tool_calls": [CALL | {"function": {"name": "x", "arguments": "[1]"}}]})),
    "a call without a name": http(completion({"content": None, "tool_calls": [{"id": "a", "function": {}}]})),
    "deep": http(b'{"choices":' + b"[" * 100_000),
    "a huge number": http(b'{"choices": 1e999999999}'),
    "a redirect": error("302 Found", headers="Location: http://127.0.0.1:1/\r\n"),
    "400": error("400 Bad Request"),
    "401": error("401 Unauthorized"),
    "404": error("404 Not Found"),
}
STREAMED_GARBAGE = {
    "no JSON": SSE_HEAD + chunked(b"data: <html>\n\n"),
    "a number for text": SSE_HEAD + chunked(*events({"content": 7})),
    "half of the arguments": SSE_HEAD
    + chunked(
        *events({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "x", "arguments": '{"a": 1'}}]}),
    ),
    "index is a text": SSE_HEAD + chunked(*events({"tool_calls": [{"index": "x", "function": {}}]})),
    "the server's words": SSE_HEAD + chunked(b'data: {"error": {"message": "no", "code": 400}}\n\n'),
}
UNAVAILABLE = {
    "500": error("500 Internal Server Error"),
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "a huge head": b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 20_000,
    "closed at once": b"",
    "closed in the body": http(completion({"content": "x"}))[:-20],
    "closed in a chunk": SSE_HEAD + b"ff\r\nabc",
}


class TestFailures:
    @pytest.mark.parametrize("kind", GARBAGE)
    def test_garbage_fails_at_once(self, kind: str) -> None:
        async def use(server: Server) -> int:
            await _fails(model(server.url).ainvoke(ASK), ModelFailed)
            return len(server.requests)

        assert run(always(GARBAGE[kind], close=True), use) == 1

    @pytest.mark.parametrize("kind", STREAMED_GARBAGE)
    def test_garbage_in_a_stream_fails_at_once(self, kind: str) -> None:
        async def use(server: Server) -> int:
            await _fails(collect(model(server.url)), ModelFailed)
            return len(server.requests)

        assert run(always(STREAMED_GARBAGE[kind], close=True), use) == 1

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("kind", UNAVAILABLE)
    def test_a_broken_exchange_is_repeated_once(self, kind: str, stream: bool) -> None:
        async def use(server: Server) -> int:
            client = model(server.url)
            await _fails(collect(client) if stream else client.ainvoke(ASK), ModelUnavailable)
            return len(server.requests)

        assert run(always(UNAVAILABLE[kind], close=True), use) == 2

    def test_the_second_attempt_may_succeed(self) -> None:
        script = in_turn(error("500 Internal Server Error"), http(completion({"content": "x"})))
        assert run(script, lambda server: model(server.url).ainvoke(ASK)).text == "x"

    def test_nothing_is_repeated_after_the_first_token(self) -> None:
        answer = SSE_HEAD + chunked(*events({"content": "half"}, finish=None, usage=False, done=False), end=False)

        async def use(server: Server) -> tuple[list[str], int]:
            seen = []
            with pytest.raises(ModelUnavailable):  # noqa: PT012  what came before the failure counts
                async for chunk in model(server.url).astream(ASK):
                    seen.append(chunk.text)
            return seen, len(server.requests)

        assert run(always(answer, close=True), use) == (["half"], 1)

    @pytest.mark.parametrize("done", [True, False])
    def test_a_stream_must_end_properly(self, done: bool) -> None:
        answer = SSE_HEAD + chunked(*events({"content": "half"}, finish=None, usage=False, done=done))
        if done:
            assert total(run(always(answer), lambda server: collect(model(server.url)))).text == "half"
        else:
            run(always(answer), lambda server: _fails(collect(model(server.url)), ModelUnavailable))

    def test_a_kept_connection_that_died_is_not_noticed(self) -> None:
        async def use(server: Server) -> int:
            client = model(server.url)
            for _ in range(3):
                assert (await client.ainvoke(ASK)).text == "x"
                await asyncio.sleep(0.05)
            return server.connections

        assert run(always(http(completion({"content": "x"})), close=True), use) == 3

    @pytest.mark.parametrize("stream", [False, True])
    def test_endless_answers_are_cut_off(self, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("agent.llm.answers.MAX_ANSWER_BYTES", 1 << 20)

        async def script(number: int, request: dict[str, Any], write: Write) -> None:
            await write(SSE_HEAD)
            while True:
                await write(chunked(b"x" * 60_000, end=False))

        def use(server: Server) -> Coroutine[Any, Any, Any]:
            client = model(server.url)
            return _fails(collect(client) if stream else client.ainvoke(ASK), ModelFailed)

        run(script, use)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_trickle_can_be_cancelled(self, stream: bool) -> None:
        async def script(number: int, request: dict[str, Any], write: Write) -> None:
            for byte in SSE_HEAD + chunked(*events({"content": "x" * 1000})):
                await write(bytes([byte]))
                await asyncio.sleep(0.2)

        async def use(server: Server) -> None:
            client = model(server.url)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await (collect(client) if stream else client.ainvoke(ASK))

        run(script, use)

    @pytest.mark.parametrize(
        ("message", "limit"),
        [
            ("This model's maximum context length is 8192 tokens. However, you requested 9000 tokens.", 8192),
            ("The decoder prompt (length 9000) is longer than the maximum model length of 4096.", 4096),
            ("Input tokens exceed the configured limit of 272000 tokens.", None),
            ("context_length_exceeded", None),
            ("the request exceeds the available context size, try increasing it", None),
            ("prompt is too long: 9000 tokens", None),
        ],
    )
    @pytest.mark.parametrize("status", ["400 Bad Request", "413 Payload Too Large"])
    def test_a_prompt_that_is_too_long_is_told_apart(self, message: str, limit: int | None, status: str) -> None:
        async def use(server: Server) -> ContextOverflow:
            with pytest.raises(ContextOverflow) as overflow:
                await model(server.url).ainvoke(ASK)
            assert len(server.requests) == 1
            return overflow.value

        assert run(always(error(status, message)), use).limit == limit

    def test_errors_are_logged_without_their_text(self, caplog: pytest.LogCaptureFixture) -> None:
        run(
            always(error("400 Bad Request", "the user said: canary")),
            lambda server: _fails(model(server.url).ainvoke(ASK), ModelFailed),
        )
        assert next(record.__dict__ for record in caplog.records if record.name == "agent.llm.model")["status"] == 400
        assert "canary" not in str([vars(record) for record in caplog.records])


async def _fails(awaitable: Awaitable[Any], kind: type[Exception]) -> None:
    with pytest.raises(kind) as failure:
        await awaitable
    assert type(failure.value) is kind


class TestTheHold:
    @pytest.mark.parametrize("status", ["429 Too Many Requests", "502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_model_that_comes_back_in_time(self, status: str, stream: bool) -> None:
        told: list[dict[str, str]] = []
        answer = SSE_HEAD + chunked(*events({"content": "x"})) if stream else http(completion({"content": "x"}))

        async def use(server: Server) -> str:
            TURN.set(Turn(asyncio.get_running_loop().time() + 10, told.append))
            client = model(server.url, hold_seconds=5)
            return total(await collect(client)).text if stream else (await client.ainvoke(ASK)).text

        assert run(in_turn(error(status), error(status), answer), use) == "x"
        assert told == [{"type": "status", "state": "waiting", "message": "waiting for the model"}]

    def test_a_server_that_is_started_later(self) -> None:
        async def main() -> str:
            server = Server(always(http(completion({"content": "x"}))))
            asked = asyncio.create_task(model(server.url, hold_seconds=10).ainvoke(ASK))
            await asyncio.sleep(1)
            async with server.running():
                return (await asked).text

        assert asyncio.run(main()) == "x"

    @pytest.mark.parametrize(("hold", "deadline", "least", "most"), [(1, 60, 0.9, 2), (60, 3, 1.5, 2.8), (0, 60, 0, 1)])
    def test_it_ends(self, hold: float, deadline: float, least: float, most: float) -> None:
        """With the hold time or a second before the turn's own end, whichever comes first."""

        async def main() -> ModelUnavailable:
            TURN.set(Turn(asyncio.get_running_loop().time() + deadline, lambda event: None))
            with pytest.raises(ModelUnavailable) as failure:
                await model(f"http://127.0.0.1:{free_port()}/v1", hold_seconds=hold).ainvoke(ASK)
            return failure.value

        started = time.monotonic()
        failure = asyncio.run(main())
        assert least <= time.monotonic() - started <= most
        assert (failure.status, failure.retry_after) == (503, 5)

    def test_retry_after_is_respected(self) -> None:
        script = in_turn(error("429 Too Many Requests", headers="Retry-After: 1\r\n"), http(completion({"content": "x"})))
        started = time.monotonic()
        run(script, lambda server: model(server.url, hold_seconds=5).ainvoke(ASK))
        assert time.monotonic() - started >= 1


def test_an_address_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listening socket whose queue is full drops what comes, as a firewall does."""
    monkeypatch.setattr("agent.wire.CONNECT_SECONDS", 0.5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        started = time.monotonic()
        with pytest.raises(ModelUnavailable):
            asyncio.run(model(f"http://127.0.0.1:{listener.getsockname()[1]}/v1").ainvoke(ASK))
        assert time.monotonic() - started < 2
        for filler in fillers:
            filler.close()


class TestToolCallIds:
    def test_missing_and_double_ids_are_replaced(self) -> None:
        call = {"type": "function", "function": {"name": "x", "arguments": ""}}
        calls = [call, call | {"id": "a"}, call | {"id": "a"}]
        answer = run(
            always(http(completion({"content": None, "tool_calls": calls}))),
            lambda server: model(server.url).ainvoke(ASK),
        )
        ids = [call["id"] for call in answer.tool_calls]
        assert len(set(ids)) == 3
        assert all(ids)
        assert ids[1] == "a"

    def test_nul_goes(self) -> None:
        answer = run(always(http(completion({"content": "a\0b"}))), lambda server: model(server.url).ainvoke(ASK))
        assert answer.text == "ab"


@pytest.mark.parametrize("name", ["localhost", "another.example"])
def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The certificate must be of the host that was asked for."""
    certificate, key = tmp_path / "certificate", tmp_path / "key"
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    options += ["-addext", f"subjectAltName=DNS:{name}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([find_program("openssl", "openssl"), "req", "-x509", *options], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)

    async def main() -> str:
        server = Server(always(http(completion({"content": "x"}))))
        listening = await asyncio.start_server(server.serve, "127.0.0.1", server.port, ssl=tls)
        try:
            client = model(f"https://localhost:{server.port}/v1")
            await client.ainvoke(ASK)
            return (await client.ainvoke(ASK)).text + str(server.connections)
        finally:
            listening.close()

    if name == "localhost":
        assert asyncio.run(main()) == "x1"
    else:
        with pytest.raises(ModelUnavailable):
            asyncio.run(main())
        assert "ConnectError: SSLCertVerificationError" in [vars(record).get("error") for record in caplog.records]


@pytest.fixture(scope="module")
def guarded() -> Any:
    server = Model(api_key="the-key")
    yield server
    server.remove()


@pytest.mark.parametrize(("key", "works"), [("the-key", True), ("another", False)])
def test_settings_alone_choose_the_server(guarded: Model, tmp_path: Path, key: str, works: bool) -> None:
    for name, text in (("secret", "x"), ("key", key)):
        (tmp_path / name).write_text(text)
    settings = Settings.from_environment(
        {
            **secret_files(tmp_path / "secret"),
            "AGENT_MODEL_BASE_URL": f"{guarded.url}/v1",
            "AGENT_MODEL_API_KEY_FILE": str(tmp_path / "key"),
            "AGENT_MODEL_EXTRA_BODY": '{"chat_template_kwargs": {"enable_thinking": false}}',
            "AGENT_TEMPERATURE": "",
        }
    )
    asked = create_model(settings).ainvoke(ASK)
    if works:
        assert "hello" in asyncio.run(_text(asked))
        request = guarded.requests()[-1]
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
        assert "temperature" not in request
        assert request["max_completion_tokens"] == 1024
    else:
        asyncio.run(_fails(asked, ModelFailed))


async def _text(awaitable: Awaitable[AIMessage]) -> str:
    return (await awaitable).text

"""The run of a completion, told in OpenAI's words."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Response

from agent.api.answers import Json, dump
from agent.api.openai_errors import MODEL, ApprovalNeeded, describe, openai_error
from agent.errors import ServiceError
from agent.runs.events import Event
from agent.runs.followers import Followers
from agent.runs.records import Run, failure_of


@dataclass(slots=True)
class Piece:
    """Something more of the answer."""

    text: str = ""
    reasoning: str = ""
    calls: Sequence[dict[str, Any]] = ()
    logprobs: Sequence[Any] = ()

    @property
    def delta(self) -> dict[str, Any]:
        """As a stream tells it."""
        delta: dict[str, Any] = {"content": self.text} if self.text else {}
        if self.reasoning:
            delta["reasoning_content"] = self.reasoning
        if self.calls:
            delta["tool_calls"] = list(self.calls)
        return delta


class Answering:
    """All that the agent says, a blank line between what it says before and after it uses a tool of its own."""

    def __init__(self, followers: Followers, run: Run) -> None:
        self._followers = followers
        self._run = run
        self._head = {"id": f"chatcmpl-{run.run_id}", "created": int(run.created_at.timestamp()), "model": MODEL}
        self._theirs = run.options.client_tools
        self._speaking: str | None = None
        self._thinking: str | None = None
        self._called = 0
        self.reason = "stop"
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    async def answer(self) -> Response:
        try:
            whole = await self.whole()
        except ServiceError as error:
            return openai_error(error)
        message: dict[str, Any] = {"role": "assistant", "content": whole.text, "refusal": None}
        if whole.calls:
            message |= {"content": whole.text or None, "tool_calls": [{name: call[name] for name in call if name != "index"} for call in whole.calls]}
        if whole.reasoning:
            message["reasoning_content"] = whole.reasoning
        choice = {"index": 0, "message": message, "finish_reason": self.reason, "logprobs": _logprobs(whole)}
        return Json({**self._head, "object": "chat.completion", "choices": [choice], "usage": self.usage})

    async def whole(self) -> Piece:
        """The answer in one piece. Raises ServiceError."""
        pieces = [piece async for piece in self.pieces()]
        return Piece(
            "".join(piece.text for piece in pieces),
            "".join(piece.reasoning for piece in pieces),
            [call for piece in pieces for call in piece.calls],
            [token for piece in pieces for token in piece.logprobs],
        )

    async def chunks(self, *, with_usage: bool) -> AsyncGenerator[bytes]:
        usage = {"usage": None} if with_usage else {}
        yield self._chunk({"role": "assistant", "content": "", "refusal": None}, None, usage)
        try:
            async with aclosing(self.pieces()) as pieces:
                async for piece in pieces:
                    yield self._chunk(piece.delta, None, usage, _logprobs(piece))
        except ServiceError as error:
            yield b"data: %s\n\n" % dump(describe(error))
        else:
            yield self._chunk({}, self.reason, usage)
            if with_usage:
                last = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage}
                yield b"data: %s\n\n" % dump(last)
        yield b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None, more: dict[str, Any], logprobs: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice], **more}
        return b"data: %s\n\n" % dump(chunk)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The answer as it comes about. Raises ServiceError where it ends without one."""
        spoke = False
        async with aclosing(self._followers.events(self._run.owner, self._run.run_id)) as events:
            async for event in events:
                for piece in self._pieces(event):
                    spoke = True
                    yield piece
                if event.event == "error":
                    raise failure_of(event.data)
                if event.event == "end":
                    if event.data.get("interrupts"):
                        raise ApprovalNeeded
                    if not spoke:  # told by another worker, which has only what is kept of a run
                        calls = self._calls(event.data.get("tool_calls") or ())
                        yield Piece(event.data.get("response") or "", calls=calls)

    def _pieces(self, event: Event) -> Iterator[Piece]:
        match event.event:
            case "messages":
                yield from self._say(event.data[0])
            case "updates":
                for update in event.data.values():
                    for message in (update or {}).get("messages", ()) if isinstance(update, dict) else ():
                        yield from self._say(message)
            case "usage":
                self.usage = {
                    "prompt_tokens": event.data["input_tokens"],
                    "completion_tokens": event.data["output_tokens"],
                    "total_tokens": event.data["total_tokens"],
                }

    def _say(self, message: dict[str, Any]) -> Iterator[Piece]:
        if message["type"] not in ("ai", "AIMessageChunk"):
            return
        metadata = message["response_metadata"]
        reason = metadata.get("finish_reason")
        if reason and not self._called:
            self.reason = reason if reason in ("length", "content_filter") else "stop"
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if text:
            apart = self._speaking not in (None, message["id"])
            self._speaking = message["id"]
            text = f"\n\n{text}" if apart else text
        thought = message["additional_kwargs"].get("reasoning_content") or ""
        if thought:
            apart = self._thinking not in (None, message["id"])
            self._thinking = message["id"]
            thought = f"\n\n{thought}" if apart else thought
        calls = self._calls(message.get("tool_calls") or ())
        logprobs = (metadata.get("logprobs") or {}).get("content") or ()
        if text or thought or calls or logprobs:
            yield Piece(text, thought, calls, logprobs)

    def _calls(self, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the caller's tools. What the agent does with its own is its own affair."""
        told = []
        for call in calls:
            if call["name"] in self._theirs:
                function = {"name": call["name"], "arguments": orjson.dumps(call["args"]).decode()}
                told.append({"index": self._called, "id": call["id"], "type": "function", "function": function})
                self._called += 1
                self.reason = "tool_calls"
        return told


def _logprobs(piece: Piece) -> dict[str, Any] | None:
    return {"content": list(piece.logprobs), "refusal": None} if piece.logprobs else None

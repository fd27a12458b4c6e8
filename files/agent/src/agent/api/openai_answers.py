"""The run of a completion, told in OpenAI's words."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import Response

from agent.api.answers import Json, dump
from agent.api.openai_errors import MODEL, ApprovalNeeded, describe, openai_error
from agent.errors import ServiceError
from agent.runs.events import Event
from agent.runs.followers import Followers
from agent.runs.records import Run, failure_of


class Answering:
    """The run of a completion, told in OpenAI's words."""

    def __init__(self, followers: Followers, run: Run) -> None:
        self._followers = followers
        self._run = run
        self._head = {"id": f"chatcmpl-{run.run_id}", "created": int(run.created_at.timestamp()), "model": MODEL}
        self._speaking: str | None = None
        self._reason = "stop"
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    async def answer(self) -> Response:
        try:
            text = "".join([piece async for piece in self._text()])
        except ServiceError as error:
            return openai_error(error)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": self._reason, "logprobs": None}
        return Json({**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage})

    async def chunks(self, *, with_usage: bool) -> AsyncGenerator[bytes]:
        usage = {"usage": None} if with_usage else {}
        yield self._chunk({"role": "assistant", "content": "", "refusal": None}, None, usage)
        try:
            async with aclosing(self._text()) as pieces:
                async for piece in pieces:
                    yield self._chunk({"content": piece}, None, usage)
        except ServiceError as error:
            yield b"data: %s\n\n" % dump(describe(error))
        else:
            yield self._chunk({}, self._reason, usage)
            if with_usage:
                last = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage}
                yield b"data: %s\n\n" % dump(last)
        yield b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None, more: dict[str, Any]) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice], **more}
        return b"data: %s\n\n" % dump(chunk)

    async def _text(self) -> AsyncGenerator[str]:
        """All that the agent says, a blank line between what it says before and after it uses a tool."""
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
                    if not spoke and event.data.get("response"):
                        yield event.data["response"]  # told by another worker, which has only this

    def _pieces(self, event: Event) -> Iterator[str]:
        match event.event:
            case "messages":
                yield from self._say(event.data[0])
            case "updates":
                for update in event.data.values():
                    for message in (update or {}).get("messages", ()) if isinstance(update, dict) else ():
                        yield from self._say(message)
            case "usage":
                self._usage = {
                    "prompt_tokens": event.data["input_tokens"],
                    "completion_tokens": event.data["output_tokens"],
                    "total_tokens": event.data["total_tokens"],
                }

    def _say(self, message: dict[str, Any]) -> Iterator[str]:
        if message["type"] not in ("ai", "AIMessageChunk"):
            return
        reason = message["response_metadata"].get("finish_reason")
        if reason:
            self._reason = reason if reason in ("length", "content_filter") else "stop"
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if text:
            if self._speaking not in (None, message["id"]):
                yield "\n\n"
            self._speaking = message["id"]
            yield text

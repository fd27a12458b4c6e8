"""A run told in the words of OpenAI's Responses API."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import Response as HttpResponse

from agent.api.answers import Json, sse
from agent.api.openai_answers import Answering, Piece
from agent.api.openai_errors import MODEL, describe, openai_error
from agent.errors import ServiceError
from agent.runs.records import Run, failure_of

# What the reasons to stop are called here.
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
STATUSES = {"pending": "queued", "running": "in_progress", "success": "completed", "interrupted": "cancelled"}


def describe_response(
    run: Run,
    status: str,
    *,
    output: Sequence[dict[str, Any]] = (),
    usage: dict[str, int] | None = None,
    reason: str = "stop",
    error: ServiceError | None = None,
    asked: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A response. `asked` is what is told back of the request; of a stored one that is not known any more."""
    incomplete = INCOMPLETE.get(reason) if status == "completed" else None
    told = describe(error)["error"] if error else None
    return {
        "id": f"resp_{run.run_id}",
        "object": "response",
        "created_at": int(run.created_at.timestamp()),
        "model": MODEL,
        "status": "incomplete" if incomplete else status,
        "error": {"code": _error_code(told["code"]), "message": told["message"]} if told else None,
        "incomplete_details": {"reason": incomplete} if incomplete else None,
        "instructions": None,
        "metadata": {name: value for name, value in run.metadata.items() if name != "user"},
        "output": list(output),
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": _usage(usage) if usage else None,
        **(asked or {}),
    }


def _error_code(code: str) -> str:
    """The code as OpenAI's clients know it."""
    return {"rate_limited": "rate_limit_exceeded", "context_length_exceeded": "invalid_prompt"}.get(code, "server_error")


def _usage(usage: dict[str, int]) -> dict[str, Any]:
    return {
        "input_tokens": usage["input_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage["output_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def stored_response(run: Run) -> dict[str, Any]:
    """A response as it is kept, which is its text, its calls of the caller's tools, and what it cost."""
    if run.status in ("error", "timeout"):
        return describe_response(run, "failed", error=failure_of(run.error or {}))
    result = run.result or {}
    items = Items(run)
    if run.status == "success":
        for _ in items.take(Piece(result.get("response", ""), calls=calls_of(result.get("tool_calls") or ()))):
            pass
        for _ in items.close():
            pass
    return describe_response(run, STATUSES[run.status], output=items.done, usage=result.get("usage"))


def calls_of(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls as a piece of an answer has them."""
    return [
        {"index": index, "id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": orjson.dumps(call["args"]).decode()}}
        for index, call in enumerate(calls)
    ]


class Items:
    """The output of a response while it comes about: reasoning, messages and calls, each an item of its own."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.done: list[dict[str, Any]] = []
        self._open: str | None = None
        self._text = ""
        self._logprobs: list[Any] = []

    def take(self, piece: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events that tell of it."""
        if piece.reasoning:
            yield from self._write("reasoning", piece.reasoning, ())
        if piece.text:
            yield from self._write("message", piece.text, piece.logprobs)
        for call in piece.calls:
            yield from self.close()
            item = {"type": "function_call", "id": self._id("fc"), "call_id": call["id"], **call["function"], "status": "completed"}
            place = {"item_id": item["id"], "output_index": len(self.done)}
            yield self._added({**item, "arguments": "", "status": "in_progress"})
            yield "response.function_call_arguments.delta", {**place, "delta": item["arguments"]}
            yield "response.function_call_arguments.done", {**place, "name": item["name"], "arguments": item["arguments"]}
            yield from self._end(item)

    def close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events that end the item that is being written."""
        if self._open == "message":
            place = {"item_id": self._id("msg"), "output_index": len(self.done), "content_index": 0}
            yield "response.output_text.done", {**place, "text": self._text, "logprobs": self._logprobs}
            yield "response.content_part.done", {**place, "part": self._part()}
            yield from self._end(self._message("completed", [self._part()]))
        elif self._open == "reasoning":
            place = {"item_id": self._id("rs"), "output_index": len(self.done), "content_index": 0}
            yield "response.reasoning_text.done", {**place, "text": self._text}
            content = [{"type": "reasoning_text", "text": self._text}]
            yield from self._end({"type": "reasoning", "id": self._id("rs"), "summary": [], "content": content})
        self._open, self._text, self._logprobs = None, "", []

    def _write(self, kind: str, text: str, logprobs: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._open != kind:
            yield from self.close()
            self._open = kind
            if kind == "message":
                yield self._added(self._message("in_progress", []))
                place = {"item_id": self._id("msg"), "output_index": len(self.done), "content_index": 0}
                yield "response.content_part.added", {**place, "part": self._part()}
            else:
                yield self._added({"type": "reasoning", "id": self._id("rs"), "summary": []})
        self._text += text
        self._logprobs += logprobs
        place = {"item_id": self._id("msg" if kind == "message" else "rs"), "output_index": len(self.done), "content_index": 0}
        if kind == "message":
            yield "response.output_text.delta", {**place, "delta": text, "logprobs": list(logprobs)}
        else:
            yield "response.reasoning_text.delta", {**place, "delta": text}

    def _id(self, kind: str) -> str:
        return f"{kind}_{self._run.run_id}_{len(self.done)}"

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._logprobs}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": self._id("msg"), "role": "assistant", "status": status, "content": content}

    def _added(self, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "response.output_item.added", {"output_index": len(self.done), "item": item}

    def _end(self, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "response.output_item.done", {"output_index": len(self.done), "item": item}
        self.done.append(item)


class Responding:
    """The answer to a request for a response. `asked` is what is told back of the request."""

    def __init__(self, answering: Answering, run: Run, asked: dict[str, Any]) -> None:
        self._answering = answering
        self._run = run
        self._asked = asked
        self._items = Items(run)

    async def answer(self) -> HttpResponse:
        try:
            whole = await self._answering.whole()
        except ServiceError as error:
            return openai_error(error)
        for _ in (*self._items.take(whole), *self._items.close()):
            pass
        return Json(self._response("completed"))

    async def events(self) -> AsyncGenerator[bytes]:
        number = 0
        async with aclosing(self._events()) as events:
            async for name, data in events:
                yield sse(name, {"type": name, "sequence_number": number, **data})
                number += 1

    async def _events(self) -> AsyncGenerator[tuple[str, dict[str, Any]]]:
        for name in ("response.created", "response.in_progress"):
            yield name, {"response": self._response("in_progress")}
        try:
            async with aclosing(self._answering.pieces()) as pieces:
                async for piece in pieces:
                    for event in self._items.take(piece):
                        yield event
        except ServiceError as error:
            yield "response.failed", {"response": self._response("failed", error)}
            return
        for event in self._items.close():
            yield event
        last = self._response("completed")
        yield f"response.{last['status']}", {"response": last}

    def _response(self, status: str, error: ServiceError | None = None) -> dict[str, Any]:
        usage = {name.replace("prompt", "input").replace("completion", "output"): value for name, value in self._answering.usage.items()}
        return describe_response(
            self._run,
            status,
            output=self._items.done,
            usage=usage if status == "completed" else None,
            reason=self._answering.reason,
            error=error,
            asked=self._asked,
        )

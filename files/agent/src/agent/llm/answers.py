"""The model's answers, read: whole ones, and streams of pieces."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import orjson
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCall, tool_call_chunk

from agent.llm.turn import TURN
from agent.wire import BrokenError, TooLargeError

MAX_ANSWER_BYTES = 16 << 20
REASONING = "reasoning_content"


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, text: str = "", retry_after: float | None = None, *, images: bool = False) -> None:
        super().__init__(f"status {status}")
        # Whether the request had any.
        self.images = images
        self.status = status
        self.text = text
        self.retry_after = retry_after


class Garbage(Exception):
    """What the server sent is no answer."""


def read_message(body: bytes) -> AIMessage:
    try:
        answer = orjson.loads(body)
        choice = answer["choices"][0]
        sent = choice["message"]
        text = _text(sent.get("content"))
        metadata = _metadata(answer.get("model"), choice.get("finish_reason"))
        if choice.get("logprobs"):
            metadata["logprobs"] = choice["logprobs"]
        calls = [_Call(call.get("id"), call["function"]["name"], call["function"].get("arguments")) for call in sent.get("tool_calls") or ()]
        return AIMessage(
            content=text,
            additional_kwargs=_thought(_reasoning(sent)),
            id=f"lc_run--{uuid4()}",
            tool_calls=_tool_calls(calls),
            usage_metadata=_usage(answer.get("usage")),
            response_metadata=metadata,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Garbage from error


@dataclass(slots=True)
class _Call:
    """A tool call as the model writes it: the arguments are JSON in a string, in a stream piece by piece."""

    id: str | None = None
    name: str = ""
    arguments: str | None = ""


@dataclass(slots=True)
class Piece:
    """What came of an answer at once."""

    text: str = ""
    reasoning: str = ""
    logprobs: list[Any] = field(default_factory=list)

    def chunk(self) -> AIMessageChunk:
        metadata = {"logprobs": {"content": self.logprobs}} if self.logprobs else {}
        return AIMessageChunk(content=self.text, additional_kwargs=_thought(self.reasoning), response_metadata=metadata)

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.logprobs)


class AnswerStream:
    """Reads server-sent events: text and reasoning as they come, everything else once it is complete."""

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""
        self._received = 0
        self._thinking = False
        self._calls: dict[int, _Call] = {}
        self._finish_reason: Any = None
        self._model: Any = None
        self._usage: Any = None

    def feed(self, data: bytes) -> Piece:
        """Take what the network delivered and return what is new in it."""
        self._received += len(data)
        if self._received > MAX_ANSWER_BYTES:
            raise TooLargeError
        *lines, self._rest = (self._rest + data).split(b"\n")
        piece = Piece()
        for line in lines:
            if line.startswith(b"data:") and not self.ended:  # the others are comments, event names and empty
                value = line[5:].strip()
                if value == b"[DONE]":
                    self.ended = True
                else:
                    try:
                        self._event(orjson.loads(value), piece)
                    except (ValueError, LookupError, TypeError, AttributeError) as error:
                        raise Garbage from error
        return piece

    def _event(self, event: dict[str, Any], piece: Piece) -> None:
        if error := event.get("error"):
            code = error.get("code") if isinstance(error, dict) else None
            raise Refused(code if isinstance(code, int) else 500, str(error))
        self._usage = event.get("usage") or self._usage
        self._model = event.get("model") or self._model
        choices = event.get("choices")
        if not choices:
            return
        self._finish_reason = choices[0].get("finish_reason") or self._finish_reason
        delta = choices[0].get("delta") or {}
        for position, part in enumerate(delta.get("tool_calls") or ()):
            call = self._calls.setdefault(int(part.get("index", position)), _Call())
            function = part.get("function") or {}
            call.id = part.get("id") or call.id
            call.name += function.get("name") or ""
            call.arguments = (call.arguments or "") + (function.get("arguments") or "")
        if thought := _reasoning(delta):
            piece.reasoning += thought
            if not self._thinking:
                self._thinking = True
                if turn := TURN.get():
                    turn.notify({"type": "status", "state": "thinking"})
        if choices[0].get("logprobs"):
            piece.logprobs += choices[0]["logprobs"].get("content") or ()
        piece.text += _text(delta.get("content"))

    def last_chunk(self) -> AIMessageChunk:
        """What is known at the end: the tool calls, the usage, and why the model stopped."""
        if not self.ended and self._finish_reason is None:
            raise BrokenError("the stream ended in the middle of the answer")
        try:
            calls = _tool_calls([self._calls[index] for index in sorted(self._calls)])
            usage = _usage(self._usage)
            metadata = _metadata(self._model, self._finish_reason)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Garbage from error
        return AIMessageChunk(
            content="",
            tool_call_chunks=[
                tool_call_chunk(name=call["name"], args=orjson.dumps(call["args"]).decode(), id=call["id"], index=index) for index, call in enumerate(calls)
            ],
            usage_metadata=usage,
            response_metadata=metadata,
            chunk_position="last",
        )


def _text(content: Any) -> str:
    if content is None:
        return ""
    if not isinstance(content, str):
        raise TypeError("content is no text")
    return content.replace("\0", "")  # which Postgres could not store


def _reasoning(sent: dict[str, Any]) -> str:
    """What the model thought, under the name of the server's release."""
    return _text(sent.get("reasoning_content") or sent.get("reasoning"))


def _thought(reasoning: str) -> dict[str, Any]:
    """Where LangChain's clients look for it. It is told and kept, and the model is not shown it again."""
    return {REASONING: reasoning} if reasoning else {}


def _tool_calls(calls: Sequence[_Call]) -> list[ToolCall]:
    """The calls with their arguments read strictly: half an argument list is never run."""
    seen: set[str] = set()
    result = []
    for call in calls:
        arguments = orjson.loads(call.arguments) if call.arguments else {}  # a call without any may be written so
        if not isinstance(arguments, dict) or not isinstance(call.name, str) or not call.name:
            raise TypeError("not a tool call")
        identity = call.id if isinstance(call.id, str) and call.id and call.id not in seen else f"call_{uuid4().hex}"
        seen.add(identity)
        result.append(ToolCall(name=call.name, args=arguments, id=identity, type="tool_call"))
    return result


def _usage(usage: Any) -> UsageMetadata | None:
    if not usage:
        return None
    prompt, completion = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    metadata = UsageMetadata(input_tokens=prompt, output_tokens=completion, total_tokens=prompt + completion)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    if cached is not None:
        metadata["input_token_details"] = InputTokenDetails(cache_read=int(cached))
    if reasoning is not None:
        metadata["output_token_details"] = OutputTokenDetails(reasoning=int(reasoning))
    return metadata


def _metadata(model: Any, finish_reason: Any) -> dict[str, Any]:
    return {"finish_reason": _text(finish_reason), "model_name": _text(model), "model_provider": "openai"}

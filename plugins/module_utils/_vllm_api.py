# Copyright: the selfhosted.agent_stack maintainers
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause
"""Judging a vLLM server by its answers. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TOOL = "report_number"
TOOL_PROMPT = f"Call the tool {TOOL} with the number 7. Do not answer in words."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "Report a number to the operator.",
            "parameters": {"type": "object", "properties": {"number": {"type": "integer", "description": "The number."}}, "required": ["number"]},
        },
    }
]
# Of all histograms only this one moves with every step of the engine, also while nothing has been finished yet.
STEPS, STEP_TOKENS, RUNNING = "vllm:iteration_tokens_total_count", "vllm:iteration_tokens_total_sum", "vllm:num_requests_running"
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})?\s+(\S+)", re.MULTILINE)


class ApiError(ValueError):
    """An answer that a healthy server does not give; the message says what was wrong."""


@dataclass(frozen=True)
class Progress:
    """How far the engines of a server have come, and how many requests they work on."""

    steps: float
    tokens: float
    running: float

    def moved_since(self, earlier: Progress) -> bool:
        """A count that is smaller than before is that of an engine which was restarted."""
        return (self.steps, self.tokens) != (earlier.steps, earlier.tokens)


def chat_request(model: str, max_tokens: int) -> bytes:
    """Return the body of the smallest chat completion that proves that the engine generates."""
    return _request(model, "Say yes.", max_tokens)


def golden_request(model: str, prompt: str, max_tokens: int) -> bytes:
    """Return the body of a chat completion that asks a question of the user's."""
    return _request(model, prompt, max_tokens)


def golden_answer(body: bytes, prompt: str, expect: str) -> None:
    """Raise ApiError unless the answer contains what the regular expression describes."""
    completion_tokens(body)
    message = json.loads(body)["choices"][0].get("message") or {}
    answer = str(message.get("content") or "")
    if not re.search(expect, answer, re.IGNORECASE):
        raise ApiError(f"the answer to {prompt[:80]!r} was {answer[:120]!r}, in which {expect!r} is not found")


def tool_request(model: str, prompt: str, max_tokens: int, *, stream: bool) -> bytes:
    """Return the body of a chat completion that a model with tools answers with a call."""
    return _request(model, prompt or TOOL_PROMPT, max_tokens, tools=TOOLS, tool_choice="auto", stream=stream)


def _request(model: str, prompt: str, max_tokens: int, **more: Any) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0, **more}
    return json.dumps(body).encode()


def served_models(body: bytes) -> list[str]:
    """Return the ids from an answer to `GET /v1/models`. Raises ApiError."""
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ApiError(f"/v1/models did not answer with a list of models: {error!r}") from error


def completion_tokens(body: bytes) -> int:
    """Return how many tokens a chat completion holds. Raises ApiError if it holds none."""
    try:
        answer: dict[str, Any] = json.loads(body)
        tokens = int(answer["usage"]["completion_tokens"])
        finish_reason = answer["choices"][0]["finish_reason"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ApiError(f"/v1/chat/completions did not answer with a completion: {error!r}") from error
    if tokens < 1 or finish_reason is None:
        raise ApiError(f"/v1/chat/completions answered with {tokens} tokens and finish_reason {finish_reason!r}")
    return tokens


def tool_call(body: bytes) -> str:
    """Return the name of the tool that a chat completion calls. Raises ApiError if it calls none, or with arguments that are no JSON object."""
    try:
        choice = json.loads(body)["choices"][0]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
        content = choice["message"].get("content")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ApiError(f"/v1/chat/completions did not answer a request with tools: {error!r}") from error
    return _called(calls, content, choice.get("finish_reason"))


def streamed_tool_call(lines: Iterable[bytes]) -> str:
    """Return the name of the tool that a stream of events calls, piece by piece. Raises ApiError like `tool_call`, and for a stream that is cut off."""
    calls: dict[int, dict[str, str]] = {}
    content, finish_reason, done = "", None, False
    for line in lines:
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:"):
            continue
        if data == b"[DONE]":
            done = True
            break
        try:
            event = json.loads(data)
            if "error" in event:
                raise ApiError(f"the stream holds an error: {str(event['error'])[:200]}")
            for choice in event.get("choices") or []:
                delta = choice.get("delta") or {}
                content += delta.get("content") or ""
                finish_reason = choice.get("finish_reason") or finish_reason
                for piece in delta.get("tool_calls") or []:
                    call = calls.setdefault(int(piece["index"]), {"name": "", "arguments": ""})
                    for key in call:
                        call[key] += (piece.get("function") or {}).get(key) or ""
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ApiError):
                raise
            raise ApiError(f"the stream holds an event that cannot be read: {error!r}") from error
    if not done:
        raise ApiError("the stream ended before [DONE]")
    return _called([calls[index] for index in sorted(calls)], content, finish_reason)


def _called(calls: list[dict[str, Any]], content: Any, finish_reason: Any) -> str:
    if not calls:
        # A call that stands in the text is what a missing or a wrong parser leaves behind.
        raise ApiError(f"the model called no tool and said {str(content or '')[:120]!r} (finish_reason {finish_reason!r})")
    name, arguments = str(calls[0].get("name") or ""), calls[0].get("arguments")
    try:
        parsed = json.loads(arguments or "")
    except (ValueError, TypeError):
        parsed = None
    if not name or not isinstance(parsed, dict):
        raise ApiError(f"the model called {name!r} with arguments that are no JSON object: {str(arguments)[:120]!r}")
    return name


def progress(body: bytes) -> Progress:
    """Return the progress from an answer to `GET /metrics`, over all engines. Raises ApiError."""
    sums: dict[str, float] = {}
    for name, value in SAMPLE.findall(body.decode(errors="replace")):
        if name in (STEPS, STEP_TOKENS, RUNNING):
            try:
                sums[name] = sums.get(name, 0.0) + float(value)
            except ValueError:
                raise ApiError(f"/metrics has {value!r} for {name}") from None
    missing = [name for name in (STEPS, STEP_TOKENS, RUNNING) if name not in sums]
    if missing:
        raise ApiError(f"/metrics does not have {missing[0]}, so it is not vLLM's")
    return Progress(sums[STEPS], sums[STEP_TOKENS], sums[RUNNING])

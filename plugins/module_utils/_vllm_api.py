# Copyright: the selfhosted.agent_stack maintainers
# Apache-2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
"""Judging a vLLM server by its answers. PRIVATE to the collection: it may change at any time."""

from __future__ import annotations

import json
from typing import Any


class ApiError(ValueError):
    """An answer that a healthy server does not give; the message says what was wrong."""


def chat_request(model: str, max_tokens: int) -> bytes:
    """Return the body of the smallest chat completion that proves that the engine generates."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Say yes."}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
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

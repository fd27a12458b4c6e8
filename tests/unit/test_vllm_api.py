"""Judging a vLLM server by its answers."""

from __future__ import annotations

import json

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_api


def completion(tokens: object, finish_reason: object) -> bytes:
    return json.dumps({"usage": {"completion_tokens": tokens}, "choices": [{"finish_reason": finish_reason}]}).encode()


def test_chat_request_asks_for_what_it_was_told() -> None:
    body = json.loads(_vllm_api.chat_request("agent-model", 4))
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("agent-model", 4, 0)


@pytest.mark.parametrize(("body", "models"), [(b'{"data": []}', []), (b'{"data": [{"id": "a"}, {"id": "b"}]}', ["a", "b"])])
def test_served_models(body: bytes, models: list[str]) -> None:
    assert _vllm_api.served_models(body) == models


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"data": [{}]}', b'{"data": null}'])
def test_served_models_refuses(body: bytes) -> None:
    with pytest.raises(_vllm_api.ApiError, match="/v1/models did not answer with a list of models"):
        _vllm_api.served_models(body)


def test_completion_tokens() -> None:
    assert _vllm_api.completion_tokens(completion(4, "length")) == 4


@pytest.mark.parametrize("body", [b"", b"{}", b'{"usage": {}}', completion(None, "stop"), completion(0, "stop"), completion(3, None)])
def test_completion_tokens_refuses(body: bytes) -> None:
    with pytest.raises(_vllm_api.ApiError, match="/v1/chat/completions"):
        _vllm_api.completion_tokens(body)

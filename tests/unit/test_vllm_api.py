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


def answer(message: object, finish_reason: str = "tool_calls") -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}]}).encode()


def call(name: object, arguments: object) -> dict[str, object]:
    return {"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def test_tool_call() -> None:
    assert _vllm_api.tool_call(answer(call("report_number", '{"number": 7}'))) == "report_number"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "did not answer a request with tools"),
        (b'{"choices": []}', "did not answer a request with tools"),
        # What stays in the text when the parser is missing or is that of another family.
        (answer({"content": '<tool_call>{"name": "report_number"}</tool_call>'}, "stop"), "called no tool and said '<tool_call>"),
        (answer(call("report_number", "{number: 7}")), "no JSON object"),
        (answer(call("report_number", "[7]")), "no JSON object"),
        (answer(call("report_number", None)), "no JSON object"),
        (answer(call("", "{}")), "called ''"),
    ],
)
def test_tool_call_refuses(body: bytes, said: str) -> None:
    with pytest.raises(_vllm_api.ApiError, match=said.replace("{", r"\{")):
        _vllm_api.tool_call(body)


def events(*deltas: dict[str, object], end: bytes = b"data: [DONE]\n") -> list[bytes]:
    return [b": ping\n", *(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n".encode() for delta in deltas), end]


def piece(index: int, **function: str) -> dict[str, object]:
    return {"tool_calls": [{"index": index, "function": function}]}


def test_streamed_tool_call_is_put_together() -> None:
    lines = events({"content": ""}, piece(0, name="report_number", arguments='{"num'), piece(0, arguments='ber": 7}'))
    assert _vllm_api.streamed_tool_call(lines) == "report_number"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (events(piece(0, name="a", arguments="{}"), end=b""), "ended before"),
        (events({"content": "No."}), "called no tool and said 'No.'"),
        (events(piece(0, name="a", arguments="{")), "no JSON object"),
        ([b"data: {not json\n"], "cannot be read"),
        ([b'data: {"error": {"message": "boom"}}\n'], "holds an error"),
        ([], "ended before"),
    ],
)
def test_streamed_tool_call_refuses(lines: list[bytes], said: str) -> None:
    with pytest.raises(_vllm_api.ApiError, match=said):
        _vllm_api.streamed_tool_call(lines)


METRICS = b"""# HELP vllm:num_requests_running Number of requests.
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 9.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 10.0
vllm:iteration_tokens_total_count{engine="1",model_name="m"} 5.0
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 1.5e+03
vllm:iteration_tokens_total_sum{engine="1",model_name="m"} 20.0
"""


def test_progress_is_that_of_all_engines() -> None:
    assert _vllm_api.progress(METRICS) == _vllm_api.Progress(15, 1520, 3)


def test_progress_after_a_restart_counts_as_progress() -> None:
    assert _vllm_api.Progress(1, 5, 1).moved_since(_vllm_api.Progress(15, 1520, 3))
    assert not _vllm_api.Progress(15, 1520, 1).moved_since(_vllm_api.Progress(15, 1520, 3))


@pytest.mark.parametrize("body", [b"", b"up 1\n", METRICS.replace(b"1.5e+03", b"many")])
def test_progress_refuses(body: bytes) -> None:
    with pytest.raises(_vllm_api.ApiError, match="/metrics"):
        _vllm_api.progress(body)

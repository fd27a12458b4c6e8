"""vllm_health against the scripted model server: every way in which a server can be unhealthy is an answer with its reason."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_api, _vllm_judge
from ansible_collections.selfhosted.agent_stack.plugins.modules import vllm_health
from programs import load

CALL = '[[tool report_number {"number": 7}]]'


model_server = load("tests/model_server/server.py")


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a scripted server that serves agent-model."""
    running = model_server.ModelServer(("127.0.0.1", 0), ["agent-model"])
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()


def control(url: str, **wish: Any) -> None:
    urllib.request.urlopen(f"{url}/_control", data=json.dumps(wish).encode(), timeout=5).close()


def judge(url: str, **params: Any) -> dict[str, Any]:
    defaults = {
        "url": url,
        "model": "agent-model",
        "max_tokens": 4,
        "timeout": 2,
        "generate": True,
        "tool_call": False,
        "tool_prompt": CALL,
        "golden_prompts": [],
        "tool_max_tokens": 64,
        "metrics_url": "",
        "progress_seconds": 0.5,
    }
    result: dict[str, Any] = vllm_health.Judge(defaults | params).judge()
    return result


def test_everything_works(server: str) -> None:
    result = judge(server, tool_call=True, metrics_url=f"{server}/metrics")
    assert (result["healthy"], result["reason"], result["reasons"]) == (True, "", [])
    assert set(result["checks"]) == {"health", "model", "generation", "progress", "tool_call", "streamed_tool_call"}
    assert result["models"] == ["agent-model"]
    assert result["completion_tokens"] == 4
    assert result["requests_running"] == 0


def test_only_what_was_asked_for_is_asked(server: str) -> None:
    assert set(judge(server)["checks"]) == {"health", "model", "generation"}
    assert set(judge(server, generate=False)["checks"]) == {"health", "model"}


def test_nothing_listens() -> None:
    result = judge("http://127.0.0.1:9")
    assert not result["healthy"]
    assert "/health cannot be reached" in result["reason"]


def test_its_own_health_says_no(server: str) -> None:
    control(server, health=503)
    assert "/health answered 503" in judge(server)["reason"]


def test_another_model(server: str) -> None:
    assert judge(server, model="other")["reason"] == "/v1/models names agent-model, not other"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "answered 500"),
        ("hang", "cannot be reached: timed out"),
        ("reset", "cannot be reached"),
        ("truncate", "cut its answer off"),
        ("garbage", "did not answer with a completion"),
    ],
)
def test_a_generation_that_fails(server: str, fault: str, said: str) -> None:
    control(server, fault=fault)
    result = judge(server, timeout=1, tool_call=True, metrics_url=f"{server}/metrics")
    assert not result["healthy"]
    assert said in result["reason"]
    # The tool calls are not tried on a server that generates nothing.
    assert len(result["reasons"]) == 1
    assert "progress" not in result["checks"]


def test_an_answer_that_trickles(server: str) -> None:
    body = _vllm_api._request("agent-model", "[[pace 0.1]] a b c d e f g h", 50, stream=True)
    with pytest.raises(_vllm_api.ApiError, match=r"did not finish its answer within 0\.3 seconds"):
        list(_vllm_judge.lines_of(f"{server}/v1/chat/completions", 0.3, body))


def test_a_model_that_calls_no_tool(server: str) -> None:
    result = judge(server, tool_call=True, tool_prompt="Call it.")
    assert len(result["reasons"]) == 2
    assert result["reason"].startswith("the model called no tool and said 'I see 1 user message")
    assert "generation" in result["checks"]


def test_a_tool_call_whose_arguments_are_no_object(server: str) -> None:
    assert "arguments that are no JSON object: '7'" in judge(server, tool_call=True, tool_prompt="[[tool report_number 7]]")["reason"]


def test_only_the_stream_is_broken(server: str) -> None:
    result = judge(server, tool_call=True, tool_prompt=f"{CALL} [[fault truncate]]")
    assert result["reasons"][-1].startswith(f"{server}/v1/chat/completions c") or "ended before" in result["reasons"][-1]
    assert "streamed_tool_call" not in result["checks"]


@contextmanager
def a_request(url: str) -> Iterator[None]:
    """Somebody else's request, which hangs."""
    body = json.dumps({"model": "agent-model", "messages": [{"role": "user", "content": "[[delay 5]]"}]}).encode()
    thread = threading.Thread(target=lambda: urllib.request.urlopen(f"{url}/v1/chat/completions", data=body, timeout=30).close(), daemon=True)
    thread.start()
    while judge(url, generate=False, metrics_url=f"{url}/metrics", progress_seconds=0)["requests_running"] < 1:
        pass
    yield


def test_an_engine_that_is_stuck(server: str) -> None:
    with a_request(server):
        result = judge(server, generate=False, metrics_url=f"{server}/metrics")
    assert result["reason"] == "the engine is stuck: 1 requests run, and vllm:iteration_tokens_total did not move for 0.5 seconds"


def test_an_engine_that_is_busy(server: str) -> None:
    with a_request(server):
        mover = threading.Timer(0.2, lambda: judge(server))
        mover.start()
        assert judge(server, generate=False, metrics_url=f"{server}/metrics", progress_seconds=5)["healthy"]
        mover.join()


def test_an_idle_engine_need_not_move(server: str) -> None:
    assert judge(server, generate=False, metrics_url=f"{server}/metrics")["healthy"]


def test_metrics_that_are_not_vllms(server: str) -> None:
    assert "does not have vllm:iteration_tokens_total_count" in judge(server, metrics_url=f"{server}/version")["reason"]
    assert "/nothing answered 404" in judge(server, metrics_url=f"{server}/nothing")["reason"]


GOLDEN = {"prompt": "What is it?", "expect": "i see \\d+ user", "max_tokens": 64, "seconds": 0}


def test_golden_prompts(server: str) -> None:
    found = judge(server, golden_prompts=[GOLDEN, GOLDEN])
    assert found["healthy"], found
    assert {"golden_prompt_1", "golden_prompt_2"} <= set(found["checks"])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ({"expect": "forty-two"}, "in which 'forty-two' is not found"),
        ({"prompt": "[[fault garbage]]"}, "did not answer with a completion"),
        ({"prompt": "[[delay 0.3]]", "seconds": 0.1}, "took 0.[3-9] seconds; allowed are 0.1"),
    ],
)
def test_a_golden_prompt_that_fails(server: str, prompt: dict[str, Any], reason: str) -> None:
    found = judge(server, golden_prompts=[GOLDEN | prompt, GOLDEN])
    assert not found["healthy"]
    assert re.search(reason, found["reason"]), found["reason"]
    assert len(found["reasons"]) == 1

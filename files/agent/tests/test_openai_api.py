"""The agent as OpenAI's own client sees it."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from sdk import connect, make_key, say, texts
from servers import Agent, Model, Postgres, wait_until

HELLO: Any = [{"role": "user", "content": "hello"}]
ANSWER = 'I see 1 user message. The first one was: "hello"'
CALCULATE: Any = [{"role": "user", "content": '[[tool calculator {"expression": "6*7"}]]'}]


@pytest.fixture(scope="module")
def key(migrated: Postgres) -> str:
    made = make_key(migrated, "openai-client")
    time.sleep(1)  # the service looks for new keys once a second at most
    return made


def client_of(agent: Agent, key: str, **how: Any) -> OpenAI:
    return OpenAI(base_url=f"{agent.url}/openai/v1", api_key=key, max_retries=0, **how)


@pytest.fixture
def client(agent: Agent, key: str) -> Iterator[OpenAI]:
    with client_of(agent, key) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["agent"]
    assert client.models.retrieve("agent").owned_by == "agent"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt")
    assert refused.value.code == "model_not_found"


def test_completion(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="agent", messages=HELLO, user="somebody", metadata={"a": "b"})
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "agent"
    assert abs(answer.created - time.time()) < 60
    assert answer.usage
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="agent",
            messages=[{"role": "user", "content": "[[pace 0.01]] hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces).startswith("I see 1 user message.")
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    plain = list(client.chat.completions.create(model="agent", messages=HELLO, stream=True))
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in plain)


def test_tools_are_the_agents(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="agent", messages=CALCULATE)
    assert answer.choices[0].message.content == "The tool says: 42"
    assert answer.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model="agent", messages=CALCULATE) as stream:
        assert stream.get_final_completion().choices[0].message.content == "The tool says: 42"


def test_the_history_is_the_input_and_leaves_nothing(agent: Agent, key: str, client: OpenAI, model: Model) -> None:
    with connect(agent, key=key) as sdk:
        before = sdk.threads.count()
        answer = client.chat.completions.create(
            model="agent",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": "yes?"},
                {"role": "assistant", "content": ""},
                {"role": "developer", "content": [{"type": "text", "text": "In French."}]},
                {"role": "user", "content": [{"type": "text", "text": "second"}]},
            ],
        )
        assert answer.choices[0].message.content.startswith("I see 2 user messages.")
        sent = model.requests()[-1]["messages"]
        assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
        assert [message["content"] for message in sent[1:]] == ["Be brief.\n\nfirst", "yes?", "In French.\n\nsecond"]
        wait_until(lambda: sdk.threads.count() == before, "the thread is gone", 5)


def test_parameters_reach_the_model(client: OpenAI, model: Model) -> None:
    answer = client.chat.completions.create(model="agent", messages=HELLO, temperature=0.5, top_p=0.9, seed=7, stop=["END"], max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "I see 1 "
    sent = model.requests()[-1]
    assert (sent["temperature"], sent["top_p"], sent["seed"], sent["stop"]) == (0.5, 0.9, 7, ["END"])
    client.chat.completions.create(model="agent", messages=HELLO, max_tokens=100_000)
    assert model.requests()[-1]["max_completion_tokens"] == 1024, "the operator's limit stays"
    client.chat.completions.create(model="agent", messages=HELLO)
    assert "seed" not in model.requests()[-1]


def test_a_kept_thread_remembers(agent: Agent, key: str, client: OpenAI) -> None:
    thread = uuid.uuid4().hex
    kept = client.with_options(default_headers={"X-Thread-Id": thread})
    kept.chat.completions.create(model="agent", messages=HELLO)
    history: Any = [{"role": "user", "content": "not this"}, {"role": "user", "content": "only this"}]
    answer = kept.chat.completions.create(model="agent", messages=history)
    assert answer.choices[0].message.content == 'I see 2 user messages. The first one was: "hello"'
    with connect(agent, key=key) as sdk:
        assert texts(sdk, thread)[::2] == ["hello", "only this"]
        assert say(sdk, thread, "and this")["messages"][-1]["content"].startswith("I see 3")
    body = {"model": "agent", "messages": HELLO}
    stranger = {"X-Forwarded-User": "stranger", "X-Thread-Id": thread}
    refused = agent.client.post("/openai/v1/chat/completions", json=body, headers=stranger)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")


def test_a_repeated_request_is_one_turn(agent: Agent, key: str, client: OpenAI) -> None:
    thread = uuid.uuid4().hex
    kept = client.with_options(default_headers={"X-Thread-Id": thread, "Idempotency-Key": thread})
    first = kept.chat.completions.create(model="agent", messages=HELLO)
    again = kept.chat.completions.create(model="agent", messages=HELLO)
    assert again.id == first.id
    assert again.choices[0].message.content == first.choices[0].message.content
    with connect(agent, key=key) as sdk:
        assert len(texts(sdk, thread)) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_stops_the_work(agent: Agent, key: str, stream: bool) -> None:
    work: Any = [{"role": "user", "content": "[[delay 3]] slow"}]

    async def hang_up() -> None:
        async with AsyncOpenAI(base_url=f"{agent.url}/openai/v1", api_key=key) as client:

            async def ask() -> None:
                answer = await client.chat.completions.create(model="agent", messages=work, stream=stream)
                if stream:
                    async for _ in answer:
                        pass

            task = asyncio.create_task(ask())
            await asyncio.sleep(0.7)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    cancelled = 'agent_turns_total{outcome="cancelled"}'
    before = agent.metric(cancelled)
    asyncio.run(hang_up())
    wait_until(lambda: agent.metric(cancelled) == before + 1, "the turn is cancelled", 2)


@pytest.mark.parametrize(
    ("fault", "status", "code", "streamed"),
    [
        ("overflow", 400, "context_length_exceeded", "context_length_exceeded"),
        # A stream without an event in it is one that broke.
        ("garbage", 502, "model_failed", "model_unavailable"),
        ("500", 503, "model_unavailable", "model_unavailable"),
    ],
)
def test_failures(client: OpenAI, model: Model, fault: str, status: int, code: str, streamed: str) -> None:
    messages: Any = [{"role": "user", "content": f"[[fault {fault}]] canary"}]
    with pytest.raises(openai.APIStatusError) as failed:
        client.chat.completions.create(model="agent", messages=messages)
    assert (failed.value.status_code, failed.value.code) == (status, code)
    assert failed.value.type == ("server_error" if status >= 500 else "invalid_request_error")
    assert failed.value.response.headers.get("Retry-After") == ("5" if status == 503 else None)
    with pytest.raises(openai.APIError) as broken:
        list(client.chat.completions.create(model="agent", messages=messages, stream=True))
    assert broken.value.code == streamed
    assert "canary" not in f"{failed.value}{broken.value}"


def test_approval_cannot_be_given_here(start_agent: Callable[..., Agent], key: str) -> None:
    agent = start_agent(AGENT_TOOLS_APPROVAL="calculator")
    with client_of(agent, key) as client:
        with pytest.raises(openai.ConflictError) as refused:
            client.chat.completions.create(model="agent", messages=CALCULATE)
        assert refused.value.code == "approval_needed"
        thread = uuid.uuid4().hex
        kept = client.with_options(default_headers={"X-Thread-Id": thread})
        with pytest.raises(openai.APIError):
            list(kept.chat.completions.create(model="agent", messages=CALCULATE, stream=True))
        with connect(agent, key=key) as sdk:
            values: Any = sdk.runs.wait(thread, "agent", command={"resume": {"approve": True}})
            assert values["messages"][-1]["content"] == "The tool says: 42"


def test_limits_and_strangers(start_agent: Callable[..., Agent], migrated: Postgres) -> None:
    key = make_key(migrated, "limited")
    agent = start_agent(AGENT_RATE_LIMIT="1/minute")
    with client_of(agent, key) as client:
        client.chat.completions.create(model="agent", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(model="agent", messages=HELLO)
        assert limited.value.code == "rate_limited"
        assert int(limited.value.response.headers["Retry-After"]) > 0
    with client_of(agent, key[:-1]) as stranger, pytest.raises(openai.AuthenticationError) as unknown:
        stranger.models.list()
    assert unknown.value.code == "unauthorized"


PICTURE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "tools": {"tools": [{"type": "function", "function": {"name": "canary", "parameters": {}}}]},
    "functions": {"functions": [{"name": "canary"}]},
    "response_format": {"response_format": {"type": "json_object"}},
    "n": {"n": 2},
    "logprobs": {"logprobs": True},
    "logit_bias": {"logit_bias": {"1": 1}},
    "store": {"store": True},
    "tool message": {"messages": [*HELLO, {"role": "tool", "content": "canary", "tool_call_id": "1"}]},
    "tool call": {
        "messages": [
            {
                "role": "assistant",
                "content": "canary",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "canary", "arguments": "{}"}}],
            },
            *HELLO,
        ]
    },
    "picture": {"messages": [{"role": "user", "content": [{"type": "text", "text": "canary"}, PICTURE]}]},
    "no messages": {"messages": []},
    "no question": {"messages": [{"role": "assistant", "content": "canary"}]},
    "blank question": {"messages": [{"role": "user", "content": " "}]},
    "long question": {"messages": [{"role": "user", "content": "canary" * 3000}]},
    "unknown": {"canary": 1},
    "temperature": {"temperature": 3},
    "temperature text": {"temperature": "1"},
    "max_tokens": {"max_tokens": 0},
    "stop": {"stop": ["a"] * 5},
    "NUL": {"messages": [{"role": "user", "content": "canary\0"}]},
    "thread": {"headers": {"X-Thread-Id": "../canary"}},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_refused(agent: Agent, name: str) -> None:
    more = dict(UNSUPPORTED[name])
    extra = more.pop("headers", {})
    body = {"model": "agent", "messages": HELLO} | more
    started = time.monotonic()
    answer = agent.client.post("/openai/v1/chat/completions", json=body, headers=extra)
    assert time.monotonic() - started < 1
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "canary" not in answer.text
    if name in ("tools", "functions", "response_format", "logit_bias"):
        assert error["code"] == "unsupported_parameter"
        assert error["param"] == name

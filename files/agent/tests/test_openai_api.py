"""The agent as OpenAI's own client sees it."""

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming
from pydantic import SecretStr

from agent.api.openai_schemas import NO_OPS
from sdk import connect, make_key, say, texts
from servers import Agent, Model, Postgres, Redis, wait_until

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
FUNCTION = {"name": "canary", "description": "Looks something up.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
CALLED = {"id": "1", "type": "function", "function": {"name": "canary", "arguments": "{}"}}
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "tool of another kind": {"tools": [{"type": "custom", "custom": {"name": "canary"}}]},
    "two tools of a name": {"tools": TOOLS * 2},
    "tool_choice": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "canary2"}}},
    "tool_choice without tools": {"tool_choice": "required"},
    "functions": {"functions": [{"name": "canary"}]},
    "audio": {"audio": {"format": "wav", "voice": "canary"}},
    "modalities": {"modalities": ["text", "audio"]},
    "web_search_options": {"web_search_options": {}},
    "verbosity": {"verbosity": "low"},
    "echo": {"echo": True},
    "prompt_logprobs": {"prompt_logprobs": 5},
    "response_format": {"response_format": {"type": "grammar", "grammar": "canary"}},
    "n": {"n": 2},
    "logprobs": {"logprobs": 5},
    "logit_bias": {"logit_bias": {"1": 101}},
    "store": {"store": True},
    "tool message": {"messages": [*HELLO, {"role": "tool", "content": "canary", "tool_call_id": "1"}]},
    "tool call without a result": {"messages": [{"role": "assistant", "content": "canary", "tool_calls": [CALLED]}, *HELLO]},
    "tool call without an object": {
        "messages": [*HELLO, {"role": "assistant", "tool_calls": [CALLED | {"function": {"name": "canary", "arguments": "[1]"}}]}],
    },
    "result twice": {
        "messages": [*HELLO, {"role": "assistant", "tool_calls": [CALLED]}, *[{"role": "tool", "content": "canary", "tool_call_id": "1"}] * 2],
    },
    "picture": {"messages": [{"role": "user", "content": [{"type": "text", "text": "canary"}, PICTURE]}]},
    "picture of another kind": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:text/html;base64,canary"}}]}],
    },
    "no messages": {"messages": []},
    "null messages": {"messages": None},
    "null model": {"model": None},
    "no question": {"messages": [{"role": "assistant", "content": "canary"}]},
    "instruction only": {"messages": [{"role": "system", "content": "canary"}]},
    "blank question": {"messages": [{"role": "user", "content": " "}]},
    "long question": {"messages": [{"role": "user", "content": "canary" * 3000}]},
    "unknown role": {"messages": [*HELLO, {"role": "canary", "content": "canary"}]},
    "unknown": {"canary": 1},
    "metadata": {"metadata": {"canary": "x" * 17_000}},
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
    if name in NO_OPS:
        assert error["code"] == "unsupported_parameter"
        assert error["param"] == name


# What means nothing

# Values that say what is true anyway, of every field that OpenAI's client knows. A new one of its fields has to be put here.
NOTHING: dict[str, list[Any]] = {
    "audio": [],
    "frequency_penalty": [0, 0.0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "max_completion_tokens": [1000],
    "max_tokens": [1000],
    "metadata": [{}, {"a": {"b": [1, None]}}],
    "modalities": [[], ["text"]],
    "moderation": [],
    "n": [1],
    "parallel_tool_calls": [True, False],
    "prediction": [{"type": "content", "content": "something"}],
    "presence_penalty": [0],
    "prompt_cache_key": ["a", ""],
    "prompt_cache_options": [{}, {"mode": "auto"}],
    "prompt_cache_retention": ["in_memory", "24h"],
    "reasoning_effort": ["medium"],
    "response_format": [{"type": "text"}],
    "safety_identifier": ["a"],
    "seed": [0],
    "service_tier": ["auto", "default", "flex", "priority"],
    "stop": ["", []],
    "store": [False],
    "stream": [False],
    "stream_options": [{}, {"include_usage": None, "include_obfuscation": None}, {"include_obfuscation": True, "include_usage": False}],
    "temperature": [1],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0, 5],
    "top_p": [1],
    "user": [""],
    "verbosity": ["medium"],
    "web_search_options": [],
}
VLLM: dict[str, list[Any]] = {
    "add_generation_prompt": [True],
    "best_of": [1],
    "cache_salt": ["a"],
    "chat_template_kwargs": [{}],
    "echo": [False],
    "guided_json": [],
    "ignore_eos": [False],
    "length_penalty": [1.0],
    "min_p": [0.0],
    "min_tokens": [0],
    "priority": [0],
    "repetition_penalty": [1.0],
    "skip_special_tokens": [True],
    "stop_token_ids": [[]],
    "top_k": [-1, 0],
    "use_beam_search": [False],
}
REQUIRED = {"messages", "model"}


def fields_of(kind: Any) -> set[str]:
    return set(get_type_hints(kind))


def test_every_field_of_the_client_is_known() -> None:
    known = fields_of(CompletionCreateParamsNonStreaming) | fields_of(CompletionCreateParamsStreaming)
    assert known == NOTHING.keys() | REQUIRED


@pytest.mark.parametrize("name", [*NOTHING, *VLLM])
def test_what_means_nothing_is_taken(agent: Agent, name: str) -> None:
    for value in [None, *(NOTHING | VLLM)[name]]:
        answer = agent.client.post("/openai/v1/chat/completions", json={"model": "agent", "messages": HELLO, name: value})
        assert answer.status_code == 200, (value, answer.text)
        assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}


def test_nothing_but_what_was_said_reaches_the_model(agent: Agent, model: Model) -> None:
    agent.client.post("/openai/v1/chat/completions", json={"model": "agent", "messages": HELLO})
    plain = model.requests()[-1]
    empty = dict.fromkeys([*NOTHING, *VLLM]) | {"tools": [], "tool_choice": "none", "stop": [], "logit_bias": {}, "response_format": {"type": "text"}}
    agent.client.post("/openai/v1/chat/completions", json={"model": "agent", "messages": HELLO, **empty})
    assert model.requests()[-1] == plain


# What a client keeps of a conversation, in every form that its types know.
PAST: dict[str, list[dict[str, Any]]] = {
    "null": [
        {"role": "assistant", "content": "yes?"}
        | dict.fromkeys(["audio", "function_call", "name", "refusal", "tool_calls", "annotations", "reasoning_content"])
    ],
    "values": [
        {"role": "assistant", "content": "yes?", "annotations": [], "reasoning_content": "hm", "tool_calls": [], "audio": {"id": "a"}, "name": "agent"},
    ],
    "unknown": [{"role": "assistant", "content": "yes?", "provider_specific_fields": {"a": 1}, "images": [], "id": "msg_1"}],
    "parts": [{"role": "assistant", "content": [{"type": "text", "text": "yes?", "annotations": [], "prompt_cache_breakpoint": {"mode": "explicit"}}]}],
    "refusal": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "yes?"}]}],
    "refusal beside": [{"role": "assistant", "content": None, "refusal": "yes?"}],
    "empty": [{"role": "assistant", "content": "yes?"}, {"role": "assistant", "content": ""}, {"role": "assistant", "content": None}, {"role": "assistant"}],
    "empty question": [{"role": "assistant", "content": "yes?"}, {"role": "user", "content": ""}, {"role": "user", "content": []}],
    "empty instruction": [{"role": "assistant", "content": "yes?"}, {"role": "system", "content": ""}, {"role": "developer", "content": []}],
}


@pytest.mark.parametrize("name", PAST)
def test_what_a_client_keeps_is_taken_back(agent: Agent, model: Model, name: str) -> None:
    messages = [{"role": "user", "content": "first", "name": None}, *PAST[name], {"role": "user", "content": "second", "name": "somebody"}]
    answer = agent.client.post("/openai/v1/chat/completions", json={"model": "agent", "messages": messages})
    assert answer.status_code == 200, answer.text
    sent = [(message["role"], message["content"]) for message in model.requests()[-1]["messages"][1:]]
    assert sent == [("user", "first"), ("assistant", "yes?"), ("user", "second")]


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (ChatCompletionAssistantMessageParam, {"role", "content", "audio", "function_call", "name", "refusal", "tool_calls"}),
        (ChatCompletionUserMessageParam, {"role", "content", "name"}),
        (ChatCompletionSystemMessageParam, {"role", "content", "name"}),
        (ChatCompletionDeveloperMessageParam, {"role", "content", "name"}),
        (ChatCompletionToolMessageParam, {"role", "content", "tool_call_id"}),
        (ChatCompletionContentPartTextParam, {"type", "text", "prompt_cache_breakpoint"}),
        (ChatCompletionStreamOptionsParam, {"include_usage", "include_obfuscation"}),
    ],
)
def test_every_field_of_a_message_is_known(kind: Any, known: set[str]) -> None:
    assert fields_of(kind) == known


def test_a_long_conversation_goes_on(client: OpenAI, model: Model) -> None:
    """Older turns are left out, and a question of the past that would be too long today is no obstacle."""
    past: Any = [{"role": role, "content": f"{role} {number} " + "x" * 2000} for number in range(20) for role in ("user", "assistant")]
    too_long: Any = [{"role": "user", "content": "x" * 17_000}]
    answer = client.chat.completions.create(model="agent", messages=[*too_long, *past, {"role": "user", "content": "last"}])
    assert answer.choices[0].finish_reason == "stop"
    sent = model.requests()[-1]["messages"]
    assert (sent[0]["role"], sent[-1]["content"]) == ("system", "last")
    assert "Earlier messages of this conversation are not shown" in sent[0]["content"]
    assert 3 < len(sent) < 20


@pytest.mark.parametrize("chunked", [False, True])
def test_a_conversation_above_the_limit_is_told_its_length(start_agent: Callable[..., Agent], key: str, chunked: bool) -> None:
    agent = start_agent(AGENT_OPENAI_BODY_KIB="128")
    past = [{"role": role, "content": "x" * 1000} for _ in range(60) for role in ("user", "assistant")]
    with client_of(agent, key).with_options(max_retries=2) as client:
        client.chat.completions.create(model="agent", messages=[*past[2:], *HELLO])  # type: ignore[list-item]
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="agent", messages=[*past, *past, *HELLO])  # type: ignore[list-item]
    assert (refused.value.code, refused.value.type) == ("context_length_exceeded", "invalid_request_error")
    data = json.dumps({"model": "agent", "messages": [*past, *past]}).encode()
    answer = agent.client.post("/openai/v1/chat/completions", content=iter([data]) if chunked else data, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert agent.client.post("/threads/search", content=data, headers={"Content-Type": "application/json"}).status_code == 413


# Tools of the caller's


def script(name: str, arguments: str = '{"a": 1}') -> str:
    return f"[[tool {name} {arguments}]]"


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_the_callers_tools_are_its_own(client: OpenAI, model: Model, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": script("canary")}]
    with client.chat.completions.stream(model="agent", messages=messages, tools=TOOLS) as events:
        streamed = events.get_final_completion()
    answer: Any = streamed if stream else client.chat.completions.create(model="agent", messages=messages, tools=TOOLS, parallel_tool_calls=False)
    offered = [tool["function"]["name"] for tool in model.requests()[-1]["tools"]]
    assert "canary" in offered
    assert "calculator" in offered, "the agent's own are offered too"
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.content or None) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "canary", {"a": 1})
    messages += [choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "seven"}]
    last = client.chat.completions.create(model="agent", messages=messages, tools=TOOLS)
    assert (last.choices[0].message.content, last.choices[0].finish_reason) == ("The tool says: seven", "stop")
    assert [message["role"] for message in model.requests()[-1]["messages"]] == ["system", "user", "assistant", "tool"]


def test_the_agent_uses_its_own_tools_meanwhile(client: OpenAI, model: Model) -> None:
    answer = client.chat.completions.create(model="agent", messages=CALCULATE, tools=TOOLS)
    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == ("The tool says: 42", None)
    both: Any = [{"role": "user", "content": f"{CALCULATE[0]['content']} {script('canary')}"}]
    asked = client.chat.completions.create(model="agent", messages=both, tools=TOOLS)
    assert [call.function.name for call in asked.choices[0].message.tool_calls or ()] == ["canary"]  # type: ignore[union-attr]
    shadowed: Any = [{"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}]
    theirs = client.chat.completions.create(model="agent", messages=CALCULATE, tools=shadowed)
    assert theirs.choices[0].finish_reason == "tool_calls"
    assert [tool["function"]["name"] for tool in model.requests()[-1]["tools"]].count("calculator") == 1


def test_a_kept_thread_waits_for_the_results(agent: Agent, key: str, client: OpenAI) -> None:
    thread = uuid.uuid4().hex
    kept = client.with_options(default_headers={"X-Thread-Id": thread})
    messages: Any = [{"role": "user", "content": f"{script('canary')} {script('canary')}"}]
    first = kept.chat.completions.create(model="agent", messages=messages, tools=TOOLS)
    calls: Any = first.choices[0].message.tool_calls
    assert len(calls) == 2
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "seven"} for call in calls]
    messages += [first.choices[0].message.model_dump(exclude_none=True), *results]
    last = kept.chat.completions.create(model="agent", messages=messages, tools=TOOLS)
    assert last.choices[0].message.content == "The tool says: seven; seven"
    with connect(agent, key=key) as sdk:
        assert texts(sdk, thread) == [messages[0]["content"], "", "seven", "seven", "The tool says: seven; seven"]
    strange: Any = [*HELLO, {"role": "assistant", "tool_calls": [CALLED]}, {"role": "tool", "tool_call_id": "1", "content": "canary"}]
    with pytest.raises(openai.BadRequestError, match="no tool call"):
        kept.chat.completions.create(model="agent", messages=strange, tools=TOOLS)


CHOICES: dict[str, tuple[Any, bool, Any]] = {
    "none": ("none", False, None),
    "auto": ("auto", True, None),
    "required": ("required", True, "required"),
    "named": ({"type": "function", "function": {"name": "canary"}}, True, {"type": "function", "function": {"name": "canary"}}),
    "allowed": (
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "canary"}}]}},
        True,
        "required",
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_which_tool_the_model_must_use(client: OpenAI, model: Model, name: str) -> None:
    choice, offered, sent = CHOICES[name]
    client.chat.completions.create(model="agent", messages=HELLO, tools=TOOLS, tool_choice=choice)
    request = model.requests()[-1]
    names = [tool["function"]["name"] for tool in request["tools"]]
    assert ("canary" in names) == offered
    assert request.get("tool_choice") == sent
    assert ("calculator" in names) == (sent is None), "the caller's alone where one of them must be called"


@pytest.mark.parametrize("responses", [False, True])
def test_langchains_client(agent: Agent, key: str, responses: bool) -> None:
    model = ChatOpenAI(base_url=f"{agent.url}/openai/v1", api_key=SecretStr(key), model="agent", max_retries=0, use_responses_api=responses)
    assert model.invoke("hello").text == ANSWER
    assert "".join(chunk.text for chunk in model.stream("hello")) == ANSWER
    bound = model.bind_tools([FUNCTION])
    called = bound.invoke(script("canary"))
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("canary", {"a": 1})]
    result = ToolMessage("seven", tool_call_id=called.tool_calls[0]["id"])
    assert bound.invoke([HumanMessage(script("canary")), called, result]).text == "The tool says: seven"


# Forms, images, reasoning


SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.mark.parametrize("form", [SCHEMA, {"type": "json_object"}])
def test_the_form_of_an_answer_reaches_the_model(client: OpenAI, model: Model, form: Any) -> None:
    client.chat.completions.create(model="agent", messages=HELLO, response_format=form)
    assert model.requests()[-1]["response_format"] == form
    assert "tools" not in model.requests()[-1], "a model that is held to a form can call no tool"


def test_vllms_parameters_reach_the_model(client: OpenAI, model: Model) -> None:
    more: dict[str, Any] = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "chat_template_kwargs": {"enable_thinking": False}}
    client.chat.completions.create(model="agent", messages=HELLO, extra_body=more, logit_bias={"1": 5}, reasoning_effort="low", logprobs=True, top_logprobs=2)
    sent = model.requests()[-1]
    assert {name: sent[name] for name in more} == more
    assert (sent["logit_bias"], sent["reasoning_effort"], sent["logprobs"], sent["top_logprobs"]) == ({"1": 5}, "low", True, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: OpenAI, stream: bool) -> None:
    if stream:
        chunks = client.chat.completions.create(model="agent", messages=HELLO, logprobs=True, stream=True)
        told = [token.token for chunk in chunks for choice in chunk.choices if choice.logprobs for token in choice.logprobs.content or ()]
    else:
        answer = client.chat.completions.create(model="agent", messages=HELLO, logprobs=True)
        assert answer.choices[0].logprobs
        told = [token.token for token in answer.choices[0].logprobs.content or ()]
    assert "".join(told) == ANSWER


PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
LOOK: Any = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]}]


def test_a_model_that_cannot_see_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="agent", messages=LOOK)
    assert refused.value.code == "model_cannot_see"
    assert refused.value.response.headers["X-Should-Retry"] == "false"


def test_a_model_that_sees_is_shown_images(migrated: Postgres, redis: Redis, key: str) -> None:
    seeing = Model(name="some/model-seeing")
    agent = Agent(migrated, redis, seeing)
    try:
        agent.start()
        with client_of(agent, key) as client:
            answer = client.chat.completions.create(model="agent", messages=[{"role": "system", "content": "Be brief."}, *LOOK])
        assert answer.choices[0].finish_reason == "stop"
        parts = seeing.requests()[-1]["messages"][-1]["content"]
        assert [part["type"] for part in parts] == ["text", "text", "image_url"]
        assert parts[-1]["image_url"]["url"] == PIXEL
    finally:
        agent.remove()
        seeing.remove()


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(client: OpenAI, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "[[think two and two]] hello"}]
    if stream:
        chunks = list(client.chat.completions.create(model="agent", messages=messages, stream=True))
        thought = "".join((chunk.choices[0].delta.model_extra or {}).get("reasoning_content") or "" for chunk in chunks)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        message = client.chat.completions.create(model="agent", messages=messages).choices[0].message
        thought, text = (message.model_extra or {})["reasoning_content"], str(message.content)
    assert thought == "two and two"
    assert text.startswith("I see 1 user message.")


# Requests that a client sends again


def retried(agent: Agent, user: str, count: int, text: str, thread: str | None, timeout: float = 20, **body: Any) -> httpx.Response:
    """One of the tries that OpenAI's clients make of a request."""
    headers = {"X-Forwarded-User": user, "X-Stainless-Retry-Count": str(count), "X-Stainless-Read-Timeout": str(timeout)}
    if thread:
        headers["X-Thread-Id"] = thread
    asked = {"model": "agent", "messages": [{"role": "user", "content": text}], **body}
    return agent.client.post("/openai/v1/chat/completions", json=asked, headers=headers, timeout=timeout)


def asked_of(model: Model, text: str) -> int:
    """How often the model was asked this."""
    return sum(request["messages"][-1]["content"] == text for request in model.requests())


@pytest.mark.parametrize("kept", [True, False])
def test_a_client_that_gives_up_and_asks_again_is_one_turn(agent: Agent, key: str, model: Model, kept: bool) -> None:
    """The first try still runs when the second comes, and has ended when the third does."""
    thread, text = uuid.uuid4().hex, f"[[delay 2.5]] {uuid.uuid4().hex}"
    headers = {"X-Thread-Id": thread} if kept else {}
    with OpenAI(base_url=f"{agent.url}/openai/v1", api_key=key, max_retries=2, timeout=1, default_headers=headers) as client:
        answer = client.chat.completions.create(model="agent", messages=[{"role": "user", "content": text}])
    assert answer.choices[0].message.content == f'I see 1 user message. The first one was: "{text}"'
    assert asked_of(model, text) == 1
    with connect(agent, key=key) as sdk:
        if kept:
            assert texts(sdk, thread) == [text, answer.choices[0].message.content]
        else:
            wait_until(lambda: sdk.threads.count(status="busy") == 0, "the run has ended", 2)


def test_who_gives_up_for_good_is_not_worked_for(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent(AGENT_TURN_TIMEOUT_SECONDS="60")
    with pytest.raises(httpx.ReadTimeout):
        retried(agent, "tester", 0, "[[delay 30]] hello", None, timeout=1)
    assert agent.metric("agent_turns_running") == 1, "it may ask again"
    wait_until(lambda: agent.metric('agent_turns_total{outcome="cancelled"}') == 1, "the turn is cancelled", 13)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_a_request_that_is_sent_again_after_its_end(agent: Agent, model: Model, stream: bool, kept: bool) -> None:
    user, text = f"user-{uuid.uuid4().hex}", f"hello {uuid.uuid4().hex}"
    thread = uuid.uuid4().hex if kept else None
    first = retried(agent, user, 0, text, thread, stream=stream)
    again = retried(agent, user, 1, text, thread, stream=stream)
    assert first.status_code == again.status_code == 200
    if kept:
        assert again.text == first.text
        assert asked_of(model, text) == 1
        third = retried(agent, user, 0, text, thread, stream=stream)
        assert third.text != first.text, "asked anew on purpose"
        assert retried(agent, user, 1, text, thread, stream=stream).text == third.text, "the newest is meant"
        with connect(agent, user) as sdk:
            assert texts(sdk, str(thread))[::2] == [text, text]


def test_only_the_same_request_is_a_repetition(agent: Agent) -> None:
    user, thread, text = f"user-{uuid.uuid4().hex}", uuid.uuid4().hex, "hello"
    answers = [
        retried(agent, user, 0, text, thread),
        retried(agent, user, 1, text, thread, temperature=0),
        retried(agent, user, 1, text, uuid.uuid4().hex),
        retried(agent, f"{user}-2", 1, text, None),
        retried(agent, user, 1, text, None),
    ]
    assert len({answer.json()["id"] for answer in answers}) == len(answers)


def test_a_retry_works_again_on_a_turn_that_failed(agent: Agent, model: Model) -> None:
    user, thread, text = f"user-{uuid.uuid4().hex}", uuid.uuid4().hex, f"hello {uuid.uuid4().hex}"
    model.control(fault="500", times=2)
    failed = retried(agent, user, 0, text, thread)
    assert (failed.status_code, failed.headers["X-Should-Retry"]) == (503, "true")
    assert retried(agent, user, 1, text, thread).status_code == 200
    with connect(agent, user) as sdk:
        assert len(texts(sdk, thread)) == 2


def test_both_workers_know_what_is_sent_again(pair: tuple[Agent, Agent], model: Model) -> None:
    user, text = f"user-{uuid.uuid4().hex}", f"[[delay 2.5]] {uuid.uuid4().hex}"
    with pytest.raises(httpx.ReadTimeout):
        retried(pair[0], user, 0, text, None, timeout=1)
    answer = retried(pair[1], user, 1, text, None)
    assert text in answer.json()["choices"][0]["message"]["content"]
    assert asked_of(model, text) == 1


FAILURES = {
    "refused by the model": ("[[fault 400]]", 400, "false"),
    "the operator's mistake": ("[[fault 401]]", 502, "false"),
    "garbage": ("[[fault garbage]]", 502, "true"),
    "too long": ("[[fault overflow]]", 400, "false"),
    "away": ("[[fault 500]]", 503, "true"),
    "too slow": ("[[delay 7]]", 504, "false"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_clients_repeat_only_what_a_repetition_can_mend(agent: Agent, key: str, model: Model, name: str) -> None:
    script, status, again = FAILURES[name]
    text = f"{script} {uuid.uuid4().hex}"
    with client_of(agent, key) as client, pytest.raises(openai.APIStatusError) as failed:
        client.chat.completions.create(model="agent", messages=[{"role": "user", "content": text}])
    assert (failed.value.status_code, failed.value.response.headers["X-Should-Retry"]) == (status, again)
    if again == "false" and status < 500:
        asked = asked_of(model, text)
        with client_of(agent, key).with_options(max_retries=2) as client, pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model="agent", messages=[{"role": "user", "content": text}])
        assert asked_of(model, text) == 2 * asked


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "canary", 404), ("POST", "embeddings", 404), ("DELETE", "models", 405), ("GET", "", 404)])
def test_what_is_not_there_is_told_in_openais_form(agent: Agent, method: str, path: str, status: int) -> None:
    answer = agent.client.request(method, f"/openai/v1/{path}")
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.headers["X-Should-Retry"] == "false"
    assert "canary" not in answer.text


PLACES: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "before": ([("system", "a"), ("user", "b")], [("user", "a\n\nb")]),
    "after": ([("user", "b"), ("system", "a")], [("user", "b\n\na")]),
    "both": ([("system", "a"), ("user", "b"), ("developer", "c"), ("system", "d")], [("user", "a\n\nb\n\nc\n\nd")]),
    "after an answer": ([("user", "a"), ("assistant", "b"), ("system", "c")], [("user", "a"), ("assistant", "b"), ("user", "c")]),
    "before an answer": ([("user", "a"), ("system", "b"), ("assistant", "c"), ("user", "d")], [("user", "a\n\nb"), ("assistant", "c"), ("user", "d")]),
    "between answers": (
        [("user", "a"), ("assistant", "b"), ("system", "c"), ("assistant", "d"), ("user", "e")],
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_an_instruction_stays_in_its_place(client: OpenAI, model: Model, name: str) -> None:
    given, sent = PLACES[name]
    messages: Any = [{"role": role, "content": text} for role, text in given]
    client.chat.completions.create(model="agent", messages=messages)
    assert [(message["role"], message["content"]) for message in model.requests()[-1]["messages"][1:]] == sent


def test_an_instruction_after_the_question_is_kept_with_it(agent: Agent, key: str, client: OpenAI) -> None:
    thread = uuid.uuid4().hex
    messages: Any = [{"role": "user", "content": "hello"}, {"role": "system", "content": "In French."}]
    client.with_options(default_headers={"X-Thread-Id": thread}).chat.completions.create(model="agent", messages=messages)
    with connect(agent, key=key) as sdk:
        assert texts(sdk, thread)[0] == "hello\n\nIn French."

"""OpenAI's Responses API as its own client sees it."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, get_type_hints

import openai
import pytest
from openai import OpenAI
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming, ResponseCreateParamsStreaming
from pydantic import BaseModel

from agent.api.responses_schemas import ResponseCreate
from sdk import connect, make_key, texts
from servers import Agent, Model, Postgres, wait_until

HELLO = 'I see 1 user message. The first one was: "hello"'
CALL = '[[tool canary {"a": 1}]]'
TOOLS: Any = [{"type": "function", "name": "canary", "description": "Looks something up.", "parameters": {"type": "object"}, "strict": None}]


@pytest.fixture(scope="module")
def key(migrated: Postgres) -> str:
    made = make_key(migrated, "responses-client")
    time.sleep(1)  # the service looks for new keys once a second at most
    return made


@pytest.fixture
def client(agent: Agent, key: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{agent.url}/openai/v1", api_key=key, max_retries=0) as client:
        yield client


def test_a_response(client: OpenAI, model: Model) -> None:
    answer = client.responses.create(model="agent", input="hello", instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, max_output_tokens=100)
    assert (answer.output_text, answer.status, answer.metadata) == (HELLO.replace("hello", "Be brief.\n\nhello"), "completed", {"a": "b"})
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 0
    assert (answer.instructions, answer.temperature, answer.previous_response_id) == ("Be brief.", 0.5, None)
    sent = model.requests()[-1]
    assert (sent["temperature"], sent["max_completion_tokens"]) == (0.5, 100)
    assert client.responses.retrieve(answer.id).output_text == answer.output_text


def test_a_stream(client: OpenAI) -> None:
    with client.responses.stream(model="agent", input="[[think two and two]] [[pace 0.01]] hello") as stream:
        events = list(stream)
        final = stream.get_final_response()
    names = [event.type for event in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    assert names.count("response.output_text.delta") > 3
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output[0].content[0].text == "two and two"  # type: ignore[union-attr, index]
    assert final.usage
    assert final.usage.total_tokens > 0


def test_it_goes_on_from_any_response(agent: Agent, key: str, client: OpenAI) -> None:
    first = client.responses.create(model="agent", input="one")
    second = client.responses.create(model="agent", input="two", previous_response_id=first.id)
    assert second.output_text.startswith("I see 2 user messages")
    third = client.responses.create(model="agent", input="three", previous_response_id=second.id)
    assert third.output_text.startswith("I see 3 user messages")
    other = client.responses.create(model="agent", input="another second", previous_response_id=first.id)
    assert other.output_text.startswith("I see 2 user messages"), "from where the first one was"
    with pytest.raises(openai.NotFoundError) as gone:
        client.responses.create(model="agent", input="x", previous_response_id=f"resp_{uuid.uuid4()}")
    assert gone.value.code == "response_not_found"
    refused = agent.client.post("/openai/v1/responses", json={"model": "agent", "input": "x", "previous_response_id": first.id})
    assert refused.status_code == 404, "another's"


def test_what_is_not_stored_leaves_nothing(agent: Agent, key: str, client: OpenAI) -> None:
    with connect(agent, key=key) as sdk:
        before = sdk.threads.count()
        answer = client.responses.create(
            model="agent",
            store=False,
            input=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "input_text", "text": "first"}]},
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "yes?", "annotations": []}],
                },
                {"type": "message", "role": "user", "content": "second"},
            ],
        )
        assert answer.output_text.startswith("I see 2 user messages")
        wait_until(lambda: sdk.threads.count() == before, "the thread is gone", 5)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


@pytest.mark.parametrize("stored", [True, False])
def test_calls_of_the_callers_tools(client: OpenAI, model: Model, stored: bool) -> None:
    first: Any = client.responses.create(model="agent", input=CALL, tools=TOOLS, store=stored)
    [call] = first.output
    assert (call.type, call.name, json.loads(call.arguments), first.output_text) == ("function_call", "canary", {"a": 1}, "")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "seven"}
    if stored:
        assert client.responses.retrieve(first.id).output[0].call_id == call.call_id  # type: ignore[union-attr]
        last = client.responses.create(model="agent", input=[result], tools=TOOLS, previous_response_id=first.id)
    else:
        last = client.responses.create(model="agent", input=[{"role": "user", "content": CALL}, call.model_dump(), result], tools=TOOLS, store=False)
    assert last.output_text == "The tool says: seven"
    assert [message["role"] for message in model.requests()[-1]["messages"]] == ["system", "user", "assistant", "tool"]


def test_a_call_is_streamed(client: OpenAI) -> None:
    with client.responses.stream(model="agent", input=CALL, tools=TOOLS, tool_choice="required", parallel_tool_calls=False) as stream:
        names = [event.type for event in stream]
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= set(names)


def test_the_form_of_an_answer_reaches_the_model(client: OpenAI, model: Model) -> None:
    class Answer(BaseModel):
        a: int

    with pytest.raises(ValueError, match="Invalid JSON"):  # what the scripted model says has no form
        client.responses.parse(model="agent", input="hello", text_format=Answer)
    form = model.requests()[-1]["response_format"]
    assert (form["type"], form["json_schema"]["name"], form["json_schema"]["strict"]) == ("json_schema", "Answer", True)
    assert form["json_schema"]["schema"]["properties"].keys() == {"a"}


def test_an_answer_that_is_cut(client: OpenAI) -> None:
    answer = client.responses.create(model="agent", input="hello", max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_failures(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="agent", input="[[fault 400]] canary")
    assert refused.value.response.headers["X-Should-Retry"] == "false"
    last: Any = list(client.responses.create(model="agent", input="[[fault 400]] canary", stream=True))[-1]
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert client.responses.retrieve(last.response.id).status == "failed"
    assert "canary" not in f"{refused.value}{last}"


def test_a_response_is_deleted_with_its_thread(agent: Agent, key: str, client: OpenAI) -> None:
    with connect(agent, key=key) as sdk:
        before = sdk.threads.count()
        first = client.responses.create(model="agent", input="one")
        second = client.responses.create(model="agent", input="two", previous_response_id=first.id)
        assert sdk.threads.count() == before + 1
        client.responses.delete(first.id)
        assert sdk.threads.count() == before + 1
        client.responses.delete(second.id)
        assert sdk.threads.count() == before
    for gone in (first, second):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone.id)


def test_a_request_that_is_sent_again_is_one_turn(agent: Agent, key: str, model: Model) -> None:
    text = f"[[delay 2.5]] {uuid.uuid4().hex}"
    with OpenAI(base_url=f"{agent.url}/openai/v1", api_key=key, max_retries=2, timeout=1) as client:
        answer = client.responses.create(model="agent", input=text)
    assert text in answer.output_text
    assert sum(request["messages"][-1]["content"] == text for request in model.requests()) == 1
    with connect(agent, key=key) as sdk:
        assert [texts(sdk, thread["thread_id"]) for thread in sdk.threads.search(limit=3) if text in str(thread["values"])] == [[text, answer.output_text]]


# Values that mean nothing, of every field that OpenAI's client knows. A new one of its fields has to be put here.
NOTHING: dict[str, list[Any]] = {
    "access_programs": [{}],
    "background": [False],
    "background_options": [{}],
    "context_management": [[]],
    "conversation": [],
    "image": [],
    "include": [[], ["reasoning.encrypted_content"]],
    "instructions": [""],
    "max_output_tokens": [1000],
    "max_tool_calls": [],
    "metadata": [{}],
    "moderation": [],
    "parallel_tool_calls": [True, False],
    "previous_response_id": [],
    "prompt": [],
    "prompt_cache_key": ["a"],
    "prompt_cache_options": [{}],
    "prompt_cache_retention": ["24h"],
    "reasoning": [{}, {"effort": None, "summary": "auto"}],
    "safety_identifier": ["a"],
    "service_tier": ["auto", "default", "flex"],
    "store": [True, False],
    "stream": [False],
    "stream_options": [{}, {"include_obfuscation": False}],
    "temperature": [1],
    "text": [{}, {"format": {"type": "text"}, "verbosity": "medium"}],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "top_p": [1],
    "truncation": ["auto", "disabled"],
    "user": [""],
}


def test_every_field_of_the_client_is_known() -> None:
    known = set(get_type_hints(ResponseCreateParamsNonStreaming)) | set(get_type_hints(ResponseCreateParamsStreaming))
    assert known == NOTHING.keys() | {"input", "model"}


@pytest.mark.parametrize("name", NOTHING)
def test_what_means_nothing_is_taken(name: str) -> None:
    for value in [None, *NOTHING[name]]:
        asked = ResponseCreate.model_validate({"model": "agent", "input": "hello", name: value}).completion()
        assert [message.content for message in asked.messages] == ["hello"], value


REFUSED: dict[str, dict[str, Any]] = {
    "no input": {"input": []},
    "null input": {"input": None},
    "blank input": {"input": " "},
    "background": {"background": True},
    "conversation": {"conversation": "canary"},
    "prompt": {"prompt": {"id": "canary"}},
    "web search": {"tools": [{"type": "web_search"}]},
    "tool choice": {"tools": TOOLS, "tool_choice": {"type": "function", "name": "canary2"}},
    "result of nothing": {"input": [{"type": "function_call_output", "call_id": "1", "output": "canary"}]},
    "file": {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "canary"}]}]},
    "picture from elsewhere": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1/canary"}]}]},
    "reference": {"input": [{"type": "item_reference", "id": "canary"}]},
    "previous": {"previous_response_id": "canary"},
    "previous and not stored": {"previous_response_id": f"resp_{uuid.uuid4()}", "store": False},
    "unknown": {"canary": 1},
    "NUL": {"input": "canary\0"},
    "form": {"text": {"format": {"type": "grammar"}}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(agent: Agent, name: str) -> None:
    answer = agent.client.post("/openai/v1/responses", json={"model": "agent", "input": "hello"} | REFUSED[name])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert "canary" not in answer.text

"""Messages of every role, as LangGraph's clients give them to runs and write them into a thread's state."""

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from langgraph_sdk.client import SyncLangGraphClient

from sdk import connect, texts
from servers import Agent, Model

CALL = {"id": "call-1", "name": "calculator", "args": {"expression": "6*7"}}
OPENAI_CALL = {"id": "call-1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "6*7"}'}}


@pytest.fixture
def client(agent: Agent) -> Iterator[SyncLangGraphClient]:
    with connect(agent, user=f"owner-{uuid.uuid4().hex[:8]}") as client:
        yield client


def shown(model: Model) -> list[tuple[str, Any]]:
    """What the model was shown last, without the service's own prompt."""
    return [(message["role"], message.get("content")) for message in model.requests()[-1]["messages"][1:]]


# What a client gives, the types that the thread then has, and what the model is shown.
GIVEN: dict[str, tuple[list[Any], list[str], list[tuple[str, Any]]]] = {
    "system": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        ["system", "human"],
        [("user", "Be brief.\n\nhi")],
    ),
    "developer": (
        [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, "hi"],
        ["system", "human"],
        [("user", "Be brief.\n\nhi")],
    ),
    "an instruction afterwards": (
        [{"type": "human", "content": "hi"}, {"type": "system", "content": "Be brief."}],
        ["human", "system"],
        [("user", "hi\n\nBe brief.")],
    ),
    "history": (
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}],
        ["human", "ai", "human"],
        [("user", "one"), ("assistant", "two"), ("user", "three")],
    ),
    "as a state has them": (
        [
            {"type": "human", "content": "one", "additional_kwargs": {"a": 1}, "response_metadata": {}, "name": None, "id": "m1", "example": False},
            {
                "type": "ai", "content": "two", "additional_kwargs": {}, "response_metadata": {"model_name": "x"}, "id": "m2", "tool_calls": [],
                "invalid_tool_calls": [], "usage_metadata": {"input_tokens": 9, "output_tokens": 9, "total_tokens": 18},
            },
            {"type": "human", "content": [{"type": "text", "text": "three"}]},
        ],
        ["human", "ai", "human"],
        [("user", "one"), ("assistant", "two"), ("user", "three")],
    ),
    "an answer of nothing": ([{"role": "assistant", "content": None}, {"role": "user", "content": "x"}], ["human"], [("user", "x")]),
    "a tool's result": (
        [{"role": "user", "content": "6*7?"}, {"role": "ai", "content": "", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call-1", "content": "42"}],
        ["human", "ai", "tool"],
        [("user", "6*7?"), ("assistant", None), ("tool", "42")],
    ),
    "OpenAI's form of a call": (
        [
            {"role": "user", "content": "6*7?"},
            {"role": "assistant", "tool_calls": [OPENAI_CALL]},
            {"type": "tool", "tool_call_id": "call-1", "content": "42", "name": "calculator", "status": "success", "artifact": None},
            {"role": "user", "content": "sure?"},
        ],
        ["human", "ai", "tool", "human"],
        [("user", "6*7?"), ("assistant", None), ("tool", "42"), ("assistant", "This turn ended without an answer."), ("user", "sure?")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("stateless", [False, True], ids=["thread", "stateless"])
def test_a_run_is_given_them(client: SyncLangGraphClient, model: Model, name: str, stateless: bool) -> None:
    given, types, prompt = GIVEN[name]
    thread = None if stateless else client.threads.create()["thread_id"]
    values: Any = client.runs.wait(thread, "agent", input={"messages": given})
    assert [message["type"] for message in values["messages"]] == [*types, "ai"]
    assert shown(model) == prompt
    if thread is not None:
        again: Any = client.runs.wait(thread, "agent", input={"messages": "and now?"})
        assert [message["type"] for message in again["messages"]] == [*types, "ai", "human", "ai"]


REFUSED: dict[str, tuple[Any, str]] = {
    "an instruction alone": ([{"role": "system", "content": "x"}], "the last one must be"),
    "an answer at the end": ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "the last one must be"),
    "a result without a call": ([{"role": "tool", "tool_call_id": "call-9", "content": "x"}], "no tool call"),
    "a call without a result": ([{"role": "ai", "content": "", "tool_calls": [CALL]}, {"role": "user", "content": "x"}], "followed by its result"),
    "arguments that are a list": (
        [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": "[]"}}]}, {"role": "user", "content": "x"}],
        "must be a JSON object",
    ),
    "a function": ([{"role": "function", "name": "a", "content": "x"}], "messages"),
    "no role": ([{"content": "x"}], "messages"),
    "a blank instruction": ([{"role": "system", "content": " "}, {"role": "user", "content": "x"}], "messages"),
    "a long question": ([{"role": "user", "content": "x" * 16_001}, {"role": "system", "content": "y"}], "at most 16000"),
    "another's reset": ([{"type": "remove", "id": "__remove_all__"}, {"role": "user", "content": "x"}], "messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_messages(client: SyncLangGraphClient, model: Model, name: str) -> None:
    given, says = REFUSED[name]
    thread = client.threads.create()["thread_id"]
    for place in (thread, None):
        with pytest.raises(httpx.HTTPStatusError, match=says):
            client.runs.wait(place, "agent", input={"messages": given})
    assert model.requests() == []


def test_a_result_belongs_to_a_call_of_the_thread(client: SyncLangGraphClient, model: Model) -> None:
    thread = client.threads.create()["thread_id"]
    question = {"role": "user", "content": "6*7?"}
    client.threads.update_state(thread, {"messages": [question, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}, as_node="model")
    assert client.threads.get_state(thread)["next"] == ["tools"]
    client.runs.wait(thread, "agent", input={"messages": [{"role": "tool", "tool_call_id": "call-1", "content": "43"}]})
    assert shown(model) == [("user", "6*7?"), ("assistant", None), ("tool", "43")]


def test_update_state_takes_every_role(client: SyncLangGraphClient, model: Model) -> None:
    thread = client.threads.create()["thread_id"]
    client.threads.update_state(
        thread,
        {
            "messages": [
                {"type": "system", "content": "Be brief.", "id": "s"},
                "one",
                {"role": "assistant", "content": "", "tool_calls": [OPENAI_CALL]},
                {"role": "tool", "tool_call_id": "call-1", "content": "42", "status": "error"},
                {"role": "assistant", "content": "two"},
            ]
        },
        as_node="model",
    )
    state: Any = client.threads.get_state(thread)["values"]
    assert [message["type"] for message in state["messages"]] == ["system", "human", "ai", "tool", "ai"]
    assert (state["messages"][2]["tool_calls"][0]["args"], state["messages"][3]["status"]) == ({"expression": "6*7"}, "error")
    client.runs.wait(thread, "agent", input={"messages": "three"})
    assert shown(model)[0] == ("user", "Be brief.\n\none")
    client.threads.update_state(thread, {"messages": [{"type": "remove", "id": "s"}]}, as_node="model")
    assert texts(client, thread)[0] == "one"

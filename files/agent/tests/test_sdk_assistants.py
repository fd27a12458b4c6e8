"""Assistants, made and used through LangGraph's own client."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langgraph_sdk.client import SyncLangGraphClient
from langgraph_sdk.errors import APIStatusError, ConflictError, NotFoundError

from sdk import ASSISTANT_ID, connect, say
from servers import Agent, Model

PIRATE: dict[str, Any] = {"configurable": {"system_prompt": "You are a pirate.", "temperature": 0.7, "tools": ["calculator"], "max_tokens": 50}}


@pytest.fixture
def client(agent: Agent) -> Iterator[SyncLangGraphClient]:
    with connect(agent, user=f"owner-{uuid.uuid4().hex[:8]}") as client:
        yield client


@pytest.fixture
def stranger(agent: Agent) -> Iterator[SyncLangGraphClient]:
    with connect(agent, user=f"stranger-{uuid.uuid4().hex[:8]}") as client:
        yield client


def test_the_first_line_of_most_programs(client: SyncLangGraphClient) -> None:
    first = client.assistants.create("agent", config=PIRATE, if_exists="do_nothing")
    assert (first["graph_id"], first["version"], first["config"]) == ("agent", 1, PIRATE)
    again = client.assistants.create("agent", config=PIRATE, if_exists="do_nothing")
    assert again == first, "one that is just like it is as good"
    other = client.assistants.create("agent", config=PIRATE, name="other", if_exists="do_nothing")
    assert other["assistant_id"] != first["assistant_id"]
    named = str(uuid.uuid4())
    assert client.assistants.create("agent", assistant_id=named)["assistant_id"] == named
    assert client.assistants.create("agent", assistant_id=named, if_exists="do_nothing", name="x")["name"] == "Untitled"
    with pytest.raises(ConflictError):
        client.assistants.create("agent", assistant_id=named)
    assert client.assistants.create("agent", assistant_id=ASSISTANT_ID, if_exists="do_nothing")["name"] == "agent"
    with pytest.raises(NotFoundError):
        client.assistants.create("other")


def test_search_and_count(client: SyncLangGraphClient, stranger: SyncLangGraphClient) -> None:
    for number in range(3):
        client.assistants.create("agent", name=f"Pirate {number}", metadata={"n": number, "kind": "pirate"})
    stranger.assistants.create("agent", name="Pirate 9", metadata={"kind": "pirate"})

    def names(**how: Any) -> list[str]:
        found: Any = client.assistants.search(**how)
        return [each["name"] for each in found]

    assert names() == ["Pirate 2", "Pirate 1", "Pirate 0", "agent"]
    assert names(sort_by="name", sort_order="asc") == ["Pirate 0", "Pirate 1", "Pirate 2", "agent"]
    assert names(metadata={"kind": "pirate", "n": 1}) == ["Pirate 1"]
    assert names(name="pirate 2") == ["Pirate 2"]
    assert names(limit=1, offset=1) == ["Pirate 1"]
    assert client.assistants.search(name="Pirate 0", select=["name"]) == [{"name": "Pirate 0"}]
    page: Any = client.assistants.search(limit=2, response_format="object")
    assert (len(page["assistants"]), page["next"]) == (2, "2")
    assert client.assistants.count() == 4
    assert client.assistants.count(metadata={"kind": "pirate"}) == 3


def test_versions(client: SyncLangGraphClient) -> None:
    name = client.assistants.create("agent", name="one", metadata={"a": 1}, description="first")["assistant_id"]
    second = client.assistants.update(name, name="two", metadata={"b": 2}, config=PIRATE)
    assert (second["version"], second["name"], second["metadata"], second["description"]) == (2, "two", {"a": 1, "b": 2}, "first")
    assert [(each["version"], each["name"]) for each in client.assistants.get_versions(name)] == [(2, "two"), (1, "one")]
    assert [each["version"] for each in client.assistants.get_versions(name, metadata={"b": 2})] == [2]
    assert client.assistants.set_latest(name, 1)["name"] == "one"
    assert client.assistants.get(name)["version"] == 1
    assert client.assistants.update(name, name="three")["version"] == 3
    assert client.assistants.get(name)["config"] == {}
    with pytest.raises(NotFoundError):
        client.assistants.set_latest(name, 9)
    for _ in range(25):
        client.assistants.update(name, name="more")
    assert len(client.assistants.get_versions(name, limit=100)) == 20
    client.assistants.delete(name)
    with pytest.raises(NotFoundError):
        client.assistants.get(name)


def test_a_run_with_an_assistant(client: SyncLangGraphClient, model: Model) -> None:
    name = client.assistants.create("agent", config=PIRATE)["assistant_id"]
    thread = client.threads.create()["thread_id"]
    values: Any = client.runs.wait(thread, name, input={"messages": "hello"})
    assert values["messages"][-1]["type"] == "ai"
    sent = model.requests()[-1]
    assert sent["messages"][0]["role"] == "system"
    assert sent["messages"][0]["content"].endswith("\n\nYou are a pirate.")
    assert (sent["temperature"], sent["max_tokens"]) == (0.7, 50)
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["calculator"]
    assert client.runs.list(thread)[0]["assistant_id"] == name
    # One run may differ, and the deployed agent is what it was.
    client.runs.wait(thread, name, input={"messages": "hello"}, context={"temperature": 0, "tools": []})
    sent = model.requests()[-1]
    assert (sent["temperature"], sent.get("tools")) == (0, None)
    say(client, thread, "hello")
    sent = model.requests()[-1]
    assert "pirate" not in sent["messages"][0]["content"]
    assert len(sent["tools"]) > 1
    stateless: Any = client.runs.wait(None, name, input={"messages": "hello"}, config={"configurable": {"thread_id": "x", "top_p": 0.5}})
    assert stateless["messages"]
    assert model.requests()[-1]["top_p"] == 0.5


def test_a_tool_that_an_assistant_may_not_use_is_not_run(client: SyncLangGraphClient) -> None:
    name = client.assistants.create("agent", config={"configurable": {"tools": ["current_time"]}})["assistant_id"]
    values: Any = client.runs.wait(None, name, input={"messages": '[[tool calculator {"expression": "6*7"}]]'})
    [result] = [message for message in values["messages"] if message["type"] == "tool"]
    assert (result["status"], result["content"]) == ("error", "calculator is not a valid tool. The tools are: current_time.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sistem_prompt": "x"}, "the options are system_prompt"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"tools": "calculator"}, "tools: Input should be a valid list"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"system_prompt": "x" * 20_001}, "system_prompt: "),
    ],
)
def test_bad_options(client: SyncLangGraphClient, options: dict[str, Any], words: str) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: client.assistants.create("agent", config={"configurable": options}),
        lambda: client.assistants.create("agent", context=options),
        lambda: client.runs.create(None, "agent", input={"messages": "x"}, context=options),
        lambda: client.runs.create(None, "agent", input={"messages": "x"}, config={"configurable": options}),
    ]
    for attempt in attempts:
        with pytest.raises(APIStatusError, match=words) as refused:
            attempt()
        assert refused.value.status_code == 422


def test_foreign_assistants_are_none(client: SyncLangGraphClient, stranger: SyncLangGraphClient) -> None:
    name = client.assistants.create("agent", name="mine")["assistant_id"]
    attempts: list[Callable[[SyncLangGraphClient, str], Any]] = [
        lambda c, a: c.assistants.get(a),
        lambda c, a: c.assistants.update(a, name="x"),
        lambda c, a: c.assistants.delete(a),
        lambda c, a: c.assistants.get_versions(a),
        lambda c, a: c.assistants.set_latest(a, 1),
        lambda c, a: c.assistants.get_graph(a),
        lambda c, a: c.assistants.get_schemas(a),
        lambda c, a: c.assistants.get_subgraphs(a),
        lambda c, a: c.runs.create(None, a, input={"messages": "x"}),
    ]
    for attempt in attempts:
        for assistant in (name, str(uuid.uuid4()), "no such name"):
            with pytest.raises(NotFoundError):
                attempt(stranger, assistant)
    with pytest.raises(ConflictError):
        stranger.assistants.create("agent", assistant_id=name, if_exists="do_nothing")
    assert client.assistants.get(name)["name"] == "mine"


def test_an_owner_has_so_many(client: SyncLangGraphClient) -> None:
    for number in range(100):
        client.assistants.create("agent", name=str(number))
    with pytest.raises(APIStatusError, match="There are 100 assistants") as refused:
        client.assistants.create("agent")
    assert refused.value.status_code == 403

"""Threads, assistants and the store, driven by LangGraph's own client."""

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from httpx import HTTPStatusError
from langgraph_sdk.client import SyncLangGraphClient
from langgraph_sdk.errors import (
    APIStatusError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    UnprocessableEntityError,
)

from sdk import ASSISTANT_ID, connect, say, texts
from servers import Agent, Postgres

NO_CHECKPOINT = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def client(agent: Agent) -> Iterator[SyncLangGraphClient]:
    with connect(agent, user=f"owner-{uuid.uuid4().hex[:8]}") as client:
        yield client


@pytest.fixture
def stranger(agent: Agent) -> Iterator[SyncLangGraphClient]:
    with connect(agent, user=f"stranger-{uuid.uuid4().hex[:8]}") as client:
        yield client


# Assistants


def test_the_one_assistant(client: SyncLangGraphClient) -> None:
    for name in ("agent", ASSISTANT_ID):
        assistant = client.assistants.get(name)
        assert (assistant["assistant_id"], assistant["graph_id"]) == (ASSISTANT_ID, "agent")
    assert [found["name"] for found in client.assistants.search()] == ["agent"]
    assert client.assistants.search(graph_id="agent", metadata={"created_by": "system"}, select=["name"]) == [{"name": "agent"}]
    assert client.assistants.search(graph_id="other") == []
    assert client.assistants.search(offset=1) == []
    assert client.assistants.count() == 1
    assert client.assistants.count(name="other") == 0
    with pytest.raises(NotFoundError):
        client.assistants.get("other")


def test_graph_and_schemas(client: SyncLangGraphClient) -> None:
    graph = client.assistants.get_graph("agent")
    assert {"model", "tools"} <= {node["id"] for node in graph["nodes"]}
    schemas = client.assistants.get_schemas("agent")
    assert schemas["graph_id"] == "agent"
    assert "messages" in schemas["input_schema"]["properties"]
    assert client.assistants.get_subgraphs("agent") == {}


# Threads


def test_create_and_get(client: SyncLangGraphClient) -> None:
    made = client.threads.create(metadata={"colour": "blue"})
    assert made["status"] == "idle"
    assert made["values"] is None
    assert made["interrupts"] == {}
    assert client.threads.get(made["thread_id"]) == made
    assert made["metadata"] == {"colour": "blue"}
    assert made["state_updated_at"] == made["created_at"]
    assert (made["config"], made["context"], made["error"]) == ({}, {}, None)
    say(client, made["thread_id"], "hello")
    used = client.threads.get(made["thread_id"])
    assert used["metadata"] == {"colour": "blue", "graph_id": "agent", "assistant_id": ASSISTANT_ID}
    assert used["state_updated_at"] > made["state_updated_at"]


def test_create_what_exists(client: SyncLangGraphClient, stranger: SyncLangGraphClient) -> None:
    name = uuid.uuid4().hex
    made = client.threads.create(thread_id=name, metadata={"a": 1})
    with pytest.raises(ConflictError):
        client.threads.create(thread_id=name)
    again = client.threads.create(thread_id=name, if_exists="do_nothing")
    assert again == made
    with pytest.raises(ConflictError):
        stranger.threads.create(thread_id=name, if_exists="do_nothing")


def test_update_and_delete(client: SyncLangGraphClient) -> None:
    name = client.threads.create(metadata={"a": 1, "b": 1})["thread_id"]
    updated = client.threads.update(name, metadata={"b": 2, "c": 3})
    assert {"a": 1, "b": 2, "c": 3}.items() <= updated["metadata"].items()
    assert client.threads.update(name, metadata={"d": 4}, return_minimal=True) is None
    assert client.threads.get(name)["metadata"]["d"] == 4
    client.threads.delete(name)
    with pytest.raises(NotFoundError):
        client.threads.get(name)
    with pytest.raises(NotFoundError):
        client.threads.delete(name)


def test_search_and_count(client: SyncLangGraphClient, stranger: SyncLangGraphClient) -> None:
    mark = uuid.uuid4().hex
    names = [client.threads.create(metadata={"mark": mark, "n": n}, graph_id="agent")["thread_id"] for n in range(3)]
    client.threads.create(metadata={"mark": f"{mark}-unused"})
    stranger.threads.create(metadata={"mark": mark})
    wanted = {"mark": mark}

    def found(**how: Any) -> list[str]:
        return [thread["thread_id"] for thread in client.threads.search(metadata=wanted, **how)]

    assert found() == names[::-1]
    assert found(sort_by="created_at", sort_order="asc") == names
    assert found(limit=1, offset=1) == [names[1]]
    assert found(status="busy") == []
    assert [thread["thread_id"] for thread in client.threads.search(ids=names[:1])] == names[:1]
    assert client.threads.search(metadata={**wanted, "n": 2}, select=["thread_id"]) == [{"thread_id": names[2]}]
    assert client.threads.search(metadata={**wanted, "graph_id": "other"}) == []
    assert len(client.threads.search(metadata={**wanted, "graph_id": "agent"})) == 3
    assert client.threads.count(metadata=wanted) == 3
    assert client.threads.count(metadata=wanted, status="idle") == 3
    assert client.threads.count(metadata={**wanted, "graph_id": "other"}) == 0
    assert client.threads.count(metadata={"mark": f"{mark}-unused"}) == 1
    assert client.threads.count(metadata={"mark": f"{mark}-unused", "graph_id": "agent"}) == 0, "nothing has worked on it"


def test_copy(client: SyncLangGraphClient) -> None:
    name = client.threads.create(metadata={"a": 1})["thread_id"]
    say(client, name, "the first")
    copy: Any = client.threads.copy(name)
    assert copy["thread_id"] != name
    assert copy["metadata"]["a"] == 1
    say(client, copy["thread_id"], "the second")
    assert texts(client, name) == ["the first", 'I see 1 user message. The first one was: "the first"']
    assert texts(client, copy["thread_id"])[2:] == [
        "the second",
        'I see 2 user messages. The first one was: "the first"',
    ]


def test_prune(client: SyncLangGraphClient, stranger: SyncLangGraphClient, migrated: Postgres) -> None:
    names = [client.threads.create()["thread_id"] for _ in range(2)]
    foreign = stranger.threads.create()["thread_id"]
    for name in names:
        say(client, name, "one")
        say(client, name, '[[tool calculator {"expression": "6*7"}]]')
    before = client.threads.get_state(names[0])
    assert client.threads.prune([names[0], foreign], strategy="keep_latest") == {"pruned_count": 1}  # type: ignore[comparison-overlap]
    after = client.threads.get_history(names[0], limit=100)
    assert [state["values"] for state in after] == [before["values"]]
    assert after[0]["parent_checkpoint"] is None
    sizes = migrated.query("SELECT count(*) FROM checkpoint_blobs WHERE thread_id = %s AND channel = 'messages'", names[0])
    assert sizes == [(1,)]
    say(client, names[0], "two")
    assert len(texts(client, names[0])) == 8
    assert client.threads.prune([names[1], foreign, "none"]) == {"pruned_count": 1}  # type: ignore[comparison-overlap]
    with pytest.raises(NotFoundError):
        client.threads.get(names[1])
    assert stranger.threads.get(foreign)
    run = client.runs.create(names[0], "agent", input={"messages": "[[delay 1]] slow"})
    with pytest.raises(ConflictError):
        client.threads.prune([names[0]], strategy="keep_latest")
    client.runs.join(names[0], run["run_id"])


def test_state_and_history(client: SyncLangGraphClient) -> None:
    name = client.threads.create()["thread_id"]
    empty = client.threads.get_state(name)
    assert (empty["values"], empty["next"], empty["metadata"]) == ({}, [], {})
    say(client, name, "one")
    say(client, name, "two")
    state = client.threads.get_state(name)
    assert [message["type"] for message in state["values"]["messages"]] == ["human", "ai", "human", "ai"]
    assert state["next"] == []
    assert state["checkpoint"]["thread_id"] == name
    history = client.threads.get_history(name, limit=20)
    assert history[0] == state
    assert len(history) > 2
    assert len(client.threads.get_history(name, limit=2)) == 2
    older = client.threads.get_history(name, before=state["checkpoint"], limit=20)
    assert older == history[1:]
    assert client.threads.get_history(name, before=state["checkpoint"]["checkpoint_id"], limit=20) == history[1:]
    past = next(each for each in history if len(each["values"].get("messages", [])) == 2 and not each["next"])
    for found in (
        client.threads.get_state(name, checkpoint=past["checkpoint"]),
        client.threads.get_state(name, checkpoint_id=past["checkpoint"]["checkpoint_id"]),
    ):
        assert found["values"] == past["values"]
    assert client.threads.get_state(name, select=["next"]) == {"next": []}
    assert list(client.threads.get_state(name, select=["values.messages"])) == ["values"]
    with pytest.raises(NotFoundError):
        client.threads.get_state(name, checkpoint_id=NO_CHECKPOINT)


def test_update_state(client: SyncLangGraphClient) -> None:
    name = client.threads.create()["thread_id"]
    say(client, name, "one")
    written = client.threads.update_state(
        name,
        {"messages": [{"role": "user", "content": "by hand"}, {"type": "ai", "content": "so it is", "id": "mine"}]},
        as_node="model",
    )
    assert written["checkpoint"]["thread_id"] == name
    assert texts(client, name)[2:] == ["by hand", "so it is"]
    client.threads.update_state(name, {"messages": [{"type": "remove", "id": "mine"}]}, as_node="model")
    assert texts(client, name)[2:] == ["by hand"]
    with pytest.raises(UnprocessableEntityError):
        client.threads.update_state(name, {"messages": "x"}, as_node="no such node")


def test_go_on_from_a_checkpoint(client: SyncLangGraphClient) -> None:
    name = client.threads.create()["thread_id"]
    say(client, name, "one")
    past = client.threads.get_state(name)["checkpoint"]
    say(client, name, "two")
    say(client, name, "three", checkpoint=past)
    assert texts(client, name) == [
        "one",
        'I see 1 user message. The first one was: "one"',
        "three",
        'I see 2 user messages. The first one was: "one"',
    ]
    with pytest.raises(HTTPStatusError, match="no such checkpoint"):
        say(client, name, "four", checkpoint_id=NO_CHECKPOINT)


def test_foreign_threads_are_none(client: SyncLangGraphClient, stranger: SyncLangGraphClient) -> None:
    name = client.threads.create()["thread_id"]
    say(client, name, "mine")
    run = client.runs.list(name)[0]["run_id"]
    state = client.threads.get_state(name)
    attempts: list[Callable[[SyncLangGraphClient, str], Any]] = [
        lambda c, t: c.threads.get(t),
        lambda c, t: c.threads.update(t, metadata={"a": 1}),
        lambda c, t: c.threads.delete(t),
        lambda c, t: c.threads.copy(t),
        lambda c, t: c.threads.get_state(t),
        lambda c, t: c.threads.get_state(t, checkpoint=state["checkpoint"] | {"thread_id": t}),
        lambda c, t: c.threads.get_state(t, checkpoint_id=state["checkpoint"]["checkpoint_id"]),
        lambda c, t: c.threads.update_state(t, {"messages": "x"}, as_node="model"),
        lambda c, t: c.threads.get_history(t),
        lambda c, t: c.runs.create(t, "agent", input={"messages": "x"}),
        lambda c, t: c.runs.create(t, "agent", input={"messages": "x"}, if_not_exists="create"),
        lambda c, t: c.runs.create(t, "agent", command={"resume": True}),
        lambda c, t: c.runs.wait(t, "agent", input={"messages": "x"}),
        lambda c, t: list(c.runs.stream(t, "agent", input={"messages": "x"})),
        lambda c, t: c.runs.list(t),
        lambda c, t: c.runs.get(t, run),
        lambda c, t: c.runs.join(t, run),
        lambda c, t: list(c.runs.join_stream(t, run)),
        lambda c, t: c.runs.cancel(t, run),
        lambda c, t: c.runs.cancel(t, run, action="rollback"),
        lambda c, t: c.runs.delete(t, run),
        lambda c, t: c.runs.cancel_many(thread_id=t, run_ids=[run]),
    ]
    for index, attempt in enumerate(attempts):
        answers = []
        for thread in (name, "there-is-no-such-thread"):
            if index == 10 and thread != name:
                continue
            with pytest.raises(HTTPStatusError) as refused:
                attempt(stranger, thread)
            assert refused.value.response.status_code == 404, index
            answers.append(refused.value.response.content)
        assert len(set(answers)) == 1, index
    assert client.threads.get_state(name) == state
    # A run of another thread of one's own is not this thread's either.
    other = stranger.threads.create()["thread_id"]
    with pytest.raises(NotFoundError):
        stranger.runs.get(other, run)


# The store


def test_items(client: SyncLangGraphClient, stranger: SyncLangGraphClient) -> None:
    room = uuid.uuid4().hex
    client.store.put_item([room, "notes"], key="a", value={"text": "first", "n": 1})
    client.store.put_item([room, "notes"], key="b", value={"text": "second", "n": 2})
    client.store.put_item([room, "other"], key="a", value={"text": "other"})
    client.store.put_item([room, "notes"], key="a", value={"text": "changed", "n": 1})
    item = client.store.get_item([room, "notes"], key="a")
    assert (item["namespace"], item["key"], item["value"]) == ([room, "notes"], "a", {"text": "changed", "n": 1})

    def keys(prefix: list[str], **how: Any) -> list[str]:
        return [found["key"] for found in client.store.search_items(prefix, **how)["items"]]

    assert keys([room, "notes"]) == ["a", "b"]
    assert keys([room, "notes"], filter={"n": 2}) == ["b"]
    assert len(keys([room])) == 3
    assert len(keys([room], limit=1, offset=1)) == 1
    assert client.store.list_namespaces(prefix=[room])["namespaces"] == [[room, "notes"], [room, "other"]]
    assert client.store.list_namespaces(prefix=[room], suffix=["other"])["namespaces"] == [[room, "other"]]
    assert client.store.list_namespaces(prefix=[room], max_depth=1)["namespaces"] == [[room]]
    # Nobody else sees any of it, whatever they ask for.
    assert stranger.store.search_items([])["items"] == []
    assert stranger.store.list_namespaces()["namespaces"] == []
    stranger.store.put_item([room, "notes"], key="a", value={"text": "the stranger's"})
    stranger.store.delete_item([room, "notes"], key="b")
    assert client.store.get_item([room, "notes"], key="a")["value"]["text"] == "changed"
    assert keys([room, "notes"]) == ["a", "b"]
    stranger.store.delete_item([room, "notes"], key="a")
    client.store.delete_item([room, "notes"], key="a")
    assert client.store.get_item([room, "notes"], key="a") is None


# Without Postgres


def test_no_storage_is_no_mistake_of_ours(client: SyncLangGraphClient, migrated: Postgres) -> None:
    name = client.threads.create()["thread_id"]
    say(client, name, "hello")
    attempts: list[Callable[[], Any]] = [
        lambda: client.threads.get_state(name),
        lambda: client.threads.get_history(name),
        lambda: client.threads.search(),
        lambda: client.threads.update_state(name, {"messages": "x"}, as_node="model"),
        lambda: client.runs.create(name, "agent", input={"messages": "x"}),
        lambda: client.store.put_item(["a"], key="a", value={}),
        lambda: client.store.search_items(["a"]),
    ]
    migrated.stop()
    try:
        with ThreadPoolExecutor(len(attempts)) as pool:
            failures = [task.exception() for task in [pool.submit(attempt) for attempt in attempts]]
    finally:
        migrated.start()
    for number, failure in enumerate(failures):
        assert isinstance(failure, InternalServerError), number
        assert failure.status_code == 503, number
        assert failure.body["error"]["code"] == "storage_unavailable", number  # type: ignore[index]
    assert len(texts(client, name)) == 2


# What is not there


def test_what_is_not_supported_is_refused(client: SyncLangGraphClient) -> None:
    name = client.threads.create()["thread_id"]
    text = {"messages": "x"}
    attempts: dict[str, Callable[[], Any]] = {
        "the only graph": lambda: client.assistants.create("other"),
        "cannot be changed": lambda: client.assistants.update("agent", name="other"),
        "as it was deployed": lambda: client.assistants.delete("agent"),
        "webhooks": lambda: client.crons.create("agent", schedule="* * * * *", input=text, webhook="http://127.0.0.1/"),
        "Webhooks": lambda: client.runs.create(name, "agent", input=text, webhook="http://127.0.0.1/"),
        "Delayed": lambda: client.runs.create(name, "agent", input=text, after_seconds=5),
        "feedback_keys": lambda: list(client.runs.stream(name, "agent", input=text, feedback_keys=["x"])),
        "context": lambda: client.runs.create(name, "agent", input=text, context={"a": 1}),
        "configurable": lambda: client.runs.create(name, "agent", input=text, config={"configurable": {"a": 1}}),
        "langsmith": lambda: client.runs.create(name, "agent", input=text, langsmith_tracing={"project_name": "x"}),
        "goto": lambda: client.runs.create(name, "agent", command={"goto": "model"}),
        "command.update": lambda: client.runs.create(name, "agent", command={"resume": 1, "update": {"a": 1}}),
        "ttl": lambda: client.threads.create(ttl=5),
        "TTL": lambda: client.threads.update(name, metadata={}, ttl=5),
        "supersteps": lambda: client.threads.create(supersteps=[{"updates": [{"values": {}, "as_node": "model"}]}]),
        "query": lambda: client.threads.get(name, include=["ttl"]),
        "extract": lambda: client.threads.search(extract={"a": "values.a"}),
        "values": lambda: client.threads.search(values={"a": 1}),
        "status": lambda: client.runs.cancel_many(status="all"),
        "meaning": lambda: client.store.search_items(["a"], query="x"),
        "index": lambda: client.store.put_item(["a"], key="a", value={}, index=["x"]),
        "a ttl": lambda: client.store.put_item(["a"], key="a", value={}, ttl=5),
        "graph_id": lambda: client.threads.create(graph_id="other"),
    }
    for word, attempt in attempts.items():
        with pytest.raises(APIStatusError) as refused:
            attempt()
        assert refused.value.status_code in (404, 405, 422), word
        assert word.lower() in refused.value.message.lower(), refused.value.message


# What only the client in JavaScript sends


def test_a_place_as_a_config(client: SyncLangGraphClient) -> None:
    name = client.threads.create()["thread_id"]
    say(client, name, "one")
    place = client.threads.get_state(name)["checkpoint"]
    states = client.http.client.post(f"/threads/{name}/history", json={"before": {"configurable": place}, "limit": 10}).json()
    assert states == client.http.client.post(f"/threads/{name}/history", json={"before": place, "limit": 10}).json()
    assert states
    assert place not in [state["checkpoint"] for state in states]
    refused = client.http.client.post(f"/threads/{name}/history", json={"before": {"configurable": {"a": 1}}})
    assert refused.status_code == 422


def test_metadata_is_patched_by_way_of_the_state(client: SyncLangGraphClient, stranger: SyncLangGraphClient) -> None:
    name = client.threads.create(metadata={"a": 1})["thread_id"]
    assert client.http.client.patch(f"/threads/{name}/state", json={"metadata": {"b": 2}}).status_code == 204
    assert client.threads.get(name)["metadata"] == {"a": 1, "b": 2}
    assert stranger.http.client.patch(f"/threads/{name}/state", json={"metadata": {"b": 2}}).status_code == 404
    assert client.http.client.patch(f"/threads/{name}/state", json={}).status_code == 422


def test_a_batch_in_the_names_of_javascript(client: SyncLangGraphClient) -> None:
    name = client.threads.create()["thread_id"]
    text = {"messages": "hello [[delay 1]]"}
    batch = [
        {"assistantId": "agent", "assistant_id": "agent", "threadId": name, "input": text, "multitaskStrategy": "enqueue", "streamMode": "values"},
        {"assistantId": "agent", "assistant_id": "agent", "input": text, "onCompletion": "keep"},
    ]
    first, second = client.http.client.post("/runs/batch", json=batch).json()
    assert first["thread_id"] == name
    client.runs.join(second["thread_id"], second["run_id"])
    assert client.threads.get(second["thread_id"])["status"] == "idle"
    refused = client.http.client.post("/runs/batch", json=[{"assistantId": "agent", "input": text, "interuptBefore": ["tools"]}])
    assert refused.status_code == 422

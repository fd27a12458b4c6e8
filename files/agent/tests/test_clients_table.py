"""Every public method of LangGraph's client, and of RemoteGraph: it works, or is one of the few refusals that docs/clients.md names."""

import asyncio
import inspect
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from langgraph.pregel.remote import RemoteGraph
from langgraph_sdk import get_client
from langgraph_sdk.client import LangGraphClient
from langgraph_sdk.errors import APIStatusError

from sdk import ASSISTANT_ID, headers
from servers import AGENT, Agent

PAGE = (AGENT.parents[1] / "docs" / "clients.md").read_text() if (AGENT.parents[1] / "docs").is_dir() else ""
CLIENT = get_client(url="http://127.0.0.1:1", api_key=None)
PARTS = ("assistants", "threads", "runs", "crons", "store")


def public(kind: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]


METHODS = [f"{part}.{name}" for part in PARTS for name in public(type(getattr(CLIENT, part)))]
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
MOST_REFUSALS = 5


@dataclass
class World:
    """What there is when a method is called."""

    client: LangGraphClient
    thread: str
    run: str
    assistant: str
    checkpoint: Any


async def all_of(stream: Any) -> list[Any]:
    return [part async for part in stream]


async def first_of(stream: Any) -> Any:
    async with asyncio.timeout(20), aclosing(stream) as parts:
        return await anext(aiter(parts))


async def join_thread(world: World) -> Any:
    joined = asyncio.create_task(first_of(await world.client.threads.join_stream(world.thread)))
    await asyncio.sleep(1)
    await world.client.runs.create(world.thread, "agent", input=HELLO)
    return (await joined).event


# A call of each, and what is true of its answer.


async def with_cron(world: World, method: str, **how: Any) -> Any:
    made = await world.client.crons.create(**CRON)
    return await getattr(world.client.crons, method)(made["cron_id"], **how)


CALLS: dict[str, tuple[Callable[[World], Awaitable[Any]], Callable[[World, Any], Any]]] = {
    "assistants.count": (lambda w: w.client.assistants.count(), lambda w, found: found >= 2),
    "assistants.create": (lambda w: w.client.assistants.create("agent", if_exists="do_nothing"), lambda w, made: made["graph_id"] == "agent"),
    "assistants.delete": (lambda w: w.client.assistants.delete(w.assistant), lambda w, nothing: nothing is None),
    "assistants.get": (lambda w: w.client.assistants.get("agent"), lambda w, found: found["assistant_id"] == ASSISTANT_ID),
    "assistants.get_graph": (lambda w: w.client.assistants.get_graph("agent", xray=1), lambda w, graph: graph["nodes"]),
    "assistants.get_schemas": (
        lambda w: w.client.assistants.get_schemas("agent"),
        lambda w, found: "tools" in found["context_schema"]["properties"],
    ),
    "assistants.get_subgraphs": (lambda w: w.client.assistants.get_subgraphs("agent", namespace="a", recurse=True), lambda w, found: found == {}),
    "assistants.get_versions": (lambda w: w.client.assistants.get_versions(w.assistant), lambda w, found: [each["version"] for each in found] == [1]),
    "assistants.search": (lambda w: w.client.assistants.search(limit=1000), lambda w, found: ASSISTANT_ID in [each["assistant_id"] for each in found]),
    "assistants.set_latest": (lambda w: w.client.assistants.set_latest(w.assistant, 1), lambda w, found: found["version"] == 1),
    "assistants.update": (lambda w: w.client.assistants.update(w.assistant, name="new"), lambda w, found: found["name"] == "new"),
    "threads.copy": (lambda w: w.client.threads.copy(w.thread), lambda w, made: len(made["values"]["messages"]) == 2),
    "threads.count": (lambda w: w.client.threads.count(status="idle"), lambda w, found: found == 1),
    "threads.create": (lambda w: w.client.threads.create(metadata={"a": 1}), lambda w, made: made["metadata"] == {"a": 1}),
    "threads.delete": (lambda w: w.client.threads.delete(w.thread), lambda w, nothing: nothing is None),
    "threads.get": (lambda w: w.client.threads.get(w.thread), lambda w, found: found["values"]["messages"]),
    "threads.get_history": (lambda w: w.client.threads.get_history(w.thread, limit=1000), lambda w, found: len(found) > 1),
    "threads.get_state": (lambda w: w.client.threads.get_state(w.thread, checkpoint=w.checkpoint), lambda w, found: found["checkpoint"] == w.checkpoint),
    "threads.join_stream": (join_thread, lambda w, event: event == "metadata"),
    "threads.prune": (lambda w: w.client.threads.prune([w.thread, "none"], strategy="keep_latest"), lambda w, answer: answer == {"pruned_count": 1}),
    "threads.search": (lambda w: w.client.threads.search(limit=1000), lambda w, found: [each["thread_id"] for each in found] == [w.thread]),
    "threads.update": (lambda w: w.client.threads.update(w.thread, metadata={"b": 2}), lambda w, found: found["metadata"]["b"] == 2),
    "threads.update_state": (
        lambda w: w.client.threads.update_state(w.thread, {"messages": "by hand"}, as_node="model"),
        lambda w, answer: answer["checkpoint"]["thread_id"] == w.thread,
    ),
    "runs.cancel": (lambda w: w.client.runs.cancel(w.thread, w.run, wait=True), lambda w, nothing: nothing is None),
    "runs.cancel_many": (lambda w: w.client.runs.cancel_many(thread_id=w.thread, run_ids=[w.run]), lambda w, nothing: nothing is None),
    "runs.create": (lambda w: w.client.runs.create(w.thread, "agent", input=HELLO), lambda w, run: run["thread_id"] == w.thread),
    "runs.create_batch": (
        lambda w: w.client.runs.create_batch([{"assistant_id": "agent", "thread_id": thread, "input": HELLO} for thread in (w.thread, None)]),  # type: ignore[typeddict-item]
        lambda w, started: (len(started), started[0]["thread_id"]) == (2, w.thread),
    ),
    "runs.delete": (lambda w: w.client.runs.delete(w.thread, w.run), lambda w, nothing: nothing is None),
    "runs.get": (lambda w: w.client.runs.get(w.thread, w.run), lambda w, run: run["status"] == "success"),
    "runs.join": (lambda w: w.client.runs.join(w.thread, w.run), lambda w, values: len(values["messages"]) == 2),
    "runs.join_stream": (lambda w: all_of(w.client.runs.join_stream(w.thread, w.run)), lambda w, parts: parts[-1].event == "end"),
    "runs.list": (lambda w: w.client.runs.list(w.thread, limit=1000), lambda w, runs: [run["run_id"] for run in runs] == [w.run]),
    "runs.stream": (lambda w: all_of(w.client.runs.stream(w.thread, "agent", input=HELLO)), lambda w, parts: parts[-1].event == "end"),
    "runs.wait": (lambda w: w.client.runs.wait(w.thread, "agent", input=HELLO), lambda w, values: len(values["messages"]) == 4),
    "crons.count": (lambda w: w.client.crons.count(), lambda w, found: found == 0),
    "crons.create": (lambda w: w.client.crons.create(**CRON), lambda w, made: made["schedule"] == CRON["schedule"]),
    "crons.create_for_thread": (lambda w: w.client.crons.create_for_thread(w.thread, **CRON), lambda w, made: made["thread_id"] == w.thread),
    "crons.delete": (lambda w: with_cron(w, "delete"), lambda w, nothing: nothing is None),
    "crons.search": (lambda w: w.client.crons.search(), lambda w, found: found == []),
    "crons.update": (lambda w: with_cron(w, "update", enabled=False), lambda w, changed: changed["enabled"] is False),
    "store.delete_item": (lambda w: w.client.store.delete_item(["a"], "none"), lambda w, nothing: nothing is None),
    "store.get_item": (lambda w: w.client.store.get_item(["a"], "none"), lambda w, item: item is None),
    "store.list_namespaces": (lambda w: w.client.store.list_namespaces(limit=1000), lambda w, found: found["namespaces"] == []),
    "store.put_item": (lambda w: w.client.store.put_item(["a"], key="a", value={"a": 1}), lambda w, nothing: nothing is None),
    "store.search_items": (lambda w: w.client.store.search_items([], limit=1000), lambda w, found: found["items"] == []),
}


async def open_stream(world: World) -> Any:
    async with world.client.threads.stream(world.thread, assistant_id="agent") as thread:
        return await thread.run.start(input=HELLO)


CRON: dict[str, Any] = {"assistant_id": "agent", "schedule": "0 0 * * *", "input": HELLO}
# The refusals, by the words that they begin with.
REFUSED: dict[str, dict[str, Callable[[World], Awaitable[Any]]]] = {
    "The thread protocol": {"threads.stream": open_stream},
}
BY_METHOD = {method: (words, call) for words, calls in REFUSED.items() for method, call in calls.items()}


# The table


def rows(heading: str) -> dict[str, str]:
    """The rows of the table below a heading: what is named in the first column, and the second."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return {name: state for names, state in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", section, re.MULTILINE) for name in re.findall(r"`([^`]+)`", names)}


@pytest.mark.skipif(not PAGE, reason="the documents are not beside the service")
def test_the_table_names_every_method() -> None:
    assert rows("Methods of langgraph-sdk") == dict.fromkeys(CALLS, "works") | dict.fromkeys(BY_METHOD, "refused")


def test_every_method_has_a_call() -> None:
    """A method that a new version of the client has must be tried and named."""
    assert sorted([*CALLS, *BY_METHOD]) == sorted(METHODS)
    assert len(REFUSED) <= MOST_REFUSALS


# The service


def in_world(agent: Agent, test: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with get_client(url=agent.url, api_key=None, headers=headers(f"owner-{uuid.uuid4().hex[:8]}")) as client:
            assistant = await client.assistants.create("agent", name="mine")
            created: list[Any] = []
            thread = (await client.threads.create())["thread_id"]
            await client.runs.wait(thread, "agent", input=HELLO, on_run_created=created.append)
            state = await client.threads.get_state(thread)
            await test(World(client, thread, created[0]["run_id"], assistant["assistant_id"], state["checkpoint"]))

    asyncio.run(run())


@pytest.mark.parametrize("method", CALLS)
def test_it_works(agent: Agent, method: str) -> None:
    call, holds = CALLS[method]

    async def test(world: World) -> None:
        answer = await call(world)
        assert holds(world, answer), answer

    in_world(agent, test)


@pytest.mark.parametrize("method", BY_METHOD)
def test_it_is_refused_by_name(agent: Agent, method: str) -> None:
    words, call = BY_METHOD[method]

    async def test(world: World) -> None:
        with pytest.raises((APIStatusError, httpx.HTTPStatusError)) as refused:
            await call(world)
        assert refused.value.response.status_code == 404
        # Not every part of the SDK puts the answer's words into its error.
        assert words in refused.value.response.json()["error"]["message"]

    in_world(agent, test)


# RemoteGraph

CONFIG_OF: Callable[[World], Any] = lambda world: {"configurable": {"thread_id": world.thread}}  # noqa: E731


async def parts(stream: AsyncIterator[Any]) -> list[Any]:
    return [part async for part in stream]


REMOTE: dict[str, tuple[Callable[[RemoteGraph, World], Any], Callable[[World, Any], Any]]] = {
    "get_graph": (lambda g, w: g.get_graph(), lambda w, graph: {"model", "tools"} <= set(graph.nodes)),
    "aget_graph": (lambda g, w: g.aget_graph(xray=True), lambda w, graph: {"model", "tools"} <= set(graph.nodes)),
    "get_state": (lambda g, w: g.get_state(CONFIG_OF(w)), lambda w, state: len(state.values["messages"]) == 2),
    "aget_state": (lambda g, w: g.aget_state(CONFIG_OF(w), subgraphs=True), lambda w, state: state.next == ()),
    "get_state_history": (lambda g, w: list(g.get_state_history(CONFIG_OF(w))), lambda w, states: len(states) > 1),
    "aget_state_history": (lambda g, w: parts(g.aget_state_history(CONFIG_OF(w), limit=1)), lambda w, states: len(states) == 1),
    "update_state": (
        lambda g, w: g.update_state(CONFIG_OF(w), {"messages": "by hand"}, as_node="model"),
        lambda w, config: config["configurable"]["thread_id"] == w.thread,
    ),
    "aupdate_state": (
        lambda g, w: g.aupdate_state(CONFIG_OF(w), {"messages": "by hand"}, as_node="model"),
        lambda w, config: config["configurable"]["checkpoint_id"],
    ),
    "invoke": (lambda g, w: g.invoke(HELLO, CONFIG_OF(w)), lambda w, values: len(values["messages"]) == 4),
    "ainvoke": (lambda g, w: g.ainvoke(HELLO), lambda w, values: len(values["messages"]) == 2),
    "stream": (lambda g, w: list(g.stream(HELLO, CONFIG_OF(w), stream_mode="values")), lambda w, values: len(values[-1]["messages"]) == 4),
    "astream": (
        lambda g, w: parts(g.astream(HELLO, CONFIG_OF(w), stream_mode=["updates", "messages", "debug"], subgraphs=True)),
        lambda w, told: {part[1] for part in told} >= {"updates", "messages", "debug"},
    ),
    "copy": (lambda g, w: g.copy({"name": "other"}), lambda w, graph: graph.name == "other"),
    "with_config": (lambda g, w: g.with_config({"tags": ["a"]}).ainvoke(HELLO), lambda w, values: len(values["messages"]) == 2),
}
# LangGraph itself has no bulk update of a remote graph; its events need the thread protocol.
REMOTE_REFUSED = {"bulk_update_state", "abulk_update_state", "stream_events", "astream_events"}


def test_every_method_of_a_remote_graph_has_a_call() -> None:
    own = {name for name, value in vars(RemoteGraph).items() if callable(value) and not name.startswith("_")}
    assert own == REMOTE.keys() | REMOTE_REFUSED
    assert not PAGE or rows("Methods of RemoteGraph") == dict.fromkeys(REMOTE, "works") | dict.fromkeys(REMOTE_REFUSED, "refused")


@pytest.mark.parametrize("method", REMOTE)
def test_a_remote_graph_works(agent: Agent, method: str) -> None:
    call, holds = REMOTE[method]

    async def test(world: World) -> None:
        sent = {name: value for name, value in world.client.http.client.headers.items() if name.startswith("x-")}
        graph = RemoteGraph("agent", url=agent.url, api_key="unused", headers={name: value for name, value in sent.items() if name != "x-api-key"})
        graph.client = world.client
        for client in (graph.sync_client.http.client,):  # type: ignore[union-attr]
            client.headers.pop("x-api-key", None)
        answer = await asyncio.to_thread(call, graph, world)
        if inspect.isawaitable(answer):
            answer = await answer
        assert holds(world, answer), answer

    in_world(agent, test)

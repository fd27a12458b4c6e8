"""Whoever follows a run is told all of it, wherever it waits, runs or ran, and only who started it stops it by leaving.

As in test_durability, two services with one worker each share the database.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langgraph_sdk import get_client
from langgraph_sdk.client import SyncLangGraphClient
from langgraph_sdk.errors import NotFoundError
from openai import AsyncOpenAI

from sdk import connect, headers, make_key
from servers import Agent, Postgres, Redis, wait_until
from streams import Stream

Clients = tuple[SyncLangGraphClient, SyncLangGraphClient]
SECOND = "[[pace 0.02]] second"
STRATEGIES = ["enqueue", "interrupt", "rollback"]


@pytest.fixture
def clients(pair: tuple[Agent, Agent]) -> Iterator[Clients]:
    with ExitStack() as stack:
        yield tuple(stack.enter_context(connect(service)) for service in pair)  # type: ignore[misc]  # two of them


@pytest.fixture
def thread(clients: Clients) -> str:
    return clients[0].threads.create()["thread_id"]


def message(text: str) -> Any:
    return {"messages": [{"role": "user", "content": text}]}


def start(client: SyncLangGraphClient, thread: str, text: str, database: Postgres, **more: Any) -> str:
    run = client.runs.create(thread, "agent", input=message(text), **more)["run_id"]
    wait_until(lambda: status(database, run) == "running", "it runs")
    return run


def status(database: Postgres, run_id: str) -> str | None:
    rows = database.query("SELECT status FROM runs WHERE run_id = %s", run_id)
    return rows[0][0] if rows else None


def newest(database: Postgres, thread: str) -> str | None:
    rows = database.query("SELECT run_id::text FROM runs WHERE thread_id = %s ORDER BY created_at DESC", thread)
    return rows[0][0] if rows else None


def worker(database: Postgres, run_id: str) -> Any:
    return database.query("SELECT worker FROM runs WHERE run_id = %s", run_id)[0][0]


def said(parts: list[Any]) -> str:
    return "".join(part.data[0]["content"] for part in parts if part.event == "messages")


def leave(agent: Agent, follow: Callable[[Any], Any], gone: Callable[[], bool]) -> None:
    """Follow as the SDK does, and hang up when it is time."""

    async def main() -> None:
        async with get_client(url=agent.url, api_key=None, headers=headers()) as client:

            async def read() -> None:
                followed = follow(client)
                if hasattr(followed, "__aiter__"):
                    async for _ in followed:
                        pass
                else:
                    await followed

            task = asyncio.create_task(read())
            await asyncio.to_thread(wait_until, gone, "it is time to leave")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


# On a busy thread


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", [0, 1], ids=["same worker", "other worker"])
def test_a_run_that_waits_tells_everything(clients: Clients, thread: str, migrated: Postgres, strategy: Any, where: int) -> None:
    # So long that only the worker that becomes free takes the second one.
    first = start(clients[0], thread, "[[delay 2.5]] first", migrated)
    ran_in = worker(migrated, first)
    parts = list(
        clients[where].runs.stream(
            thread,
            "agent",
            input=message(SECOND),
            stream_mode=["messages-tuple", "values"],
            multitask_strategy=strategy,
        )
    )
    assert parts[0].event == "metadata"
    assert parts[-1].data["status"] == "success"
    answer = clients[0].threads.get_state(thread)["values"]["messages"][-1]["content"]
    assert said(parts) == answer
    assert len([part for part in parts if part.event == "messages"]) > 3
    assert [part for part in parts if part.event == "values"][-1].data["messages"][-1]["content"] == answer
    if strategy == "enqueue":
        assert worker(migrated, parts[0].data["run_id"]) == ran_in
    assert status(migrated, first) == {"enqueue": "success", "interrupt": "interrupted", "rollback": None}[strategy]


@pytest.mark.parametrize("where", [0, 1], ids=["same worker", "other worker"])
def test_chat_stream_on_a_busy_thread(pair: tuple[Agent, Agent], clients: Clients, thread: str, migrated: Postgres, where: int) -> None:
    start(clients[0], thread, "[[delay 2.5]] first", migrated)
    stream = Stream(pair[where], {"message": SECOND, "thread_id": thread}).join()
    assert len(stream.texts()) > 3
    assert "".join(stream.texts()) == stream.data("end")["response"]


@pytest.mark.parametrize("how", ["stop", "freeze"])
def test_a_run_that_waits_needs_no_redis_in_its_own_worker(
    pair: tuple[Agent, Agent], clients: Clients, thread: str, migrated: Postgres, redis: Redis, how: str
) -> None:
    start(clients[0], thread, "[[delay 2]] first", migrated)
    # Nobody else takes what waits.
    pair[1].freeze()
    getattr(redis, how)()
    try:
        stream = Stream(pair[0], {"message": SECOND, "thread_id": thread}).join()
        assert len(stream.texts()) > 3
        assert "".join(stream.texts()) == stream.data("end")["response"]
    finally:
        if how == "stop":
            redis.start()
        else:
            redis.thaw()
        pair[1].thaw()


def test_who_follows_a_run_that_is_rolled_back_is_told(clients: Clients, thread: str, migrated: Postgres) -> None:
    start(clients[0], thread, "[[delay 15]] first", migrated)
    waiting = clients[1].runs.create(thread, "agent", input=message("never"))["run_id"]
    parts: list[Any] = []

    def roll_back() -> bool:
        clients[0].runs.cancel(thread, waiting, action="rollback")
        return True

    async def follow() -> None:
        async with get_client(url=str(clients[1].http.client.base_url), api_key=None, headers=headers()) as client:
            task = asyncio.create_task(read(client))
            await asyncio.sleep(1)
            await asyncio.to_thread(roll_back)
            await task

    async def read(client: Any) -> None:
        parts.extend([part async for part in client.runs.join_stream(thread, waiting)])

    asyncio.run(follow())
    assert [part.event for part in parts] == ["error", "end"]
    assert (parts[0].data["error"], parts[1].data["status"]) == ("cancelled", "interrupted")
    clients[0].runs.cancel(thread, newest(migrated, thread) or "", wait=True)


# From the other worker


@pytest.mark.parametrize("kept", [True, False], ids=["on a thread", "without one"])
def test_a_created_run_is_told_in_the_other_worker(clients: Clients, thread: str, kept: bool) -> None:
    text = "[[delay 1]] [[pace 0.02]] hello"
    run = clients[0].runs.create(thread if kept else None, "agent", input=message(text), stream_mode=["messages-tuple", "values"])
    parts = list(clients[1].runs.join_stream(run["thread_id"], run["run_id"]))
    assert {part.event for part in parts} == {"metadata", "messages", "values", "end"}
    assert len([part for part in parts if part.event == "messages"]) > 3
    assert said(parts).startswith("I see 1 user message.")
    if kept:
        assert list(clients[0].runs.join_stream(run["thread_id"], run["run_id"])) == parts


def test_the_other_worker_knows_it_all(clients: Clients, thread: str, migrated: Postgres) -> None:
    mine, other = clients

    def told(client: SyncLangGraphClient, run: str) -> str | None:
        try:
            return client.runs.get(thread, run)["status"]
        except NotFoundError:
            return None

    def is_told(run: str, expected: str | None) -> None:
        assert told(other, run) == expected
        # Postgres knows of the end some milliseconds before the worker that had it written.
        wait_until(lambda: told(mine, run) == expected, "its own worker says the same", 1)

    run = start(mine, thread, "[[delay 1]] slow", migrated)
    values: Any = other.runs.join(thread, run)
    assert values["messages"][-1]["content"].startswith("I see 1")
    is_told(run, "success")
    assert other.runs.get(thread, run) == mine.runs.get(thread, run)
    run = start(mine, thread, "[[delay 15]] slow", migrated)
    other.runs.cancel(thread, run, wait=True)
    is_told(run, "interrupted")
    run = start(mine, thread, "[[delay 15]] slow", migrated)
    other.runs.cancel(thread, run, wait=True, action="rollback")
    is_told(run, None)


# Who leaves


@pytest.mark.parametrize("call", ["stream", "wait"])
def test_who_leaves_a_run_that_waits_cancels_it(pair: tuple[Agent, Agent], clients: Clients, thread: str, migrated: Postgres, call: str) -> None:
    first = start(clients[0], thread, "[[delay 4]] first", migrated)

    def follow(client: Any) -> Any:
        return getattr(client.runs, call)(thread, "agent", input=message("never"), on_disconnect="cancel")

    leave(pair[1], follow, lambda: newest(migrated, thread) != first)
    second = newest(migrated, thread) or ""
    wait_until(lambda: status(migrated, second) == "interrupted", "it is cancelled", 2)
    assert status(migrated, first) == "running"
    clients[0].runs.cancel(thread, first, wait=True)


@pytest.mark.parametrize("call", ["stream", "wait"])
def test_who_leaves_a_run_in_the_other_worker_cancels_it(pair: tuple[Agent, Agent], clients: Clients, thread: str, migrated: Postgres, call: str) -> None:
    first = start(clients[0], thread, "[[delay 2.5]] first", migrated)

    def follow(client: Any) -> Any:
        return getattr(client.runs, call)(thread, "agent", input=message("[[delay 15]]"), on_disconnect="cancel")

    def runs() -> bool:
        return newest(migrated, thread) != first and status(migrated, newest(migrated, thread) or "") == "running"

    leave(pair[1], follow, runs)
    second = newest(migrated, thread) or ""
    assert worker(migrated, second) == worker(migrated, first)
    wait_until(lambda: status(migrated, second) == "interrupted", "it is cancelled", 2)


@pytest.mark.parametrize("call", ["join_stream", "join"])
@pytest.mark.parametrize("where", [0, 1], ids=["same worker", "other worker"])
def test_who_only_joined_may_leave(pair: tuple[Agent, Agent], clients: Clients, thread: str, migrated: Postgres, call: str, where: int) -> None:
    """The run goes with the client that started it, and that one stays."""
    stream = clients[0].runs.stream(thread, "agent", input=message("[[delay 1.5]] hello"), on_disconnect="cancel", stream_resumable=True)
    run = next(iter(stream)).data["run_id"]

    def follow(client: Any) -> Any:
        return getattr(client.runs, call)(thread, run)

    seen = iter([False] * 8)
    leave(pair[where], follow, lambda: next(seen, True))
    parts = list(stream)
    assert parts[-1].data["status"] == "success"
    assert status(migrated, run) == "success"


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_a_completion_on_a_busy_thread(pair: tuple[Agent, Agent], migrated: Postgres, stream: bool) -> None:
    """On a kept thread the work goes on without the client."""
    key, thread = make_key(migrated, f"leaver-{int(stream)}"), uuid4().hex
    with connect(pair[0], key=key) as client:
        client.threads.create(thread_id=thread)
        first = start(client, thread, "[[delay 1]] first", migrated)

        async def main() -> None:
            async with AsyncOpenAI(base_url=f"{pair[1].url}/openai/v1", api_key=key, default_headers={"X-Thread-Id": thread}) as openai:

                async def ask() -> None:
                    answer: Any = await openai.chat.completions.create(model="agent", messages=[{"role": "user", "content": "second"}], stream=stream)
                    if stream:
                        async for _ in answer:
                            pass

                task = asyncio.create_task(ask())
                await asyncio.to_thread(wait_until, lambda: newest(migrated, thread) != first, "it is recorded")
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())
        second = newest(migrated, thread) or ""
        wait_until(lambda: status(migrated, second) == "success", "it is finished", 5)


# In silence


PATIENT = """
import agent.api.answers
from langchain_core.tools import tool

agent.api.answers.HEARTBEAT_SECONDS = 0.2


@tool
def patient() -> str:
    "Nothing."
    return ""


tools = [patient]
"""


@pytest.fixture
def impatient(start_agent: Callable[..., Agent], tmp_path: Path) -> Agent:
    """A service that sends a heartbeat five times a second."""
    (tmp_path / "patient.py").write_text(PATIENT)
    return start_agent(AGENT_TOOLS="patient", AGENT_TOOLS_DIR=str(tmp_path))


def raw(agent: Agent, path: str, body: dict[str, Any]) -> bytes:
    with agent.client.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        return b"".join(answer.iter_raw())


def test_streams_have_a_heartbeat(impatient: Agent) -> None:
    text = "[[delay 1.1]] hello"
    run = {"assistant_id": "agent", "input": message(text)}
    for path, body in (
        ("/chat/stream", {"message": text}),
        ("/runs/stream", run),
        ("/openai/v1/chat/completions", {"model": "agent", "stream": True, **message(text)}),
    ):
        told = raw(impatient, path, body)
        assert told.count(b": heartbeat\n\n") >= 4, (path, told)
        assert b"hello" in told
    with connect(impatient) as client:  # which its clients do not notice
        parts = list(client.runs.stream(None, "agent", input=run["input"]))
        assert [part.event for part in parts][-1] == "end"


def test_who_waits_has_a_heartbeat(impatient: Agent) -> None:
    text = "[[delay 1.1]] hello"
    told = raw(impatient, "/runs/wait", {"assistant_id": "agent", "input": message(text)})
    blank, _, rest = told.partition(b"{")
    assert set(blank) == {ord("\n")}
    assert len(blank) >= 4
    assert b"hello" in rest
    with connect(impatient) as client:
        values: Any = client.runs.wait(None, "agent", input=message(text))
        assert values["messages"][-1]["content"].startswith("I see 1")

"""Runs, driven by LangGraph's own client."""

import asyncio
import contextlib
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from langgraph_sdk import get_client
from langgraph_sdk.client import SyncLangGraphClient
from langgraph_sdk.errors import ConflictError, NotFoundError
from langgraph_sdk.schema import StreamPart

from sdk import ASSISTANT_ID, connect, headers, say, texts
from servers import Agent, wait_until

HELLO = 'I see 1 user message. The first one was: "hello"'
SLOW = "[[delay 1]] slow"
CALCULATE = '[[tool calculator {"expression": "6*7"}]]'


@pytest.fixture
def client(agent: Agent) -> Iterator[SyncLangGraphClient]:
    with connect(agent) as client:
        yield client


@pytest.fixture
def thread(client: SyncLangGraphClient) -> str:
    return client.threads.create()["thread_id"]


def message(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def status(client: SyncLangGraphClient, thread: str, run: Any) -> str:
    return client.runs.get(thread, run["run_id"])["status"]


# Waiting


def test_wait(client: SyncLangGraphClient, thread: str) -> None:
    created: list[Any] = []
    mine = {"a": 1, "run_id": "another", "step": -7}  # a name that the service uses too does no harm
    values = say(client, thread, "hello", on_run_created=created.append, metadata=mine)
    assert [each["content"] for each in values["messages"]] == ["hello", HELLO]
    assert created == [{"run_id": created[0]["run_id"], "thread_id": thread}]
    run = client.runs.get(thread, created[0]["run_id"])
    assert (run["status"], run["assistant_id"], run["metadata"]) == ("success", ASSISTANT_ID, mine)
    assert run["multitask_strategy"] == "enqueue"
    assert client.threads.get(thread)["values"] == values
    assert client.runs.join(thread, run["run_id"]) == values
    say(client, thread, "more")
    assert client.runs.join(thread, run["run_id"]) == values, "what came later is not this run's"


@pytest.mark.parametrize(
    "given",
    [
        "hello",
        ["hello"],
        {"role": "user", "content": "hello"},
        [{"type": "human", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}],
        [{"type": "human", "content": "hello", "id": "my-own:1", "name": None, "additional_kwargs": {}}],
    ],
    ids=["text", "texts", "message", "blocks", "dumped"],
)
def test_forms_of_input(client: SyncLangGraphClient, thread: str, given: Any) -> None:
    values: Any = client.runs.wait(thread, ASSISTANT_ID, input={"messages": given})
    assert [each["content"] for each in values["messages"]] == ["hello", HELLO]


def test_a_message_id_is_kept_and_not_taken_twice(client: SyncLangGraphClient, thread: str) -> None:
    mine = {"messages": [{"role": "user", "content": "hello", "id": "mine"}]}
    values: Any = client.runs.wait(thread, "agent", input=mine)
    assert values["messages"][0]["id"] == "mine"
    with pytest.raises(ConflictError):
        client.runs.create(thread, "agent", input=mine)
    assert texts(client, thread) == ["hello", HELLO]


def test_a_repeated_request_adds_no_second_run(client: SyncLangGraphClient, thread: str) -> None:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    first = client.runs.create(thread, "agent", input=message("hello"), headers=key)
    again = client.runs.create(thread, "agent", input=message("hello"), headers=key)
    assert again["run_id"] == first["run_id"]
    values = client.runs.wait(thread, "agent", input=message("hello"), headers=key)
    assert len(values["messages"]) == 2
    with pytest.raises(ConflictError):
        client.runs.create(thread, "agent", input=message("other"), headers=key)


def test_a_failed_run_says_so(client: SyncLangGraphClient, thread: str) -> None:
    with pytest.raises(Exception, match="model_failed: The model"):
        say(client, thread, "[[fault garbage]]")
    failed = client.runs.list(thread)[0]
    assert failed["status"] == "error"
    assert client.threads.get(thread)["status"] == "error"
    assert say(client, thread, "[[fault garbage]]", raise_error=False)["__error__"]["error"] == "model_failed"
    assert client.runs.join(thread, failed["run_id"])["__error__"]["error"] == "model_failed"
    assert say(client, thread, "hello")["messages"][-1]["content"] == HELLO, "nothing of the failures is left"


def test_recursion_limit(client: SyncLangGraphClient, thread: str) -> None:
    loop = '[[loop calculator {"expression": "1"}]]'
    with pytest.raises(Exception, match="too_many_steps"):
        say(client, thread, loop, config={"recursion_limit": 3})
    # More than the operator allows is as much as that.
    without_end: Any = {"recursion_limit": 1e30}
    answer = say(client, thread, "hello", config=without_end)["messages"][-1]["content"]
    assert answer == f'I see 2 user messages. The first one was: "{loop}"', "what its tools did is not forgotten"
    with pytest.raises(Exception, match="too_many_steps"):
        say(client, thread, loop, config=without_end)


def test_a_failure_that_may_pass_says_when(client: SyncLangGraphClient, thread: str) -> None:
    parts = list(client.runs.stream(thread, "agent", input=message("[[fault 500]]")))
    assert (parts[-2].event, parts[-2].data["error"]) == ("error", "model_unavailable")
    assert parts[-2].data["retry_after"] == 5
    assert say(client, thread, "[[fault 500]]", raise_error=False)["__error__"]["retry_after"] == 5


def test_interrupt_before_a_step(client: SyncLangGraphClient, thread: str) -> None:
    values = say(client, thread, CALCULATE, interrupt_before=["tools"])
    assert values["messages"][-1]["tool_calls"][0]["name"] == "calculator"
    state = client.threads.get_state(thread)
    assert state["next"] == ["tools"]
    assert client.threads.get(thread)["status"] == "interrupted"
    values = client.runs.wait(thread, "agent", input=None)
    assert values["messages"][-1]["content"] == "The tool says: 42"
    assert client.threads.get(thread)["status"] == "idle"
    values = say(client, thread, CALCULATE, interrupt_after="*")
    assert client.threads.get_state(thread)["next"] == ["tools"]
    with pytest.raises(httpx.HTTPStatusError, match="'model' or 'tools'"):
        say(client, thread, "hello", interrupt_before=["nowhere"])


# Streaming


def test_stream_of_values(client: SyncLangGraphClient, thread: str) -> None:
    parts = list(client.runs.stream(thread, "agent", input=message("hello")))
    assert parts[0].event == "metadata"
    assert parts[0].data["run_id"]
    assert {part.event for part in parts[1:-1]} == {"values"}
    assert [each["content"] for each in parts[-2].data["messages"]] == ["hello", HELLO]
    assert parts[-1] == StreamPart("end", {"run_id": parts[0].data["run_id"], "status": "success"}, parts[-1].id)
    numbers = [int(part.id or 0) for part in parts]
    assert numbers == sorted(numbers)


def test_stream_of_tokens(client: SyncLangGraphClient, thread: str) -> None:
    parts = list(client.runs.stream(thread, "agent", input=message("[[pace 0.01]] hello"), stream_mode="messages-tuple"))
    pieces = [part.data for part in parts if part.event == "messages"]
    assert "".join(piece["content"] for piece, _ in pieces).startswith("I see 1 user message. The first one was")
    assert {piece["type"] for piece, _ in pieces} == {"AIMessageChunk"}
    assert len(pieces) > 3
    assert {metadata["langgraph_node"] for _, metadata in pieces} == {"model"}
    assert {part.event for part in parts} == {"metadata", "messages", "end"}


def test_stream_of_messages(client: SyncLangGraphClient, thread: str) -> None:
    parts = list(client.runs.stream(thread, "agent", input=message(f"[[pace 0.01]] {CALCULATE}"), stream_mode="messages"))
    events = [part.event for part in parts]
    assert events[0] == "metadata"
    assert events[-1] == "end"
    complete = [part.data[0] for part in parts if part.event == "messages/complete"]
    assert [each["type"] for each in complete] == ["ai", "tool", "ai"]
    assert complete[0]["tool_calls"][0]["args"] == {"expression": "6*7"}
    assert complete[2]["content"] == "The tool says: 42"
    partial = [part.data[0]["content"] for part in parts if part.event == "messages/partial"]
    assert all("The tool says: 42".startswith(text) for text in partial)
    assert events.count("messages/metadata") == 3


def test_stream_of_several_modes(client: SyncLangGraphClient, thread: str) -> None:
    modes: Any = ["values", "updates", "messages-tuple", "custom"]
    parts = list(client.runs.stream(thread, "agent", input=message(CALCULATE), stream_mode=modes))
    assert {part.event for part in parts} == {"metadata", "values", "updates", "messages", "custom", "end"}
    assert [list(part.data) for part in parts if part.event == "updates"] == [["model"], ["tools"], ["model"]]
    tools = [part.data for part in parts if part.event == "custom"]
    assert [(told["name"], told["state"]) for told in tools] == [("calculator", "start"), ("calculator", "end")]


def test_stream_of_steps(client: SyncLangGraphClient, thread: str) -> None:
    modes: Any = ["checkpoints", "tasks", "debug"]
    parts = list(client.runs.stream(thread, "agent", input=message(CALCULATE), stream_mode=modes, metadata={"mine": 1}))
    assert {part.event for part in parts} == {"metadata", "checkpoints", "tasks", "debug", "end"}
    checkpoints = [part.data for part in parts if part.event == "checkpoints"]
    assert [len(each["values"].get("messages", [])) for each in checkpoints][-1] == 4
    for each in checkpoints:
        assert each["config"]["configurable"].keys() <= {"thread_id", "checkpoint_ns", "checkpoint_id", "checkpoint_map"}
        assert each["metadata"].keys() <= {"source", "step", "parents", "run_id", "mine"}
    assert checkpoints[-1]["config"]["configurable"]["checkpoint_id"] == client.threads.get_state(thread)["checkpoint"]["checkpoint_id"]
    tasks = [part.data for part in parts if part.event == "tasks"]
    assert [each["name"] for each in tasks if "result" in each] == ["model", "tools", "model"]
    debug = [part.data for part in parts if part.event == "debug"]
    assert {each["type"] for each in debug} == {"checkpoint", "task", "task_result"}
    text = str([part.data for part in parts])
    for secret in ("user:tester", "deadline", "__pregel", "RunSaver"):
        assert secret not in text


def test_a_batch(client: SyncLangGraphClient, thread: str) -> None:
    payloads: Any = [{"assistant_id": "agent", "thread_id": thread, "input": message(str(number))} for number in range(2)]
    runs: Any = client.runs.create_batch([*payloads, {"assistant_id": "agent", "input": message("alone")}])
    assert [run["thread_id"] == thread for run in runs] == [True, True, False]
    client.runs.join(thread, runs[1]["run_id"])
    assert texts(client, thread)[::2] == ["0", "1"]
    with pytest.raises(httpx.HTTPStatusError, match="input: must be given"):
        client.runs.create_batch([{"assistant_id": "agent"}])  # type: ignore[typeddict-item]
    with pytest.raises(httpx.HTTPStatusError):
        client.runs.create_batch(payloads * 11)


def test_stream_version_2(client: SyncLangGraphClient, thread: str) -> None:
    parts: list[Any] = list(client.runs.stream(thread, "agent", input=message("hello"), version="v2"))
    assert parts[0]["type"] == "metadata"
    assert parts[-1]["data"]["messages"][-1]["content"] == HELLO


def test_stream_of_a_failure(client: SyncLangGraphClient, thread: str) -> None:
    parts = list(client.runs.stream(thread, "agent", input=message("[[fault garbage]]")))
    assert [part.event for part in parts][-2:] == ["error", "end"]
    assert parts[-2].data == {"error": "model_failed", "message": "The model gave no usable answer."}


def test_stream_on_a_new_thread(client: SyncLangGraphClient) -> None:
    name = uuid.uuid4().hex
    with pytest.raises(NotFoundError):
        list(client.runs.stream(name, "agent", input=message("hello")))
    parts = list(client.runs.stream(name, "agent", input=message("hello"), if_not_exists="create"))
    assert parts[-1].data["status"] == "success"
    assert texts(client, name) == ["hello", HELLO]


def test_join_a_stream(client: SyncLangGraphClient, thread: str) -> None:
    run = client.runs.create(thread, "agent", input=message(f"{SLOW} [[pace 0.02]]"), stream_mode=["messages-tuple", "values"])
    parts = list(client.runs.join_stream(thread, run["run_id"]))
    assert {part.event for part in parts} == {"metadata", "messages", "values", "end"}
    parts = list(client.runs.join_stream(thread, run["run_id"], stream_mode="values"))
    assert {part.event for part in parts} == {"metadata", "values", "end"}
    middle = parts[2].id
    assert middle
    rest = list(client.runs.join_stream(thread, run["run_id"], stream_mode="values", last_event_id=middle))
    assert rest == parts[3:]


class Cutter:
    """A proxy that cuts the connection in the middle of each of the first answers."""

    def __init__(self, port: int, cuts: int, after: int) -> None:
        self._target = port
        self._cuts = cuts
        self._after = after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            outer = socket.create_connection(("127.0.0.1", self._target))
            limit = self._after if self._cuts > 0 else None
            self._cuts -= 1
            threading.Thread(target=self._pump, args=(inner, outer, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(outer, inner, limit), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, limit: int | None) -> None:
        sent = 0
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(200):
                target.sendall(data)
                sent += len(data)
                if limit and sent > limit:
                    break
            for each in (source, target):  # the other direction's thread waits in recv
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("mode", ["messages-tuple", "messages"])
def test_a_broken_stream_is_taken_up_without_loss(agent: Agent, client: SyncLangGraphClient, mode: Any) -> None:
    thread = client.threads.create()["thread_id"]
    proxy = Cutter(agent.port, cuts=2, after=4000)
    text = " ".join(["word"] * 60)
    with (
        connect(agent, url=proxy.url) as unlucky,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")  # the client would warn that it lost something
        parts = list(unlucky.runs.stream(thread, "agent", input=message(f"[[pace 0.02]] {text}"), stream_mode=mode, stream_resumable=True))
    proxy.close()
    assert parts[-1].event == "end"
    answer = texts(client, thread)[-1]
    if mode == "messages":
        assert [part.data[0]["content"] for part in parts if part.event == "messages/complete"] == [answer]
    else:
        assert "".join(part.data[0]["content"] for part in parts if part.event == "messages") == answer


def test_a_broken_wait_is_taken_up(agent: Agent, client: SyncLangGraphClient, thread: str) -> None:
    proxy = Cutter(agent.port, cuts=1, after=500)
    with connect(agent, url=proxy.url) as unlucky, pytest.warns(UserWarning, match="attempting reconnect"):
        values = say(unlucky, thread, "[[delay 0.5]] hello")
    proxy.close()
    assert len(values["messages"]) == 2


# Listing, deleting


def test_list_get_delete(client: SyncLangGraphClient, thread: str) -> None:
    say(client, thread, "one", metadata={"n": 1})
    say(client, thread, "two", metadata={"n": 2})
    runs = client.runs.list(thread)
    assert [run["metadata"]["n"] for run in runs] == [2, 1]
    assert client.runs.list(thread, limit=1, offset=1) == runs[1:]
    assert client.runs.list(thread, status="error") == []
    assert client.runs.list(thread, select=["status"]) == [{"status": "success"}] * 2
    client.runs.delete(thread, runs[0]["run_id"])
    assert client.runs.list(thread) == runs[1:]
    with pytest.raises(NotFoundError):
        client.runs.get(thread, runs[0]["run_id"])
    assert len(texts(client, thread)) == 4


# Several at once


def test_reject(client: SyncLangGraphClient, thread: str) -> None:
    first = client.runs.create(thread, "agent", input=message(SLOW))
    assert client.threads.get(thread)["status"] == "busy"
    with pytest.raises(ConflictError):
        client.runs.create(thread, "agent", input=message("second"), multitask_strategy="reject")
    with pytest.raises(ConflictError):
        client.runs.delete(thread, first["run_id"])
    with pytest.raises(ConflictError):
        client.threads.update_state(thread, {"messages": "by hand"}, as_node="model")
    client.runs.join(thread, first["run_id"])
    assert len(texts(client, thread)) == 2


def test_enqueue(client: SyncLangGraphClient, thread: str) -> None:
    runs = [client.runs.create(thread, "agent", input=message(text)) for text in (SLOW, "second", "third")]
    assert [status(client, thread, run) for run in runs] == ["running", "pending", "pending"]
    client.runs.join(thread, runs[-1]["run_id"])
    assert [status(client, thread, run) for run in runs] == ["success"] * 3
    assert texts(client, thread)[::2] == [SLOW, "second", "third"]


@pytest.mark.parametrize("strategy", ["interrupt", "rollback"])
def test_interrupt_and_rollback(client: SyncLangGraphClient, thread: str, strategy: Any) -> None:
    say(client, thread, "hello")
    first = client.runs.create(thread, "agent", input=message("[[delay 4]] slow"))
    time.sleep(0.3)
    started = time.monotonic()
    say(client, thread, "second", multitask_strategy=strategy)
    assert time.monotonic() - started < 2
    assert texts(client, thread) == ["hello", HELLO, "second", 'I see 2 user messages. The first one was: "hello"']
    if strategy == "interrupt":
        assert status(client, thread, first) == "interrupted"
    else:
        with pytest.raises(NotFoundError):
            status(client, thread, first)


def test_cancel(client: SyncLangGraphClient, thread: str) -> None:
    run = client.runs.create(thread, "agent", input=message("[[delay 4]] slow"))
    waiting = client.runs.create(thread, "agent", input=message("never"))
    client.runs.cancel_many(thread_id=thread, run_ids=[waiting["run_id"]])
    assert status(client, thread, waiting) == "interrupted"
    started = time.monotonic()
    client.runs.cancel(thread, run["run_id"], wait=True)
    assert time.monotonic() - started < 2
    assert status(client, thread, run) == "interrupted"
    assert client.runs.join(thread, run["run_id"])["__error__"]["error"] == "cancelled"
    client.runs.cancel(thread, run["run_id"])  # there is nothing left to do, and that is no mistake
    assert say(client, thread, "hello")["messages"][-1]["content"] == HELLO
    run = client.runs.create(thread, "agent", input=message("[[delay 4]] slow"))
    client.runs.cancel(thread, run["run_id"], wait=True, action="rollback")
    with pytest.raises(NotFoundError):
        status(client, thread, run)
    assert texts(client, thread) == ["hello", HELLO]


@pytest.mark.parametrize("call", ["stream", "wait"])
@pytest.mark.parametrize("wish", ["cancel", "continue"])
def test_on_disconnect(agent: Agent, client: SyncLangGraphClient, thread: str, wish: Any, call: str) -> None:
    async def hang_up() -> None:
        async with get_client(url=agent.url, api_key=None, headers=headers()) as other:
            # What is to be cancelled takes so long that a machine with other work notices in time who left.
            work: Any = message({"cancel": "[[delay 8]] slow", "continue": "[[delay 1.5]] slow"}[wish])
            if call == "wait":
                task = asyncio.create_task(other.runs.wait(thread, "agent", input=work, on_disconnect=wish))
                await asyncio.sleep(0.5)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                async for _ in other.runs.stream(thread, "agent", input=work, on_disconnect=wish):
                    break

    asyncio.run(hang_up())
    run = client.runs.list(thread)[0]
    client.runs.join(thread, run["run_id"])
    assert status(client, thread, run) == {"cancel": "interrupted", "continue": "success"}[wish]


def test_cancel_on_disconnect_of_a_joined_stream(client: SyncLangGraphClient, thread: str) -> None:
    run = client.runs.create(thread, "agent", input=message("[[delay 8]] slow"))
    stream = client.runs.join_stream(thread, run["run_id"], cancel_on_disconnect=True)
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    client.runs.join(thread, run["run_id"])
    assert status(client, thread, run) == "interrupted"


def test_many_at_once_lose_nothing(agent: Agent, client: SyncLangGraphClient) -> None:
    threads = [client.threads.create()["thread_id"] for _ in range(4)]

    def talk(number: int) -> str:
        with connect(agent) as own:
            return say(own, threads[number % 4], f"message {number}")["messages"][-1]["content"]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(talk, range(24)))
    assert all(answer.startswith("I see") for answer in answers)
    for number, thread in enumerate(threads):
        said = texts(client, thread)
        assert sorted(said[::2]) == sorted(f"message {n}" for n in range(number, 24, 4))


# Without a thread


@pytest.fixture
def alone(agent: Agent) -> Iterator[SyncLangGraphClient]:
    """A user who has no threads."""
    with connect(agent, user=f"owner-{uuid.uuid4().hex[:8]}") as client:
        yield client


def test_stateless_runs(alone: SyncLangGraphClient) -> None:
    client = alone
    created: list[Any] = []
    before = client.threads.count()
    values = say(client, None, "hello", on_run_created=created.append)
    assert [each["content"] for each in values["messages"]] == ["hello", HELLO]
    parts = list(client.runs.stream(None, "agent", input=message("hello"), stream_mode=["updates", "messages-tuple"]))
    assert parts[-1].data["status"] == "success"
    odd = {"assistant_id": "agent", "input": message("hello"), "stream_mode": "custom"}
    assert len(client.http.post("/runs/wait", json=odd)["messages"]) == 2
    run = client.runs.create(None, "agent", input=message("hello"))
    wait_until(lambda: client.threads.count() == before, "the threads are gone", 5)
    with pytest.raises(NotFoundError):
        client.threads.get(run["thread_id"])
    with pytest.raises(Exception, match="model_failed"):
        say(client, None, "[[fault garbage]]")
    kept = client.runs.create(None, "agent", input=message("hello"), on_completion="keep")
    client.runs.join(kept["thread_id"], kept["run_id"])
    assert texts(client, kept["thread_id"]) == ["hello", HELLO]


# Approval


def test_approval(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent(AGENT_TOOLS_APPROVAL="calculator")
    with connect(agent) as client:
        thread = client.threads.create()["thread_id"]
        values = say(client, thread, CALCULATE)
        question = values["__interrupt__"][0]
        assert question["value"] | {"id": ""} == {
            "type": "approval",
            "tool": "calculator",
            "arguments": {"expression": "6*7"},
            "id": "",
        }
        found = client.threads.get(thread)
        assert found["status"] == "interrupted"
        assert [each["id"] for waiting in found["interrupts"].values() for each in waiting] == [question["id"]]
        state = client.threads.get_state(thread)
        assert state["interrupts"][0]["id"] == question["id"]
        assert state["tasks"][0]["interrupts"][0]["value"] == question["value"]
        assert thread in [each["thread_id"] for each in client.threads.search(status="interrupted")]

        with pytest.raises(ConflictError):  # there is no such message to remove
            client.threads.update_state(thread, {"messages": [{"type": "remove", "id": "none"}]}, as_node="model")
        assert client.threads.get(thread)["status"] == "interrupted", "it still waits"
        with pytest.raises(httpx.HTTPStatusError, match="must be"):
            client.runs.wait(thread, "agent", command={"resume": "yes"})
        values = client.runs.wait(thread, "agent", command={"resume": {"approve": True}})
        assert values["messages"][-1]["content"] == "The tool says: 42"
        assert "__interrupt__" not in values
        assert client.threads.get(thread)["status"] == "idle"
        with pytest.raises(ConflictError):
            client.runs.create(thread, "agent", command={"resume": {"approve": True}})

        parts = list(client.runs.stream(thread, "agent", input=message(CALCULATE), stream_mode="updates"))
        assert parts[-2].data["__interrupt__"][0]["value"]["tool"] == "calculator"
        for answer in ({"decisions": [{"type": "approve"}]}, [{"type": "accept", "args": None}]):
            values = client.runs.wait(thread, "agent", command={"resume": answer})
            assert values["messages"][-1]["content"] == "The tool says: 42"
            question = say(client, thread, CALCULATE)["__interrupt__"][0]
        values = client.runs.wait(thread, "agent", command={"resume": {question["id"]: {"approve": True}}})
        assert values["messages"][-1]["content"] == "The tool says: 42"
        say(client, thread, CALCULATE)
        parts = list(client.runs.stream(thread, "agent", command={"resume": {"approve": False, "reason": "no sums"}}, stream_mode="values"))
        refused = parts[-2].data["messages"][-2]
        assert (refused["type"], refused["status"]) == ("tool", "error")
        assert "no sums" in refused["content"]


# The rest of the service's own


def test_ok_and_info(agent: Agent) -> None:
    assert agent.client.get("/ok").json() == {"ok": True}
    info = agent.client.get("/info").json()
    assert info["strict_resume"] is True
    assert info["langgraph_py_version"].startswith("1.")

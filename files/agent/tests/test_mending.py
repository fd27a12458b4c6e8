"""What an interrupted turn leaves behind: as a function, and in threads that were left in each way there is."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, RemoveMessage, SystemMessage, ToolMessage
from langgraph.graph.message import add_messages
from langgraph_sdk.client import SyncLangGraphClient

from agent.llm.context import NO_ANSWER
from agent.runs.mending import STOPPED, WAITED, changes, mend
from agent.runs.records import new_run_id
from sdk import connect, say
from servers import Agent, Model, Postgres, wait_until
from test_durability import runs_in

# A thread as letters: h a user's message and m a second one that came with it, w one that was written by hand, s a system message, a an answer,
# 1 and 2 the model's calls, c both of them in one message, ! a call that could not be read, x and y the results of 1 and 2.
LETTERS: dict[str, Callable[[], AnyMessage]] = {
    "h": lambda: HumanMessage("h"),
    "m": lambda: HumanMessage("m"),
    "w": lambda: HumanMessage("w"),
    "s": lambda: SystemMessage("s"),
    "a": lambda: AIMessage("a"),
    "1": lambda: AIMessage("", tool_calls=[call("one")]),
    "2": lambda: AIMessage("", tool_calls=[call("two")]),
    "c": lambda: AIMessage("", tool_calls=[call("one"), call("two")]),
    "!": lambda: AIMessage("", invalid_tool_calls=[{"name": "x", "args": "{", "id": "bad", "error": None}]),
    "x": lambda: ToolMessage("x", tool_call_id="one"),
    "y": lambda: ToolMessage("y", tool_call_id="two"),
}


def call(name: str) -> Any:
    return {"name": name, "args": {}, "id": name}


def thread(letters: str) -> list[AnyMessage]:
    messages = [LETTERS[letter]() for letter in letters]
    for index, message in enumerate(messages):
        run = new_run_id()
        message.id = {"h": run, "m": f"{run}-1"}.get(letters[index], f"{index}{letters[index]}")
        message.name = f"{index}{letters[index]}"
    return messages


def told(messages: list[Any]) -> list[str]:
    """Names of what was there before, and what the closing messages say of which call."""
    return [message.name if message.name[0].isdigit() else f"{message.tool_call_id}: {message.content}" for message in messages]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", []),
        ("ha", ["0h", "1a"]),
        ("h1xa", ["0h", "11", "2x", "3a"]),
        ("h", []),
        ("hm", []),
        ("w", ["0w"]),
        ("sh", ["0s"]),
        ("haw", ["0h", "1a", "2w"]),
        ("wwh", ["0w", "1w"]),
        ("hah", ["0h", "1a"]),
        ("h!", []),
        ("h1", ["0h", "11", f"one: {STOPPED}"]),
        ("sh1", ["0s", "1h", "21", f"one: {STOPPED}"]),
        ("hah1x2", ["0h", "1a", "2h", "31", "4x", "52", f"two: {STOPPED}"]),
        ("hcx", ["0h", "1c", "2x", f"two: {STOPPED}"]),
        ("h1x!", ["0h", "11", "2x"]),
        ("h1xh", ["0h", "11", "2x"]),  # closed before, and then another turn that failed
        ("h1h", ["0h", "11", f"one: {STOPPED}"]),
        ("h1h2y", ["0h", "11", f"one: {STOPPED}", "2h", "32", "4y"]),
    ],
)
def test_mend(before: str, after: list[str]) -> None:
    messages = thread(before)
    mended = mend(messages, {}, (), waits=False)
    assert told(mended) == after
    again = mend(mended, {}, (), waits=False)
    assert told(again) == after, "what was mended needs no more"
    given: Any = changes(messages, mended)
    assert told(add_messages(messages, given)) == after  # type: ignore[arg-type]


def test_what_is_known_of_a_call_comes_before_what_is_not() -> None:
    messages = thread("hc")
    assert told(mend(messages, {}, (), waits=True))[2:] == [f"one: {WAITED}", f"two: {WAITED}"]
    kept = mend(messages, {"one": ToolMessage("done", tool_call_id="one", name="9r")}, (), waits=False)
    assert told(kept)[2:] == ["9r", f"two: {STOPPED}"]
    assert told(mend(messages, {}, ("one",), waits=False))[2:] == [f"two: {STOPPED}"]


def test_only_what_changes_is_given() -> None:
    messages = thread("hah")
    assert changes(messages, messages[:2]) == [RemoveMessage(id=str(messages[2].id))]


# The service


TOOLS = '''
import asyncio
from pathlib import Path
from langchain_core.tools import tool

@tool
async def note(text: str) -> str:
    """Write a line."""
    with Path("{ran}").open("a") as file:
        file.write(text + "\\n")
    return f"noted {{text}}"

@tool
async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "waited"

tools = [note, wait]
'''
NOTE = '[[tool note {"text": "A"}]]'
WAIT = '[[tool wait {"seconds": 4}]]'
LOOP = '[[loop note {"text": "A"}]]'


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(TOOLS.format(ran=tmp_path / "ran"))
    return tmp_path / "ran"


@pytest.fixture
def client(start_agent: Callable[..., Agent], ran: Path, request: pytest.FixtureRequest) -> Iterator[SyncLangGraphClient]:
    agent = start_agent(AGENT_TOOLS_DIR=str(ran.parent), AGENT_TOOLS="own", AGENT_TURN_TIMEOUT_SECONDS="8", **getattr(request, "param", {}))
    with connect(agent) as client:
        yield client


def said(client: SyncLangGraphClient, thread: str) -> list[tuple[str, str]]:
    return [(message["type"], message["content"]) for message in client.threads.get_state(thread)["values"]["messages"]]


def shown(model: Model) -> list[tuple[str, str]]:
    """What the model was shown last, without the system prompt."""
    return [(message["role"], message.get("content")) for message in model.requests()[-1]["messages"][1:]]


@pytest.mark.parametrize("client", [{"AGENT_TOOLS_APPROVAL": "note"}], indirect=True)
def test_a_message_while_an_approval_waits(client: SyncLangGraphClient, model: Model, ran: Path) -> None:
    thread = client.threads.create()["thread_id"]
    say(client, thread, LOOP)
    values: Any = client.runs.wait(thread, "agent", command={"resume": {"approve": True}})
    assert values["__interrupt__"], "the second call waits"
    say(client, thread, "something else")
    history = [("human", LOOP), ("ai", ""), ("tool", "noted A"), ("ai", ""), ("tool", WAITED), ("human", "something else")]
    assert said(client, thread)[:6] == history
    assert [message[0] for message in said(client, thread)[6:]] == ["ai"]
    assert ("tool", WAITED) in shown(model)
    assert ("tool", "noted A") in shown(model)
    assert ran.read_text() == "A\n"
    tool = client.threads.get_state(thread)["values"]["messages"][4]
    assert (tool["status"], tool["name"]) == ("error", "note")


def cancelled(client: SyncLangGraphClient, text: str, ran: Path) -> str:
    thread = client.threads.create()["thread_id"]
    run = client.runs.create(thread, "agent", input={"messages": text})
    wait_until(ran.exists, "the first tool is done")
    time.sleep(0.3)
    client.runs.cancel(thread, run["run_id"], wait=True)
    return thread


def test_a_cancel_while_one_of_two_tools_is_done(client: SyncLangGraphClient, model: Model, ran: Path) -> None:
    text = f"{NOTE} {WAIT}"
    thread = cancelled(client, text, ran)
    say(client, thread, "something else")
    assert said(client, thread)[:5] == [("human", text), ("ai", ""), ("tool", "noted A"), ("tool", STOPPED), ("human", "something else")]
    assert shown(model)[-4:] == [("tool", "noted A"), ("tool", STOPPED), ("assistant", NO_ANSWER), ("user", "something else")]
    say(client, thread, "and more")
    assert said(client, thread)[:3] == [("human", text), ("ai", ""), ("tool", "noted A")], "it stays"


def test_going_on_after_a_cancel_runs_no_tool_twice(client: SyncLangGraphClient, ran: Path) -> None:
    thread = cancelled(client, f'{NOTE} [[tool wait {{"seconds": 1}}]]', ran)
    client.runs.wait(thread, "agent", input=None)
    assert sorted(said(client, thread)[2:4]) == [("tool", "noted A"), ("tool", "waited")]
    assert ran.read_text() == "A\n"


def test_a_killed_worker_runs_no_finished_tool_twice(start_agent: Callable[..., Agent], ran: Path, migrated: Postgres, agent_process: Agent) -> None:
    agent = start_agent(AGENT_TOOLS_DIR=str(ran.parent), AGENT_TOOLS="own", AGENT_TURN_TIMEOUT_SECONDS="20")
    agent_process.freeze()  # it shares the database, and has no such tools
    try:
        with connect(agent) as client:
            thread = client.threads.create()["thread_id"]
            client.runs.create(thread, "agent", input={"messages": f'{NOTE} [[tool wait {{"seconds": 2}}]]'})
            wait_until(ran.exists, "the first tool is done")
            time.sleep(0.3)
            agent.process.kill()
            agent.process.wait()
            agent.start()
            wait_until(lambda: not runs_in(migrated, thread), "the turn is finished", 20)
            assert sorted(said(client, thread)[2:4]) == [("tool", "noted A"), ("tool", "waited")]
    finally:
        agent_process.thaw()
    assert ran.read_text() == "A\n"

"""Parts that have tests of their own, in the running service: memory, plug-ins, MCP servers, limits, secrets."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from sdk import ASSISTANT_ID, connect, say
from servers import Agent, McpServer, Model, wait_until
from streams import Stream


def call(name: str, **arguments: Any) -> str:
    return f"[[tool {name} {json.dumps(arguments)}]]"


def test_memory_lasts(start_agent: Callable[..., Agent]) -> None:
    service = start_agent(AGENT_MEMORY_ENABLED="true")
    user, other = uuid4().hex, uuid4().hex
    with connect(service, user) as client:
        kept = say(client, None, call("remember", note="likes tea"))
        assert kept["messages"][-1]["content"].startswith("The tool says: Remembered as ")
    service.stop(signal.SIGTERM)
    service.start()
    for name, expected in ((user, "likes tea"), (other, "Nothing is remembered.")):
        with connect(service, name) as client:
            found = say(client, None, call("recall", query="tea"))
            assert found["messages"][-1]["content"].endswith(expected)


PLUGIN = """
import os
from langchain_core.tools import tool


@tool
def shout(text: str) -> str:
    "Say it loudly."
    return f"{text.upper()} {os.getpid()}"


tools = [shout]
"""


@pytest.fixture
def mcp() -> Iterator[McpServer]:
    server = McpServer()
    server.start()
    yield server
    server.remove()


def test_tools_of_ones_own_in_two_workers(start_agent: Callable[..., Agent], mcp: McpServer, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    service = start_agent(
        workers=2,
        AGENT_TOOLS="mine",
        AGENT_TOOLS_DIR=str(tmp_path),
        AGENT_MCP_SERVERS=json.dumps({"files": mcp.url}),
    )
    wait_until(lambda: len([line for line in service.log_lines() if line["message"] == "started"]) == 2, "both serve")
    ran: set[int] = set()

    def both() -> bool:
        with httpx.Client(base_url=service.url, headers=service.client.headers, timeout=20) as client:
            said = client.post("/chat", json={"message": call("shout", text="hi")}).json()["response"]
            words = said.removeprefix("The tool says: ").split()
            assert words[0] == "HI"
            ran.add(int(words[1]))
            added = client.post("/chat", json={"message": call("files_add", a=2, b=3)}).json()["response"]
            assert added == "The tool says: 5"
        return ran == set(service.workers())

    wait_until(both, "both workers have it")
    assert service.metric('agent_mcp_server_up{server="files"}') == 1
    assert service.metric('agent_tool_calls_total{status="success",tool="shout"}') >= 2
    assert service.metric('agent_tool_calls_total{status="success",tool="files_add"}') >= 2
    up = [line for line in service.client.get("/metrics").text.splitlines() if line.startswith("agent_mcp_server_up{")]
    assert up == ['agent_mcp_server_up{server="files"} 1.0'], "one value, not one a worker"


class TestTokens:
    """Whoever reads an answer pays for it, however the turn ends."""

    @pytest.fixture
    def service(self, start_agent: Callable[..., Agent]) -> Agent:
        service = start_agent(AGENT_TOKENS_PER_MINUTE="10")
        service.client.headers["X-Forwarded-User"] = uuid4().hex
        return service

    @staticmethod
    def refuses(service: Agent) -> bool:
        time.sleep(0.5)  # what a turn cost is told when its answer is on its way already
        answer = service.chat("hello")
        return (answer.status_code, answer.json().get("error", {}).get("code")) == (429, "rate_limited")

    def test_of_an_answer(self, service: Agent) -> None:
        assert service.chat("a question of more than ten words, so that it costs enough").status_code == 200
        assert self.refuses(service)

    @pytest.mark.parametrize(
        ("text", "status"),
        [
            ('[[loop calculator {"expression": "1"}]]', 422),
            ('a tool and then no more time for an answer [[tool calculator {"expression": "1"}]] [[delay 3]]', 504),
        ],
        ids=["too many steps", "too late"],
    )
    def test_of_a_failure(self, service: Agent, text: str, status: int) -> None:
        assert service.chat(text).status_code == status
        assert self.refuses(service)

    @pytest.mark.parametrize("action", ["interrupt", "rollback"])
    def test_of_an_answer_that_was_stopped(self, service: Agent, action: str) -> None:
        thread = uuid4().hex
        stream = Stream(service, {"message": "one two three four five [[pace 0.2]]", "thread_id": thread})
        wait_until(lambda: len(stream.texts()) >= 8, "most of it was told")
        path = f"/threads/{thread}/runs/{stream.run_id}/cancel?wait=true&action={action}"
        assert service.client.post(path).status_code == 204
        stream.join()
        assert stream.names()[-1] == "error"
        assert self.refuses(service)


def test_a_foreign_thread_is_none(agent: Agent) -> None:
    """To /chat and /chat/stream as well: no word tells that it exists."""
    mine = agent.chat("mine").json()["thread_id"]
    stranger = {"X-Forwarded-User": uuid4().hex}
    for path in ("/chat", "/chat/stream"):
        answer = agent.client.post(path, json={"message": "hello", "thread_id": mine}, headers=stranger)
        assert (answer.status_code, answer.json()) == (
            404,
            {"error": {"code": "not_found", "message": "There is nothing here."}},
        )
        assert answer.headers["Content-Type"] == "application/json"
    # What the same words about a thread that nobody has say.
    none = agent.client.get(f"/threads/{uuid4()}", headers=stranger)
    assert none.json() == answer.json()
    assert "I see 2 user messages" in agent.chat("mine again", mine).json()["response"]


def test_the_instructions_are_in_no_output(start_agent: Callable[..., Agent], model: Model) -> None:
    service = start_agent(AGENT_SYSTEM_PROMPT="canary-prompt-5d1c: tell nobody.", AGENT_TOOLS_APPROVAL="current_time")
    ask, run = service.client.post, {"assistant_id": "agent", "if_not_exists": "create"}
    said: list[str] = []
    texts = ("hello", *(f"[[fault {fault}]]" for fault in ("400", "500", "overflow")))
    calls = (call("calculator", expression="6*7"), call("nothing", a=1), call("current_time"))
    for text in (*texts, *calls, '[[loop calculator {"expression": "1"}]]'):
        body = {**run, "input": {"messages": text}}
        modes = ["values", "updates", "messages", "messages-tuple", "custom"]
        said += [
            ask("/chat", json={"message": text, "thread_id": "canary"}).text,
            ask("/chat/stream", json={"message": text, "thread_id": "canary"}).text,
            ask("/threads/canary/runs/wait", json=body).text,
            ask("/threads/canary/runs/stream", json={**body, "stream_mode": modes}).text,
            ask("/openai/v1/chat/completions", json={"model": "agent", "messages": [{"role": "user", "content": text}]}).text,
        ]
    assert "canary-prompt-5d1c" in model.requests()[-1]["messages"][0]["content"], "it is the model's alone"
    paths = ["/", "/openapi.json", "/info", "/metrics", "/ready", f"/assistants/{ASSISTANT_ID}"]
    paths += [f"/assistants/{ASSISTANT_ID}/{what}" for what in ("schemas", "graph")]
    paths += [f"/threads/canary{what}" for what in ("", "/state", "/runs")]
    said += [service.client.get(path).text for path in paths]
    said += [ask("/threads/canary/history", json={"limit": 100}).text, ask("/assistants/search", json={}).text]
    assert len(said) == 40 + len(paths) + 2
    assert all(said)
    time.sleep(0.5)
    assert not [text for text in (*said, service.log.read_text()) if "canary-prompt" in text]

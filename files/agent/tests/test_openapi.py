"""The OpenAPI document is complete and true, and no route can be surprised by what it is given."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sdk import connect, make_key, say
from servers import Agent, Postgres

CANARY = "canary-7f3a"
OPEN = {"/health", "/metrics", "/ready"}
# NUL and half a surrogate pair cannot be ruled out in a schema, but in one sentence: they are in the tests below. Nor can
# a schema say that a tool's result follows its call, and that the last question is no blank one: see test_openai_api.py.
# Nor which of all options that clients send along are the agent's, whether a thread has something to go on with, and which schedules there are.
SCHEMATHESIS = """
[generation]
allow-x00 = false
codec = "utf-8"

[[operations]]
include-path = ["/openai/v1/chat/completions", "/openai/v1/responses"]

[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "403", "404", "409", "5xx"]

[[operations]]
include-path-regex = "^(/threads/[^/]+)?/runs(/batch|/stream|/wait|/crons.*)?$|^/assistants"

[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "403", "404", "409", "422", "429", "5xx"]
"""


@pytest.fixture(scope="module")
def document(agent_process: Agent) -> dict[str, Any]:
    return agent_process.client.get("/openapi.json").json()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


# The document


def test_only_for_those_who_are_known(agent: Agent) -> None:
    assert httpx.get(f"{agent.url}/openapi.json").status_code == 401
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert agent.client.get(path).status_code == 404


def test_every_operation_tells_how_it_fails(document: dict[str, Any]) -> None:
    listed = {(method, path) for method, path, _ in operations(document)}
    assert {("POST", "/chat"), ("POST", "/chat/stream"), ("GET", "/chat/stream/{run_id}")} <= listed
    assert {("POST", "/threads/{thread_id}/runs/stream"), ("PUT", "/store/items"), ("GET", "/info")} <= listed
    assert ("POST", "/openai/v1/chat/completions") in listed
    for method, path, operation in operations(document):
        assert operation["responses"], (method, path)
        if path in OPEN:
            assert operation["security"] == []
        else:
            assert {"401", "500", "503"} <= operation["responses"].keys(), (method, path)
            assert operation["security"]
    text = json.dumps(document)
    assert "HTTPValidationError" not in text


def test_an_unknown_caller_gets_nowhere(agent: Agent, document: dict[str, Any]) -> None:
    for method, path, _ in operations(document):
        if path not in OPEN:
            answer = httpx.request(method, agent.url + path, json={"messages": CANARY})
            assert answer.status_code == 401, (method, path)
            assert CANARY not in answer.text


def test_methods_that_are_not_there(agent: Agent, document: dict[str, Any], known: dict[str, str]) -> None:
    for path, methods in document["paths"].items():
        answer = agent.client.request("TRACE", fill(path, known))
        assert answer.status_code == 405, path
        assert set(answer.headers["Allow"].split(", ")) == {method.upper() for method in methods}, path


def test_schemathesis_finds_nothing(agent: Agent, migrated: Postgres, tmp_path: Path) -> None:
    key = make_key(migrated, "schemathesis")
    time.sleep(1)  # the service looks for new keys once a second at most
    config = tmp_path / "schemathesis.toml"
    config.write_text(SCHEMATHESIS)
    program = Path(sys.executable).with_name("schemathesis")
    command = [program, "--config-file", config, "run", f"{agent.url}/openapi.json", "-H", f"X-Api-Key: {key}"]
    command += ["--checks", "all", "--phases", "coverage,fuzzing", "--max-examples", "5", "--seed", "1"]
    command += ["--no-shrink", "--continue-on-failure", "--suppress-health-check", "all", "--no-color"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert run.returncode == 0, run.stdout[-8000:]
    assert " passed" in run.stdout
    assert " failed" not in run.stdout


# Hostile input, over every route


def deep(levels: int) -> bytes:
    return b'{"metadata": ' + b"[" * levels + b"]" * levels + b"}"


BODIES: dict[str, bytes] = {
    "empty": b"",
    "text": b"canary-7f3a",
    "half": b'{"messages": "canary-7f3a',
    "trailing": b'{"metadata": {}} canary-7f3a',
    "not UTF-8": b'{"messages": "canary-7f3a \xff"}',
    "UTF-16": '{"messages": "canary-7f3a"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"messages": "canary-7f3a"}',
    "NUL": rb'{"canary-7f3a": "a\u0000b"}',
    "NUL in a name": rb'{"a\u0000b": "canary-7f3a"}',
    "NUL far inside": rb'{"metadata": {"a": [{"b": "canary-7f3a\u0000"}]}}',
    "lone surrogate": rb'{"metadata": {"a": "canary-7f3a \ud800"}}',
    "NaN": b'{"limit": NaN, "a": "canary-7f3a"}',
    "Infinity": b'{"limit": 1e400, "a": "canary-7f3a"}',
    "huge number": b'{"limit": ' + b"9" * 5000 + b"}",
    "deep": deep(70),
    "very deep": deep(30_000),
    "deep objects": b'{"metadata":' * 5_000 + b"1" + b"}" * 5_000,
    "5 MB": b'{"metadata": {"a": "' + b"x" * 5_000_000 + b'"}}',
    "list": b'["canary-7f3a"]',
    "string": b'"canary-7f3a"',
    "null": b"null",
    "number": b"1",
    "unknown field": b'{"canary-7f3a": "canary-7f3a"}',
    "wrong types": b'{"assistant_id": 1, "metadata": "canary-7f3a", "limit": "canary-7f3a", "message": [],'
    b' "messages": 1, "values": 1, "checkpoint": 1, "namespace": 1, "run_ids": 1, "prefix": 1, "namespace_prefix": 1}',
}
# Where a field of a newer client is ignored: it does no harm, and finds more than it wanted.
TOLERANT = {
    ("POST", "/assistants"), ("POST", "/assistants/search"), ("POST", "/assistants/count"), ("POST", "/assistants/{assistant_id}/versions"),
    ("POST", "/threads"), ("POST", "/threads/search"), ("POST", "/threads/count"), ("PATCH", "/threads/{thread_id}"),
    ("POST", "/runs/crons/search"), ("POST", "/runs/crons/count"),
    ("POST", "/threads/{thread_id}/history"), ("POST", "/store/items/search"), ("POST", "/store/namespaces"),
}  # fmt: skip
IDS = {
    "NUL": "a%00b",
    "long": "a" * 9000,
    "slash": "..%2F..%2Fcanary-7f3a",
    "dots": "%2E%2E",
    "unicode": "%D9%A1%D9%A2",
    "not UTF-8": "%FF%FE",
    "newline": "abc%0A",
    "quote": "'%3B%20DROP%20TABLE%20threads%3B--canary-7f3a",
    "brackets": "%7B%7Bcanary-7f3a%7D%7D",
}


@pytest.fixture(scope="module")
def known(agent_process: Agent) -> dict[str, str]:
    """What exists, so that it is the body that is refused and not the path."""
    with connect(agent_process) as client:
        thread = client.threads.create()["thread_id"]
        say(client, thread, "hello")
        return {
            "thread_id": thread,
            "cron_id": client.crons.create("agent", schedule="@yearly", input={"messages": "hello"}, enabled=False)["cron_id"],  # type: ignore[typeddict-item]
            "run_id": client.runs.list(thread)[0]["run_id"],
            "checkpoint_id": client.threads.get_state(thread)["checkpoint"]["checkpoint_id"] or "",
            "assistant_id": "agent",
            "model": "agent",
            "response_id": "resp_00000000-0000-0000-0000-000000000000",
        }


def fill(path: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        path = path.replace(f"{{{name}}}", value)
    return path


def refused(answer: httpx.Response, what: object) -> None:
    assert 400 <= answer.status_code < 500, (what, answer.status_code, answer.text)
    assert answer.elapsed.total_seconds() < 1, what
    assert CANARY not in answer.text, what
    assert answer.json()["error"].keys() >= {"code", "message"}, what
    for word in ("psycopg", "Traceback", "pydantic", "langgraph.", "site-packages"):
        assert word not in answer.text, what


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies(agent: Agent, document: dict[str, Any], known: dict[str, str], name: str) -> None:
    for method, path, operation in operations(document):
        if "requestBody" in operation:
            answer = agent.client.request(method, fill(path, known), content=BODIES[name], headers={"Content-Type": "application/json"})
            if name == "unknown field" and (method, path) in TOLERANT:
                assert answer.status_code == 200, (method, path)
            else:
                refused(answer, (method, path))


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_bad_content_types(agent: Agent, document: dict[str, Any], known: dict[str, str], kind: str) -> None:
    for method, path, operation in operations(document):
        if "requestBody" in operation:
            answer = agent.client.request(method, fill(path, known), content=b"{}", headers={"Content-Type": kind})
            refused(answer, (method, path))
            assert answer.status_code == (400 if path.startswith("/openai") else 415)


@pytest.mark.parametrize("name", IDS)
def test_bad_names_in_paths(agent: Agent, document: dict[str, Any], known: dict[str, str], name: str) -> None:
    body = {"assistant_id": "agent", "input": {"messages": "hello"}}
    for method, path, operation in operations(document):
        for parameter in [each["name"] for each in operation.get("parameters", []) if each["in"] == "path"]:
            where = fill(path, {**known, parameter: IDS[name]})
            refused(agent.client.request(method, where, json=body), (method, path, parameter))


def test_bad_queries_and_headers(agent: Agent, document: dict[str, Any], known: dict[str, str]) -> None:
    thread = f"/threads/{known['thread_id']}"
    for method, path, operation in operations(document):
        if path in OPEN or path.startswith("/chat") or path == "/":
            continue
        answer = agent.client.request(method, f"{fill(path, known)}?canary-7f3a=1", json={})
        refused(answer, (method, path))
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "query" and parameter["schema"].get("type") != "string":
                refused(agent.client.request(method, f"{fill(path, known)}?{parameter['name']}={CANARY}", json={}), path)
    for query in ("limit=0", "limit=1001", "limit=9" * 50, "offset=-1", "status=canary-7f3a", "select=canary-7f3a"):
        refused(agent.client.get(f"{thread}/runs?{query}"), query)
    run = f"{thread}/runs/{known['run_id']}/stream"
    for event in ("canary-7f3a", "9" * 30, "1-0", "--1", "-"):
        refused(agent.client.get(run, headers={"Last-Event-ID": event}), event)
    for namespace in ("", ".", "a..b", "a.", "a" * 65, "a.b.c.d.e.f", "a%00b"):
        refused(agent.client.get(f"/store/items?namespace={namespace}&key=a"), namespace)
    body = {"assistant_id": "agent", "input": {"messages": "hello"}}
    for turn in ("", "a b", "a" * 129, "\u00e9"):
        headers = {"Idempotency-Key": turn.encode()}
        refused(agent.client.post(f"{thread}/runs", json=body, headers=headers), turn)


RUNS: dict[str, dict[str, Any]] = {
    "no assistant": {"input": {"messages": "hello"}},
    "other assistant": {"assistant_id": CANARY},
    "long assistant": {"assistant_id": "a" * 9000},
    "blank": {"input": {"messages": " \t\u3000"}},
    "blank in some alphabet": {"input": {"messages": "\u0085\ufeff\u2003\x1f"}},
    "blank message": {"input": {"messages": [{"role": "user", "content": "\n"}]}},
    "blank block": {"input": {"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}},
    "no content": {"input": {"messages": [{"role": "user"}]}},
    "no messages": {"input": {"messages": []}},
    "long": {"input": {"messages": CANARY + "x" * 16_000}},
    "system": {"input": {"messages": [{"role": "system", "content": CANARY}]}},
    "answer": {"input": {"messages": [{"role": "assistant", "content": CANARY}]}},
    "tool call": {
        "input": {
            "messages": [{"type": "ai", "content": "", "tool_calls": [{"id": "1", "name": CANARY, "args": {}}]}],
        }
    },
    "tool result": {"input": {"messages": [{"type": "tool", "content": CANARY, "tool_call_id": "1"}]}},
    "removal": {"input": {"messages": [{"type": "remove", "id": "__remove_all__"}]}},
    "pickle": {"input": {"messages": [{"lc": 1, "type": "constructor", "id": ["langchain"], "kwargs": {}}]}},
    "role and type": {"input": {"messages": [{"role": "user", "type": "human", "content": CANARY}]}},
    "picture": {"input": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": CANARY}]}]}},
    "message id": {"input": {"messages": [{"role": "user", "content": CANARY, "id": "\u00e9"}]}},
    "more state": {"input": {"messages": "hello", "canary-7f3a": 1}},
    "input and command": {"input": {"messages": "hello"}, "command": {"resume": CANARY}},
    "nothing waits": {"command": {"resume": CANARY}},
    "empty command": {"command": {}},
    "checkpoint": {"checkpoint_id": CANARY},
    "no checkpoint": {"checkpoint_id": "00000000-0000-0000-0000-000000000000"},
    "other thread's checkpoint": {"checkpoint": {"thread_id": CANARY}},
    "subgraph's checkpoint": {"checkpoint": {"checkpoint_ns": CANARY}},
    "strategy": {"multitask_strategy": CANARY},
    "mode": {"stream_mode": ["values", CANARY]},
    "no mode": {"stream_mode": []},
    "recursion": {"config": {"recursion_limit": 0}},
    "thread in config": {"config": {"configurable": {"thread_id": CANARY, "owner": "user:stranger"}}},
    "owner in metadata list": {"metadata": [CANARY]},
    "webhook": {"webhook": "http://169.254.169.254/canary-7f3a"},
    "step": {"interrupt_before": [CANARY]},
}


@pytest.mark.parametrize("name", RUNS)
def test_bad_runs(agent: Agent, known: dict[str, str], name: str) -> None:
    body = ({} if name == "no assistant" else {"assistant_id": "agent"}) | RUNS[name]
    before = agent.client.get(f"/threads/{known['thread_id']}/runs").json()
    for path in ("", "/wait", "/stream"):
        refused(agent.client.post(f"/threads/{known['thread_id']}/runs{path}", json=body), path)
        refused(agent.client.post(f"/runs{path}", json=body), path)
    assert agent.client.get(f"/threads/{known['thread_id']}/runs").json() == before


def test_odd_but_good(agent: Agent) -> None:
    """What looks hostile and is somebody's language is kept as it came."""
    odd = "\u202eRTL \u200bzero-width \u0065\u0301 \u00e9 " + "a" + "\u0300" * 5_000 + " \U0001f469\u200d\U0001f680 ' \" \\ %s {x}"
    with connect(agent) as client:
        thread = client.threads.create(metadata={odd: odd})
        assert thread["metadata"][odd] == odd
        values = say(client, thread["thread_id"], odd)
        assert values["messages"][0]["content"] == odd
        client.store.put_item(["\u00e9 %_*"], key=odd[:90], value={odd: [odd, 2**63, 1e308, True, None]})
        item = client.store.get_item(["\u00e9 %_*"], key=odd[:90])
        assert item["value"] == {odd: [odd, 2**63, 1e308, True, None]}
        assert client.store.search_items(["\u00e9 %_*"])["items"][0]["key"] == odd[:90]
        # The longest that is allowed fits Postgres's index.
        label, key = "\U0001f680" * 64, "\U0001f680" * 100
        client.store.put_item([label] * 5, key=key, value={})
        assert client.store.list_namespaces(prefix=[label])["namespaces"] == [[label] * 5]

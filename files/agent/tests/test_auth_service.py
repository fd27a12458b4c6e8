"""API keys, owners and limits through the whole service, two workers on one port."""

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from langgraph_sdk import get_client
from openai import AuthenticationError, OpenAI

from servers import Agent, Model, Postgres, Redis


@pytest.fixture(scope="module")
def service(migrated: Postgres, redis: Redis, model_process: Model) -> Iterator[Agent]:
    service = Agent(migrated, redis, model_process, workers=2, AGENT_RATE_LIMIT="1000/minute", AGENT_CONCURRENT_RUNS="6")
    service.start()
    yield service
    service.remove()
    migrated.query("DELETE FROM api_keys RETURNING 1")


def keys(service: Agent, *arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", "agent.keys", *arguments]
    run = subprocess.run(command, env=service.environ, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def key(service: Agent) -> Iterator[str]:
    made = keys(service, "create", "ci")
    yield str(made["key"])
    keys(service, "revoke", "ci")


SITES: dict[str, tuple[dict[str, str], int]] = {
    "no browser": ({}, 200),
    "the page": ({"Sec-Fetch-Site": "same-origin", "Origin": "https://agent.example.com"}, 200),
    "the address line": ({"Sec-Fetch-Site": "none"}, 200),
    "another site": ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
    "a neighbour": ({"Sec-Fetch-Site": "same-site"}, 403),
    "an old browser": ({"Origin": "https://agent.example.com"}, 200),
    "an old browser elsewhere": ({"Origin": "https://evil.example"}, 403),
    "a sandbox": ({"Origin": "null"}, 403),
    "half an address": ({"Origin": "https://[::1"}, 403),
}


@pytest.mark.parametrize("name", SITES)
def test_no_other_site_acts_in_a_users_name(service: Agent, key: str, name: str) -> None:
    headers, status = SITES[name]
    headers = {"Host": "agent.example.com", **headers}
    assert service.client.post("/threads", json={}, headers=headers).status_code == status
    assert service.client.post("/chat", content=b"{}", headers={"Content-Type": "application/json", **headers}).status_code == (
        status if status == 403 else 422
    )
    assert service.client.get("/openapi.json", headers=headers).status_code == 200, "reading does nothing, and no other site can read the answer"
    with stranger(service, key) as client:
        assert client.post("/threads", json={}, headers=headers).status_code == 200, "no browser sends a key by itself"


def stranger(service: Agent, key: str | None = None) -> httpx.Client:
    """Not the proxy."""
    return httpx.Client(base_url=service.url, headers={"X-Api-Key": key} if key else {}, timeout=60)


def test_nothing_but_the_probes_is_open(service: Agent) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    assert len(paths) > 10
    with stranger(service) as client:
        for path, operations in [*paths.items(), ("/openapi.json", {"get": {}}), ("/none", {"get": {}})]:
            for method in operations:
                answer = client.request(method, path.replace("{", "").replace("}", ""))
                if path in {"/health", "/ready", "/metrics"}:
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == 401, (method, path)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                kind = "authentication_error" if path.startswith("/openai/v1") else None
                assert answer.json()["error"].get("type") == kind


def test_the_official_clients_with_a_key(service: Agent, key: str) -> None:
    async def talk() -> str:
        client = get_client(url=service.url, api_key=key)
        thread = await client.threads.create()
        await client.runs.wait(thread["thread_id"], "agent", input={"messages": [{"role": "user", "content": "hello"}]})
        return str(thread["thread_id"])

    thread = asyncio.run(talk())
    client = OpenAI(base_url=f"{service.url}/openai/v1", api_key=key, max_retries=0)
    models = [model.id for model in client.models.list().data]
    answer = client.chat.completions.create(model=models[0], messages=[{"role": "user", "content": "hello"}])
    assert answer.choices[0].message.content
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{service.url}/openai/v1", api_key="sk-wrong", max_retries=0).models.list()
    # The thread is the key's, and nobody else's.
    with stranger(service, key) as own:
        assert own.get(f"/threads/{thread}").status_code == 200
    foreign = service.client.get(f"/threads/{thread}")
    none = service.client.get("/threads/00000000-0000-0000-0000-000000000000")
    assert (foreign.status_code, foreign.json()) == (none.status_code, none.json())
    assert foreign.status_code == 404


def test_a_new_key_of_a_name_has_its_threads_and_the_old_one_has_nothing(service: Agent, key: str) -> None:
    with stranger(service, key) as old:
        thread = old.post("/chat", json={"message": "hello"}).json()["thread_id"]
        keys(service, "revoke", "ci")
        new = str(keys(service, "create", "ci")["key"])
        revoked = time.monotonic()
        # Each worker by itself.
        while any(old.get(f"/threads/{thread}", headers={"Connection": "close"}).status_code != 401 for _ in range(10)):
            assert time.monotonic() - revoked < 5
            time.sleep(0.1)
    with stranger(service, new) as client:
        assert client.get(f"/threads/{thread}").status_code == 200


def test_concurrent_runs_over_both_workers(service: Agent) -> None:
    """Whoever finishes makes room at once, in whichever worker."""
    with ThreadPoolExecutor(40) as threads:
        ask = lambda number: service.chat("[[delay 3]]", None, **{"X-Forwarded-User": "grace", "Connection": "close"})  # noqa: E731
        answers = list(threads.map(ask, range(40)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert Counter(answer.status_code for answer in answers) == {200: 6, 429: 34}
    assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
    for _ in range(5):
        answers = service.chats([("hello", None)] * 6)
        assert [answer.status_code for answer in answers] == [200] * 6
    assert service.metric("agent_rate_limited_total") >= 34


def test_failed_runs_give_their_place_back(service: Agent) -> None:
    headers = {"X-Forwarded-User": "hopper"}
    for _ in range(3):
        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda _: service.chat("[[fault 400]]", None, **headers), range(6)))
        assert 429 not in {answer.status_code for answer in answers}, [answer.text for answer in answers]
    # Refused after it was let in: the thread is not there.
    for _ in range(10):
        assert service.client.post("/threads/none/runs/wait", json={"assistant_id": "agent"}, headers=headers).status_code == 404
    assert service.chat("hello", None, **headers).status_code == 200


def test_tokens(service: Agent) -> None:
    key = str(keys(service, "create", "frugal", "--tokens-per-minute", "5")["key"])
    with stranger(service, key) as client:
        answers = [client.post("/chat", json={"message": "hello"}, headers={"Connection": "close"}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 429, 429, 429]
    assert 50 <= int(answers[-1].headers["Retry-After"]) <= 61
    keys(service, "create", "frugal", "--tokens-per-minute", "0")
    time.sleep(5)
    with stranger(service, key) as client:
        assert client.post("/chat", json={"message": "hello"}).status_code == 200


def test_exactly_the_limit_over_both_workers(service: Agent) -> None:
    key = str(keys(service, "create", "five", "--requests-per-minute", "5", "--concurrent-runs", "0")["key"])

    def ask(number: int) -> int:
        spoof = {
            "X-Forwarded-For": f"192.0.2.{number}",
            "X-Forwarded-User": f"u{number}",
            "X-Real-IP": f"192.0.2.{number}",
        }
        with stranger(service, key) as client:
            return client.post("/chat", json={"message": "hello"}, headers=spoof).status_code

    with ThreadPoolExecutor(100) as threads:
        assert Counter(threads.map(ask, range(100))) == {200: 5, 429: 95}


def test_no_key_reaches_the_log_or_the_database(service: Agent, key: str, migrated: Postgres) -> None:
    with stranger(service, key) as client:
        assert client.post("/chat", json={"message": "hello"}).status_code == 200
        assert client.get("/threads/none").status_code == 404
    assert key not in service.log.read_text()
    rows = migrated.query("SELECT k::text FROM api_keys k")
    assert rows
    assert key[10:] not in str(rows)

"""Readiness, rate limits, metrics, logs and migrations."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.store.postgres.aio import AsyncPostgresStore
from redis import Redis as RedisClient
from redis.exceptions import NoPermissionError

from agent.api.middleware import Observe
from agent.logs import JsonFormatter
from agent.metrics import Metrics
from agent.migrate import migrations
from agent.readiness import WATCH_SECONDS
from sdk import connect
from servers import AGENT, ODD_PASSWORD, Agent, Model, Postgres, Redis, environment, free_port, migrate, wait_until

ALL_MIGRATIONS = len(migrations()) + len(AsyncPostgresSaver.MIGRATIONS) + len(AsyncPostgresStore.MIGRATIONS)


class TestMigrate:
    @pytest.fixture
    def empty(self, postgres: Postgres, redis: Redis, model: Model) -> dict[str, str]:
        """The settings of a database without tables."""
        with psycopg.connect(postgres.admin(), autocommit=True) as connection:
            connection.execute("DROP DATABASE IF EXISTS empty")
            connection.execute("CREATE DATABASE empty OWNER agent")
        return environment(postgres, redis, model, postgres.directory) | {"AGENT_POSTGRES_DB": "empty"}

    def test_twice(self, empty: dict[str, str]) -> None:
        first = migrate(empty)
        assert first.stdout == f"migrations applied: {ALL_MIGRATIONS}\n", first.stderr
        second = migrate(empty)
        assert second.stdout == "migrations applied: 0, unchanged\n", second.stderr

    def test_at_the_same_time(self, empty: dict[str, str]) -> None:
        with ThreadPoolExecutor(4) as threads:
            runs = list(threads.map(migrate, [empty] * 4))
        assert [run.returncode for run in runs] == [0] * 4, [run.stderr for run in runs]
        assert sorted(run.stdout.rpartition(" ")[2] for run in runs) == [f"{ALL_MIGRATIONS}\n", *["unchanged\n"] * 3]

    def test_threads_from_before_they_had_owners(self, empty: dict[str, str], postgres: Postgres) -> None:
        assert migrate(empty).returncode == 0
        with psycopg.connect(postgres.admin("empty"), autocommit=True) as connection:
            connection.execute("DROP TABLE crons, runs, threads, workers")
            connection.execute("DELETE FROM agent_migrations WHERE name LIKE '0001%'")
            connection.execute("INSERT INTO checkpoints (thread_id, checkpoint_id, checkpoint) VALUES ('old', '1', '{}')")
        assert migrate(empty).stdout == "migrations applied: 1\n"
        with psycopg.connect(postgres.admin("empty")) as connection:
            assert connection.execute("SELECT thread_id, owner FROM threads").fetchall() == [("old", "")]

    def test_needs_no_redis_secret(self, empty: dict[str, str]) -> None:
        del empty["AGENT_REDIS_PASSWORD_FILE"]
        assert migrate(empty).returncode == 0

    def test_waits_for_postgres(self, empty: dict[str, str], postgres: Postgres) -> None:
        postgres.stop()
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(migrate, empty)
            time.sleep(3)
            postgres.start()
            assert running.result().stdout == f"migrations applied: {ALL_MIGRATIONS}\n"

    @pytest.mark.parametrize("setting", [{"AGENT_POSTGRES_USER": "nobody"}, {"AGENT_POSTGRES_DB": "none"}])
    def test_says_why_it_cannot(self, empty: dict[str, str], setting: dict[str, str]) -> None:
        started = time.monotonic()
        run = migrate(empty | setting)
        assert time.monotonic() - started < 20
        assert run.returncode == 1
        assert "agent: cannot migrate the database: " in run.stderr
        assert "Traceback" not in run.stderr
        assert ODD_PASSWORD not in run.stderr

    def test_a_service_without_them_is_not_ready(self, start_agent: Callable[..., Agent], empty: dict[str, str]) -> None:
        service = start_agent(AGENT_POSTGRES_DB="empty")
        assert service.client.get("/ready").json()["error"]["not_ready"] == ["postgres"]
        answer = service.chat("hello")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")


class TestReady:
    def not_ready(self, agent: Agent) -> list[str]:
        started = time.monotonic()
        answer = agent.client.get("/ready")
        assert time.monotonic() - started < 2.6
        if answer.status_code == 200:
            assert answer.json() == {"status": "ready"}
            return []
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        error = answer.json()["error"]
        assert error["message"] == f"Not ready: {', '.join(error['not_ready'])}."
        return error["not_ready"]

    def becomes(self, agent: Agent, expected: list[str]) -> None:
        wait_until(lambda: self.not_ready(agent) == expected, f"not ready: {expected}", 10)
        for name in ("postgres", "redis", "model"):
            metric = agent.metric(f'agent_dependency_ready{{dependency="{name}"}}')
            assert metric == (name not in expected)

    def test_in_order(self, agent: Agent) -> None:
        self.becomes(agent, [])

    def test_postgres_away(self, agent: Agent, migrated: Postgres) -> None:
        migrated.stop()
        self.becomes(agent, ["postgres"])
        migrated.start()
        self.becomes(agent, [])

    def test_the_metric_is_true_while_nobody_asks(self, start_agent: Callable[..., Agent], migrated: Postgres) -> None:
        """Prometheus reads /metrics alone, and the alert must not wait for somebody who asks /ready."""
        service, name = start_agent(), 'agent_dependency_ready{dependency="postgres"}'
        wait_until(lambda: service.metric(name) == 1, "it was looked at", 3)
        migrated.stop()
        wait_until(lambda: service.metric(name) == 0, "its loss is seen", WATCH_SECONDS + 5)
        migrated.start()
        wait_until(lambda: service.metric(name) == 1, "its return is seen", WATCH_SECONDS + 5)

    def test_redis_frozen(self, agent: Agent, redis: Redis) -> None:
        redis.freeze()
        self.becomes(agent, ["redis"])
        redis.thaw()
        self.becomes(agent, [])

    def test_model_away(self, agent: Agent, model: Model) -> None:
        model.stop()
        self.becomes(agent, ["model"])
        answer = agent.chat("hello")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        model.start()
        self.becomes(agent, [])

    def test_model_frozen(self, agent: Agent, model: Model) -> None:
        model.freeze()
        self.becomes(agent, ["model"])
        model.thaw()
        self.becomes(agent, [])

    def test_all_away_at_once(self, agent: Agent, migrated: Postgres, redis: Redis, model: Model) -> None:
        migrated.stop()
        redis.stop()
        model.freeze()
        self.becomes(agent, ["postgres", "redis", "model"])
        assert agent.client.get("/health").json() == {"status": "ok"}
        migrated.start()
        redis.start()
        model.thaw()
        self.becomes(agent, [])

    def test_a_model_of_another_name(self, start_agent: Callable[..., Agent]) -> None:
        assert self.not_ready(start_agent(AGENT_MODEL_NAME="other-model")) == ["model"]

    def test_a_wrong_redis_password(self, start_agent: Callable[..., Agent], postgres: Postgres) -> None:
        file = postgres.directory / "wrong"
        file.write_text("wrong")
        assert self.not_ready(start_agent(AGENT_REDIS_PASSWORD_FILE=str(file))) == ["redis"]


class TestRateLimit:
    def statuses(self, agent: Agent, count: int, user: str | bytes) -> Counter[int]:
        with ThreadPoolExecutor(count) as threads:
            answers = list(threads.map(lambda _: agent.chat("hi", **{"X-Forwarded-User": user}), range(count)))
        for answer in answers:
            if answer.status_code == 429:
                assert answer.json()["error"]["code"] == "rate_limited"
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
        return Counter(answer.status_code for answer in answers)

    def test_exactly_the_limit(self, start_agent: Callable[..., Agent]) -> None:
        service = start_agent(AGENT_RATE_LIMIT="5/minute")
        assert self.statuses(service, 100, "ada") == {200: 5, 429: 95}
        assert service.metric("agent_rate_limited_total") == 95
        assert service.metric("agent_rate_limit_local") == 0
        # Another user has a window of their own; who sends no name is counted by address, whatever they claim it is.
        assert self.statuses(service, 6, "grace") == {200: 5, 429: 1}
        headers = [{"X-Forwarded-For": f"192.0.2.{number}"} for number in range(6)]
        assert Counter(service.chat("hi", **header).status_code for header in headers) == {200: 5, 429: 1}
        assert self.statuses(service, 1, "\u00e9\u4e2d".encode() * 50) == {200: 1}

    def test_the_window_moves(self, start_agent: Callable[..., Agent]) -> None:
        service = start_agent(AGENT_RATE_LIMIT="2/2 seconds")
        assert self.statuses(service, 3, "window") == {200: 2, 429: 1}
        time.sleep(2.2)
        assert self.statuses(service, 3, "window") == {200: 2, 429: 1}

    def test_two_services_count_together(self, start_agent: Callable[..., Agent]) -> None:
        first, second = start_agent(AGENT_RATE_LIMIT="5/minute"), start_agent(AGENT_RATE_LIMIT="5/minute")
        assert self.statuses(first, 3, "shared") == {200: 3}
        assert self.statuses(second, 3, "shared") == {200: 2, 429: 1}

    @pytest.mark.parametrize("how", ["stop", "freeze"])
    def test_redis_away(self, start_agent: Callable[..., Agent], redis: Redis, how: str) -> None:
        service = start_agent(AGENT_RATE_LIMIT="5/minute")
        assert self.statuses(service, 1, f"before-{how}") == {200: 1}
        getattr(redis, how)()
        try:
            started = time.monotonic()
            assert self.statuses(service, 1, f"away-{how}") == {200: 1}
            assert time.monotonic() - started < 1
            assert self.statuses(service, 20, f"away-{how}") == {200: 4, 429: 16}
            assert service.metric("agent_rate_limit_local") == 1
        finally:
            if how == "stop":
                redis.start()
            else:
                redis.thaw()
        time.sleep(2.5)
        assert self.statuses(service, 6, f"back-{how}") == {200: 5, 429: 1}
        assert service.metric("agent_rate_limit_local") == 0

    def test_the_user_in_redis_can_do_nothing_else(self, redis: Redis) -> None:
        client = RedisClient(port=redis.port, username="agent", password=ODD_PASSWORD, protocol=2)
        for command in (
            "CONFIG GET *",
            "FLUSHALL",
            "KEYS *",
            "GET agent:rl",
            "EVAL x 0",
            "ACL LIST",
            "LRANGE other 0 1",
        ):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split())


def test_metrics_count(agent: Agent) -> None:
    requests = 'agent_http_requests_total{method="POST",route="/chat",status="200"}'
    tokens = 'agent_model_tokens_total{kind="prompt"}', 'agent_model_tokens_total{kind="completion"}'
    before = [agent.metric(name) for name in (requests, *tokens)]
    agent.chat('[[tool calculator {"expression": "6*7"}]]', "metrics")
    middle = [agent.metric(name) for name in (requests, *tokens)]
    assert middle[0] == before[0] + 1
    assert all(now > then for now, then in zip(middle, before, strict=True))
    # The second turn counts its own tokens, not the thread's.
    answer = agent.chat("hi", "metrics").json()["response"]
    assert agent.metric(tokens[1]) - middle[2] == len(answer.split())
    assert agent.metric("agent_turns_running") == 0
    assert agent.metric("process_resident_memory_bytes") > 0
    wait_until(lambda: agent.metric('agent_postgres_connections{state="idle"}') > 0, "the pool is seen")


def test_metrics_of_turns(agent: Agent, migrated: Postgres) -> None:
    names = [f"agent_{name}_{what}" for name in ("turn_duration_seconds", "first_token_seconds", "checkpoint_save_seconds") for what in ("count", "sum")]
    before = [agent.metric(name) for name in names]
    running, pending = ('agent_runs{status="running"}', 'agent_runs{status="pending"}')
    body = {"assistant_id": "agent", "if_not_exists": "create"}
    for text in ("[[delay 2.5]] first", "second"):
        asked = {**body, "input": {"messages": text}, "stream_mode": "messages-tuple"}
        assert agent.client.post("/threads/metrics-of-turns/runs", json=asked).status_code == 200
    wait_until(lambda: (agent.metric(running), agent.metric(pending)) == (1, 1), "both are seen", 3)
    wait_until(lambda: (agent.metric(running), agent.metric(pending)) == (0, 0), "both have ended", 6)
    after = [agent.metric(name) for name in names]
    # How often, and how long in all.
    assert [now - then for now, then in zip(after[::2], before[::2], strict=True)] == [2, 2, 2]
    seconds = [now - then for now, then in zip(after[1::2], before[1::2], strict=True)]
    assert seconds[0] > seconds[1] > 2.5 > 1 > seconds[2] > 0


def test_logs_are_json_lines(agent: Agent) -> None:
    request_id = agent.chat("hi", "logged").headers["X-Request-ID"]
    agent.client.get("/health")
    lines = list(agent.log_lines())
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    [line] = [line for line in lines if line.get("request_id") == request_id]
    assert (line["route"], line["status"], line["thread_id"]) == ("/chat", 200, "logged")
    assert not [line for line in lines if line.get("route") == "/health" and line["status"] == 200]


def lines_of(agent: Agent, number: str) -> list[dict[str, Any]]:
    return [line for line in agent.log_lines() if line.get("request_id") == number]


def test_the_log_has_the_number_that_the_proxy_gives(agent: Agent) -> None:
    number = uuid4().hex
    answer = agent.client.get("/threads/none", headers={"X-Request-ID": number})
    assert answer.headers["X-Request-ID"] == number
    routes = ["/threads/{thread_id}"]
    wait_until(lambda: [line["route"] for line in lines_of(agent, number)] == routes, "it is in the log", 2)
    failed = agent.chat("[[fault 400]]", **{"X-Request-ID": number})
    assert failed.json()["error"]["id"] == failed.headers["X-Request-ID"] == number
    for other in ("", number[:-1], number + "0", number.upper(), f"{number[:-1]}\u0661".encode()):
        assert re.fullmatch("[0-9a-f]{32}", agent.client.get("/ok", headers={"X-Request-ID": other}).headers["X-Request-ID"])
        assert agent.client.get("/ok", headers={"X-Request-ID": other}).headers["X-Request-ID"] != number
    for secret in ({}, {"X-Proxy-Secret": "guess"}):
        stranger = httpx.get(f"{agent.url}/health", headers={"X-Request-ID": number, **secret})
        assert stranger.headers["X-Request-ID"] != number


def test_the_log_names_the_run_of_each_request(agent: Agent) -> None:
    with connect(agent) as client:
        thread = client.threads.create()["thread_id"]
        run = client.runs.create(thread, "agent", input={"messages": "hello"})["run_id"]
        client.runs.join(thread, run)
        list(client.runs.join_stream(thread, run))
        client.runs.get(thread, run)
        client.runs.cancel(thread, run)
    path = "/threads/{thread_id}/runs"

    def told() -> list[dict[str, Any]]:
        return [line for line in agent.log_lines() if line.get("run_id") == run and "route" in line]

    wait_until(lambda: len(told()) >= 5, "all are logged", 2)
    lines = told()
    assert [line["route"].replace(":uuid", "") for line in lines] == [
        path, *(f"{path}/{{run_id}}{what}" for what in ("/join", "/stream", "", "/cancel"))
    ]  # fmt: skip
    assert {line["thread_id"] for line in lines} == {thread}


def test_secrets_reach_no_log(agent: Agent) -> None:
    assert ODD_PASSWORD not in agent.log.read_text()


def test_idle_memory(start_agent: Callable[..., Agent]) -> None:
    service = start_agent()
    service.client.get("/ready")
    assert service.metric("process_resident_memory_bytes") < 200 << 20


def test_the_lock_is_complete() -> None:
    """Every requirement is pinned with a hash, and no index is named."""
    lock = (AGENT / "requirements.lock").read_text()
    wanted = [line for line in (AGENT / "requirements.in").read_text().splitlines() if line and line[0] != "#"]
    for requirement in wanted:
        assert f"\n{requirement.partition('=')[0].partition('[')[0]}==" in f"\n{lock}"
    assert "://" not in lock
    pins = [line for line in lock.splitlines() if "==" in line and line[0] not in " #"]
    assert lock.count("--hash=sha256:") >= len(pins)


def test_the_healthcheck_program(agent: Agent) -> None:
    def check(port: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agent.healthcheck", str(port)]
        return subprocess.run(command, env=agent.environ, capture_output=True, text=True)

    assert check(agent.port).returncode == 0
    away = check(free_port())
    assert (away.returncode, away.stderr) == (1, "agent: no answer: [Errno 111] Connection refused\n")


def test_an_internal_error_shows_an_id_only(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("canary")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Observe(broken, Metrics()))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
            return await client.post("/chat")

    answer = asyncio.run(ask())
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error.keys() == {"code", "message", "id"}
    assert error["code"] == "internal_error"
    assert "canary" not in answer.text
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.request_id == error["id"] == answer.headers["X-Request-ID"]
    assert "canary" in json.loads(JsonFormatter().format(record))["exception"]


def test_a_model_that_asks_for_a_key(start_agent: Callable[..., Agent], redis: Redis) -> None:
    guarded = Model(api_key="sk-$odd")
    file = guarded.directory / "key"
    file.write_text("sk-$odd\n")
    try:
        address = f"{guarded.url}/v1"
        service = start_agent(AGENT_MODEL_BASE_URL=address, AGENT_MODEL_API_KEY_FILE=str(file))
        assert service.client.get("/ready").status_code == 200
        assert service.chat("hello").status_code == 200
        stranger = start_agent(AGENT_MODEL_BASE_URL=address)
        assert stranger.client.get("/ready").json()["error"]["not_ready"] == ["model"]
        assert stranger.chat("hello").json()["error"]["code"] == "model_failed"
    finally:
        guarded.remove()

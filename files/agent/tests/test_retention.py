"""What goes and what stays, next to turns that go on."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import START, MessagesState, StateGraph
from prometheus_client import CollectorRegistry, generate_latest
from psycopg.rows import dict_row

from agent import retention
from agent.retention import Retention, RetentionMetrics, RetentionSettings
from agent.storage.postgres import conninfo, create_pool
from servers import ODD_PASSWORD, Model, Postgres, Redis, environment, migrate

TABLES = ("threads", "runs", "checkpoints", "checkpoint_writes", "checkpoint_blobs")


class Database:
    """A migrated database of the test's own, and the job on it."""

    def __init__(self, postgres: Postgres, environ: dict[str, str]) -> None:
        self.environ = environ
        self.settings = RetentionSettings.from_environment(environ)
        self.connection = psycopg.connect(conninfo(self.settings), autocommit=True, row_factory=dict_row)
        self.graph = graph(PostgresSaver(self.connection))

    def talk(self, thread: str, turns: int = 1, *, days: float = 0) -> None:
        """A thread whose last turn was so long ago."""
        self.connection.execute("INSERT INTO threads (thread_id, owner) VALUES (%s, 'user:ada') ON CONFLICT DO NOTHING", [thread])
        for number in range(turns):
            self.turn(thread, f"question {number}", days=days)
        self.age(thread, days)

    def turn(self, thread: str, text: str, *, days: float = 0, status: str = "success") -> None:
        self.graph.invoke({"messages": [HumanMessage(text)]}, {"configurable": {"thread_id": thread}})
        if days:
            self.connection.execute(
                "UPDATE checkpoints SET checkpoint = jsonb_set(checkpoint, '{ts}',"
                " to_jsonb((checkpoint->>'ts')::timestamptz - %s * interval '1 day')) WHERE thread_id = %s"
                " AND (checkpoint->>'ts')::timestamptz > now() - interval '1 hour'",
                [days, thread],
            )
        self.connection.execute(
            "INSERT INTO runs (run_id, thread_id, owner, status, input, options, updated_at)"
            " VALUES (%s, %s, 'user:ada', %s, '{}', '{}', now() - %s * interval '1 day')",
            [uuid4(), thread, status, days],
        )

    def age(self, thread: str, days: float) -> None:
        self.connection.execute("UPDATE threads SET last_active = now() - %s * interval '1 day' WHERE thread_id = %s", [days, thread])

    def history(self, thread: str) -> list[list[str]]:
        states = self.graph.get_state_history({"configurable": {"thread_id": thread}})
        return [[message.content for message in state.values.get("messages", [])] for state in states]

    def count(self, table: str, thread: str | None = None) -> int:
        where = "WHERE thread_id = %(thread)s" if thread else ""
        row = self.connection.execute(f"SELECT count(*) AS n FROM {table} {where}", {"thread": thread}).fetchone()  # noqa: S608
        return row["n"]

    def counts(self) -> dict[str, int]:
        return {table: self.count(table) for table in TABLES}

    def run(self, **options: Any) -> dict[str, Any]:
        settings = self.settings.model_copy(update={name: options.pop(name) for name in list(options) if name.startswith("retention_")})
        with retention.connect(settings) as connection:
            return Retention(connection, settings, sleep=lambda _: None, **options).run()


def graph(saver: PostgresSaver) -> Any:
    """One question, two steps."""
    builder = StateGraph(MessagesState)
    builder.add_node("think", lambda state: {"messages": [AIMessage(f"thought {len(state['messages'])}")]})
    builder.add_node("answer", lambda state: {"messages": [AIMessage(f"answer {len(state['messages'])}")]})
    builder.add_edge(START, "think")
    builder.add_edge("think", "answer")
    return builder.compile(checkpointer=saver)


@pytest.fixture
def database(postgres: Postgres, redis: Redis, model: Model) -> Iterator[Database]:
    with psycopg.connect(postgres.admin(), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS retained WITH (FORCE)")
        connection.execute("CREATE DATABASE retained OWNER agent")
    environ = environment(postgres, redis, model, postgres.directory) | {"AGENT_POSTGRES_DB": "retained"}
    ran = migrate(environ)
    assert ran.returncode == 0, ran.stderr
    database = Database(postgres, environ)
    yield database
    database.connection.close()


def program(database: Database, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agent.retention", *arguments]
    return subprocess.run(command, env=database.environ | settings, capture_output=True, text=True, timeout=60)


def sizes(database: Database) -> dict[str, int | None]:
    return {row["thread_id"]: row["bytes"] for row in database.connection.execute("SELECT thread_id, bytes FROM threads").fetchall()}


def test_threads_are_measured(database: Database) -> None:
    """Those that a worker of the version before made, and those whose history goes."""
    database.talk("short", 1)
    database.talk("long", 30)
    database.run(dry_run=True)
    assert sizes(database) == {"short": None, "long": None}
    database.run(retention_checkpoints=0)
    first = sizes(database)
    assert first["long"] > 20 * first["short"] > 20 * 1000
    database.age("long", 1)
    database.run(retention_checkpoints=5)
    assert sizes(database)["long"] < first["long"] / 3


def test_a_thread_with_an_active_cron_stays(database: Database) -> None:
    for thread, next_at in (("active", "now() + interval '20 days'"), ("paused", "NULL")):
        database.talk(thread, days=40)
        database.connection.execute(
            f"INSERT INTO crons (cron_id, owner, thread_id, schedule, enabled, payload, metadata, next_at)"  # noqa: S608
            f" VALUES (gen_random_uuid(), 'user:ada', %s, '@monthly', true, '{{}}', '{{}}', {next_at})",
            [thread],
        )
    assert database.run()["threads"] == 1
    assert (database.count("threads", "active"), database.count("crons", "active"), database.count("crons")) == (1, 1, 1)


def test_the_program(database: Database) -> None:
    database.talk("old", days=31)
    database.talk("young", days=29)
    before = database.counts()
    dry = program(database, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert database.counts() == before
    would = json.loads(dry.stdout)
    assert would.pop("dry_run") is True
    real = program(database)
    did = json.loads(real.stdout)
    assert did.pop("dry_run") is False
    assert would.pop("seconds") >= 0 <= did.pop("seconds")
    assert would == did
    assert did["threads"] == did["runs"] == 1
    for table, kind in (("checkpoints", "checkpoints"), ("checkpoint_writes", "writes"), ("checkpoint_blobs", "blobs")):
        assert did[kind] == before[table] - database.count(table) > 0
    assert database.count("threads") == database.count("threads", "young") == 1
    summary, word = program(database).stdout.splitlines()
    assert word == "unchanged"
    assert not any(json.loads(summary)[kind] for kind in retention.KINDS)


def test_never(database: Database) -> None:
    database.talk("old", turns=10, days=10_000)
    before = database.counts()
    assert program(database, AGENT_RETENTION_DAYS="0", AGENT_RETENTION_CHECKPOINTS="0").stdout.endswith("unchanged\n")
    assert database.counts() == before


def test_history_is_pruned_to_the_last_checkpoints(database: Database) -> None:
    database.talk("long", turns=5, days=2)
    database.talk("short", turns=1, days=2)
    whole, short = database.history("long"), database.history("short")
    assert len(whole) == 20
    would = database.run(retention_checkpoints=7, dry_run=True)
    assert database.history("long") == whole
    did = database.run(retention_checkpoints=7)
    assert {**would, "dry_run": False, "seconds": did["seconds"]} == did
    assert (did["pruned_threads"], did["checkpoints"], did["threads"]) == (1, 13, 0)
    assert database.history("long") == whole[:7]
    assert database.history("short") == short
    # The thread goes on as if nothing had been.
    assert database.graph.get_state({"configurable": {"thread_id": "long"}}).values["messages"][-1].content == "answer 14"
    # Three of the five ended before the oldest that stays.
    assert database.count("runs", "long") == 2
    database.turn("long", "more")
    assert database.history("long")[0][-2:] == ["thought 16", "answer 17"]
    # Every blob that is left is used, and every one that is used is there.
    used = database.connection.execute("SELECT DISTINCT thread_id, key, value FROM checkpoints, jsonb_each_text(checkpoint->'channel_versions')").fetchall()
    stored = database.connection.execute("SELECT thread_id, channel AS key, version AS value FROM checkpoint_blobs").fetchall()
    assert {tuple(row.values()) for row in stored} <= {tuple(row.values()) for row in used}
    orphans = database.connection.execute(
        "SELECT 1 FROM checkpoint_writes w WHERE NOT EXISTS (SELECT FROM checkpoints c WHERE c.thread_id = w.thread_id"
        " AND c.checkpoint_ns = w.checkpoint_ns AND c.checkpoint_id = w.checkpoint_id)"
    ).fetchall()
    assert orphans == []
    assert database.run(retention_checkpoints=7)["checkpoints"] == 0


def test_only_threads_that_were_used_since_are_looked_at(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    prune = Retention._prune
    monkeypatch.setattr(Retention, "_prune", lambda self, thread: (looked.append(thread), prune(self, thread)))
    for number in range(6):
        database.talk(f"thread-{number}", turns=2, days=2)
    database.run(retention_checkpoints=3)
    assert len(looked) == 6
    looked.clear()
    database.talk("thread-3", turns=1, days=1)
    database.run(retention_checkpoints=3)
    assert looked == ["thread-3"]
    # More may stay now: what is gone is gone. Fewer: all are looked at.
    looked.clear()
    database.run(retention_checkpoints=5)
    assert looked == []
    database.run(retention_checkpoints=2)
    assert len(looked) == 6


@pytest.mark.parametrize("status", ["pending", "running"])
def test_a_thread_with_a_run_is_left_alone(database: Database, status: str) -> None:
    database.talk("busy", turns=5, days=40)
    database.turn("busy", "now", status=status)
    database.age("busy", 40)
    before = database.counts()
    did = database.run(retention_checkpoints=2)
    assert (did["threads"], did["pruned_threads"]) == (0, 0)
    assert did["skipped"] > 0
    assert database.counts() == before
    # As soon as it is over the thread counts as used.
    database.connection.execute("UPDATE runs SET status = 'success'")
    database.age("busy", 1)
    assert database.run(retention_checkpoints=2)["pruned_threads"] == 1


def test_a_run_that_begins_in_the_same_moment_wins_or_waits(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it holds its thread first, the job skips it. Else it waits and finds none: no thread is half gone."""
    for thread in ("first", "second", "third"):
        database.talk(thread, days=40)
    with psycopg.connect(conninfo(database.settings), row_factory=dict_row) as other:
        other.execute(
            "INSERT INTO runs (run_id, thread_id, owner, status, input, options) VALUES (gen_random_uuid(), 'second', 'user:ada', 'running', '{}', '{}')"
        )
        did = database.run()
        assert (did["threads"], did["skipped"]) == (2, 1)
    assert database.history("second")

    # An old run that is being taken up again keeps its thread, too.
    database.talk("fifth", days=40)
    with psycopg.connect(conninfo(database.settings)) as other:
        other.execute("UPDATE runs SET status = 'pending' WHERE thread_id = 'fifth'")
        did = database.run()
        assert (did["threads"], did["skipped"]) == (0, 2)
    assert database.history("fifth")
    database.age("fifth", 0)

    database.talk("fourth", days=40)
    waited: list[BaseException | None] = []
    statement = retention.WHOLE[0]

    class Meanwhile(retention.Statement):
        def run(self, *arguments: Any, **options: Any) -> int:
            with psycopg.connect(conninfo(database.settings), options="-c lock_timeout=300") as other:
                try:
                    other.execute(
                        "INSERT INTO runs (run_id, thread_id, owner, status, input, options)"
                        " VALUES (gen_random_uuid(), 'fourth', 'user:ada', 'running', '{}', '{}')"
                    )
                except psycopg.Error as error:
                    waited.append(error)
            return retention.Statement.run(self, *arguments, **options)

    first = Meanwhile(statement.kind, statement.table, statement.where)
    monkeypatch.setattr(retention, "WHOLE", (first, *retention.WHOLE[1:]))
    database.age("second", 0)
    database.run()
    assert [type(error) for error in waited] == [psycopg.errors.LockNotAvailable]
    assert database.count("threads", "fourth") == database.count("checkpoints", "fourth") == 0


def test_a_locked_thread_is_left_for_the_next_time(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "LOCK_SECONDS", 1)
    database.talk("idle", days=40)
    database.talk("long", turns=4, days=1)
    with psycopg.connect(conninfo(database.settings)) as other:
        other.execute("SELECT 1 FROM threads FOR UPDATE")
        did = database.run(retention_checkpoints=2)
        assert (did["threads"], did["pruned_threads"], did["skipped"]) == (0, 0, 3)
    did = database.run(retention_checkpoints=1)
    assert (did["threads"], did["pruned_threads"]) == (1, 1)


def test_interrupted_it_goes_on_where_it_was(database: Database) -> None:
    for number in range(12):
        database.talk(f"idle-{number}", days=40 + number)
        database.talk(f"long-{number}", turns=2, days=1 + number / 100)

    class Killed(Exception):
        pass

    def die(at: int) -> Any:
        rests = 0

        def sleep(_: float) -> None:
            nonlocal rests
            rests += 1
            if rests == at:
                raise Killed

        return sleep

    deleted, pruned = 0, 0
    for at in range(1, 60):
        settings = database.settings.model_copy(update={"retention_checkpoints": 3})
        with retention.connect(settings) as connection:
            job = Retention(connection, settings, batch=2, sleep=die(at))
            try:
                job.run()
            except Killed:
                pass
            else:
                break
            finally:
                deleted += job.done["threads"]
                pruned += job.done["pruned_threads"]
    assert (deleted, pruned) == (12, 12)
    assert all(len(database.history(f"long-{number}")) == 3 for number in range(12))
    # The table has counted the same, whatever was interrupted.
    row = database.connection.execute("SELECT threads, pruned_threads FROM retention").fetchone()
    assert row == {"threads": 12, "pruned_threads": 12}


def test_one_at_a_time(database: Database) -> None:
    database.talk("old", days=40)
    with psycopg.connect(conninfo(database.settings), autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [retention.LOCK])
        ran = program(database)
        assert (ran.returncode, ran.stderr) == (1, "agent: the retention job is running already\n")
    assert database.count("threads") == 1
    assert program(database).returncode == 0
    assert database.count("threads") == 0


def test_a_graph_inside_a_graph(database: Database) -> None:
    """Its own history goes with the outer one's; what it keeps from call to call stays."""
    keeper = StateGraph(MessagesState)
    keeper.add_node("note", lambda state: {"messages": [AIMessage(f"note {len(state['messages'])}")]})
    keeper.add_edge(START, "note")
    builder = StateGraph(MessagesState)
    builder.add_node("keeper", keeper.compile(checkpointer=True))
    builder.add_edge(START, "keeper")
    outer = builder.compile(checkpointer=PostgresSaver(database.connection))
    config = {"configurable": {"thread_id": "nested"}}
    database.connection.execute("INSERT INTO threads (thread_id, owner) VALUES ('nested', 'user:ada')")
    for number in range(4):
        outer.invoke({"messages": [HumanMessage(f"question {number}")]}, config)
    database.age("nested", 1)
    notes = "SELECT count(*) AS n FROM checkpoints WHERE checkpoint_ns <> ''"
    before = database.connection.execute(notes).fetchone()["n"]
    assert database.run(retention_checkpoints=2)["pruned_threads"] == 1
    assert 0 < database.connection.execute(notes).fetchone()["n"] < before
    answer = outer.invoke({"messages": [HumanMessage("and now")]}, config)
    assert answer["messages"][-1].content.startswith("note ")
    assert int(answer["messages"][-1].content.split()[1]) > 8


def test_metrics(database: Database) -> None:
    database.talk("old", days=40)
    database.run()

    async def scrape() -> str:
        pool = create_pool(database.settings)
        await pool.open()
        metrics = RetentionMetrics(pool)
        registry = CollectorRegistry()
        registry.register(metrics)
        assert b"agent_retention_deleted_total{" not in generate_latest(registry)
        metrics.refresh()
        metrics.refresh()
        await asyncio.sleep(0.5)
        text = generate_latest(registry).decode()
        await metrics.close()
        await pool.close()
        return text

    text = asyncio.run(scrape())
    assert 'agent_retention_deleted_total{kind="threads"} 1.0' in text
    [line] = [line for line in text.splitlines() if line.startswith("agent_retention_finished_timestamp_seconds ")]
    assert abs(float(line.split()[1]) - time.time()) < 60


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (["--batch", "0"], {}, "--batch"),
        (["--batch", "x"], {}, "--batch"),
        (["x"], {}, "unrecognized"),
        ([], {"AGENT_RETENTION_DAYS": "-1"}, "AGENT_RETENTION_DAYS='-1': expected a whole number from 0 (never)"),
        ([], {"AGENT_RETENTION_CHECKPOINTS": "x"}, "AGENT_RETENTION_CHECKPOINTS='x'"),
        ([], {"AGENT_POSTGRES_PORT": "1"}, "agent: cannot use the database"),
    ],
)
def test_it_says_why_it_cannot(tmp_path: Path, arguments: list[str], settings: dict[str, str], message: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text(ODD_PASSWORD)
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(retention.__file__).parents[1]),
        "AGENT_POSTGRES_HOST": "127.0.0.1",
        "AGENT_POSTGRES_PASSWORD_FILE": str(secret),
    }
    command = [sys.executable, "-m", "agent.retention", *arguments]
    ran = subprocess.run(command, env=environ | settings, capture_output=True, text=True, timeout=60)
    assert ran.returncode in {1, 2}
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr

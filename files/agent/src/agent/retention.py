"""`python -m agent.retention [--dry-run] [--batch N]`: delete threads that nobody uses any more, and old history.

Works in small transactions with pauses between them, so that a turn never waits long: for a lock only if it is on one
of the few threads of the present batch, and for the disk and the CPU no more than SHARE of the time. A thread with a
run that is pending or running is left alone. Wherever it is interrupted, the next time goes on from there.

LangGraph's own aprune() keeps one checkpoint or none, and does not know of runs; hence the statements here.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, LiteralString

import psycopg
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from psycopg.rows import dict_row

from agent.runs._langgraph import PRUNE_DELTA_THREADS_SQL
from agent.runs.quota import MEASURED
from agent.settings import PostgresSettings, RetentionSettings, SettingsError
from agent.storage.postgres import Pool, connected

LOCK = 0x72657461696E  # "retain"
BATCH_THREADS = 200
BATCH_SECONDS = 0.1
SHARE = 0.25
LOCK_SECONDS = 2
METRICS_SECONDS = 15

KINDS = ("threads", "pruned_threads", "runs", "checkpoints", "writes", "blobs")

Connection = psycopg.Connection[dict[str, Any]]


START: dict[str, Any] = {"active": datetime(1970, 1, 1, tzinfo=UTC), "thread": ""}


class Busy(Exception):
    """Another process does this at the moment."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What to delete of one kind. A dry run counts it instead."""

    kind: str
    table: LiteralString
    where: LiteralString

    def run(self, connection: Connection, parameters: Mapping[str, Any], *, dry_run: bool) -> int:
        if not dry_run:
            query: LiteralString = f"DELETE FROM {self.table} WHERE {self.where}"  # noqa: S608  constants of this file
            return connection.execute(query, parameters).rowcount
        query = f"SELECT count(*) AS n FROM {self.table} WHERE {self.where}"  # noqa: S608  constants of this file
        row = connection.execute(query, parameters).fetchone()
        return int(row["n"]) if row else 0


# Of whole threads. Runs go with their thread, and are named here to be counted.
WHOLE = (
    Statement("blobs", "checkpoint_blobs", "thread_id = ANY(%(threads)s)"),
    Statement("writes", "checkpoint_writes", "thread_id = ANY(%(threads)s)"),
    Statement("checkpoints", "checkpoints", "thread_id = ANY(%(threads)s)"),
    Statement("runs", "runs", "thread_id = ANY(%(threads)s)"),
    Statement("threads", "threads", "thread_id = ANY(%(threads)s)"),
)

# Of one thread: what is older than %(oldest)s, the oldest checkpoint that stays. A namespace with a colon belongs to
# one call of a subgraph; one without keeps the subgraph's state from call to call, so its latest checkpoint stays.
OLD: LiteralString = (
    "c.thread_id = %(thread)s AND c.checkpoint_id < %(oldest)s"
    " AND (c.checkpoint_ns = '' OR strpos(c.checkpoint_ns, ':') > 0"
    " OR EXISTS (SELECT FROM checkpoints n WHERE n.thread_id = c.thread_id AND n.checkpoint_ns = c.checkpoint_ns"
    " AND n.checkpoint_id > c.checkpoint_id))"
)
HISTORY = (
    Statement(
        "writes",
        "checkpoint_writes w",
        f"w.thread_id = %(thread)s AND w.checkpoint_id < %(oldest)s AND EXISTS (SELECT FROM checkpoints c WHERE {OLD}"
        " AND c.checkpoint_ns = w.checkpoint_ns AND c.checkpoint_id = w.checkpoint_id)",
    ),
    Statement(
        "blobs",
        "checkpoint_blobs b",
        "b.thread_id = %(thread)s AND (b.checkpoint_ns, b.channel, b.version) NOT IN"  # noqa: S608  a constant
        " (SELECT c.checkpoint_ns, v.key, v.value"
        " FROM checkpoints c, jsonb_each_text(c.checkpoint->'channel_versions') v"
        f" WHERE c.thread_id = %(thread)s AND v.value IS NOT NULL AND NOT ({OLD}))",
    ),
    # A day longer than its checkpoint at least: a client may still ask for what became of a turn.
    Statement(
        "runs",
        "runs r",
        "r.thread_id = %(thread)s AND r.status NOT IN ('pending', 'running')"
        " AND r.updated_at < now() - interval '1 day'"
        " AND r.updated_at < (SELECT (c.checkpoint->>'ts')::timestamptz FROM checkpoints c"
        " WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = '' AND c.checkpoint_id = %(oldest)s)",
    ),
    Statement("checkpoints", "checkpoints c", OLD),
)

# A thread is not idle while a cron waits for its next time.
NO_CRON: LiteralString = "NOT EXISTS (SELECT FROM crons WHERE crons.thread_id = threads.thread_id AND crons.next_at IS NOT NULL)"
IDLE: LiteralString = (
    f"SELECT thread_id, last_active FROM threads WHERE last_active < now() - make_interval(days => %(days)s) AND {NO_CRON}"  # noqa: S608  a constant
    " AND (last_active, thread_id) > (%(active)s, %(thread)s) ORDER BY last_active, thread_id LIMIT %(limit)s"
)
BUSY: LiteralString = "SELECT DISTINCT thread_id FROM runs WHERE thread_id = ANY(%(threads)s) AND status IN ('pending', 'running')"
# An ended run may be taken up again, which its row's lock prevents. One whose row is locked already is being taken up.
HELD: LiteralString = (
    "WITH ended AS MATERIALIZED (SELECT run_id FROM runs WHERE thread_id = ANY(%(threads)s)"
    " AND status NOT IN ('pending', 'running') FOR UPDATE SKIP LOCKED)"
    " SELECT DISTINCT thread_id FROM runs WHERE thread_id = ANY(%(threads)s)"
    " AND NOT EXISTS (SELECT FROM ended WHERE ended.run_id = runs.run_id)"
)
ACTIVE: LiteralString = (
    "SELECT thread_id, last_active, EXISTS (SELECT FROM checkpoints c WHERE c.thread_id = t.thread_id"
    " AND c.checkpoint_ns = '' ORDER BY c.checkpoint_id DESC OFFSET %(keep)s LIMIT 1) AS long"
    " FROM threads t WHERE last_active < %(until)s AND (last_active, thread_id) > (%(active)s, %(thread)s)"
    " ORDER BY last_active, thread_id LIMIT %(limit)s"
)
OLDEST: LiteralString = (
    "SELECT checkpoint_id FROM checkpoints WHERE thread_id = %(thread)s AND checkpoint_ns = '' ORDER BY checkpoint_id DESC OFFSET %(keep)s - 1 LIMIT 1"
)


UNMEASURED: LiteralString = "SELECT thread_id FROM threads WHERE bytes IS NULL AND thread_id > %(after)s ORDER BY thread_id LIMIT %(limit)s"


class Retention:
    def __init__(
        self,
        connection: Connection,
        settings: RetentionSettings,
        *,
        dry_run: bool = False,
        batch: int = BATCH_THREADS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._connection = connection
        self._days = settings.retention_days
        self._keep = settings.retention_checkpoints
        self._dry_run = dry_run
        self._most = batch
        self._limit = min(batch, 20)
        self._sleep = sleep
        self.done: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.skipped = 0

    def run(self) -> dict[str, Any]:
        """Do all there is to do, and say what went. Raises Busy."""
        started = time.monotonic()
        connection = self._connection
        # A crash loses the last moments of this, and the next time does them again. Nobody else's commit is less safe.
        connection.execute("SET synchronous_commit = off")
        connection.execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")
        connection.execute("SET statement_timeout = '60s'")
        if not self._one("SELECT pg_try_advisory_lock(%s) AS locked", [LOCK])["locked"]:
            raise Busy
        try:
            if self._days:
                self._delete_idle()
            if self._keep:
                self._prune_active()
            if not self._dry_run:
                self._measure_unknown()
            seconds = round(time.monotonic() - started, 3)
            if not self._dry_run:
                connection.execute("UPDATE retention SET finished_at = now(), seconds = %s", [seconds])
        finally:
            if not connection.closed:
                connection.execute("SELECT pg_advisory_unlock(%s)", [LOCK])
        return {"dry_run": self._dry_run, **self.done, "skipped": self.skipped, "seconds": seconds}

    def _delete_idle(self) -> None:
        after = START
        while True:
            with self._paced():
                found = self._all(IDLE, {"days": self._days, "limit": self._limit, **after})
                # Of what was locked or became busy in between, the next time takes care.
                if found:
                    after = {"active": found[-1]["last_active"], "thread": found[-1]["thread_id"]}
                    self._delete([row["thread_id"] for row in found])
            if not found:
                return

    def _delete(self, found: Sequence[str]) -> None:
        with self._batch(len(found)) as gone:
            busy = {row["thread_id"] for row in self._all(BUSY, {"threads": list(found)})}
            threads = [thread for thread in found if thread not in busy]
            if not self._dry_run:
                # A new run refers to its thread, and waits for this lock: none can begin any more.
                locked = self._all(
                    "SELECT thread_id FROM threads WHERE thread_id = ANY(%(threads)s)"  # noqa: S608  a constant
                    f" AND last_active < now() - make_interval(days => %(days)s) AND {NO_CRON}"
                    " ORDER BY thread_id FOR UPDATE SKIP LOCKED",
                    {"threads": threads, "days": self._days},
                )
                threads = [row["thread_id"] for row in locked]
                busy |= {row["thread_id"] for row in self._all(HELD, {"threads": threads})}
                threads = [thread for thread in threads if thread not in busy]
            self.skipped += len(found) - len(threads)
            for statement in WHOLE:
                gone[statement.kind] += statement.run(self._connection, {"threads": threads}, dry_run=self._dry_run)

    def _prune_active(self) -> None:
        # What ends in this minute may be stored with a time that we have passed already.
        state = self._one("SELECT pruned_active, pruned_thread, pruned_to, now() - interval '1 minute' AS until FROM retention")
        after: dict[str, Any] = {"active": state["pruned_active"], "thread": state["pruned_thread"]}
        if not 0 < state["pruned_to"] <= self._keep:
            after = START  # fewer than the last time are to stay, in all threads
        self._reached(after)
        while True:
            with self._paced():
                given = {"keep": self._keep, "until": state["until"], "limit": self._limit, **after}
                found = self._all(ACTIVE, given)
                if found:
                    after = {"active": found[-1]["last_active"], "thread": found[-1]["thread_id"]}
            for row in found:
                if row["long"]:
                    with self._paced():
                        self._prune(row["thread_id"])
            if not found:
                return
            self._reached(after)

    def _measure(self, threads: Sequence[str]) -> None:
        """What they take, which counts for their owners' quotas."""
        query: LiteralString = f"UPDATE threads SET bytes = {MEASURED} WHERE thread_id = ANY(%(threads)s)"  # noqa: S608  constants
        self._connection.execute(query, {"threads": list(threads)})

    def _measure_unknown(self) -> None:
        after = ""
        while True:
            with self._paced():
                found = self._all(UNMEASURED, {"after": after, "limit": self._limit})
                for row in found:
                    after = row["thread_id"]
                    # One that is locked at the moment is measured the next time.
                    with self._batch(0):
                        self._measure([after])
            if not found:
                return

    def _reached(self, after: Mapping[str, Any]) -> None:
        """Whoever comes next goes on from here. A thread that is used again moves to the end of the line."""
        if not self._dry_run:
            self._connection.execute(
                "UPDATE retention SET pruned_active = %(active)s, pruned_thread = %(thread)s, pruned_to = %(keep)s",
                {**after, "keep": self._keep},
            )

    def _prune(self, thread: str) -> None:
        with self._batch(1) as gone:
            parameters: dict[str, Any] = {"thread": thread, "keep": self._keep, "threads": [thread]}
            if not self._dry_run:
                self._all("SELECT 1 FROM threads WHERE thread_id = %(thread)s FOR UPDATE", parameters)
            if (
                self._all(BUSY, parameters)
                # Its state is the sum of all its checkpoints.
                or self._connection.execute(PRUNE_DELTA_THREADS_SQL, ([thread], [thread])).fetchone()
            ):
                self.skipped += 1
                return
            oldest = self._all(OLDEST, parameters)
            if not oldest:
                return
            parameters["oldest"] = oldest[0]["checkpoint_id"]
            for statement in HISTORY:
                gone[statement.kind] += statement.run(self._connection, parameters, dry_run=self._dry_run)
            if not self._dry_run:
                self._connection.execute(
                    "UPDATE checkpoints SET parent_checkpoint_id = NULL WHERE thread_id = %(thread)s AND checkpoint_ns = '' AND checkpoint_id = %(oldest)s",
                    parameters,
                )
                self._measure([thread])
            gone["pruned_threads"] += 1

    @contextmanager
    def _batch(self, threads: int) -> Iterator[Counter[str]]:
        """One transaction, counted in the table together with what it did."""
        gone: Counter[str] = Counter()
        try:
            with self._connection.transaction():
                yield gone
                if not self._dry_run and gone.total():
                    self._connection.execute(
                        "UPDATE retention SET threads = threads + %(threads)s, runs = runs + %(runs)s,"
                        " pruned_threads = pruned_threads + %(pruned_threads)s, blobs = blobs + %(blobs)s,"
                        " checkpoints = checkpoints + %(checkpoints)s, writes = writes + %(writes)s",
                        {kind: gone[kind] for kind in KINDS},
                    )
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.QueryCanceled):
            self.skipped += threads
        else:
            self.done.update(gone)

    @contextmanager
    def _paced(self) -> Iterator[None]:
        """Take BATCH_SECONDS at a time, and rest in proportion."""
        started = time.monotonic()
        yield
        taken = time.monotonic() - started
        if taken > BATCH_SECONDS:
            self._limit = max(1, self._limit // 2)
        elif taken < BATCH_SECONDS / 2:
            self._limit = min(self._most, self._limit * 2)
        self._sleep(taken * (1 / SHARE - 1))

    def _all(self, query: LiteralString, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> list[dict[str, Any]]:
        return self._connection.execute(query, parameters).fetchall()

    def _one(self, query: LiteralString, parameters: Sequence[Any] = ()) -> dict[str, Any]:
        row = self._connection.execute(query, parameters).fetchone()
        assert row is not None  # every such query has one row
        return row


class RetentionMetrics(Collector):
    """What the table says, for /metrics. The job itself is gone before anybody could ask it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._row: dict[str, Any] | None = None
        self._read_at = -math.inf
        self._reading: asyncio.Task[None] | None = None

    def refresh(self) -> None:
        """Start to read the table, at most every METRICS_SECONDS: who asks for metrics does not wait for Postgres."""
        if time.monotonic() - self._read_at >= METRICS_SECONDS and (self._reading is None or self._reading.done()):
            self._read_at = time.monotonic()
            self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        if self._reading:
            self._reading.cancel()
            await asyncio.wait({self._reading}, timeout=1)

    async def _read(self) -> None:
        # What was read last stays where there is no answer.
        with suppress(psycopg.Error):
            async with self._pool.connection() as connection:
                self._row = await (await connection.execute("SELECT * FROM retention")).fetchone()

    def collect(self) -> Iterable[Metric]:
        gone = CounterMetricFamily("agent_retention_deleted", "Rows that the retention job deleted", labels=["kind"])
        finished = GaugeMetricFamily("agent_retention_finished_timestamp_seconds", "When the retention job last ended well")
        seconds = GaugeMetricFamily("agent_retention_duration_seconds", "How long it took")
        if self._row:
            for kind in KINDS:
                gone.add_metric([kind], self._row[kind])
            if self._row["finished_at"]:
                finished.add_metric([], self._row["finished_at"].timestamp())
                seconds.add_metric([], self._row["seconds"])
        return [gone, finished, seconds]


def connect(settings: PostgresSettings) -> Connection:
    # Statements are planned each time, for how many rows they are really about.
    return connected(settings, lambda address: psycopg.connect(address, autocommit=True, prepare_threshold=None, row_factory=dict_row))


def _batch(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= 10_000):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are 1 to 10000")
    return int(text)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m agent.retention", description="Delete what is old.")
    parser.add_argument("--dry-run", action="store_true", help="only count what would go")
    parser.add_argument("--batch", type=_batch, default=BATCH_THREADS, metavar="N", help="threads to delete at once")
    wish = parser.parse_args(arguments)
    settings = RetentionSettings.from_environment(os.environ)
    with connect(settings) as connection:
        return Retention(connection, settings, dry_run=wish.dry_run, batch=wish.batch).run()


def main() -> None:
    try:
        summary = run(sys.argv[1:])
    except SettingsError as error:
        raise SystemExit(f"agent: bad settings\n{error}") from None
    except Busy:
        raise SystemExit("agent: the retention job is running already") from None
    except psycopg.Error as error:
        raise SystemExit(f"agent: cannot use the database: {str(error).strip()}") from None
    print(json.dumps(summary))
    if not any(summary[kind] for kind in KINDS):
        # The last word tells the deployment that nothing was changed.
        print("unchanged")


if __name__ == "__main__":
    main()

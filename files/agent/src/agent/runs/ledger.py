"""What Postgres knows of runs and workers. Each change is one statement, which is one transaction and one round trip.

Every statement here can be sent again after a connection broke without an answer: `Database` does that.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, LiteralString

import orjson
import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow

from agent.errors import StorageUnavailable
from agent.runs.crons import Due
from agent.runs.quota import ROW_BYTES
from agent.runs.records import Batch, Outcome, Run, RunLost, RunOptions
from agent.runs.statements import CANCEL, CHANNEL, FINISH, FINISH_ONE, FIRE, INSERT, ROLL_BACK, SAVE
from agent.settings import PostgresSettings
from agent.storage.postgres import Connection, Database, conninfo

logger = logging.getLogger(__name__)

LISTENER = "agent-"
RUN = "run_id::text, thread_id, owner, turn_id, status, attempt, first_attempt, cancel, input, options, result, error, created_at, updated_at"


class Ledger:
    def __init__(self, database: Database, worker: str, stored: Callable[[str, int], None] = lambda owner, size: None) -> None:
        """stored: told of an owner and of the bytes that were stored for it"""
        self._database = database
        self.worker = worker
        self._stored = stored

    # Accepting

    async def insert(self, run: Run, thread_metadata: str, *, create_thread: bool, reject: bool) -> bool:
        """Record a run, running where its thread is free, else pending. False where that could not be."""
        rows = await self._database.run(
            INSERT,
            {
                "run": run.run_id,
                "thread": run.thread_id,
                "owner": run.owner,
                "turn": run.turn_id,
                "worker": self.worker,
                "input": orjson.dumps(run.input).decode(),
                "options": run.options.to_json(),
                "metadata": thread_metadata,
                "create": create_thread,
                "reject": reject,
                "bytes": ROW_BYTES + len(thread_metadata),
            },
        )
        if not rows:
            return False
        run.status = rows[0]["status"]
        run.created_at = run.updated_at = rows[0]["created_at"]
        run.first = rows[0]["first"]
        return True

    async def fire(self, run: Run, due: Due) -> bool:
        """Record a cron's run and move the cron on. False where its time was used up already, or its thread refuses."""
        rows = await self._database.rows(
            FIRE,
            {
                "run": run.run_id,
                "thread": run.thread_id,
                "owner": run.owner,
                "input": orjson.dumps(run.input).decode(),
                "options": run.options.to_json(),
                "cron": due.cron.cron_id,
                "due": due.due_at,
                "following": due.following,
                "create": due.cron.thread_id is None,
                "reject": run.options.strategy == "reject",
                "bytes": ROW_BYTES,
            },
        )
        if not rows:
            return False
        run.created_at = run.updated_at = rows[0]["created_at"]
        return True

    async def find(self, run_id: str) -> Run | None:
        return _first(await self._database.rows(f"SELECT {RUN} FROM runs WHERE run_id = %s", [run_id]))

    async def find_turn(self, owner: str, turn_id: str) -> Run | None:
        query: LiteralString = f"SELECT {RUN} FROM runs WHERE owner = %s AND turn_id = %s"
        return _first(await self._database.rows(query, [owner, turn_id]))

    async def find_retried(self, owner: str, thread_id: str | None, request: str, retry: int, seconds: float) -> Run | None:
        """The newest run that this request began within so many seconds, and keep that it is sent again.

        Without a thread's name the run has a thread of its own, which goes with it: one that was cancelled is gone.
        """
        query: LiteralString = (
            "UPDATE runs SET options = (options::jsonb || jsonb_build_object('retry', %(retry)s::int))::json WHERE run_id ="
            " (SELECT r.run_id FROM threads t JOIN runs r USING (thread_id) WHERE t.owner = %(owner)s AND CASE WHEN %(thread)s::text IS NULL"
            " THEN t.updated_at > now() - make_interval(secs => %(seconds)s) AND r.cancel IS NULL ELSE t.thread_id = %(thread)s END"
            " AND r.created_at > now() - make_interval(secs => %(seconds)s) AND r.options->>'request' = %(request)s"
            f" ORDER BY r.created_at DESC LIMIT 1) RETURNING {RUN}"
        )
        return _first(
            await self._database.rows(query, {"owner": owner, "thread": thread_id, "request": request, "retry": retry, "seconds": seconds}),
        )

    async def thread_owner(self, thread_id: str) -> str | None:
        rows = await self._database.rows("SELECT owner FROM threads WHERE thread_id = %s", [thread_id])
        return rows[0]["owner"] if rows else None

    async def reopen(self, run: Run) -> Run | None:
        """Let a failed run wait for another try."""
        query: LiteralString = (
            "UPDATE runs SET status = 'pending', worker = NULL, attempt = attempt + 1, first_attempt = attempt + 1,"
            " cancel = NULL, error = NULL, watched = true, created_at = now(), updated_at = now()"
            f" WHERE run_id = %s AND attempt = %s AND status IN ('error', 'timeout') RETURNING {RUN}"
        )
        return _first(await self._database.rows(query, [run.run_id, run.attempt]))

    # Taking

    async def claim_pending(self, thread_id: str) -> Run | None:
        """Take the oldest run that waits for this thread, if the thread is free."""
        query: LiteralString = (
            "UPDATE runs SET status = 'running', worker = %s, updated_at = now(), options ="
            " CASE WHEN options->'stream' IS NULL THEN options"
            """ ELSE (options::jsonb || '{"resumable": true}')::json END WHERE run_id ="""
            " (SELECT run_id FROM runs WHERE thread_id = %s AND status = 'pending'"
            " ORDER BY created_at, run_id LIMIT 1 FOR UPDATE SKIP LOCKED)"
            " AND NOT EXISTS (SELECT FROM runs WHERE thread_id = %s AND status = 'running')"
            f" RETURNING {RUN}"
        )
        return await self._claim(query, [self.worker, thread_id, thread_id])

    async def free_threads(self, limit: int) -> list[str]:
        """Threads with a run that waits, and none that runs."""
        rows = await self._database.rows(
            "SELECT DISTINCT thread_id FROM runs p WHERE status = 'pending' AND NOT EXISTS"
            " (SELECT FROM runs r WHERE r.thread_id = p.thread_id AND r.status = 'running') LIMIT %s",
            [limit],
        )
        return [row["thread_id"] for row in rows]

    async def claim_left(self, mine: Sequence[str], deaf_seconds: float, dead_seconds: float, limit: int, *, others: bool) -> list[Run]:
        """Take runs whose worker is dead, and those that are this worker's but not in `mine`: it forgot them.

        A worker that was killed is not only silent: its connection that listens is gone too, and then fewer missed
        beats are enough. After a start of Postgres all of them are gone, and all get time to come back.
        """
        query: LiteralString = (
            "UPDATE runs SET worker = %(worker)s, attempt = attempt + 1, updated_at = now() WHERE run_id IN"
            " (SELECT run_id FROM runs WHERE status = 'running' AND CASE WHEN worker = %(worker)s"
            " THEN NOT run_id = ANY(%(mine)s::uuid[]) AND updated_at < now() - make_interval(secs => %(dead)s)"
            " ELSE %(others)s AND pg_postmaster_start_time() < now() - make_interval(secs => %(dead)s)"
            " AND NOT EXISTS (SELECT FROM workers w WHERE w.worker = runs.worker"
            " AND (w.seen > now() - make_interval(secs => %(deaf)s) OR w.seen > now() - make_interval(secs => %(dead)s)"
            " AND EXISTS (SELECT FROM pg_stat_activity WHERE application_name = %(listener)s || w.worker))) END"
            " LIMIT %(limit)s FOR UPDATE SKIP LOCKED)"
            f" RETURNING {RUN}"
        )
        parameters = {
            "worker": self.worker, "mine": list(mine), "deaf": deaf_seconds, "dead": dead_seconds, "limit": limit,
            "others": others, "listener": LISTENER,
        }  # fmt: skip
        return [_run(row) for row in await self._database.rows(query, parameters)]

    async def hand_back(self, run: Run) -> None:
        """Let another worker go on with a run. This attempt does not count."""
        await self._database.rows(
            "UPDATE runs SET status = 'pending', worker = NULL,"
            " attempt = attempt + 1, first_attempt = first_attempt + 1"
            " WHERE run_id = %s AND worker = %s AND attempt = %s AND status = 'running' RETURNING run_id",
            [run.run_id, self.worker, run.attempt],
        )

    async def _claim(self, query: LiteralString, parameters: Sequence[Any]) -> Run | None:
        try:
            return _first(await self._database.rows(query, parameters))
        except StorageUnavailable as error:
            if isinstance(error.__cause__, psycopg.errors.UniqueViolation):
                return None  # somebody else was faster
            raise

    # Keeping

    async def save(self, run: Run, batch: Batch) -> None:
        """Store what an attempt has so far. Raises RunLost where the run is somebody else's by now."""
        rows = await self._database.run(SAVE, [run.run_id, self.worker, run.attempt, *batch.columns()])
        if not rows[0]["mine"]:
            raise RunLost

    async def finish(self, run: Run, batch: Batch, outcome: Outcome, saved: int = 0) -> bool:
        """Store the rest together with how it ended, and tell whether another run waits for the thread.

        saved: bytes of the batches that were stored before
        """
        result = orjson.dumps(outcome.result).decode() if outcome.result is not None else None
        error = orjson.dumps(outcome.error).decode() if outcome.error is not None else None
        # Nearly always there is one checkpoint and one channel: the plain values cost half of what the columns do.
        one = len(batch.checkpoints) == len(batch.blobs) == 1 and not batch.writes
        size = saved + batch.size + len(result or "") + len(orjson.dumps([run.input, run.options.metadata]))
        rows = await self._database.run(
            FINISH_ONE if one else FINISH,
            [
                outcome.status, result, error, run.run_id, self.worker, run.attempt,
                *(batch.only() if one else batch.columns()),
                outcome.thread_status, size, run.thread_id,
            ],
        )  # fmt: skip
        if not rows[0]["mine"]:
            # Stored already, where the answer to an earlier try was lost on its way?
            stored = await self.find(run.run_id)
            if stored is None or stored.attempt != run.attempt or stored.status != outcome.status:
                raise RunLost
            return True
        self._stored(run.owner, size)
        run.updated_at = rows[0]["now"]
        return bool(rows[0]["more"])

    async def roll_back(self, run: Run) -> None:
        """Delete a run of this worker's and what it stored, as if it had never been. Raises RunLost."""
        rows = await self._database.rows(ROLL_BACK, [run.run_id, self.worker, run.attempt])
        if not rows[0]["mine"] and await self.find(run.run_id) is not None:
            raise RunLost

    # Cancelling and waiting

    async def cancel(self, run_id: str, action: Literal["interrupt", "rollback"]) -> tuple[str, str] | None:
        """Ask for a run's end. What it was, and whose it is, unless it was final."""
        rows = await self._database.rows(CANCEL, {"run": run_id, "action": action})
        return (rows[0]["was"], rows[0]["owner"]) if rows else None

    async def to_stop(self, mine: Sequence[str]) -> list[str]:
        """Those of these runs that were cancelled or deleted."""
        rows = await self._database.rows(
            "SELECT mine.run_id::text FROM unnest(%s::uuid[]) AS mine (run_id) LEFT JOIN runs USING (run_id)"
            " WHERE runs.run_id IS NULL OR runs.cancel IS NOT NULL",
            [list(mine)],
        )
        return [row["run_id"] for row in rows]

    async def others_on(self, run: Run) -> list[str]:
        """The runs that keep this one from its thread."""
        rows = await self._database.rows(
            "SELECT run_id::text FROM runs WHERE thread_id = %s AND run_id <> %s AND (status = 'running'"
            " OR status = 'pending'"
            " AND (created_at, run_id) < (SELECT created_at, run_id FROM runs WHERE run_id = %s))",
            [run.thread_id, run.run_id, run.run_id],
        )
        return [row["run_id"] for row in rows]

    async def watch(self, run_id: str) -> Run | None:
        """Have its end told on the channel."""
        query: LiteralString = f"UPDATE runs SET watched = true WHERE run_id = %s RETURNING {RUN}"
        return _first(await self._database.rows(query, [run_id]))

    async def notify(self, message: str) -> None:
        await self._database.rows("SELECT pg_notify(%s, %s)", [CHANNEL, message])

    # Reading

    async def list(self, thread_id: str, statuses: Sequence[str] | None, limit: int, offset: int, *, oldest_first: bool = False) -> list[Run]:
        order: LiteralString = "ASC" if oldest_first else "DESC"
        query: LiteralString = (
            f"SELECT {RUN} FROM runs WHERE thread_id = %s AND (%s::text[] IS NULL OR status = ANY(%s::text[]))"
            f" AND options->>'kind' IS NULL ORDER BY created_at {order}, run_id {order} LIMIT %s OFFSET %s"
        )
        listed = list(statuses) if statuses is not None else None
        return [_run(row) for row in await self._database.rows(query, [thread_id, listed, listed, limit, offset])]

    async def delete(self, run_id: str) -> bool:
        query: LiteralString = "DELETE FROM runs WHERE run_id = %s AND status NOT IN ('pending', 'running') RETURNING run_id"
        return bool(await self._database.rows(query, [run_id]))

    async def delete_thread(self, owner: str, thread_id: str) -> bool:
        """A thread, its runs and its checkpoints. Whoever works on it finds that the run is not there any more."""
        for _ in range(3):
            try:
                async with self._database.pool.connection() as connection, connection.transaction():
                    gone = await connection.execute(
                        "DELETE FROM threads WHERE thread_id = %s AND owner = %s RETURNING thread_id",
                        [thread_id, owner],
                    )
                    if await gone.fetchone() is None:
                        return False
                    # After that one, which waits for a run that is just being stored.
                    await connection.execute("DELETE FROM checkpoints WHERE thread_id = %s", [thread_id])
                    await connection.execute("DELETE FROM checkpoint_blobs WHERE thread_id = %s", [thread_id])
                    await connection.execute("DELETE FROM checkpoint_writes WHERE thread_id = %s", [thread_id])
                    return True
            except psycopg.errors.DeadlockDetected:
                continue
            except psycopg.Error as error:
                raise StorageUnavailable from error
        raise StorageUnavailable

    # Workers

    async def beat(self, forget_seconds: float) -> None:
        await self._database.rows(
            "WITH gone AS (DELETE FROM workers WHERE seen < now() - make_interval(secs => %s))"
            " INSERT INTO workers (worker, seen) VALUES (%s, now()) ON CONFLICT (worker) DO UPDATE SET seen = now()"
            " RETURNING worker",
            [forget_seconds, self.worker],
        )

    async def leave(self) -> None:
        await self._database.rows("DELETE FROM workers WHERE worker = %s RETURNING worker", [self.worker])

    def connections(self) -> dict[str, int]:
        """This worker's use of its pool."""
        stats = self._database.pool.get_stats()
        idle = stats.get("pool_available", 0)
        return {"busy": stats.get("pool_size", 0) - idle, "idle": idle, "wanted": stats.get("requests_waiting", 0)}

    async def counts(self) -> dict[str, int]:
        rows = await self._database.rows(
            "SELECT (SELECT count(*) FROM runs WHERE status = 'pending') AS pending, (SELECT count(*) FROM runs WHERE status = 'running') AS running"
        )
        return dict(rows[0])


class Channel:
    """What the workers tell each other: one connection that listens, opened anew whenever it breaks."""

    def __init__(self, settings: PostgresSettings, worker: str, on_message: Callable[[str], None]) -> None:
        self._conninfo = make_conninfo(conninfo(settings), application_name=f"{LISTENER}{worker}")
        self._secret = settings.postgres_password
        self._on_message = on_message

    async def listen(self) -> None:
        while True:
            started = time.monotonic()
            try:
                async with await Connection.connect(self._conninfo, secret=self._secret, autocommit=True) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    async for notification in connection.notifies():
                        self._on_message(notification.payload)
            except psycopg.Error as error:
                logger.warning("not listening", extra={"error": type(error).__name__})
            await asyncio.sleep(0.1 if time.monotonic() - started > 5 else 1)


def _first(rows: Sequence[DictRow]) -> Run | None:
    return _run(rows[0]) if rows else None


def _run(row: DictRow) -> Run:
    return Run(**{**row, "options": RunOptions.from_json(row["options"])})

"""Crons: runs that begin by themselves, at the times of a schedule. Each belongs to one owner; a foreign one is none.

A time is used up by the statement that records its run, so there is one run however many workers see that it is due, and
none is lost where a worker dies. Of times that passed while nobody was there, one run makes up for all.

An owner has few, so whoever looks for some is given all, and chooses.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, LiteralString
from uuid import uuid4

import orjson
from psycopg.rows import DictRow

from agent.errors import NotFound, ShuttingDown, StorageUnavailable, TooManyCrons
from agent.runs.schedules import parse
from agent.storage.postgres import Database

logger = logging.getLogger(__name__)

MAX_CRONS = 100
SCAN_SECONDS = 1.0
# How many a worker takes at once, and for how long it alone sees to them.
MAX_TAKEN = 50
LEASE_SECONDS = 30

FIELDS: LiteralString = (
    "cron_id::text, owner, thread_id, assistant_id::text, schedule, timezone, end_time, enabled, on_run_completed, payload, metadata, next_at,"
    " created_at, updated_at"
)
# One whose last run still waits for its thread is not due: runs would pile up there.
TAKE: LiteralString = f"""
WITH taken AS (
    UPDATE crons SET taken_until = now() + make_interval(secs => {LEASE_SECONDS}) WHERE cron_id IN (
        SELECT cron_id FROM crons WHERE next_at <= now() AND (taken_until IS NULL OR taken_until <= now())
        AND NOT EXISTS (SELECT FROM runs WHERE runs.run_id = crons.last_run AND runs.status = 'pending')
        ORDER BY next_at LIMIT {MAX_TAKEN} FOR UPDATE SKIP LOCKED
    )
    RETURNING *
)
SELECT {", ".join("taken." + name for name in FIELDS.split(", "))}, now() AS now,
    k.id IS NOT NULL OR NOT starts_with(owner, 'key:') AS known, k.requests_per_minute, k.tokens_per_minute, k.concurrent_runs
FROM taken LEFT JOIN api_keys k ON owner = 'key:' || k.name AND k.revoked_at IS NULL
ORDER BY taken.next_at
"""


@dataclass(slots=True)
class Cron:
    cron_id: str
    owner: str
    # None makes a thread for each run.
    thread_id: str | None
    # None is the agent as it was deployed.
    assistant_id: str | None
    schedule: str
    timezone: str | None
    end_time: datetime | None
    enabled: bool
    on_run_completed: Literal["delete", "keep"] | None
    payload: dict[str, Any]
    metadata: dict[str, Any]
    next_at: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(slots=True)
class Due:
    """A cron whose time has come."""

    cron: Cron
    due_at: datetime
    # When it comes next, None for never.
    following: datetime | None
    # Whether its owner is still there, as far as that is known: the key was not revoked.
    known: bool
    # The limits of the owner's key; None is the service's own.
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent_runs: int | None


def next_time(schedule: str, timezone: str | None, end_time: datetime | None, now: datetime) -> datetime | None:
    """Raises ValueError with a sentence."""
    following = parse(schedule, timezone).after(now)
    return None if following is None or (end_time is not None and following > end_time) else following


class Crons:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        owner: str,
        *,
        thread_id: str | None,
        assistant_id: str | None,
        schedule: str,
        timezone: str | None,
        end_time: datetime | None,
        enabled: bool,
        on_run_completed: Literal["delete", "keep"] | None,
        payload: dict[str, Any],
        metadata: dict[str, Any],
    ) -> Cron:
        """Raises ValueError with a sentence (the schedule), NotFound (the thread), TooManyCrons."""
        next_at = next_time(schedule, timezone, end_time, await self._now()) if enabled else None
        query: LiteralString = (
            "INSERT INTO crons (cron_id, owner, thread_id, assistant_id, schedule, timezone, end_time, enabled, on_run_completed, payload, metadata, next_at)"
            " SELECT %(id)s, %(owner)s, %(thread)s, %(assistant)s, %(schedule)s, %(timezone)s, %(end)s, %(enabled)s, %(completed)s,"
            " %(payload)s::jsonb, %(metadata)s::jsonb, %(next)s"
            " WHERE (SELECT count(*) FROM crons WHERE owner = %(owner)s) < %(most)s"
            " AND (%(thread)s::text IS NULL OR EXISTS (SELECT FROM threads WHERE thread_id = %(thread)s AND threads.owner = %(owner)s))"
            f" ON CONFLICT DO NOTHING RETURNING {FIELDS}"
        )
        rows = await self._database.rows(
            query,
            {
                "id": str(uuid4()), "owner": owner, "thread": thread_id, "assistant": assistant_id, "schedule": schedule, "timezone": timezone,
                "end": end_time, "enabled": enabled, "completed": on_run_completed, "payload": _json(payload), "metadata": _json(metadata),
                "next": next_at, "most": MAX_CRONS,
            },
        )  # fmt: skip
        if rows:
            return Cron(**rows[0])
        if len(await self.all(owner)) >= MAX_CRONS:
            raise TooManyCrons(MAX_CRONS)
        raise NotFound("There is no such thread.")

    async def all(self, owner: str) -> list[Cron]:
        return [Cron(**row) for row in await self._database.rows(f"SELECT {FIELDS} FROM crons WHERE owner = %s", [owner])]

    async def get(self, owner: str, cron_id: str) -> Cron:
        """Raises NotFound."""
        rows = await self._database.rows(f"SELECT {FIELDS} FROM crons WHERE cron_id = %s AND owner = %s", [cron_id, owner])
        return _only(rows)

    async def update(self, owner: str, cron_id: str, changed: dict[str, Any], payload: dict[str, Any], metadata: dict[str, Any]) -> Cron:
        """Change these of its columns; payload and metadata are merged. Where the times change, they count from now.

        Raises ValueError with a sentence (the schedule), NotFound.
        """
        cron = await self.get(owner, cron_id)
        wanted = {name: changed.get(name, getattr(cron, name)) for name in ("schedule", "timezone", "end_time", "enabled", "on_run_completed")}
        again = any(wanted[name] != getattr(cron, name) for name in ("schedule", "timezone", "end_time", "enabled"))
        next_at = None
        if wanted["enabled"]:
            next_at = next_time(wanted["schedule"], wanted["timezone"], wanted["end_time"], await self._now())
        query: LiteralString = (
            "UPDATE crons SET schedule = %(schedule)s, timezone = %(timezone)s, end_time = %(end_time)s, enabled = %(enabled)s,"
            " on_run_completed = %(on_run_completed)s, payload = payload || %(payload)s::jsonb, metadata = metadata || %(metadata)s::jsonb,"
            " next_at = CASE WHEN %(again)s THEN %(next)s ELSE next_at END, updated_at = now()"
            f" WHERE cron_id = %(id)s AND owner = %(owner)s RETURNING {FIELDS}"
        )
        given = {"id": cron_id, "owner": owner, "again": again, "next": next_at, "payload": _json(payload), "metadata": _json(metadata)}
        return _only(await self._database.rows(query, {**wanted, **given}))

    async def delete(self, owner: str, cron_id: str) -> None:
        """Raises NotFound. Runs that it has begun go on."""
        _only(await self._database.rows(f"DELETE FROM crons WHERE cron_id = %s AND owner = %s RETURNING {FIELDS}", [cron_id, owner]))

    # Firing

    async def take(self) -> list[Due]:
        """Those that are due and that no other worker sees to."""
        due = []
        for row in await self._database.rows(TAKE):
            limits: dict[str, Any] = {name: row.pop(name) for name in ("known", "requests_per_minute", "tokens_per_minute", "concurrent_runs")}
            now = row.pop("now")
            cron = Cron(**row)
            try:
                following = next_time(cron.schedule, cron.timezone, cron.end_time, now)
            except ValueError:  # a time zone that there is no longer
                logger.exception("a cron cannot be read", extra={"cron_id": cron.cron_id})
                continue
            due.append(Due(cron, row["next_at"], following, **limits))
        return due

    async def skip(self, due: Due) -> None:
        """Let this time pass without a run."""
        await self._database.rows(
            "UPDATE crons SET next_at = %s, taken_until = NULL WHERE cron_id = %s AND next_at = %s RETURNING cron_id",
            [due.following, due.cron.cron_id, due.due_at],
        )

    async def defer(self, due: Due, seconds: float) -> None:
        """Have it looked at again so much later."""
        await self._database.rows(
            "UPDATE crons SET taken_until = now() + make_interval(secs => %s) WHERE cron_id = %s AND next_at = %s RETURNING cron_id",
            [seconds, due.cron.cron_id, due.due_at],
        )

    async def _now(self) -> datetime:
        """The time by Postgres' clock, which is the one that decides what is due."""
        now: datetime = (await self._database.rows("SELECT now() AS now"))[0]["now"]
        return now


class Scheduler:
    """Looks for what is due, in each worker."""

    def __init__(self, crons: Crons, fire: Callable[[Due], Awaitable[None]]) -> None:
        self._crons = crons
        self._fire = fire
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _work(self) -> None:
        while True:
            # Whatever fails is tried again: what was taken is free again after a while.
            taken: list[Due] = []
            with contextlib.suppress(StorageUnavailable, ShuttingDown):
                taken = await self._crons.take()
                for due in taken:
                    try:
                        await self._fire(due)
                    except (StorageUnavailable, ShuttingDown):
                        raise
                    except Exception:
                        logger.exception("a cron failed", extra={"cron_id": due.cron.cron_id})
            if len(taken) < MAX_TAKEN:
                await asyncio.sleep(SCAN_SECONDS)


def _only(rows: list[DictRow]) -> Cron:
    if not rows:
        raise NotFound("There is no such cron.")
    return Cron(**rows[0])


def _json(value: dict[str, Any]) -> str:
    return orjson.dumps(value).decode()

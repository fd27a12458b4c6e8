"""Threads: whose they are, and what is known of them besides the conversation.

A foreign thread is the same NotFound as none. The conversation is in LangGraph's tables under the same id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, LiteralString
from uuid import uuid4

import orjson
from psycopg.rows import DictRow

from agent.errors import NotFound, ThreadExists
from agent.runs._langgraph import CHECKPOINT_TABLES
from agent.runs.ledger import Ledger
from agent.runs.records import Finished
from agent.storage.postgres import Database

ThreadStatus = Literal["idle", "busy", "interrupted", "error"]
SortBy = Literal["thread_id", "status", "created_at", "updated_at"]

STATUS: LiteralString = (
    "CASE WHEN EXISTS (SELECT FROM runs WHERE runs.thread_id = threads.thread_id AND runs.status = 'running')"
    " OR EXISTS (SELECT FROM runs WHERE runs.thread_id = threads.thread_id AND runs.status = 'pending')"
    " THEN 'busy' ELSE status END"
)
THREAD: LiteralString = f"thread_id, owner, metadata, {STATUS} AS status, created_at, updated_at"
FOUND: LiteralString = (
    f"owner = %(owner)s AND (%(metadata)s::jsonb IS NULL OR metadata @> %(metadata)s::jsonb) AND (%(status)s::text IS NULL OR {STATUS} = %(status)s::text)"
)
ORDERS: dict[SortBy, LiteralString] = {
    "thread_id": "thread_id",
    "status": "status",
    "created_at": "created_at",
    "updated_at": "updated_at",
}


@dataclass(slots=True)
class Thread:
    thread_id: str
    owner: str
    metadata: dict[str, Any]
    status: ThreadStatus
    created_at: datetime
    updated_at: datetime


class Threads:
    def __init__(self, database: Database, ledger: Ledger, finished: Finished | None = None) -> None:
        self._database = database
        self._ledger = ledger
        self._finished = finished

    async def create(
        self,
        owner: str,
        thread_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        *,
        if_exists: Literal["raise", "do_nothing"] = "raise",
    ) -> Thread:
        """Raises ThreadExists. A foreign thread of this name is not told from one that cannot be made."""
        thread_id = thread_id or str(uuid4())
        query: LiteralString = f"INSERT INTO threads (thread_id, owner, metadata) VALUES (%s, %s, %s::jsonb) ON CONFLICT DO NOTHING RETURNING {THREAD}"
        rows = await self._database.rows(query, [thread_id, owner, _json(metadata or {})])
        if rows:
            return Thread(**rows[0])
        thread = await self._find(owner, thread_id)
        if thread is None or if_exists == "raise":
            raise ThreadExists
        return thread

    async def get(self, owner: str, thread_id: str) -> Thread:
        thread = await self._find(owner, thread_id)
        if thread is None:
            raise NotFound
        return thread

    async def update(self, owner: str, thread_id: str, metadata: dict[str, Any]) -> Thread:
        """Merge into the metadata."""
        query: LiteralString = f"UPDATE threads SET metadata = metadata || %s::jsonb, updated_at = now() WHERE thread_id = %s AND owner = %s RETURNING {THREAD}"
        return _only(await self._database.rows(query, [_json(metadata), thread_id, owner]))

    async def delete(self, owner: str, thread_id: str) -> None:
        """With its runs, which are cancelled, and its checkpoints."""
        await self.get(owner, thread_id)
        runs = await self._ledger.list(thread_id, ("running", "pending"), 1000, 0)
        if not await self._ledger.delete_thread(owner, thread_id):
            raise NotFound
        for run in runs:
            if run.status == "running":
                # Its worker finds that the run is gone, and stops.
                await self._ledger.notify(f"cancel {run.run_id}")
            elif self._finished is not None:
                await self._finished(owner, run.run_id, 0)

    async def copy(self, owner: str, thread_id: str) -> Thread:
        """A new thread with the same history and metadata."""
        await self.get(owner, thread_id)
        copied = str(uuid4())
        # One statement sees one moment of the thread.
        copies = [
            f"{table}_copied AS (INSERT INTO {table} (thread_id, {columns}) SELECT %(copied)s, {columns} FROM {table} WHERE thread_id = %(thread)s)"
            for table, columns in CHECKPOINT_TABLES.items()
        ]
        query = (
            f"WITH {', '.join(copies)} INSERT INTO threads (thread_id, owner, metadata, status)"
            " SELECT %(copied)s, owner, metadata, status FROM threads WHERE thread_id = %(thread)s"
            f" AND owner = %(owner)s RETURNING {THREAD}"
        )
        parameters = {"copied": copied, "thread": thread_id, "owner": owner}
        return _only(await self._database.rows(query, parameters))

    async def search(
        self,
        owner: str,
        *,
        metadata: dict[str, Any] | None = None,
        status: ThreadStatus | None = None,
        thread_ids: list[str] | None = None,
        limit: int = 10,
        offset: int = 0,
        sort_by: SortBy = "updated_at",
        descending: bool = True,
    ) -> list[Thread]:
        order, direction = ORDERS[sort_by], "DESC" if descending else "ASC"
        query: LiteralString = (
            f"SELECT {THREAD} FROM threads WHERE {FOUND} AND (%(ids)s::text[] IS NULL OR thread_id = ANY(%(ids)s))"
            f" ORDER BY {order} {direction}, thread_id LIMIT %(limit)s OFFSET %(offset)s"
        )
        parameters = {**_filter(owner, metadata, status), "ids": thread_ids, "limit": limit, "offset": offset}
        return [Thread(**row) for row in await self._database.rows(query, parameters)]

    async def count(self, owner: str, *, metadata: dict[str, Any] | None = None, status: ThreadStatus | None = None) -> int:
        query: LiteralString = f"SELECT count(*) AS n FROM threads WHERE {FOUND}"
        return int((await self._database.rows(query, _filter(owner, metadata, status)))[0]["n"])

    async def _find(self, owner: str, thread_id: str) -> Thread | None:
        query: LiteralString = f"SELECT {THREAD} FROM threads WHERE thread_id = %s AND owner = %s"
        rows = await self._database.rows(query, [thread_id, owner])
        return Thread(**rows[0]) if rows else None


def _filter(owner: str, metadata: dict[str, Any] | None, status: str | None) -> dict[str, Any]:
    return {"owner": owner, "metadata": _json(metadata) if metadata else None, "status": status}


def _json(value: dict[str, Any]) -> str:
    return orjson.dumps(value).decode()


def _only(rows: Sequence[DictRow]) -> Thread:
    if not rows:
        raise NotFound
    return Thread(**rows[0])

"""Threads: whose they are, and what is known of them besides the conversation.

A foreign thread is the same NotFound as none. The conversation is in LangGraph's tables under the same id.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, LiteralString
from uuid import uuid4

import orjson

from agent.errors import InvalidRequest, NotFound, ThreadBusy, ThreadExists
from agent.runs._langgraph import CHECKPOINT_TABLES
from agent.runs.ledger import Ledger
from agent.runs.quota import MEASURED, ROW_BYTES, Quota
from agent.runs.records import Finished
from agent.storage.postgres import Database

ThreadStatus = Literal["idle", "busy", "interrupted", "error"]
SortBy = Literal["thread_id", "status", "created_at", "updated_at", "state_updated_at"]

STATUS: LiteralString = (
    "CASE WHEN EXISTS (SELECT FROM runs WHERE runs.thread_id = threads.thread_id AND runs.status = 'running')"
    " OR EXISTS (SELECT FROM runs WHERE runs.thread_id = threads.thread_id AND runs.status = 'pending')"
    " THEN 'busy' ELSE status END"
)
# Whether a run or a change by hand left a state in it.
USED: LiteralString = "EXISTS (SELECT FROM checkpoints WHERE checkpoints.thread_id = threads.thread_id)"
THREAD: LiteralString = f"thread_id, owner, metadata, {STATUS} AS status, created_at, updated_at, last_active, bytes, {USED} AS used"
# All of it together, as JSON.
MAX_METADATA_BYTES = 1 << 16
FOUND: LiteralString = (
    f"owner = %(owner)s AND (%(metadata)s::jsonb IS NULL OR metadata @> %(metadata)s::jsonb) AND (%(status)s::text IS NULL OR {STATUS} = %(status)s::text)"
    f" AND (NOT %(used)s OR {USED} OR metadata ?| ARRAY['graph_id', 'assistant_id'])"
)
# A checkpoint names the version of each channel that it has, and a channel's blob may belong to many.
SIZES: LiteralString = """
SELECT c.checkpoint_id, (
    SELECT coalesce(sum(octet_length(b.blob)), 0) FROM jsonb_each_text(c.checkpoint->'channel_versions') v
    JOIN checkpoint_blobs b ON b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns AND b.channel = v.key AND b.version = v.value
) AS size
FROM checkpoints c
WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = '' AND (%(at)s::text IS NULL OR c.checkpoint_id = %(at)s)
    AND (%(before)s::text IS NULL OR c.checkpoint_id < %(before)s) AND (%(metadata)s::jsonb IS NULL OR c.metadata @> %(metadata)s::jsonb)
ORDER BY c.checkpoint_id DESC LIMIT %(limit)s
"""
# The thread's row is locked, so that no run begins meanwhile: a new one refers to it.
KEEP_LATEST: LiteralString = """
WITH mine AS (
    SELECT thread_id FROM threads WHERE thread_id = %(thread)s AND owner = %(owner)s
    AND NOT EXISTS (SELECT FROM runs WHERE runs.thread_id = threads.thread_id AND runs.status IN ('pending', 'running')) FOR UPDATE
),
latest AS (
    SELECT c.thread_id, c.checkpoint_id, c.checkpoint FROM checkpoints c JOIN mine USING (thread_id)
    WHERE c.checkpoint_ns = '' ORDER BY c.checkpoint_id DESC LIMIT 1
),
c AS (DELETE FROM checkpoints c USING latest l WHERE c.thread_id = l.thread_id AND c.checkpoint_ns = '' AND c.checkpoint_id < l.checkpoint_id),
w AS (DELETE FROM checkpoint_writes w USING latest l WHERE w.thread_id = l.thread_id AND w.checkpoint_ns = '' AND w.checkpoint_id < l.checkpoint_id),
b AS (
    DELETE FROM checkpoint_blobs b USING latest l WHERE b.thread_id = l.thread_id AND b.checkpoint_ns = ''
    AND NOT EXISTS (SELECT FROM jsonb_each_text(l.checkpoint->'channel_versions') v WHERE v.key = b.channel AND v.value = b.version)
),
p AS (
    UPDATE checkpoints c SET parent_checkpoint_id = NULL FROM latest l
    WHERE c.thread_id = l.thread_id AND c.checkpoint_ns = '' AND c.checkpoint_id = l.checkpoint_id
)
SELECT thread_id FROM mine
"""
ORDERS: dict[SortBy, LiteralString] = {
    "thread_id": "thread_id",
    "status": "status",
    "created_at": "created_at",
    "updated_at": "updated_at",
    "state_updated_at": "last_active",
}


@dataclass(slots=True)
class Thread:
    thread_id: str
    owner: str
    metadata: dict[str, Any]
    status: ThreadStatus
    created_at: datetime
    updated_at: datetime
    # When its state was last changed.
    last_active: datetime
    # What it takes in the database, None where that was not measured yet.
    bytes: int | None
    # Whether it has a state.
    used: bool


class Threads:
    def __init__(self, database: Database, ledger: Ledger, quota: Quota, finished: Finished | None = None) -> None:
        self._database = database
        self._quota = quota
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
        """Raises ThreadExists, StorageFull. A foreign thread of this name is not told from one that cannot be made."""
        thread_id = thread_id or str(uuid4())
        stored = _json(metadata or {})
        size = ROW_BYTES + len(stored)
        await self._quota.admit(owner, size)
        query: LiteralString = (
            f"INSERT INTO threads (thread_id, owner, metadata, bytes) VALUES (%s, %s, %s::jsonb, %s) ON CONFLICT DO NOTHING RETURNING {THREAD}"
        )
        rows = await self._database.rows(query, [thread_id, owner, stored, size])
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

    async def size(self, thread: Thread) -> int:
        """Bytes of a thread with its history. One that was not measured yet is measured now."""
        if thread.bytes is None:
            query: LiteralString = f"UPDATE threads SET bytes = {MEASURED} WHERE thread_id = %s RETURNING bytes"
            rows = await self._database.rows(query, [thread.thread_id])
            thread.bytes = int(rows[0]["bytes"]) if rows else 0
        return thread.bytes

    async def update(self, owner: str, thread_id: str, metadata: dict[str, Any]) -> Thread:
        """Merge into the metadata. Raises NotFound, StorageFull, and InvalidRequest where it would be too much in all."""
        more = _json(metadata)
        await self._quota.admit(owner, len(more))
        query: LiteralString = (
            "UPDATE threads SET metadata = metadata || %(more)s::jsonb, updated_at = now(),"
            " bytes = bytes - octet_length(metadata::text) + octet_length((metadata || %(more)s::jsonb)::text)"
            " WHERE thread_id = %(thread)s AND owner = %(owner)s AND octet_length((metadata || %(more)s::jsonb)::text) <= %(most)s"
            f" RETURNING {THREAD}"
        )
        rows = await self._database.rows(query, {"more": more, "thread": thread_id, "owner": owner, "most": MAX_METADATA_BYTES})
        if not rows:
            await self.get(owner, thread_id)
            raise InvalidRequest(f"metadata: all of a thread's together can have {MAX_METADATA_BYTES} bytes.")
        return Thread(**rows[0])

    async def delete(self, owner: str, thread_id: str) -> None:
        """With its runs, which are cancelled, and its checkpoints."""
        await self.get(owner, thread_id)
        runs = await self._ledger.list(thread_id, ("running", "pending"), 1000, 0)
        if not await self._ledger.delete_thread(owner, thread_id):
            raise NotFound
        self._quota.forget(owner)
        for run in runs:
            if run.status == "running":
                # Its worker finds that the run is gone, and stops.
                await self._ledger.notify(f"cancel {run.run_id}")
            elif self._finished is not None:
                await self._finished(owner, run.run_id, 0)

    async def keep_latest(self, owner: str, thread_id: str) -> None:
        """Delete a thread's history but its last state. Raises NotFound, and ThreadBusy."""
        await self.get(owner, thread_id)
        if not await self._database.rows(KEEP_LATEST, {"thread": thread_id, "owner": owner}):
            raise ThreadBusy
        query: LiteralString = f"UPDATE threads SET bytes = {MEASURED} WHERE thread_id = %s RETURNING bytes"
        await self._database.rows(query, [thread_id])
        self._quota.forget(owner)

    async def copy(self, owner: str, thread_id: str) -> Thread:
        """A new thread with the same history and metadata. Raises NotFound, StorageFull."""
        size = await self.size(await self.get(owner, thread_id))
        await self._quota.admit(owner, size)
        copied = str(uuid4())
        # One statement sees one moment of the thread.
        copies = [
            f"{table}_copied AS (INSERT INTO {table} (thread_id, {columns}) SELECT %(copied)s, {columns} FROM {table} WHERE thread_id = %(thread)s)"
            for table, columns in CHECKPOINT_TABLES.items()
        ]
        query = (
            f"WITH {', '.join(copies)} INSERT INTO threads (thread_id, owner, metadata, status, bytes)"
            " SELECT %(copied)s, owner, metadata, status, bytes FROM threads WHERE thread_id = %(thread)s"
            " AND owner = %(owner)s RETURNING thread_id"
        )
        parameters = {"copied": copied, "thread": thread_id, "owner": owner}
        if not await self._database.rows(query, parameters):
            raise NotFound
        return await self.get(owner, copied)

    async def search(
        self,
        owner: str,
        *,
        metadata: dict[str, Any] | None = None,
        status: ThreadStatus | None = None,
        used: bool = False,
        thread_ids: list[str] | None = None,
        limit: int = 10,
        offset: int = 0,
        sort_by: SortBy = "updated_at",
        descending: bool = True,
    ) -> list[Thread]:
        """used: only those that have a state, or were made for a graph by name"""
        order, direction = ORDERS[sort_by], "DESC" if descending else "ASC"
        query: LiteralString = (
            f"SELECT {THREAD} FROM threads WHERE {FOUND} AND (%(ids)s::text[] IS NULL OR thread_id = ANY(%(ids)s))"
            f" ORDER BY {order} {direction}, thread_id LIMIT %(limit)s OFFSET %(offset)s"
        )
        parameters = {**_filter(owner, metadata, status, used=used), "ids": thread_ids, "limit": limit, "offset": offset}
        return [Thread(**row) for row in await self._database.rows(query, parameters)]

    async def count(self, owner: str, *, metadata: dict[str, Any] | None = None, status: ThreadStatus | None = None, used: bool = False) -> int:
        query: LiteralString = f"SELECT count(*) AS n FROM threads WHERE {FOUND}"
        return int((await self._database.rows(query, _filter(owner, metadata, status, used=used)))[0]["n"])

    async def checkpoints(
        self,
        thread_id: str,
        limit: int,
        *,
        at: str | None = None,
        before: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> list[tuple[str, int]]:
        """Ids of a thread's checkpoints and the bytes of their states, newest first."""
        parameters = {"thread": thread_id, "at": at, "before": before, "metadata": _json(metadata) if metadata else None, "limit": limit}
        return [(row["checkpoint_id"], int(row["size"])) for row in await self._database.rows(SIZES, parameters)]

    async def _find(self, owner: str, thread_id: str) -> Thread | None:
        query: LiteralString = f"SELECT {THREAD} FROM threads WHERE thread_id = %s AND owner = %s"
        rows = await self._database.rows(query, [thread_id, owner])
        return Thread(**rows[0]) if rows else None


def _filter(owner: str, metadata: dict[str, Any] | None, status: str | None, *, used: bool) -> dict[str, Any]:
    return {"owner": owner, "metadata": _json(metadata) if metadata else None, "status": status, "used": used}


def _json(value: dict[str, Any]) -> str:
    return orjson.dumps(value).decode()

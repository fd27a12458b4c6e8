"""Postgres: connections that notice when the server has gone, and statements that survive it."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, LiteralString, Self, TypeVar

import orjson
from psycopg import AsyncConnection, DatabaseError, Error, OperationalError
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, Row, dict_row
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg_pool import AsyncConnectionPool

from agent.errors import StorageUnavailable
from agent.settings import PostgresSettings, accepted

logger = logging.getLogger(__name__)

RETRY_SECONDS = (0.0, 0.05, 0.2, 0.5, 1.0)
ANSWER_SECONDS = 4.0
LIMIT_SECONDS = 8.0


Parameters = Sequence[Any] | Mapping[str, Any]
Result = TypeVar("Result")


# What the LangGraph saver expects of a connection (CREATE INDEX CONCURRENTLY needs autocommit).
SAVER_CONNECTION: dict[str, Any] = {"autocommit": True, "row_factory": dict_row, "prepare_threshold": 0}

set_json_dumps(orjson.dumps)
set_json_loads(orjson.loads)


def conninfo(settings: PostgresSettings) -> str:
    return make_conninfo(
        host=settings.postgres_host,
        port=settings.postgres_port,
        dbname=settings.postgres_db,
        user=settings.postgres_user,
        password=settings.postgres_password.get_secret_value(),
        application_name="agent",
        connect_timeout=3,
        # Keepalives find a dead peer only while nothing is sent; tcp_user_timeout finds it while something is.
        keepalives_idle=30,
        keepalives_interval=10,
        keepalives_count=3,
        tcp_user_timeout=5000,
    )


class Connection(AsyncConnection[Row]):
    """A connection with any password that counts now: while it is rotated nobody knows which one the server has already."""

    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        """`secret` is the password. Raises OperationalError."""
        *first, last = accepted(kwargs.pop("secret"))
        for password in first:
            with suppress(OperationalError):
                return await super().connect(conninfo, password=password, **kwargs)
        return await super().connect(conninfo, password=last, **kwargs)


Pool = AsyncConnectionPool[AsyncConnection[DictRow]]
CONNECTION: type[AsyncConnection[DictRow]] = Connection


def connected(settings: PostgresSettings, connect: Callable[[str], Result]) -> Result:
    """Return what `connect` makes of a connection string: as Connection does, for programs without an event loop. Raises OperationalError."""
    *first, last = accepted(settings.postgres_password)
    for password in first:
        with suppress(OperationalError):
            return connect(make_conninfo(conninfo(settings), password=password))
    return connect(make_conninfo(conninfo(settings), password=last))


def create_pool(settings: PostgresSettings, *, checked: bool = True) -> Pool:
    """A closed pool. It may be opened while Postgres is away: it connects as soon as it can.

    A checked one asks each connection for a sign of life before it is lent, which costs a round trip. Whoever takes an
    unchecked one must be able to send a statement again.
    """

    async def check(connection: AsyncConnection[DictRow]) -> None:
        try:
            await AsyncConnectionPool.check_connection(connection)
        except OperationalError:
            # Where one died the others most likely did. The pool would try them one by one, waiting longer each time.
            await pool.drain()
            raise

    pool = AsyncConnectionPool(
        conninfo(settings),
        connection_class=CONNECTION,
        kwargs=SAVER_CONNECTION | {"secret": settings.postgres_password},
        min_size=2,
        max_size=8,
        open=False,
        timeout=5,
        max_idle=300,
        max_lifetime=1800,
        # The pool's back-off doubles until this: it bounds how long a Postgres that is back stays unnoticed.
        reconnect_timeout=5,
        check=check if checked else None,
        name="agent" if checked else "agent-unchecked",
    )
    return pool


class Database:
    """Statements that survive a Postgres which was restarted: none of the pool's connections may be alive then."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def rows(self, query: LiteralString, parameters: Parameters = (), *, binary: bool = False) -> list[DictRow]:
        """The rows, or StorageUnavailable within some seconds."""
        return await bounded(self.run(query, parameters, binary=binary), LIMIT_SECONDS)

    async def run(self, query: LiteralString, parameters: Parameters = (), *, binary: bool = False) -> list[DictRow]:
        """The same without the bound, for callers with one of their own: it costs a task."""
        error: Error | None = None
        started = time.monotonic()
        for wait in RETRY_SECONDS:
            left = started + ANSWER_SECONDS - time.monotonic() - wait
            if error is not None and left < 0:
                break
            if wait:
                await asyncio.sleep(wait)
            try:
                async with self.pool.connection(timeout=max(0.1, left)) as connection:
                    cursor = await connection.execute(query, parameters, binary=binary)
                    return await cursor.fetchall()
            except OperationalError as caught:
                error = caught
                # Where one connection died the others most likely did.
                await self.pool.drain()
            except Error as caught:
                error = caught
                break
        logger.error("the storage failed", extra={"error": reason(error)})
        raise StorageUnavailable from error


def reason(error: Error | None) -> str:
    """For the log. Where Postgres refuses what it was given, it quotes it."""
    if isinstance(error, DatabaseError) and not isinstance(error, OperationalError):
        return f"{type(error).__name__} {error.sqlstate}"
    return f"{type(error).__name__}: {error}"


async def bounded(work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """What comes of it, or StorageUnavailable when the time is over.

    It is cancelled then, but not waited for: a driver may take as long to give up a dead connection as that is dead.
    """
    task = asyncio.create_task(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
            abandoned.add(task)
            task.add_done_callback(_forget)
    if not done:
        raise StorageUnavailable
    return task.result()


abandoned: set[asyncio.Task[Any]] = set()


def _forget(task: asyncio.Task[Any]) -> None:
    abandoned.discard(task)
    if not task.cancelled():
        task.exception()  # seen, though nobody is left to see it

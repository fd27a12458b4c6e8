"""Connections to Postgres that notice when the server has gone."""

from typing import Any

import orjson
from psycopg import AsyncConnection, OperationalError
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg_pool import AsyncConnectionPool

from agent.settings import PostgresSettings

Pool = AsyncConnectionPool[AsyncConnection[DictRow]]

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
        connection_class=AsyncConnection[DictRow],
        kwargs=SAVER_CONNECTION,
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

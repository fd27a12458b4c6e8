"""`python -m agent.migrate`: bring the tables up to date, once, before the service starts.

Our own are the files in migrations/, each applied in one transaction and recorded in agent_migrations; those of
LangGraph's saver and store follow by their own setup. Not part of the service's start: two processes that run those
setups at the same time make each other fail.
"""

import asyncio
import os
import time
from importlib import resources
from typing import Any

import psycopg
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.store.postgres.aio import AsyncPostgresStore
from psycopg.rows import DictRow

from agent.runs._langgraph import MIGRATIONS
from agent.settings import PostgresSettings, SettingsError
from agent.storage.postgres import SAVER_CONNECTION, Connection, conninfo

WAIT_SECONDS = 60
LOCK = 0x6167656E74  # "agent"


def migrations() -> dict[str, str]:
    """Every file's name and text, in the order in which they apply."""
    files = [file for file in (resources.files("agent") / "migrations").iterdir() if file.name.endswith(".sql")]
    return {file.name: file.read_text("utf-8") for file in sorted(files, key=lambda file: file.name)}


async def missing(connection: psycopg.AsyncConnection[DictRow]) -> list[str]:
    """What of the three sets is not in the database; raises UndefinedTable where a set is missing as a whole."""
    cursor = await connection.execute(
        "SELECT (SELECT array_agg(name) FROM agent_migrations) AS own,"
        " (SELECT count(*) FROM checkpoint_migrations) AS saver, (SELECT count(*) FROM store_migrations) AS store"
    )
    row = await cursor.fetchone()
    assert row is not None  # a query without FROM has one row
    absent = sorted(migrations().keys() - set(row["own"] or ()))
    return absent + [name for name, count in MIGRATIONS.items() if row[name] < count]


async def migrate(settings: PostgresSettings) -> int:
    """Apply what is missing and return how many migrations that were."""
    async with await _connect(settings) as connection:
        # Asked again and again instead of waited for: CREATE INDEX CONCURRENTLY, which the setups below use, waits for
        # every statement that runs, and one that waits for this lock would never end.
        while not (await _one(connection, "SELECT pg_try_advisory_lock(%s)", LOCK)):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        applied = await _apply_own(connection)
        for table, setup in (
            ("checkpoint_migrations", AsyncPostgresSaver(connection).setup),
            ("store_migrations", AsyncPostgresStore(connection).setup),
        ):
            before = await _count(connection, table)
            await setup()
            applied += await _count(connection, table) - before
        return applied


async def _apply_own(connection: psycopg.AsyncConnection[DictRow]) -> int:
    await connection.execute("CREATE TABLE IF NOT EXISTS agent_migrations (name text PRIMARY KEY, applied timestamptz DEFAULT now())")
    present = {row["name"] async for row in await connection.execute("SELECT name FROM agent_migrations")}
    wanted = {name: text for name, text in migrations().items() if name not in present}
    for name, text in wanted.items():
        async with connection.transaction():
            await connection.execute(text.encode(), prepare=False)  # several statements
            await connection.execute("INSERT INTO agent_migrations (name) VALUES (%s)", (name,))
    return len(wanted)


async def _connect(settings: PostgresSettings) -> psycopg.AsyncConnection[DictRow]:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return await Connection.connect(conninfo(settings), secret=settings.postgres_password, **SAVER_CONNECTION)
        except psycopg.OperationalError as error:
            # A refused password or a missing database does not get better by waiting.
            if "FATAL" in str(error) and "starting up" not in str(error) and "shutting down" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(1)


async def _count(connection: psycopg.AsyncConnection[DictRow], table: str) -> int:
    if await _one(connection, "SELECT to_regclass(%s)", table) is None:
        return 0
    return int(await _one(connection, f"SELECT count(*) FROM {table}"))  # noqa: S608  a name of ours


async def _one(connection: psycopg.AsyncConnection[DictRow], query: str, *parameters: object) -> Any:
    row = await (await connection.execute(query.encode(), parameters or None)).fetchone()
    return next(iter(row.values())) if row else None


def main() -> None:
    try:
        applied = asyncio.run(migrate(PostgresSettings.from_environment(os.environ)))
    except SettingsError as error:
        raise SystemExit(f"agent: bad settings\n{error}") from None
    except psycopg.Error as error:
        raise SystemExit(f"agent: cannot migrate the database: {str(error).strip()}") from None
    # The last word tells the deployment that nothing was changed.
    print(f"migrations applied: {applied}" + ("" if applied else ", unchanged"))


if __name__ == "__main__":
    main()

"""`python -m agent.migrate`: bring the checkpoint tables up to date, once, before the service starts.

Not part of the service's start: two processes that run the saver's setup at the same time make each other fail.
"""

import asyncio
import os
import time

import psycopg
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from psycopg.rows import DictRow

from agent.database import SAVER_CONNECTION, conninfo
from agent.settings import PostgresSettings, SettingsError

WAIT_SECONDS = 60


async def _connect(settings: PostgresSettings) -> psycopg.AsyncConnection[DictRow]:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return await psycopg.AsyncConnection.connect(conninfo(settings), **SAVER_CONNECTION)
        except psycopg.OperationalError as error:
            # A refused password or a missing database does not get better by waiting.
            if "FATAL" in str(error) and "starting up" not in str(error) and "shutting down" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(1)


async def _count(connection: psycopg.AsyncConnection[DictRow]) -> int:
    table = await (await connection.execute("SELECT to_regclass('checkpoint_migrations') AS name")).fetchone()
    if table is None or table["name"] is None:
        return 0
    row = await (await connection.execute("SELECT count(*) AS n FROM checkpoint_migrations")).fetchone()
    return int(row["n"]) if row else 0


async def migrate(settings: PostgresSettings) -> int:
    """Apply what is missing and return how many migrations that were."""
    async with await _connect(settings) as connection:
        before = await _count(connection)
        await AsyncPostgresSaver(connection).setup()
        return await _count(connection) - before


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

"""`python -m agent.keys create NAME | list | revoke NAME`: the API keys, one JSON object as the answer.

A new key is shown once, by `create`; the database holds its digest. The service needs no restart: it lets a new key in
within a second and a revoked one no longer after five.
"""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg.sql import SQL, Identifier

from agent.access.auth import KEY, KEY_NAME, KEY_PREFIX, key_hash
from agent.settings import PostgresSettings, SettingsError
from agent.storage.postgres import connected

# Each limit's largest value, as the table has it.
LIMITS = {"requests_per_minute": 100_000, "tokens_per_minute": 100_000_000, "concurrent_runs": 10_000}
NOT_GIVEN = object()

Connection = psycopg.Connection[dict[str, Any]]


class KeyRefused(Exception):
    """Why a key that was given cannot be taken, for the caller."""


def new_key(name: str) -> str:
    return f"{KEY_PREFIX}_{name}_{secrets.token_urlsafe(32)}"


def create(connection: Connection, name: str, limits: dict[str, int | None], key: str | None = None) -> dict[str, Any]:
    """Make a key unless the name has an active one; that one gets the limits which are given."""
    made = new_key(name) if key is None else key
    columns = ["name", "hash", *limits]
    inserted = connection.execute(
        SQL("INSERT INTO api_keys ({}) VALUES ({}) ON CONFLICT (name) WHERE revoked_at IS NULL DO NOTHING RETURNING id").format(
            SQL(", ").join(map(Identifier, columns)), SQL(", ").join([SQL("%s")] * len(columns))
        ),
        [name, key_hash(made), *limits.values()],
    ).fetchone()
    if inserted:
        return {"name": name, "changed": True} | ({"key": made} if key is None else {})
    changed = 0
    for column, value in limits.items():
        changed += connection.execute(
            SQL("UPDATE api_keys SET {0} = %s WHERE name = %s AND revoked_at IS NULL AND {0} IS DISTINCT FROM %s").format(Identifier(column)),
            [value, name, value],
        ).rowcount
    return {"name": name, "changed": changed > 0}


def list_keys(connection: Connection) -> dict[str, Any]:
    """Every key that was ever made; its digest names it without giving it away."""
    rows = connection.execute(
        "SELECT name, encode(hash, 'hex') AS sha256, created_at, revoked_at, last_used,"
        " requests_per_minute, tokens_per_minute, concurrent_runs FROM api_keys ORDER BY name, id"
    ).fetchall()
    return {"keys": rows}


def revoke(connection: Connection, name: str) -> dict[str, Any]:
    statement = "UPDATE api_keys SET revoked_at = now() WHERE name = %s AND revoked_at IS NULL"
    return {"name": name, "changed": connection.execute(statement, [name]).rowcount > 0}


def _name(text: str) -> str:
    if not KEY_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are 1 to 32 of the characters a-z 0-9 -, the first one no hyphen")
    return text


def _limit(most: int) -> Any:
    def parse(text: str) -> int | None:
        if text == "default":
            return None
        if not (text.isascii() and text.isdecimal() and int(text[:12]) <= most):
            raise argparse.ArgumentTypeError(f"{text!r}: allowed are 0 (no limit) to {most}, and default")
        return int(text)

    return parse


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m agent.keys", description="The API keys of the agent.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("create", help="make a key and show it, this once")
    making.add_argument("name", metavar="NAME", type=_name)
    making.add_argument("--stdin", action="store_true", help="take a key that was made elsewhere, and do not show it")
    for limit, most in LIMITS.items():
        flag = f"--{limit.replace('_', '-')}"
        making.add_argument(flag, dest=limit, type=_limit(most), default=NOT_GIVEN, metavar="N", help=f"0 to {most}")
    commands.add_parser("list", help="show all, revoked ones included")
    commands.add_parser("revoke", help="let nobody in with it any more").add_argument("name", metavar="NAME", type=_name)
    return parser.parse_args(arguments)


def _read_key(name: str) -> str:
    key = sys.stdin.read(200).removesuffix("\n")
    if not KEY.fullmatch(key) or not key.startswith(f"{KEY_PREFIX}_{name}_"):
        raise KeyRefused(f"the key on standard input is not {KEY_PREFIX}_{name}_ and 43 of the characters A-Z a-z 0-9 _ -")
    return key


def run(arguments: Sequence[str]) -> dict[str, Any]:
    wish = _parse(arguments)
    settings = PostgresSettings.from_environment(os.environ)
    key = _read_key(wish.name) if wish.command == "create" and wish.stdin else None
    with connected(settings, lambda address: psycopg.connect(address, row_factory=dict_row)) as connection:
        match wish.command:
            case "create":
                limits = {limit: value for limit in LIMITS if (value := getattr(wish, limit)) is not NOT_GIVEN}
                try:
                    return create(connection, wish.name, limits, key)
                except psycopg.errors.UniqueViolation:
                    raise KeyRefused("this key was revoked, or is in use under this name") from None
            case "revoke":
                return revoke(connection, wish.name)
            case _:
                return list_keys(connection)


def main() -> None:
    try:
        answer = run(sys.argv[1:])
    except SettingsError as error:
        raise SystemExit(f"agent: bad settings\n{error}") from None
    except KeyRefused as error:
        raise SystemExit(f"agent: {error}") from None
    except psycopg.Error as error:
        raise SystemExit(f"agent: cannot use the database: {str(error).strip()}") from None
    print(json.dumps(answer, default=str))


if __name__ == "__main__":
    main()

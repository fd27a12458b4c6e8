"""Assistants: named configurations of the one graph, with their versions. Each belongs to one owner; a foreign one is none.

An owner has few, so whoever looks for some is given all, and chooses.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID, uuid4

import orjson
from psycopg.rows import DictRow

from agent.errors import AssistantExists, NotFound, TooManyAssistants
from agent.storage.postgres import Database

MAX_ASSISTANTS = 100
# The oldest go first.
MAX_VERSIONS = 20

FIELDS: LiteralString = (
    "a.assistant_id::text, v.version, v.name, v.description, v.config, v.context, v.metadata, a.created_at, a.updated_at, v.created_at AS written_at"
)
CURRENT: LiteralString = "assistants a JOIN assistant_versions v ON v.assistant_id = a.assistant_id AND v.version = a.version"


@dataclass(slots=True)
class Assistant:
    assistant_id: str
    version: int
    name: str
    description: str | None
    config: dict[str, Any]
    context: dict[str, Any]
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    # When this version was made.
    written_at: datetime


class Assistants:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        owner: str,
        assistant_id: str | None,
        name: str,
        description: str | None,
        config: dict[str, Any],
        context: dict[str, Any],
        metadata: dict[str, Any],
    ) -> Assistant:
        """Raises AssistantExists, and TooManyAssistants."""
        query: LiteralString = (
            "WITH a AS (INSERT INTO assistants (assistant_id, owner) SELECT %(id)s, %(owner)s"
            " WHERE (SELECT count(*) FROM assistants WHERE owner = %(owner)s) < %(most)s ON CONFLICT DO NOTHING RETURNING *),"
            " v AS (INSERT INTO assistant_versions (assistant_id, version, name, description, config, context, metadata)"
            " SELECT assistant_id, 1, %(name)s, %(description)s, %(config)s::jsonb, %(context)s::jsonb, %(metadata)s::jsonb FROM a RETURNING *)"
            f" SELECT {FIELDS} FROM a, v"
        )
        rows = await self._database.rows(
            query,
            {
                "id": assistant_id or str(uuid4()), "owner": owner, "most": MAX_ASSISTANTS, "name": name, "description": description,
                "config": _json(config), "context": _json(context), "metadata": _json(metadata),
            },
        )  # fmt: skip
        if rows:
            return _assistant(rows[0])
        if len(await self.all(owner)) >= MAX_ASSISTANTS:
            raise TooManyAssistants(MAX_ASSISTANTS)
        raise AssistantExists

    async def all(self, owner: str) -> list[Assistant]:
        return [_assistant(row) for row in await self._database.rows(f"SELECT {FIELDS} FROM {CURRENT} WHERE a.owner = %s", [owner])]

    async def get(self, owner: str, assistant_id: str) -> Assistant:
        """Raises NotFound."""
        _check(assistant_id)
        rows = await self._database.rows(f"SELECT {FIELDS} FROM {CURRENT} WHERE a.assistant_id::text = %s AND a.owner = %s", [assistant_id, owner])
        if not rows:
            raise NotFound("There is no such assistant.")
        return _assistant(rows[0])

    async def update(self, owner: str, assistant_id: str, changed: dict[str, Any]) -> Assistant:
        """Make a version with these of its fields changed, and use it. Metadata is merged. Raises NotFound."""
        _check(assistant_id)
        query: LiteralString = (
            "WITH a AS (UPDATE assistants SET updated_at = now(),"
            " version = 1 + (SELECT max(version) FROM assistant_versions WHERE assistant_id = assistants.assistant_id)"
            " WHERE assistant_id::text = %(id)s AND owner = %(owner)s RETURNING *),"
            " before AS (SELECT v.* FROM assistant_versions v JOIN assistants old ON old.assistant_id = v.assistant_id AND old.version = v.version"
            " WHERE v.assistant_id::text = %(id)s),"
            " gone AS (DELETE FROM assistant_versions o USING a WHERE o.assistant_id = a.assistant_id AND o.version <= a.version - %(most)s"
            " AND o.version <> (SELECT version FROM before)),"
            " v AS (INSERT INTO assistant_versions (assistant_id, version, name, description, config, context, metadata)"
            " SELECT a.assistant_id, a.version, coalesce(%(name)s, before.name), coalesce(%(description)s, before.description),"
            " coalesce(%(config)s::jsonb, before.config), coalesce(%(context)s::jsonb, before.context), before.metadata || %(metadata)s::jsonb"
            " FROM a, before RETURNING *)"
            f" SELECT {FIELDS} FROM a, v"
        )
        given = {name: _json(changed[name]) if changed.get(name) is not None else None for name in ("config", "context")}
        rows = await self._database.rows(
            query,
            {
                "id": assistant_id, "owner": owner, "most": MAX_VERSIONS, "name": changed.get("name"),
                "description": changed.get("description"), "metadata": _json(changed.get("metadata") or {}), **given,
            },
        )  # fmt: skip
        if not rows:
            raise NotFound("There is no such assistant.")
        return _assistant(rows[0])

    async def delete(self, owner: str, assistant_id: str) -> None:
        """Raises NotFound."""
        _check(assistant_id)
        query: LiteralString = "DELETE FROM assistants WHERE assistant_id::text = %s AND owner = %s RETURNING assistant_id"
        if not await self._database.rows(query, [assistant_id, owner]):
            raise NotFound("There is no such assistant.")

    async def versions(self, owner: str, assistant_id: str) -> list[Assistant]:
        """Newest first. Raises NotFound."""
        _check(assistant_id)
        query: LiteralString = (
            f"SELECT {FIELDS} FROM assistants a JOIN assistant_versions v USING (assistant_id)"
            " WHERE a.assistant_id::text = %s AND a.owner = %s ORDER BY v.version DESC"
        )
        rows = await self._database.rows(query, [assistant_id, owner])
        if not rows:
            raise NotFound("There is no such assistant.")
        return [_assistant(row) for row in rows]

    async def use(self, owner: str, assistant_id: str, version: int) -> Assistant:
        """Use one of its versions. Raises NotFound."""
        _check(assistant_id)
        query: LiteralString = (
            "UPDATE assistants SET version = %(version)s, updated_at = now() WHERE assistant_id::text = %(id)s AND owner = %(owner)s"
            " AND EXISTS (SELECT FROM assistant_versions v WHERE v.assistant_id = assistants.assistant_id AND v.version = %(version)s)"
            " RETURNING assistant_id"
        )
        if not await self._database.rows(query, {"id": assistant_id, "owner": owner, "version": version}):
            raise NotFound("There is no such version of an assistant.")
        return await self.get(owner, assistant_id)


def _check(assistant_id: str) -> None:
    """A client may name anything; Postgres does not take all of it."""
    try:
        UUID(assistant_id)
    except ValueError:
        raise NotFound("There is no such assistant.") from None


def _assistant(row: DictRow) -> Assistant:
    return Assistant(**row)


def _json(value: dict[str, Any]) -> str:
    return orjson.dumps(value).decode()

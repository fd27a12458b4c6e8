"""The contract with LangGraph: each name in agent/runs/_langgraph.py still means what the agent relies on."""

import ast
import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from operator import add
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import pytest
from langchain_core.messages import HumanMessage
from langgraph._internal import _constants, _serde
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.graph import START, StateGraph
from langgraph.pregel._checkpoint import LATEST_VERSION
from langgraph.types import Command, Interrupt, Send, interrupt
from typing_extensions import TypedDict

import agent
from agent.runs import _langgraph
from agent.runs.checkpoints import RunSaver, ThreadSaver
from agent.settings import PostgresSettings
from agent.storage.postgres import Database, Pool, create_pool
from servers import Model, Postgres, Redis, environment

SOURCE = Path(agent.__file__).parent
CONTRACT = "runs/_langgraph.py"


class State(TypedDict):
    log: Annotated[list[str], add]


async def ask(state: State) -> dict[str, Any]:
    return {"log": [interrupt("which?")]}


async def send(state: State) -> list[Send]:
    return [Send("work", {"log": [name]}) for name in ("one", "two")]


async def work(state: State) -> dict[str, Any]:
    return {"log": [f"did {state['log'][0]}"]}


def asking(saver: Any = None) -> Any:
    graph = StateGraph(State)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    return graph.compile(checkpointer=saver)


def sending(saver: Any) -> Any:
    graph = StateGraph(State)
    graph.add_node("work", work)
    graph.add_conditional_edges(START, send)
    return graph.compile(checkpointer=saver)


def place(**more: Any) -> Any:
    return {"configurable": {"thread_id": str(uuid4()), "checkpoint_ns": "", **more}}


def checkpointer(_: Pool) -> None:
    """A graph that was compiled without a saver stores in the one it is lent."""
    saver, config = InMemorySaver(), place()
    lent = {"configurable": {**config["configurable"], _langgraph.CHECKPOINTER: saver}}
    asyncio.run(asking().ainvoke({"log": ["hello"]}, lent))
    stored = saver.get_tuple(config)
    assert stored is not None
    assert stored.checkpoint["channel_values"]["log"] == ["hello"]


def interrupt_channel(_: Pool) -> None:
    saver, config = InMemorySaver(), place()
    asyncio.run(asking(saver).ainvoke({"log": []}, config))
    [value] = [value for _, channel, value in saver.get_tuple(config).pending_writes if channel == _langgraph.INTERRUPT]
    assert [type(each) for each in value] == [Interrupt]
    assert value[0].value == "which?"


def tasks_channel(_: Pool) -> None:
    saver, config = InMemorySaver(), place()
    asyncio.run(sending(saver).ainvoke({"log": []}, config))
    sent = [len(each.checkpoint["channel_values"].get(_langgraph.TASKS) or ()) for each in saver.list(config)]
    assert max(sent) == 2


def internal_prefix(_: Pool) -> None:
    """All keys that LangGraph puts into a configurable begin with the prefix, but for those that name a checkpoint."""
    keys = {value for name, value in vars(_constants).items() if name.startswith("CONFIG_KEY_")}
    named = {"thread_id", "checkpoint_id", "checkpoint_ns", "checkpoint_map"}
    assert len(keys) > 10
    assert {key for key in keys if not key.startswith(_langgraph.INTERNAL)} <= named
    assert _langgraph.without_internal({**dict.fromkeys(keys, 1), "thread_id": 2}).keys() <= named


def inline_version(_: Pool) -> None:
    """A later form of a checkpoint may hold its values elsewhere: ThreadSaver.read() must be looked at then."""
    assert LATEST_VERSION == _langgraph.INLINE_VERSION


def write_indexes(_: Pool) -> None:
    assert _langgraph.WRITES_IDX_MAP[_langgraph.INTERRUPT] < 0
    assert _langgraph.WRITES_IDX_MAP["__error__"] < 0


def checkpoint_id(_: Pool) -> None:
    assert _langgraph.get_checkpoint_id(place(checkpoint_id="one")) == "one"
    assert _langgraph.get_checkpoint_id(place()) is None


def read(pool: Pool) -> None:
    """SELECT_SQL, load_blobs and load_writes give together what the saver's own aget_tuple gives."""

    async def compare() -> None:
        async with opened(pool) as saver:
            config = place()
            graph = asking(AsyncPostgresSaver(pool))
            await graph.ainvoke({"log": ["a", "b"]}, config)
            theirs, ours = await AsyncPostgresSaver(pool).aget_tuple(config), await saver.read(config)
            assert theirs is not None
            assert theirs.checkpoint["channel_values"]["log"] == ["a", "b"]
            assert theirs.pending_writes
            assert ours == theirs
            exact = {"configurable": {**config["configurable"], "checkpoint_id": theirs.checkpoint["id"]}}
            assert await saver.read(exact) == theirs
            await graph.ainvoke(Command(resume="c"), config)
            assert await saver.read(config) == await AsyncPostgresSaver(pool).aget_tuple(config)

    asyncio.run(compare())


def lock(pool: Pool) -> None:
    """Two readers are served at once, which the saver's own lock forbids."""

    async def both() -> None:
        async with opened(pool) as saver, asyncio.timeout(5), saver._cursor() as first, saver._cursor() as second:
            assert first.connection is not second.connection

    asyncio.run(both())


def allowlist(pool: Pool) -> None:
    """A graph asks the saver that it is lent for a clone with its own classes, once at the start of each run."""
    asked: list[Any] = []

    class Watched(RunSaver):
        def with_allowlist(self, extra_allowlist: Any) -> RunSaver:
            asked.append(extra_allowlist)
            return super().with_allowlist(extra_allowlist)

    async def save(batch: Any) -> None:
        pass

    async def run() -> None:
        async with opened(pool) as saver:
            watched = Watched(saver, str(uuid4()), {}, save, history="step", limit=1 << 20)
            await watched.load(None)
            await asking().ainvoke({"log": [HumanMessage("x")]}, place(**{_langgraph.CHECKPOINTER: watched}))

    with pytest.MonkeyPatch.context() as patch:
        # LangGraph reads LANGGRAPH_STRICT_MSGPACK once; in this process it may have been imported before the agent.
        patch.setattr(_serde, "STRICT_MSGPACK_ENABLED", True)
        asyncio.run(run())
    assert len(asked) == 1


def prune_query(pool: Pool) -> None:
    """No thread of this graph is one whose state is the sum of its checkpoints."""

    async def find() -> None:
        async with opened(pool) as saver:
            config = place()
            await asking(AsyncPostgresSaver(pool)).ainvoke({"log": ["a"]}, config)
            thread = config["configurable"]["thread_id"]
            assert await saver.database.rows(_langgraph.PRUNE_DELTA_THREADS_SQL, ([thread], [thread])) == []

    asyncio.run(find())


def tables(pool: Pool) -> None:
    """A column that LangGraph adds would be lost when a thread is copied."""

    async def columns() -> dict[str, set[str]]:
        async with opened(pool) as saver:
            rows = await saver.database.rows(
                "SELECT table_name, array_agg(column_name::text) AS names FROM information_schema.columns WHERE table_name = ANY(%s) GROUP BY table_name",
                [list(_langgraph.CHECKPOINT_TABLES)],
            )
            return {row["table_name"]: set(row["names"]) for row in rows}

    copied = {table: {"thread_id", *names.split(", ")} for table, names in _langgraph.CHECKPOINT_TABLES.items()}
    assert asyncio.run(columns()) == copied


def migrations(pool: Pool) -> None:
    """So many are recorded in a database that is up to date."""

    async def count() -> dict[str, int]:
        async with opened(pool) as saver:
            [row] = await saver.database.rows("SELECT (SELECT count(*) FROM checkpoint_migrations) AS saver, (SELECT count(*) FROM store_migrations) AS store")
            return dict(row)

    assert asyncio.run(count()) == _langgraph.MIGRATIONS


@asynccontextmanager
async def opened(pool: Pool) -> AsyncIterator[ThreadSaver]:
    await pool.open()
    try:
        yield ThreadSaver(pool, Database(pool))
    finally:
        await pool.close()


CONTRACTS: dict[str, Callable[[Pool], None]] = {
    "CHECKPOINTER": checkpointer,
    "CHECKPOINT_TABLES": tables,
    "INLINE_VERSION": inline_version,
    "INTERRUPT": interrupt_channel,
    "MIGRATIONS": migrations,
    "PRUNE_DELTA_THREADS_SQL": prune_query,
    "SELECT_SQL": read,
    "TASKS": tasks_channel,
    "WRITES_IDX_MAP": write_indexes,
    "get_checkpoint_id": checkpoint_id,
    "load_blobs": read,
    "load_writes": read,
    "set_lock": lock,
    "with_allowlist": allowlist,
    "without_internal": internal_prefix,
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_name_means_what_is_relied_on(name: str, migrated: Postgres, redis: Redis, model: Model) -> None:
    environ = environment(migrated, redis, model, migrated.directory)

    async def closed() -> Pool:
        return create_pool(PostgresSettings.from_environment({**os.environ, **environ}))

    CONTRACTS[name](asyncio.run(closed()))


def test_each_name_has_a_contract() -> None:
    assert set(_langgraph.__all__) <= CONTRACTS.keys()


def private_uses(text: str) -> set[str]:
    """What a module's text uses of LangGraph's that only the contract's file may."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "langgraph":
                private = any(part.startswith("_") for part in module.split("."))
                found |= {each.name for each in names if private or each.name.startswith("_") or each.name.isupper()}
            case ast.Constant(value=str(value)) if value.startswith("__pregel_"):
                found.add(value)
            case ast.Attribute(attr="_load_blobs" | "_load_writes" | "_cursor" | "MIGRATIONS" as name):
                found.add(name)
    # These its documentation promises.
    return found - {"START", "END", "REMOVE_ALL_MESSAGES"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from langgraph.graph import START, StateGraph", set()),
        ("from langgraph._internal._constants import CONF", {"CONF"}),
        ("from langgraph.checkpoint.postgres.base import SELECT_SQL", {"SELECT_SQL"}),
        ("from langgraph.checkpoint.base import _x", {"_x"}),
        ('key = {"__pregel_read": 1}', {"__pregel_read"}),
        ("self._load_blobs(values)", {"_load_blobs"}),
        ("AsyncPostgresSaver.MIGRATIONS", {"MIGRATIONS"}),
    ],
)
def test_private_uses_are_found(text: str, found: set[str]) -> None:
    assert private_uses(text) == found


def test_no_other_module_uses_a_private_name() -> None:
    modules = {str(path.relative_to(SOURCE)): private_uses(path.read_text()) for path in SOURCE.rglob("*.py")}
    assert modules.pop(CONTRACT)
    assert {module: found for module, found in modules.items() if found} == {}

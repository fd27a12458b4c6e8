"""Every name of LangGraph that its documentation does not promise, each with the reason why it is needed.

No other module of the package uses such a name. tests/test_langgraph.py holds LangGraph to each, and fails by its name.
"""

from collections.abc import Mapping
from typing import Any, LiteralString

from langgraph.checkpoint.base import WRITES_IDX_MAP, get_checkpoint_id
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.postgres.base import PRUNE_DELTA_THREADS_SQL, SELECT_SQL
from langgraph.store.postgres.aio import AsyncPostgresStore

__all__ = [
    "CHECKPOINTER",
    "CHECKPOINT_TABLES",
    "INLINE_VERSION",
    "INTERRUPT",
    "MIGRATIONS",
    "PRUNE_DELTA_THREADS_SQL",
    "SELECT_SQL",
    "TASKS",
    "WRITES_IDX_MAP",
    "get_checkpoint_id",
    "load_blobs",
    "load_writes",
    "set_lock",
    "without_internal",
]

# Under this key of `configurable` a graph finds the saver that it is lent, as a subgraph finds its parent's. Each run
# has a saver of its own; the compiled graph is one for all runs.
CHECKPOINTER = "__pregel_checkpointer"

# The channel that questions to the client are written to. It tells whether a thread waits for an answer, before the
# graph is started.
INTERRUPT = "__interrupt__"

# The channel of the tasks that a step sends out. Its length is the number of tool calls that the next step runs.
TASKS = "__pregel_tasks"

# Keys of `configurable` and of a stream's metadata that begin so are LangGraph's own, and no client is shown them.
INTERNAL = "__"

# From this version on, a checkpoint holds plain values itself, and needs no second query for what its parent sent.
INLINE_VERSION = 4

# SELECT_SQL is the saver's query for a checkpoint with its values and writes; the saver itself runs it on a connection
# that it checks first, at the cost of a round trip.
# WRITES_IDX_MAP gives the fixed indexes of errors and interrupts among a task's writes, as they must be stored.
# A saver's `with_allowlist` is called at the start of each run; ThreadSaver and RunSaver replace it, and copy nothing.
# PRUNE_DELTA_THREADS_SQL finds the threads whose state is the sum of all their checkpoints: no history can go there.

# The saver's tables and their columns besides thread_id. A thread is copied by them.
CHECKPOINT_TABLES: dict[LiteralString, LiteralString] = {
    "checkpoints": "checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata",
    "checkpoint_blobs": "checkpoint_ns, channel, version, type, blob",
    "checkpoint_writes": "checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob, task_path",
}

# How many migrations of its own each has: whether the tables are up to date is asked without setting them up.
MIGRATIONS = {"saver": len(AsyncPostgresSaver.MIGRATIONS), "store": len(AsyncPostgresStore.MIGRATIONS)}


def load_blobs(saver: AsyncPostgresSaver, values: Any) -> dict[str, Any]:
    """The channels' values of a row of SELECT_SQL."""
    return saver._load_blobs(values)


def load_writes(saver: AsyncPostgresSaver, writes: Any) -> list[tuple[str, str, Any]]:
    """The pending writes of a row of SELECT_SQL, in LangGraph's order."""
    return saver._load_writes(writes)


def set_lock(saver: AsyncPostgresSaver, lock: Any) -> None:
    """Replace the saver's lock, which is for one connection. Over a pool it makes every thread wait for every other."""
    saver.lock = lock


def without_internal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is LangGraph's own."""
    return {name: value for name, value in values.items() if not name.startswith(INTERNAL)}

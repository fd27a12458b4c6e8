"""LangGraph's checkpoints of one run, kept back until they must be in Postgres.

LangGraph asks a saver to store after every step, and each time costs several round trips. What is stored has to be
there at two moments only: before and after a tool runs, because it may have changed the world, and when the answer goes
out. So a run collects its checkpoints here, and the ledger writes them in one statement together with the run's own
row. A run that was taken over by another worker can store nothing: that statement refuses it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal, cast
from uuid import UUID, uuid5

import orjson
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

from agent.errors import StorageUnavailable, ThreadTooLarge
from agent.runs._langgraph import (
    INLINE_VERSION,
    INTERRUPT,
    SELECT_SQL,
    TASKS,
    WRITES_IDX_MAP,
    get_checkpoint_id,
    load_blobs,
    load_writes,
    set_lock,
)
from agent.runs.records import Batch
from agent.storage.postgres import Database, Pool

LATEST = SELECT_SQL + "WHERE thread_id = %s AND checkpoint_ns = %s ORDER BY checkpoint_id DESC LIMIT 1"
EXACT = SELECT_SQL + "WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s"
PRIMITIVE = (str, int, float, bool)
# The channel of results that were there before their step ended. It is no channel of the graph, which ignores it.
RESULT = "result"
# A call's id is what the model made up. Of it is made the task id that its result is stored under.
RESULTS = UUID("b7a0c1de-5b0e-4b9a-9f3a-3a1f6a1d7c52")

Save = Callable[[Batch], Awaitable[None]]
# namespace, id, parent, checkpoint, metadata, channels that are new and their versions
Kept = tuple[str, str, str | None, Checkpoint, CheckpointMetadata, ChannelVersions]


class ThreadSaver(AsyncPostgresSaver):
    """The saver of everything outside a run, and the reader and the serializer of all runs."""

    def __init__(self, pool: Pool, database: Database) -> None:
        super().__init__(pool)
        set_lock(self, asyncio.Semaphore(pool.max_size))
        self.database = database
        self._allowing: dict[int, AsyncPostgresSaver] = {}

    async def read(self, config: RunnableConfig) -> CheckpointTuple | None:
        """A checkpoint with everything in it, in one round trip and without a thread."""
        return (await self.read_sized(config))[0]

    async def read_sized(self, config: RunnableConfig) -> tuple[CheckpointTuple | None, int]:
        """The same, and the bytes of its channels as they are stored."""
        configurable = config["configurable"]
        key = [configurable["thread_id"], configurable.get("checkpoint_ns", "")]
        checkpoint_id = get_checkpoint_id(config)
        rows = await (self.database.run(EXACT, [*key, checkpoint_id], binary=True) if checkpoint_id else self.database.run(LATEST, key, binary=True))
        if not rows:
            return None, 0
        size = sum(len(blob or b"") for _, _, blob in rows[0]["channel_values"] or ())
        if rows[0]["checkpoint"]["v"] < INLINE_VERSION:
            return await self.aget_tuple(config), size  # written by an older LangGraph
        row = rows[0]
        here = {"thread_id": row["thread_id"], "checkpoint_ns": row["checkpoint_ns"]}
        parent_id = row["parent_checkpoint_id"]
        values = (row["checkpoint"].get("channel_values") or {}) | load_blobs(self, row["channel_values"])
        found = CheckpointTuple(
            {"configurable": {**here, "checkpoint_id": row["checkpoint_id"]}},
            cast(Checkpoint, {**row["checkpoint"], "channel_values": values}),
            row["metadata"],
            {"configurable": {**here, "checkpoint_id": parent_id}} if parent_id else None,
            load_writes(self, row["pending_writes"]),
        )
        return found, size

    def allowing(self, allowlist: Any) -> AsyncPostgresSaver:
        """The same saver, loading these classes too. A graph asks for it at every run with the same list."""
        known = self._allowing.get(id(allowlist))
        if known is None:
            known = self._allowing[id(allowlist)] = cast(AsyncPostgresSaver, super().with_allowlist(allowlist))
        return known


class RunSaver(BaseCheckpointSaver[str]):
    """The checkpointer of one attempt of one run."""

    def __init__(
        self,
        saver: ThreadSaver,
        run_id: str,
        metadata: dict[str, Any],
        save: Save,
        *,
        history: Literal["turn", "step"],
        limit: int,
    ) -> None:
        """limit: bytes that the state may have"""
        super().__init__(serde=saver.serde)
        self._saver: AsyncPostgresSaver = saver
        self._reader = saver
        self._metadata = {**metadata, "run_id": run_id}
        self._save = save
        self._history = history
        self._limit = limit
        # Bytes of what is stored.
        self.saved = 0
        self._loaded: CheckpointTuple | None = None
        self._unread = False
        self._checkpoints: list[Kept] = []
        self._writes: dict[tuple[str, str, str, int], tuple[str, str, Any]] = {}
        self._tools_running = 0
        self._flushing = asyncio.Lock()
        # The root graph's state as of the last step.
        self.values: dict[str, Any] = {}
        self.last_id: str | None = None

    async def load(self, config: RunnableConfig | None) -> CheckpointTuple | None:
        """Where the run starts from, which is nothing without a config. The graph is given the same when it asks.

        Raises ThreadTooLarge.
        """
        self._loaded, size = (None, 0) if config is None else await self._reader.read_sized(config)
        if size > self._limit:
            raise ThreadTooLarge(size, self._limit)
        self._unread = True
        if self._loaded is not None:
            self.values = self._loaded.checkpoint["channel_values"]
            self.last_id = self._loaded.checkpoint["id"]
            self._tools_running = _tool_calls(self._loaded.checkpoint)
        return self._loaded

    @property
    def results(self) -> dict[str, ToolMessage]:
        """What finished of the calls of the step that the run starts in, by the call's id."""
        loaded = self._loaded
        if loaded is None or loaded.checkpoint["id"] != self.last_id:  # a later step may have a call of the same id
            return {}
        return {str(value.tool_call_id): value for _, channel, value in loaded.pending_writes or () if channel == RESULT}

    async def keep_result(self, result: ToolMessage) -> None:
        """Store what a tool did while others of its step still run: if we die before they are done, it does not run again."""
        messages = self.values.get("messages")
        last = messages[-1] if messages else None
        if self.last_id is None or not isinstance(last, AIMessage) or len(last.tool_calls) < 2:
            return  # the step ends with its only call, and is stored
        self._writes["", self.last_id, str(uuid5(RESULTS, str(result.tool_call_id))), 0] = ("", RESULT, result)
        await self._flush()

    @property
    def interrupts(self) -> list[Any]:
        """What the last step waits to be told."""
        return [
            interrupt
            for (ns, checkpoint_id, _, _), (_, channel, value) in self._writes.items()
            if channel == INTERRUPT and not ns and checkpoint_id == self.last_id
            for interrupt in value
        ]

    def batch(self, *, final: bool = False) -> Batch:
        """What is not stored yet, serialized. Raises ThreadTooLarge."""
        last_only = final and self._history == "turn" and not any(ns for ns, *_ in self._checkpoints)
        checkpoints = _join(self._checkpoints) if last_only else self._checkpoints
        batch = Batch()
        dumps = self._saver.serde.dumps_typed
        for ns, checkpoint_id, parent, checkpoint, metadata, versions in checkpoints:
            inline = {}
            for channel, value in checkpoint["channel_values"].items():
                if value is None or (isinstance(value, PRIMITIVE) and not (isinstance(value, str) and "\0" in value)):
                    inline[channel] = value
                elif channel in versions:
                    kind, blob = dumps(value)
                    if len(blob) > self._limit:
                        raise ThreadTooLarge(len(blob), self._limit)
                    batch.blobs[ns, channel, str(versions[channel])] = (kind, blob)
            batch.checkpoints[ns, checkpoint_id] = (
                parent,
                orjson.dumps({**checkpoint, "channel_values": inline}).decode(),
                orjson.dumps({**self._metadata, **metadata}, default=str).decode(),
            )
        for (ns, checkpoint_id, task_id, index), (path, channel, value) in self._writes.items():
            if not last_only or checkpoint_id == self.last_id:
                batch.writes[ns, checkpoint_id, task_id, index] = (path, channel, *dumps(value))
        return batch

    def with_allowlist(self, extra_allowlist: Any) -> "RunSaver":
        self._saver = self._reader.allowing(extra_allowlist)
        self.serde = self._saver.serde
        return self

    def get_next_version(self, current: str | None, channel: None) -> str:
        return self._reader.get_next_version(current, channel)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        configurable = config["configurable"]
        if self._unread and not configurable.get("checkpoint_ns"):
            self._unread = False
            return self._loaded
        if self._checkpoints or self._writes:
            await self._flush()  # a subgraph reads what the graph around it has written
        return await self._reader.read(config)

    async def alist(self, config: RunnableConfig | None, **options: Any) -> AsyncIterator[CheckpointTuple]:
        async for found in self._saver.alist(config, **options):
            yield found

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        configurable = config["configurable"]
        ns, checkpoint_id = configurable.get("checkpoint_ns", ""), checkpoint["id"]
        parent = configurable.get("checkpoint_id")
        if parent and checkpoint_id <= parent:
            # Checkpoints are found by their ids, which are times: this one would stand before the one it follows.
            raise StorageUnavailable("The conversation cannot be stored: the clock of the server went back.")
        self._checkpoints.append((ns, checkpoint_id, parent, checkpoint, metadata, new_versions))
        if not ns:
            self.values, self.last_id = checkpoint["channel_values"], checkpoint_id
            ran, self._tools_running = self._tools_running, _tool_calls(checkpoint)
            if ran or self._tools_running:
                await self._flush()
        return {"configurable": {**configurable, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}}

    async def aput_writes(self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = "") -> None:
        configurable = config["configurable"]
        ns, checkpoint_id = configurable.get("checkpoint_ns", ""), configurable["checkpoint_id"]
        for index, (channel, value) in enumerate(writes):
            key = (ns, checkpoint_id, task_id, WRITES_IDX_MAP.get(channel, index))
            self._writes[key] = (task_path, channel, value)
        if self._tools_running > 1 and not ns:
            # One of several tools is done: if we die before the others are, it must not run again.
            self._tools_running -= 1
            await self._flush()

    async def _flush(self) -> None:
        async with self._flushing:
            await self._flush_all()

    async def _flush_all(self) -> None:
        batch = self.batch()
        pending, writes = len(self._checkpoints), list(self._writes.items())
        await self._save(batch)
        self.saved += batch.size
        # More may have come in the meantime, or a write may have been replaced.
        del self._checkpoints[:pending]
        for key, value in writes:
            if self._writes.get(key) is value and value[1] != INTERRUPT:
                del self._writes[key]


def _join(checkpoints: list[Kept]) -> list[Kept]:
    """The last one alone, in the place of all of them."""
    if len(checkpoints) < 2:
        return checkpoints
    versions: ChannelVersions = {}
    for kept in checkpoints:
        versions |= kept[5]
    ns, checkpoint_id, _, checkpoint, metadata, _ = checkpoints[-1]
    return [(ns, checkpoint_id, checkpoints[0][2], checkpoint, metadata, versions)]


def _tool_calls(checkpoint: Checkpoint) -> int:
    """How many tasks that call tools the next step has."""
    values = checkpoint["channel_values"]
    messages = values.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return len(values.get(TASKS) or ()) or (1 if isinstance(last, AIMessage) and last.tool_calls else 0)

"""What a run is: how it is asked for, how it is stored and how it ended."""

import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal, TypedDict
from uuid import UUID, uuid4

import orjson

from agent.errors import ServiceError
from agent.llm.parameters import client_tools

Strategy = Literal["reject", "enqueue", "interrupt", "rollback"]
RunStatus = Literal["pending", "running", "success", "error", "timeout", "interrupted"]
FINAL: frozenset[str] = frozenset({"success", "error", "timeout", "interrupted"})
# Told of a run's end: its owner, its id and the tokens that it used.
Finished = Callable[[str, str, int], Coroutine[Any, Any, None]]


class Messages(TypedDict):
    """One or more new messages, as LangChain or OpenAI write them. The first gets the run's id unless it has one."""

    messages: list[Any]


class Resume(TypedDict):
    """The answer to the interrupt that the thread waits at."""

    resume: Any


# None goes on from the checkpoint as it is.
RunInput = Messages | Resume | None


def new_run_id() -> str:
    """A UUID that begins with the time, as version 7 does: runs of one hour stand together in the index."""
    milliseconds = time.time_ns() // 1_000_000
    random = uuid4().int & ((1 << 74) - 1)
    return str(UUID(int=milliseconds << 80 | 0x7 << 76 | (random >> 62) << 64 | 0b10 << 62 | random & ((1 << 62) - 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    # What is told while it works: any of "tokens", "tools", and LangGraph's stream modes.
    stream: tuple[str, ...] = ()
    subgraphs: bool = False
    # Events are also kept in Redis for some minutes, so that any worker can replay them. A run that had to wait for its
    # thread always is: the worker that takes it may not be the one that its client is connected to.
    resumable: bool = False
    # Somebody waits for the answer now: the deadline counts from the submission, not from the start of the work.
    waited: bool = False
    # "turn" keeps one checkpoint a turn (and those that a tool call needs), "step" every step's.
    history: Literal["turn", "step"] = "step"
    # Start from this one instead of the thread's latest.
    checkpoint_id: str | None = None
    recursion_limit: int | None = None
    # Parameters for the model, in the words of its API, that go before the service's own.
    model: dict[str, Any] = field(default_factory=dict)
    # The assistant's own, beside the service's prompt; and the only tools that it may use, None for all.
    system_prompt: str | None = None
    tools: tuple[str, ...] | None = None
    # Whose options these are, None for the agent as it was deployed.
    assistant_id: str | None = None
    interrupt_before: tuple[str, ...] = ()
    interrupt_after: tuple[str, ...] = ()
    # "delete": the thread goes when the run ends (the LangGraph API's runs without a thread).
    on_completion: Literal["keep", "delete"] = "keep"
    strategy: Strategy = "enqueue"
    metadata: dict[str, Any] = field(default_factory=dict)
    # A digest of the request that began it, and how often its client has sent that again.
    request: str = ""
    retry: int = 0
    # "update" is a change of the state by hand, which must not meet a turn.
    kind: Literal["turn", "update"] = "turn"

    @property
    def client_tools(self) -> frozenset[str]:
        """The names of the tools that the run's client runs itself."""
        return client_tools(self.model)

    def to_json(self) -> str:
        """Only what differs from the defaults."""
        return orjson.dumps({name: value for name, value in asdict(self).items() if value != DEFAULTS[name]}).decode()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunOptions":
        names = {item.name for item in fields(cls)}
        known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in names}
        return cls(**known)


DEFAULTS = asdict(RunOptions())


@dataclass(slots=True)
class Run:
    run_id: str
    thread_id: str
    owner: str
    turn_id: str | None
    status: RunStatus
    attempt: int
    first_attempt: int
    cancel: Literal["interrupt", "rollback"] | None
    input: Any
    options: RunOptions
    # {"response": str, "usage": {...}, "interrupts"?: [...], "tool_calls"?: [...] of the client's tools} of a success
    result: dict[str, Any] | None
    # {"code", "message", "status", "retry_after"?, "refused"?} of an error, a timeout or an interruption
    error: dict[str, Any] | None
    created_at: datetime
    updated_at: datetime
    # False where an earlier submission with this turn id recorded it.
    created: bool = True
    # It made its thread, which is empty so far.
    first: bool = False

    @property
    def final(self) -> bool:
        return self.status in FINAL

    @property
    def metadata(self) -> dict[str, Any]:
        return self.options.metadata


def new_run(run_id: str | None, thread_id: str | None, owner: str, turn_id: str | None, run_input: RunInput, options: RunOptions) -> Run:
    """One that waits, with a thread's name of its own unless it is given one."""
    now = datetime.now(UTC)
    return Run(
        run_id=run_id or new_run_id(),
        thread_id=thread_id or str(uuid4()),
        owner=owner,
        turn_id=turn_id,
        status="pending",
        attempt=1,
        first_attempt=1,
        cancel=None,
        input=run_input,
        options=options,
        result=None,
        error=None,
        created_at=now,
        updated_at=now,
    )


@dataclass(slots=True)
class Batch:
    """Rows of the saver's tables, as columns: each dictionary is keyed so that no row comes twice in a statement."""

    # (namespace, id) -> (parent, checkpoint, metadata)
    checkpoints: dict[tuple[str, str], tuple[str | None, str, str]] = field(default_factory=dict)
    # (namespace, channel, version) -> (type, blob)
    blobs: dict[tuple[str, str, str], tuple[str, bytes | None]] = field(default_factory=dict)
    # (namespace, checkpoint, task, index) -> (task path, channel, type, blob)
    writes: dict[tuple[str, str, str, int], tuple[str, str, str, bytes]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes, as Quota counts them."""
        return (
            sum(len(checkpoint) + len(metadata) for _, checkpoint, metadata in self.checkpoints.values())
            + sum(len(blob or b"") for _, blob in self.blobs.values())
            + sum(len(blob) for *_, blob in self.writes.values())
        )

    def only(self) -> list[Any]:
        """The one checkpoint and the one blob."""
        [(checkpoint, stored)], [(blob, value)] = self.checkpoints.items(), self.blobs.items()
        return [*checkpoint, *stored, *blob, *value]

    def columns(self) -> list[list[Any]]:
        c, b, w = self.checkpoints, self.blobs, self.writes
        return [
            [key[0] for key in c], [key[1] for key in c], *_columns(list(c.values()), 3),
            [key[0] for key in b], [key[1] for key in b], [key[2] for key in b], *_columns(list(b.values()), 2),
            [key[0] for key in w], [key[1] for key in w], [key[2] for key in w], [key[3] for key in w],
            *_columns(list(w.values()), 4),
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended."""

    status: RunStatus
    # None leaves it as it is.
    thread_status: Literal["idle", "interrupted", "error"] | None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class RunLost(Exception):
    """The run is no longer this worker's: another one took it over, or it was deleted."""


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [[row[index] for row in rows] for index in range(width)]


def describe_failure(error: ServiceError) -> dict[str, Any]:
    """As a run keeps it."""
    failure = {"code": error.code, "message": error.message, "status": error.status}
    more = {"retry_after": error.retry_after, "refused": error.refused}
    return failure | {name: value for name, value in more.items() if value}


def failure_of(told: Mapping[str, Any]) -> ServiceError:
    """The error that a run without an answer keeps, as it was raised."""
    error = ServiceError(told.get("message"), retry_after=told.get("retry_after"), refused=told.get("refused"))
    error.code = told.get("code", ServiceError.code)
    error.status = told.get("status", ServiceError.status)
    return error


def last_words(run: Run) -> list[tuple[str, Any]]:
    result = run.result or {}
    words: list[tuple[str, Any]] = []
    if run.status == "success":
        if result.get("usage", {}).get("total_tokens"):
            words.append(("usage", result["usage"]))
    else:
        words.append(("error", {"code": None, "message": None, **(run.error or {})}))
    end: dict[str, Any] = {"status": run.status, "response": result.get("response", "")}
    end |= {name: result[name] for name in ("interrupts", "tool_calls") if result.get(name)}
    words.append(("end", end))
    return words

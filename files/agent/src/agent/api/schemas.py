"""What the LangGraph routes take and answer. The names are the LangGraph API's; a field that is not here is refused."""

from typing import Annotated, Any, Literal
from uuid import UUID, uuid5

from fastapi import Path, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

GRAPH_ID = "agent"
# What LangGraph's own server calls the assistant of a graph of this name.
ASSISTANT_ID = str(uuid5(UUID("6ba7b821-9dad-11d1-80b4-00c04fd430c8"), GRAPH_ID))

THREAD_ID = r"^[A-Za-z0-9_-]{1,64}$"
UUID_TEXT = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
# What is white differs from one dialect of patterns to the next; here it is what any of them says.
NOT_BLANK = r"[^\s\x1c-\x1f\x85\ufeff]"

ThreadId = Annotated[str, StringConstraints(pattern=THREAD_ID)]
Uuid = Annotated[str, StringConstraints(pattern=UUID_TEXT)]
ThreadPath = Annotated[str, Path(pattern=THREAD_ID, description="A thread of the caller's.")]
RunPath = Annotated[UUID, Path(description="A run of that thread.")]
CheckpointPath = Annotated[UUID, Path(description="A checkpoint of that thread.")]
AssistantPath = Annotated[str, Path(max_length=64, description=f"`{GRAPH_ID}` or `{ASSISTANT_ID}`.")]
AssistantName = Annotated[str, Field(max_length=64, description="The one assistant.", json_schema_extra={"enum": [GRAPH_ID, ASSISTANT_ID]})]
Metadata = Annotated[dict[str, Any], Field(description="Any JSON object.")]
# To JSON 3.0 is a whole number too.
WHOLE = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
Limit = Annotated[int, Field(ge=1, le=100), WHOLE]
Offset = Annotated[int, Field(ge=0, le=10_000), WHOLE]

# The steps of the graph.
Node = Literal["model", "tools"]
Nodes = Literal["*"] | list[Node]
RunStatus = Literal["pending", "running", "error", "success", "timeout", "interrupted"]
ThreadStatus = Literal["idle", "busy", "interrupted", "error"]
StreamMode = Literal["values", "messages", "messages-tuple", "updates", "custom"]
Strategy = Literal["reject", "enqueue", "interrupt", "rollback"]
OnDisconnect = Literal["cancel", "continue"]
CancelAction = Literal["interrupt", "rollback"]
AssistantField = Literal[
    "assistant_id", "graph_id", "name", "description", "config", "context", "created_at", "updated_at", "metadata",
    "version",
]  # fmt: skip
ThreadField = Literal["thread_id", "created_at", "updated_at", "metadata", "status", "values", "interrupts"]
StateField = Literal[
    "values", "values.messages", "next", "tasks", "checkpoint", "metadata", "created_at", "parent_checkpoint",
    "interrupts",
]  # fmt: skip
RunField = Literal[
    "run_id", "thread_id", "assistant_id", "created_at", "updated_at", "status", "metadata", "multitask_strategy",
]  # fmt: skip


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Part(BaseModel):
    """An answer of which `select` can ask for some fields only."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.update(required=[]))


# Messages

Text = Annotated[str, StringConstraints(pattern=NOT_BLANK)]
MessageId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]


class TextBlock(Body):
    type: Literal["text"]
    text: Text


Content = Annotated[
    Text | Annotated[list[TextBlock], Field(min_length=1)],
    Field(description="Text, not longer than the service's AGENT_MAX_MESSAGE_CHARS."),
]
Empty = Annotated[dict[str, Any], Field(max_length=0)]


class RoleMessage(Body):
    """A user's message as OpenAI's API writes it."""

    role: Literal["user", "human"]
    content: Content
    id: MessageId | None = None


class TypeMessage(Body):
    """A user's message as LangChain writes it."""

    type: Literal["user", "human"]
    content: Content
    id: MessageId | None = None
    name: None = None
    additional_kwargs: Empty | None = None
    response_metadata: Empty | None = None


class RoleAnswer(Body):
    """An answer put into a thread by hand."""

    role: Literal["assistant", "ai"]
    content: Content
    id: MessageId | None = None


class TypeAnswer(Body):
    type: Literal["assistant", "ai"]
    content: Content
    id: MessageId | None = None


class Removal(Body):
    """Takes the message of this id out of the thread."""

    type: Literal["remove"]
    id: MessageId


UserMessage = Text | RoleMessage | TypeMessage
UserMessages = UserMessage | Annotated[list[UserMessage], Field(min_length=1)]
WrittenMessage = UserMessage | RoleAnswer | TypeAnswer | Removal
WrittenMessages = WrittenMessage | Annotated[list[WrittenMessage], Field(min_length=1)]


# Assistants


class AssistantSearch(Body):
    metadata: Metadata | None = None
    graph_id: str | None = None
    name: str | None = None
    limit: Limit = 10
    offset: Offset = 0
    sort_by: Literal["assistant_id", "graph_id", "name", "created_at", "updated_at"] | None = None
    sort_order: Literal["asc", "desc"] | None = None
    select: list[AssistantField] | None = None


class AssistantCount(Body):
    metadata: Metadata | None = None
    graph_id: str | None = None
    name: str | None = None


class Assistant(Part):
    assistant_id: str
    graph_id: str
    name: str
    description: str | None
    config: dict[str, Any]
    context: dict[str, Any]
    metadata: dict[str, Any]
    version: int
    created_at: str
    updated_at: str


class Graph(BaseModel):
    nodes: list[dict[str, Any]]
    edges: list[dict[str, Any]]


class GraphSchemas(BaseModel):
    graph_id: str
    input_schema: dict[str, Any] | None
    output_schema: dict[str, Any] | None
    state_schema: dict[str, Any] | None
    config_schema: dict[str, Any] | None
    context_schema: dict[str, Any] | None


# Threads


class ThreadCreate(Body):
    thread_id: ThreadId | None = None
    metadata: Metadata | None = None
    if_exists: Literal["raise", "do_nothing"] = "raise"


class ThreadUpdate(Body):
    metadata: Annotated[dict[str, Any], Field(description="Merged into what is there.")]


class ThreadSearch(Body):
    metadata: Annotated[dict[str, Any], Field(description="What a thread's metadata must contain.")] | None = None
    ids: Annotated[list[ThreadId], Field(max_length=100)] | None = None
    status: ThreadStatus | None = None
    limit: Limit = 10
    offset: Offset = 0
    sort_by: Literal["thread_id", "status", "created_at", "updated_at"] = "created_at"
    sort_order: Literal["asc", "desc"] = "desc"
    select: list[ThreadField] | None = None


class ThreadCount(Body):
    metadata: Annotated[dict[str, Any], Field(description="What a thread's metadata must contain.")] | None = None
    status: ThreadStatus | None = None


class Interrupt(BaseModel):
    id: str
    value: Any


class Thread(Part):
    thread_id: str
    created_at: str
    updated_at: str
    metadata: dict[str, Any]
    status: ThreadStatus
    values: dict[str, Any] | None
    interrupts: dict[str, list[Interrupt]]


class Checkpoint(Body):
    thread_id: ThreadId | None = None
    checkpoint_ns: Literal[""] = ""
    checkpoint_id: Uuid | None = None
    checkpoint_map: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class CheckpointAnswer(BaseModel):
    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str | None
    checkpoint_map: dict[str, Any]


class StateAt(Body):
    checkpoint: Checkpoint
    subgraphs: bool = False
    select: list[StateField] | None = None


class StateValues(Body):
    messages: WrittenMessages


class StateUpdate(Body):
    values: StateValues | None = None
    as_node: Annotated[Node | None, Field(description="Whose step it is to be. It can be left out where it is clear.")] = None
    checkpoint: Checkpoint | None = None
    checkpoint_id: Uuid | None = None


class StateUpdated(BaseModel):
    checkpoint: CheckpointAnswer


class History(Body):
    limit: Annotated[int, Field(ge=1, le=1000), WHOLE] = 10
    before: Uuid | Checkpoint | None = None
    metadata: Metadata | None = None
    checkpoint: Checkpoint | None = None
    select: list[StateField] | None = None


class Task(BaseModel):
    id: str
    name: str
    error: str | None
    interrupts: list[Interrupt]
    checkpoint: CheckpointAnswer | None
    state: None
    result: dict[str, Any] | None


class ThreadState(Part):
    values: dict[str, Any]
    next: list[str]
    tasks: list[Task]
    checkpoint: CheckpointAnswer
    parent_checkpoint: CheckpointAnswer | None
    metadata: dict[str, Any] | None
    created_at: str | None
    interrupts: list[Interrupt]


# Runs


class RunInput(Body):
    messages: UserMessages


class Command(Body):
    resume: Annotated[Any, Field(description="The answer to what the thread waits for.")]


class RunConfig(Body):
    recursion_limit: Annotated[int, Field(ge=1), WHOLE] | None = None


class RunBase(Body):
    assistant_id: AssistantName
    config: RunConfig | None = None
    metadata: Metadata | None = None
    interrupt_before: Nodes | None = None
    interrupt_after: Nodes | None = None
    stream_mode: StreamMode | Annotated[list[StreamMode], Field(min_length=1)] | None = None
    stream_subgraphs: Annotated[bool, Field(description="Events of subgraphs too. The agent itself has none.")] = False
    stream_resumable: Annotated[bool, Field(description="Keep the events for some minutes, for whoever comes back with a Last-Event-ID.")] = False
    on_disconnect: OnDisconnect = "continue"
    durability: Annotated[
        Literal["sync", "async", "exit"],
        Field(description="Every run is as durable as `sync` where it matters. Less cannot be had."),
    ] = "sync"


class RunCreate(RunBase):
    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "required": ["input", "command"],
                "properties": {"input": {"type": "object"}, "command": {"type": "object"}},
            }
        }
    )

    input: Annotated[RunInput | None, Field(description="With neither input nor command the thread goes on as it is.")] = None
    command: Command | None = None
    checkpoint: Checkpoint | None = None
    checkpoint_id: Uuid | None = None
    multitask_strategy: Strategy = "enqueue"
    if_not_exists: Literal["create", "reject"] = "reject"
    strict_resume: Annotated[bool, Field(description="A resume that nothing waits for is always refused.")] = True


class StatelessRunCreate(RunBase):
    input: RunInput
    on_completion: Annotated[Literal["delete", "keep"], Field(description="What becomes of the thread that is made for the run.")] = "delete"


class Run(Part):
    run_id: str
    thread_id: str
    assistant_id: str
    status: RunStatus
    metadata: dict[str, Any]
    multitask_strategy: Strategy
    created_at: str
    updated_at: str


class RunsCancel(Body):
    thread_id: ThreadId
    run_ids: Annotated[list[Uuid], Field(min_length=1, max_length=100)]


# Store

# The bounds keep a namespace and a key together small enough for an index of Postgres.
Label = Annotated[str, StringConstraints(pattern=r"^[^.\x00-\x1f\x7f]{1,64}$")]
Namespace = Annotated[list[Label], Field(min_length=1, max_length=5)]
NamespacePart = Annotated[list[Label], Field(max_length=5)]
NamespaceQuery = Annotated[
    str,
    Query(pattern=r"^[^.\x00-\x1f\x7f]{1,64}(\.[^.\x00-\x1f\x7f]{1,64}){0,4}$", description="Labels joined by dots."),
]
KEY = r"^[^\x00-\x1f\x7f]{1,100}$"
Key = Annotated[str, StringConstraints(pattern=KEY)]
KeyQuery = Annotated[str, Query(pattern=KEY)]


class ItemPut(Body):
    namespace: Namespace
    key: Key
    value: dict[str, Any]


class ItemDelete(Body):
    namespace: Namespace
    key: Key


class ItemSearch(Body):
    namespace_prefix: NamespacePart = []
    filter: Annotated[dict[str, str | int | float | bool | None], Field(description="What fields of the value must equal.")] = {}
    limit: Limit = 10
    offset: Offset = 0


class NamespaceList(Body):
    prefix: NamespacePart = []
    suffix: NamespacePart = []
    max_depth: Annotated[int, Field(ge=1, le=5), WHOLE] | None = None
    limit: Limit = 100
    offset: Offset = 0


class Item(BaseModel):
    namespace: list[str]
    key: str
    value: dict[str, Any]
    created_at: str
    updated_at: str


class SearchItem(Item):
    score: float | None


class Items(BaseModel):
    items: list[SearchItem]


class Namespaces(BaseModel):
    namespaces: list[list[str]]


# The service


class Ok(BaseModel):
    ok: bool


class Info(BaseModel):
    version: str
    langgraph_py_version: str
    flags: dict[str, bool]
    strict_resume: bool


class ErrorBody(BaseModel):
    code: str
    message: str
    id: str | None = None


class Error(BaseModel):
    error: ErrorBody

"""What the LangGraph routes take and answer. The names are the LangGraph API's.

What means nothing is accepted everywhere: null, and for a feature that is not here also false, 0 and what is empty. A
field that no client knows is refused where something is run or written, and ignored where something is looked for.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID, uuid5

from fastapi import Path, Query
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

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
AssistantPath = Annotated[str, Path(max_length=64, description=f"`{GRAPH_ID}`, which is `{ASSISTANT_ID}`, or one of the caller's.")]
AssistantName = Annotated[str, Field(max_length=64, description=f"`{GRAPH_ID}`, which is `{ASSISTANT_ID}`, or one of the caller's.")]
Metadata = Annotated[dict[str, Any], Field(description="Any JSON object.")]
# To JSON 3.0 is a whole number too.
WHOLE = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
NUMBER = BeforeValidator(lambda value: float(value) if isinstance(value, int) and not isinstance(value, bool) else value)
Limit = Annotated[int, Field(ge=1, le=1000), WHOLE]
Offset = Annotated[int, Field(ge=0, le=1_000_000), WHOLE]

# The steps of the graph.
Node = Literal["model", "tools"]
Nodes = Literal["*"] | list[Node]
RunStatus = Literal["pending", "running", "error", "success", "timeout", "interrupted"]
ThreadStatus = Literal["idle", "busy", "interrupted", "error"]
StreamMode = Literal["values", "messages", "messages-tuple", "updates", "custom", "checkpoints", "tasks", "debug"]
Strategy = Literal["reject", "enqueue", "interrupt", "rollback"]
OnDisconnect = Literal["cancel", "continue"]
CancelAction = Literal["interrupt", "rollback"]
AssistantField = Literal[
    "assistant_id", "graph_id", "name", "description", "config", "context", "created_at", "updated_at", "metadata",
    "version",
]  # fmt: skip
ThreadField = Literal[
    "thread_id", "created_at", "updated_at", "state_updated_at", "metadata", "config", "context", "status", "values",
    "interrupts", "error",
]  # fmt: skip
StateField = Annotated[
    str,
    StringConstraints(pattern=r"^(values(\.[A-Za-z0-9_]{1,64})?|next|tasks|checkpoint|metadata|created_at|parent_checkpoint|interrupts)$"),
]
RunField = Literal[
    "run_id", "thread_id", "assistant_id", "created_at", "updated_at", "status", "metadata", "kwargs", "multitask_strategy",
    "cancel_reason",
]  # fmt: skip


def _nothing(value: Any) -> None:
    if value not in (None, "", [], {}, False):  # 0 is equal to False
        raise PydanticCustomError("not_supported", "this is not supported here")


# A field of a feature that is not here. Clients send such with a value that means nothing.
Absent = Annotated[Any, BeforeValidator(_nothing), WithJsonSchema({"enum": [None, False, 0, "", [], {}]})]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        """Null is as good as left out."""
        return {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, dict) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, field in schema.get("properties", {}).items():
            if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()) and None not in field.get("enum", ()):
                own = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **own} if field else own
        if schema.get("additionalProperties") is False:
            schema["additionalProperties"] = {"type": "null"}
        return schema


class Search(Body):
    """What a newer client may also ask is ignored: it finds more than it wanted."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Part(BaseModel):
    """An answer of which `select` can ask for some fields only."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.update(required=[]))


# Messages

Text = Annotated[str, StringConstraints(pattern=NOT_BLANK)]
MessageId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]


class Said(Body):
    """A message, or a part of one. What a client keeps with it and nobody needs is ignored: it may come from a thread's state."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"additionalProperties": True})


class TextBlock(Said):
    type: Literal["text"]
    text: Text


class AnyTextBlock(Said):
    type: Literal["text"]
    text: str


Content = Annotated[
    Text | Annotated[list[TextBlock], Field(min_length=1)],
    Field(description="Text. A user's is not longer than the service's AGENT_MAX_MESSAGE_CHARS."),
]
# What was said before may be empty.
AnyContent = str | list[AnyTextBlock]
Empty = Annotated[dict[str, Any], Field(max_length=0)]
CallId = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,128}$")]
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class Message(Said):
    id: MessageId | None = None


class UserSaid(Message):
    content: Content


class RoleMessage(UserSaid):
    """A user's message as OpenAI's API writes it."""

    role: Literal["user", "human"]
    type: None = None


class TypeMessage(UserSaid):
    """A user's message as LangChain writes it."""

    type: Literal["user", "human"]
    role: None = None


class Instruction(Message):
    """Shown to the model in its place, as text of the user's: the agent's own instructions are the operator's."""

    content: Content


class RoleInstruction(Instruction):
    role: Literal["system", "developer"]
    type: None = None


class TypeInstruction(Instruction):
    type: Literal["system", "developer"]
    role: None = None


class Call(Said):
    """A call as LangChain writes it."""

    id: CallId
    name: ToolName
    args: dict[str, Any]


class CalledFunction(Said):
    name: ToolName
    arguments: Annotated[str, Field(description="A JSON object, or nothing.")] = ""


class FunctionCall(Said):
    """A call as OpenAI's API writes it."""

    id: CallId
    function: CalledFunction


class Answer(Message):
    content: AnyContent = ""
    tool_calls: list[Call | FunctionCall] = []


class RoleAnswer(Answer):
    role: Literal["assistant", "ai"]
    type: None = None


class TypeAnswer(Answer):
    type: Literal["assistant", "ai", "AIMessageChunk"]
    role: None = None


class Result(Message):
    """What came of a call."""

    tool_call_id: CallId
    content: AnyContent = ""
    name: ToolName | None = None
    status: Literal["success", "error"] = "success"


class RoleResult(Result):
    role: Literal["tool"]
    type: None = None


class TypeResult(Result):
    type: Literal["tool"]
    role: None = None


class Removal(Body):
    """Takes the message of this id out of the thread."""

    type: Literal["remove"]
    id: MessageId


GivenMessage = Text | RoleMessage | TypeMessage | RoleInstruction | TypeInstruction | RoleAnswer | TypeAnswer | RoleResult | TypeResult
GivenMessages = GivenMessage | Annotated[list[GivenMessage], Field(min_length=1)]
WrittenMessage = GivenMessage | Removal
WrittenMessages = WrittenMessage | Annotated[list[WrittenMessage], Field(min_length=1)]


# Assistants


class Options(Body):
    """What an assistant, or one run, sets of the agent: in `config.configurable` or in `context`."""

    system_prompt: Annotated[str, Field(max_length=20_000, description="Follows the service's own.")] | None = None
    tools: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=100, description="Names of the only tools to use.")] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), NUMBER] | None = None
    top_p: Annotated[float, Field(gt=0, le=1), NUMBER] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=131_072, description="Not more than the service allows."), WHOLE] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2), NUMBER] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2), NUMBER] | None = None


class AssistantConfig(Search):
    """Whatever else a client sends only steers its own side, and is ignored."""

    configurable: Annotated[dict[str, Any], Field(description="The options of the agent.")] | None = None
    recursion_limit: Annotated[int, Field(ge=1), WHOLE] | None = None
    tags: list[Any] | None = None


Context = Annotated[dict[str, Any], Field(description="The options of the agent. They go before those of the config.")]
AssistantTitle = Annotated[str, StringConstraints(min_length=1, max_length=200)]
AssistantText = Annotated[str, Field(max_length=2000)]


class AssistantCreate(Search):
    graph_id: Annotated[str, Field(description=f"`{GRAPH_ID}`: there is none but one.")] = GRAPH_ID
    assistant_id: Uuid | None = None
    config: AssistantConfig | None = None
    context: Context | None = None
    metadata: Metadata | None = None
    if_exists: Annotated[
        Literal["raise", "do_nothing"],
        Field(description="With `do_nothing` and no id, one that is just like this is as good."),
    ] = "raise"
    name: AssistantTitle | None = None
    description: AssistantText | None = None


class AssistantUpdate(Search):
    graph_id: Annotated[str, Field(description=f"`{GRAPH_ID}`: there is none but one.")] = GRAPH_ID
    config: AssistantConfig | None = None
    context: Context | None = None
    metadata: Annotated[dict[str, Any], Field(description="Merged into what is there.")] | None = None
    name: AssistantTitle | None = None
    description: AssistantText | None = None


class AssistantVersions(Search):
    metadata: Metadata | None = None
    limit: Limit = 10
    offset: Offset = 0


class AssistantLatest(Search):
    version: Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE]


class AssistantSearch(Search):
    metadata: Metadata | None = None
    graph_id: str | None = None
    name: str | None = None
    limit: Limit = 10
    offset: Offset = 0
    sort_by: Literal["assistant_id", "graph_id", "name", "created_at", "updated_at"] | None = None
    sort_order: Literal["asc", "desc"] | None = None
    select: list[AssistantField] | None = None


class AssistantCount(Search):
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


class ThreadCreate(Search):
    thread_id: ThreadId | None = None
    metadata: Metadata | None = None
    if_exists: Literal["raise", "do_nothing"] = "raise"
    supersteps: Absent = None
    ttl: Absent = None


class ThreadUpdate(Search):
    metadata: Annotated[dict[str, Any], Field(description="Merged into what is there.")] | None = None
    ttl: Absent = None


class StatePatch(Search):
    metadata: Annotated[dict[str, Any], Field(description="Merged into what is there.")]


class ThreadSearch(Search):
    metadata: Annotated[dict[str, Any], Field(description="What a thread's metadata must contain.")] | None = None
    ids: Annotated[list[ThreadId], Field(max_length=100)] | None = None
    values: Absent = None
    status: ThreadStatus | None = None
    limit: Limit = 10
    offset: Offset = 0
    sort_by: Literal["thread_id", "status", "created_at", "updated_at", "state_updated_at"] = "created_at"
    sort_order: Literal["asc", "desc"] = "desc"
    select: list[ThreadField] | None = None
    extract: Absent = None


class ThreadCount(Search):
    metadata: Annotated[dict[str, Any], Field(description="What a thread's metadata must contain.")] | None = None
    values: Absent = None
    status: ThreadStatus | None = None


class Interrupt(BaseModel):
    id: str
    value: Any


class Thread(Part):
    thread_id: str
    created_at: str
    updated_at: str
    state_updated_at: str
    metadata: dict[str, Any]
    config: dict[str, Any]
    context: dict[str, Any]
    status: ThreadStatus
    values: dict[str, Any] | None
    interrupts: dict[str, list[Interrupt]]
    error: None


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


class StateAt(Search):
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


def _place(value: Any) -> Any:
    """LangGraph's client in JavaScript writes a place as a config."""
    return value["configurable"] if isinstance(value, dict) and value.keys() == {"configurable"} else value


class History(Search):
    limit: Annotated[int, Field(ge=1, le=1000), WHOLE] = 10
    before: Annotated[Uuid | Checkpoint | None, BeforeValidator(_place)] = None
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
    metadata: dict[str, Any]
    created_at: str | None
    interrupts: list[Interrupt]


# Runs


class RunInput(Body):
    messages: Annotated[
        GivenMessages,
        Field(description="New messages, the last one a user's or a tool's result; instructions may follow. Each call has its result."),
    ]


class Command(Body):
    resume: Annotated[Any, Field(description="The answer to what the thread waits for.")] = None
    goto: Absent = None
    update: Absent = None
    graph: Absent = None

    @property
    def empty(self) -> bool:
        return self.resume is None


class RunConfig(Search):
    """What only steers the client's own side, such as callbacks or a run's name, is ignored."""

    recursion_limit: Annotated[int, Field(ge=1), WHOLE] | None = None
    tags: Annotated[list[Any], Field(description="Labels for a tracer. They are not kept.")] | None = None
    metadata: Annotated[dict[str, Any], Field(description="Added to the run's.")] | None = None
    configurable: Annotated[dict[str, Any], Field(description="Options of the agent, for this run.")] | None = None


class RunFields(Body):
    """How something is run."""

    config: RunConfig | None = None
    context: Context | None = None
    metadata: Metadata | None = None
    interrupt_before: Nodes | None = None
    interrupt_after: Nodes | None = None
    stream_mode: StreamMode | Annotated[list[StreamMode], Field(min_length=1)] | None = None
    stream_subgraphs: Annotated[bool, Field(description="Events of subgraphs too. The agent itself has none.")] = False
    stream_resumable: Annotated[bool, Field(description="Keep the events for some minutes, for whoever comes back with a Last-Event-ID.")] = False
    on_disconnect: OnDisconnect = "continue"
    multitask_strategy: Strategy = "enqueue"
    if_not_exists: Literal["create", "reject"] = "reject"
    strict_resume: Annotated[bool, Field(description="A resume that nothing waits for is always refused.")] = True
    webhook: Absent = None
    after_seconds: Absent = None
    feedback_keys: Absent = None
    langsmith_tracer: Absent = None
    checkpoint_during: Annotated[bool, Field(description="The older form of durability.")] = True
    durability: Annotated[
        Literal["sync", "async", "exit"],
        Field(description="Every run is as durable as `sync` where it matters. Less cannot be had."),
    ] = "sync"


class RunBase(RunFields):
    assistant_id: AssistantName


class RunCreate(RunBase):
    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "required": ["input", "command"],
                "properties": {
                    "input": {"type": "object", "minProperties": 1},
                    "command": {"type": "object", "required": ["resume"], "properties": {"resume": {"not": {"type": "null"}}}},
                },
            }
        }
    )

    input: Annotated[RunInput | Empty | None, Field(description="With neither input nor command the thread goes on as it is.")] = None
    command: Command | None = None
    checkpoint: Checkpoint | None = None
    checkpoint_id: Uuid | None = None
    on_completion: Annotated[Literal["delete", "keep"], Field(description="Of runs without a thread. It changes nothing here.")] = "keep"


class StatelessRunCreate(RunBase):
    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "required": ["command"],
                "properties": {"command": {"type": "object", "required": ["resume"], "properties": {"resume": {"not": {"type": "null"}}}}},
            }
        }
    )

    input: RunInput
    command: Annotated[Command | None, Field(description="Without a thread nothing waits for one.")] = None
    checkpoint: Absent = None
    checkpoint_id: Absent = None
    on_completion: Annotated[Literal["delete", "keep"], Field(description="What becomes of the thread that is made for the run.")] = "delete"


class BatchRun(RunCreate):
    """A run of a batch, on a thread or on one of its own."""

    thread_id: ThreadId | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        """LangGraph's client in JavaScript sends the names of a batch as JavaScript writes them, and assistant_id in both forms."""
        if not isinstance(value, dict):
            return value
        names = {to_camel(name): name for name in cls.model_fields}
        return {names.get(name, name): inner for name, inner in value.items() if inner is not None}


class ThreadPrune(Body):
    thread_ids: Annotated[list[ThreadId], Field(max_length=100)]
    strategy: Annotated[
        Literal["delete", "keep_latest"],
        Field(description="Delete the threads, or all of their history but the last state."),
    ] = "delete"


class Pruned(BaseModel):
    pruned_count: int


class Run(Part):
    run_id: str
    thread_id: str
    assistant_id: str
    status: RunStatus
    metadata: dict[str, Any]
    kwargs: dict[str, Any]
    multitask_strategy: Strategy
    cancel_reason: None
    created_at: str
    updated_at: str


class RunsCancel(Body):
    thread_id: ThreadId
    run_ids: Annotated[list[Uuid], Field(min_length=1, max_length=100)]
    status: Absent = None


# Crons

CronPath = Annotated[UUID, Path(description="A cron of the caller's.")]
CronSchedule = Annotated[str, Field(max_length=200, description="As cron writes it: five fields, or `@daily` and the like.")]
CronTimezone = Annotated[str, Field(max_length=64, description="A name of the IANA database, such as `Europe/Berlin`. UTC unless it is given.")]
CronSort = Literal["cron_id", "assistant_id", "thread_id", "created_at", "updated_at", "next_run_date", "end_time"]
CronField = Literal[
    "cron_id", "assistant_id", "thread_id", "end_time", "schedule", "timezone", "created_at", "updated_at", "user_id", "payload",
    "next_run_date", "metadata", "now", "on_run_completed", "enabled",
]  # fmt: skip


def _moment(value: Any) -> datetime:
    """In UTC. One without an offset is UTC too."""
    try:
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise PydanticCustomError("moment", "must be a date and a time, such as 2030-01-31T09:00:00+01:00") from None


Moment = Annotated[datetime, BeforeValidator(_moment), WithJsonSchema({"type": "string", "format": "date-time"})]
OnRunCompleted = Annotated[Literal["delete", "keep"], Field(description="What becomes of the thread that is made for each run.")]


class CronRun(RunBase):
    """What each run of a cron is given."""

    input: RunInput


class CronCreate(CronRun):
    schedule: CronSchedule
    timezone: CronTimezone | None = None
    end_time: Annotated[Moment, Field(description="The last moment at which a run may begin.")] | None = None
    enabled: bool = True


class StatelessCronCreate(CronCreate):
    on_run_completed: OnRunCompleted = "delete"


class CronUpdate(RunFields):
    """What is not given stays. An end_time of null takes it away."""

    assistant_id: AssistantName | None = None
    input: RunInput | None = None
    schedule: CronSchedule | None = None
    timezone: CronTimezone | None = None
    end_time: Annotated[Moment, Field(description="The last moment at which a run may begin.")] | None = None
    enabled: bool | None = None
    on_run_completed: OnRunCompleted | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        return {name: inner for name, inner in value.items() if inner is not None or name == "end_time"} if isinstance(value, dict) else value


class CronCount(Search):
    assistant_id: AssistantName | None = None
    thread_id: ThreadId | None = None
    metadata: Annotated[dict[str, Any], Field(description="What a cron's metadata must contain.")] | None = None


class CronSearch(CronCount):
    enabled: bool | None = None
    limit: Limit = 10
    offset: Offset = 0
    sort_by: CronSort = "created_at"
    sort_order: Literal["asc", "desc"] = "desc"
    select: list[CronField] | None = None


class Cron(Part):
    cron_id: str
    assistant_id: str
    thread_id: str | None
    on_run_completed: Literal["delete", "keep"] | None
    end_time: str | None
    schedule: str
    timezone: str | None
    created_at: str
    updated_at: str
    payload: dict[str, Any]
    user_id: None
    next_run_date: str | None
    metadata: dict[str, Any]
    enabled: bool


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
    index: Absent = None
    ttl: Absent = None


class ItemDelete(Body):
    namespace: Namespace
    key: Key


class ItemSearch(Search):
    namespace_prefix: NamespacePart = []
    filter: Annotated[dict[str, str | int | float | bool | None], Field(description="What fields of the value must equal.")] = {}
    limit: Limit = 10
    offset: Offset = 0
    query: Absent = None
    refresh_ttl: Annotated[bool, Field(description="Items have no ttl here.")] = False


class NamespaceList(Search):
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

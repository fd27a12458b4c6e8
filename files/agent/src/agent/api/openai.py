"""The agent as a model of OpenAI's API, for clients that speak nothing else.

Without a word on threads, `messages` is the whole conversation: it is given to the agent on a thread that is thrown
away afterwards, and the work stops when the client hangs up. With the header X-Thread-Id that thread is the
conversation: only the last question is added to it, and the work goes on without the client.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Request, Response
from pydantic import AfterValidator, BaseModel, Field, StringConstraints
from pydantic_core import PydanticCustomError

from agent.api.admission import canceller, submit
from agent.api.answers import EVENTS, Attended, Json, dump, event_stream
from agent.api.assistants import STARTED
from agent.api.requests import JsonRoute, TurnId
from agent.api.schemas import THREAD_ID, WHOLE, Body, Text, TextBlock
from agent.api.threads import text_of
from agent.errors import ConversationTooLong, InvalidRequest, NotFound, NotSupported, ServiceError
from agent.runs.events import Event
from agent.runs.followers import Followers
from agent.runs.records import Run, RunOptions
from agent.services import services

PREFIX = "/openai/v1"
MODEL = "agent"

router = APIRouter(prefix=PREFIX, tags=["openai"], route_class=JsonRoute)


class ApprovalNeeded(ServiceError):
    status = 409
    code = "approval_needed"
    message = "The agent waits for an approval. It cannot be given here, but by the LangGraph API on a kept thread."


class ModelNotFound(NotFound):
    code = "model_not_found"
    message = f"There is no such model. The agent is called `{MODEL}`."


# What they take


def _refuse_true(value: bool) -> bool:
    if value:
        raise PydanticCustomError("not_false", "Input can only be false")
    return value


# Literal[False] would take 0 as well.
No = Annotated[bool, AfterValidator(_refuse_true), Field(json_schema_extra={"const": False})]


class Instruction(Body):
    """Put before the next question: the agent's own instructions are the operator's."""

    role: Literal["system", "developer"]
    content: str | list[TextBlock]
    name: str | None = None


class Question(Body):
    role: Literal["user"]
    content: Text | Annotated[list[TextBlock], Field(min_length=1)]
    name: str | None = None


class Answer(Body):
    role: Literal["assistant"]
    content: str | list[TextBlock]
    name: str | None = None
    refusal: None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: No = False


A_QUESTION = {"contains": {"type": "object", "required": ["role"], "properties": {"role": {"const": "user"}}}}
StopText = Annotated[str, StringConstraints(min_length=1, max_length=100)]
MaxTokens = Annotated[int, Field(ge=1, le=131_072, description="Not more than the service's AGENT_MAX_TOKENS."), WHOLE]
ModelPath = Annotated[str, Path(max_length=64)]
ThreadHeader = Annotated[str | None, Header(alias="X-Thread-Id", pattern=THREAD_ID)]


class Completion(Body):
    model: Annotated[str, Field(json_schema_extra={"enum": [MODEL]})]
    messages: Annotated[list[Instruction | Question | Answer], Field(min_length=1, json_schema_extra=A_QUESTION)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256, description="Kept with the run.")] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16, description="Kept with the run.")] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**31), le=2**31 - 1), WHOLE] | None = None
    stop: StopText | Annotated[list[StopText], Field(min_length=1, max_length=4)] | None = None
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    store: No | None = None
    logprobs: No | None = None


# What they answer


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Said(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    index: int
    message: Said
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completed(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class OpenAIErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    error: OpenAIErrorBody


@router.get("/models", response_model=Models)
async def list_models() -> Json:
    return Json({"object": "list", "data": [_model()]})


@router.get("/models/{model}", response_model=Model, responses={404: {}})
async def get_model(model: ModelPath) -> Json:
    _check_model(model)
    return Json(_model())


@router.post(
    "/chat/completions",
    response_model=Completed,
    responses={
        **EVENTS,
        **{status: {} for status in (404, 409, 429, 502, 504)},
    },
)
async def complete(request: Request, asked: Completion, thread_id: ThreadHeader = None, turn_id: TurnId = None) -> Response:
    """Ask the agent. With X-Thread-Id only the last question is sent, to that thread, which remembers the rest."""
    _check_model(asked.model)
    given = _messages(asked, services(request).settings.max_message_chars)
    options = RunOptions(
        stream=("messages",) if asked.stream else ("updates",),
        waited=True,
        on_completion="keep" if thread_id else "delete",
        model=_parameters(asked, services(request).settings.max_tokens),
        metadata={**(asked.metadata or {}), **({"user": asked.user} if asked.user else {})},
    )
    run = await submit(request, thread_id, {"messages": given[-1:] if thread_id else given}, options, turn_id=turn_id)
    answering = Answering(services(request).followers, run)
    gone = canceller(request, run) if run.created and not thread_id else None
    if asked.stream:
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return event_stream(answering.chunks(with_usage=with_usage), on_disconnect=gone)
    return Attended(answering.answer, gone)


def _model() -> dict[str, Any]:
    return {"id": MODEL, "object": "model", "created": int(STARTED.timestamp()), "owned_by": "agent"}


def _check_model(name: str) -> None:
    if name != MODEL:
        raise ModelNotFound


def _messages(asked: Completion, longest: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    instructions: list[str] = []
    for message in asked.messages:
        text = text_of(message.content)
        if isinstance(message, Instruction):
            instructions.append(text)
            continue
        if isinstance(message, Question):
            if len(text) > longest:
                raise InvalidRequest(f"messages: a question must have at most {longest} characters.")
            text = "\n\n".join([*instructions, text])
            instructions.clear()
        if text:  # an answer that was stopped at once is empty
            messages.append({"role": message.role, "content": text})
    if not any(message["role"] == "user" for message in messages):
        raise InvalidRequest("messages: there must be a question, a message of the user's.")
    return messages


def _parameters(asked: Completion, most_tokens: int) -> dict[str, Any]:
    """What the model is to be told, in its own words."""
    named = asked.model_dump(include={"temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop"}, exclude_none=True)
    limits = [limit for limit in (asked.max_completion_tokens, asked.max_tokens) if limit]
    return named | ({"max_completion_tokens": min(*limits, most_tokens)} if limits else {})


class Answering:
    """The run of a completion, told in OpenAI's words."""

    def __init__(self, followers: Followers, run: Run) -> None:
        self._followers = followers
        self._run = run
        self._head = {"id": f"chatcmpl-{run.run_id}", "created": int(run.created_at.timestamp()), "model": MODEL}
        self._speaking: str | None = None
        self._reason = "stop"
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    async def answer(self) -> Response:
        try:
            text = "".join([piece async for piece in self._text()])
        except ServiceError as error:
            return openai_error(error)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": self._reason, "logprobs": None}
        return Json({**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage})

    async def chunks(self, *, with_usage: bool) -> AsyncGenerator[bytes]:
        usage = {"usage": None} if with_usage else {}
        yield self._chunk({"role": "assistant", "content": "", "refusal": None}, None, usage)
        try:
            async with aclosing(self._text()) as pieces:
                async for piece in pieces:
                    yield self._chunk({"content": piece}, None, usage)
        except ServiceError as error:
            yield b"data: %s\n\n" % dump(_describe(error))
        else:
            yield self._chunk({}, self._reason, usage)
            if with_usage:
                last = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage}
                yield b"data: %s\n\n" % dump(last)
        yield b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None, more: dict[str, Any]) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice], **more}
        return b"data: %s\n\n" % dump(chunk)

    async def _text(self) -> AsyncGenerator[str]:
        """All that the agent says, a blank line between what it says before and after it uses a tool."""
        spoke = False
        async with aclosing(self._followers.events(self._run.owner, self._run.run_id)) as events:
            async for event in events:
                for piece in self._pieces(event):
                    spoke = True
                    yield piece
                if event.event == "error":
                    raise _failure(event.data)
                if event.event == "end":
                    if event.data.get("interrupts"):
                        raise ApprovalNeeded
                    if not spoke and event.data.get("response"):
                        yield event.data["response"]  # told by another worker, which has only this

    def _pieces(self, event: Event) -> Iterator[str]:
        match event.event:
            case "messages":
                yield from self._say(event.data[0])
            case "updates":
                for update in event.data.values():
                    for message in (update or {}).get("messages", ()) if isinstance(update, dict) else ():
                        yield from self._say(message)
            case "usage":
                self._usage = {
                    "prompt_tokens": event.data["input_tokens"],
                    "completion_tokens": event.data["output_tokens"],
                    "total_tokens": event.data["total_tokens"],
                }

    def _say(self, message: dict[str, Any]) -> Iterator[str]:
        if message["type"] not in ("ai", "AIMessageChunk"):
            return
        reason = message["response_metadata"].get("finish_reason")
        if reason:
            self._reason = reason if reason in ("length", "content_filter") else "stop"
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if text:
            if self._speaking not in (None, message["id"]):
                yield "\n\n"
            self._speaking = message["id"]
            yield text


# Errors


def openai_error(error: ServiceError) -> Json:
    """The same failure as OpenAI would tell it. What OpenAI's API calls a bad request has one status there."""
    status = 400 if error.status in (413, 415, 422) else error.status
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return Json(_describe(error), status, headers)


def _describe(error: ServiceError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else TYPES.get(error.status, "invalid_request_error")
    param = error.param if isinstance(error, NotSupported) else None
    return {"error": {"message": error.message, "type": kind, "param": param, "code": CODES.get(error.code, error.code)}}


TYPES = {401: "authentication_error", 429: "rate_limit_error"}
CODES = {ConversationTooLong.code: "context_length_exceeded", NotSupported.code: "unsupported_parameter"}


def _failure(told: dict[str, Any]) -> ServiceError:
    """The error that a run's event tells of. Events have no statuses, but each code has its own."""
    error = ServiceError(told["message"], retry_after=told.get("retry_after"))
    error.code = told["code"]
    error.status = next((kind.status for kind in ServiceError.__subclasses__() if kind.code == error.code), 500)
    return error

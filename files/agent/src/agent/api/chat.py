"""POST /chat and POST /chat/stream: a message in, the agent's answer out, in one piece or as it comes about."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.api.admission import submit
from agent.api.answers import EVENTS, Json, event_stream, sse
from agent.api.requests import owner, parse, read_body
from agent.api.schemas import NOT_BLANK
from agent.errors import InvalidJson, InvalidRequest, NotFound, UnsupportedMediaType
from agent.runs.events import ATTEMPT
from agent.runs.followers import Followers
from agent.runs.records import Run, RunOptions, failure_of
from agent.services import services

router = APIRouter(tags=["chat"])

THREAD_ID = r"^[A-Za-z0-9_-]{1,64}$"
TURN_ID = r"^[\x21-\x7e]{1,128}$"
TITLE_CHARACTERS = 80
# More than the turn itself has: who waits is told how it ended, and not that nobody knows.
GRACE_SECONDS = 0.5


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    message: Annotated[str, Field(description="Not blank.", json_schema_extra={"pattern": NOT_BLANK})]
    thread_id: Annotated[str, Field(pattern=THREAD_ID)] | None = None
    turn_id: Annotated[str, Field(pattern=TURN_ID, description="A second request with the same one adds no second turn.")] | None = None


class ChatAnswer(BaseModel):
    response: str
    thread_id: str
    run_id: str
    interrupts: Annotated[list[dict[str, Any]], Field(description="What the agent waits to be told.")] = []


BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}}
NEW: dict[int | str, dict[str, Any]] = {404: {}, 409: {}, 429: {}}
RUN_ID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"


@router.post("/chat", response_model=ChatAnswer, openapi_extra=BODY, responses=NEW | {502: {}, 504: {}})
async def chat(request: Request) -> Response:
    """Give the agent a message and wait for its answer."""
    asked = await _read(request)
    run = await _submit(request, asked, RunOptions(waited=True, history="turn"))
    if not run.final:
        settings = services(request).settings
        run = await services(request).followers.wait(owner(request), run.run_id, settings.turn_timeout_seconds + GRACE_SECONDS)
    if run.status != "success":
        raise failure_of(run.error or {})
    result = run.result or {}
    answer = {"response": result.get("response", ""), "thread_id": run.thread_id, "run_id": run.run_id}
    if result.get("interrupts"):
        answer["interrupts"] = result["interrupts"]
    return Json(answer)


@router.post("/chat/stream", openapi_extra=BODY, response_class=Response, responses=EVENTS | NEW)
async def chat_stream(request: Request) -> Response:
    """Give the agent a message and be told as the answer comes about.

    Events: `run` {run_id, thread_id}, `token` {text}, `reasoning` {text}, `tool` {name, id, state, status}, `status`
    {state}, `usage`, and at the end `error` {code, message, retry_after} or `end` {response}. After `status` {"state":
    "restarted"} the text since the last tool comes anew.
    """
    asked = await _read(request)
    run = await _submit(request, asked, RunOptions(stream=("tokens", "tools"), resumable=True, history="turn"))
    return event_stream(_events(services(request).followers, owner(request), run, 0))


@router.get("/chat/stream/{run_id}", response_class=Response, responses=EVENTS | {404: {}})
async def resume_chat_stream(request: Request, run_id: str) -> Response:
    """Take up a stream that broke: what came after the event Last-Event-ID, and what comes."""
    last = request.headers.get("Last-Event-ID", "0")
    if not (last.isascii() and last.isdecimal() and len(last) <= 18):
        raise InvalidRequest("Last-Event-ID: must be a number.")
    if not re.fullmatch(RUN_ID, run_id):
        raise NotFound
    run = await services(request).followers.get(owner(request), run_id)
    request.state.log = {"thread_id": run.thread_id, "run_id": run.run_id}
    return event_stream(_events(services(request).followers, owner(request), run, int(last)))


async def _events(followers: Followers, caller: str, run: Run, after: int) -> AsyncGenerator[bytes]:
    failed = False
    if after < ATTEMPT:
        yield sse("run", {"run_id": run.run_id, "thread_id": run.thread_id})
    async with aclosing(followers.events(caller, run.run_id, after)) as events:
        async for event in events:
            match event.event:
                case "token" | "reasoning" | "tool" | "status" | "usage":
                    yield sse(event.event, event.data, str(event.id))
                case "error":
                    failed = True
                    told = {name: event.data[name] for name in ("code", "message", "retry_after") if name in event.data}
                    yield sse("error", told, str(event.id))
                case "end" if not failed:
                    told = {name: value for name, value in event.data.items() if name != "status"}
                    yield sse("end", told, str(event.id))


async def _submit(request: Request, asked: ChatRequest, options: RunOptions) -> Run:
    return await submit(
        request,
        asked.thread_id,
        {"messages": [{"role": "user", "content": asked.message}]},
        options,
        turn_id=asked.turn_id,
        thread_metadata={"title": " ".join(asked.message.split())[:TITLE_CHARACTERS]},
    )


async def _read(request: Request) -> ChatRequest:
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType
    values = parse(await read_body(request))
    if isinstance(values, dict) and values.get("turn_id") is None and "Idempotency-Key" in request.headers:
        values["turn_id"] = request.headers["Idempotency-Key"]
    try:
        asked = ChatRequest.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None
    most = services(request).settings.max_message_chars
    if not re.search(NOT_BLANK, asked.message) or len(asked.message) > most:
        raise InvalidRequest(f"message: must be a text of 1 to {most} characters, not blank, without NUL.")
    return asked


def _explain(error: ValidationError) -> InvalidJson | InvalidRequest:
    """Say what is wrong in words of our own: the validator's would quote the input."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    match first["loc"]:
        case ("message", *_):
            return InvalidRequest("message: must be given and be a text.")
        case ("thread_id", *_):
            return InvalidRequest("thread_id: must be 1 to 64 of the characters A-Z a-z 0-9 _ - or left out.")
        case ("turn_id", *_):
            return InvalidRequest("turn_id: must be 1 to 128 visible ASCII characters or left out.")
        case _:
            return InvalidRequest("The body must be an object with message and, if wanted, thread_id and turn_id.")

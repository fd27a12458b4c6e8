"""The agent as a model of OpenAI's API, for clients that speak nothing else.

Without a word on threads, `messages` is the whole conversation: it is given to the agent on a thread that is thrown
away afterwards, and the work stops when the client hangs up. With the header X-Thread-Id that thread is the
conversation: only the last question is added to it, and the work goes on without the client.

OpenAI's clients send a request again by themselves, with its number in a header and no Idempotency-Key. Such a request
is given the run that it began before, whether that works still or has ended. A client that waited as long as it said,
and gave up, gets some seconds to ask again before its run is stopped.
"""

import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response

from agent.api import admission
from agent.api.answers import EVENTS, Attended, Json, event_stream
from agent.api.assistants import STARTED
from agent.api.openai_answers import Answering
from agent.api.openai_errors import MODEL, ModelNotFound
from agent.api.openai_messages import conversation_of, metadata_of, new_messages, parameters_of
from agent.api.openai_schemas import Completed, Completion, Model, Models
from agent.api.requests import JsonRoute, TurnId, owner
from agent.api.schemas import THREAD_ID
from agent.runs.engine import is_worth_another_try
from agent.runs.records import Run, RunOptions
from agent.services import services

PREFIX = "/openai/v1"
# As long as OpenAI's clients wait for an answer where they are told nothing else, and between two requests.
WAIT_SECONDS = 600.0
PAUSE_SECONDS = 10.0
LONGEST_RETRY_SECONDS = 3600.0
# A client's clock starts a moment before the request is here.
EARLY_SECONDS = 0.5


class ConversationRoute(JsonRoute):
    """Its clients send the whole conversation each time."""

    def most_bytes(self, request: Request) -> int:
        return services(request).settings.openai_body_kib * 1024


router = APIRouter(prefix=PREFIX, tags=["openai"], route_class=ConversationRoute)

ModelPath = Annotated[str, Path(max_length=64)]
ThreadHeader = Annotated[str | None, Header(alias="X-Thread-Id", pattern=THREAD_ID)]


@dataclass(frozen=True, slots=True)
class Sending:
    """A request as OpenAI's clients send it, perhaps not for the first time."""

    # A digest of what is asked, the same each time that it is sent; empty for other clients.
    request: str
    # How often it was sent before.
    retry: int
    # How many seconds the client waits for the answer.
    patience: float

    @property
    def window(self) -> float:
        """Within how many seconds all its tries are."""
        return min(LONGEST_RETRY_SECONDS, self.retry * (self.patience + PAUSE_SECONDS) + PAUSE_SECONDS)


@router.get("/models", response_model=Models)
async def list_models() -> Json:
    return Json({"object": "list", "data": [_model()]})


@router.get("/models/{model}", response_model=Model, responses={404: {}})
async def get_model(model: ModelPath) -> Json:
    check_model(model)
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
    started = time.monotonic()
    check_model(asked.model)
    settings = services(request).settings
    given = conversation_of(asked, settings.max_message_chars, settings.context_tokens)
    sending = await read_sending(request, thread_id, turn_id)
    options = RunOptions(
        stream=("messages",) if asked.stream else ("updates",),
        waited=True,
        on_completion="keep" if thread_id else "delete",
        model=parameters_of(asked, settings.max_tokens),
        metadata=metadata_of(asked),
        request=sending.request,
    )
    run, begun = await submit(request, thread_id, new_messages(given) if thread_id else given, options, sending, turn_id)
    answering = Answering(services(request).followers, run)
    gone = patient_canceller(request, run, sending, started) if begun and not thread_id else None
    if asked.stream:
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return event_stream(answering.chunks(with_usage=bool(with_usage)), on_disconnect=gone)
    return Attended(answering.answer, gone)


async def read_sending(request: Request, thread_id: str | None, turn_id: str | None) -> Sending:
    """How the request is sent. One with an Idempotency-Key says itself what it repeats."""
    retry = request.headers.get("X-Stainless-Retry-Count", "")
    if turn_id or not _is_number(retry):
        return Sending("", 0, WAIT_SECONDS)
    waits = request.headers.get("X-Stainless-Read-Timeout") or request.headers.get("X-Stainless-Timeout") or ""
    patience = float(waits) if _is_number(waits.replace(".", "", 1)) else WAIT_SECONDS
    digest = hashlib.sha256(f"{thread_id or ''} {request.url.path} ".encode() + await request.body()).hexdigest()
    return Sending(digest, int(retry), patience)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9


async def submit(
    request: Request,
    thread_id: str | None,
    messages: list[dict[str, Any]],
    options: RunOptions,
    sending: Sending,
    turn_id: str | None,
) -> tuple[Run, bool]:
    """Submit a run, or take the one that an earlier try of this request began; and whether this client began it, then or now."""
    known = None
    if sending.retry:
        known = await services(request).engine.find_retried(owner(request), thread_id, sending.request, sending.retry, sending.window)
    if known is not None and not is_worth_another_try(known):
        known.created = False
        return known, True
    run = await admission.submit(request, thread_id, {"messages": messages}, options, known=known, turn_id=turn_id)
    return run, run.created or known is not None


def patient_canceller(request: Request, run: Run, sending: Sending, started: float) -> Callable[[], Awaitable[None]]:
    """What stops a run when its client goes away: at once, or later where the client will most likely ask again."""
    cancel = admission.canceller(request, run)

    async def gone() -> None:
        if sending.request and time.monotonic() - started >= sending.patience - EARLY_SECONDS:
            services(request).engine.cancel_unless_retried(run, sending.retry)
        else:
            await cancel()

    return gone


def _model() -> dict[str, Any]:
    return {"id": MODEL, "object": "model", "created": int(STARTED.timestamp()), "owned_by": "agent"}


def check_model(name: str) -> None:
    if name != MODEL:
        raise ModelNotFound

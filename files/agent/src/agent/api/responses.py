"""OpenAI's Responses API: a conversation that stays, and goes on from any of its responses.

A response is a run, and its number is the run's. It is stored as a thread of the caller's, which other APIs see too,
unless the request says `store: false`; then it is as a completion without a thread.
"""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from agent.api.answers import EVENTS, Attended, Json, event_stream
from agent.api.openai import PREFIX, ConversationRoute, check_model, patient_canceller, read_sending, submit
from agent.api.openai_answers import Answering
from agent.api.openai_messages import conversation_of, metadata_of, parameters_of
from agent.api.requests import TurnId, owner
from agent.api.responses_answers import Responding, stored_response
from agent.api.responses_schemas import RESPONSE_ID, ResponseCreate, ResponseDeleted
from agent.api.responses_schemas import Response as ResponseBody
from agent.api.threads import config_of
from agent.errors import InvalidRequest, NotFound
from agent.runs.records import Run, RunOptions
from agent.services import services

router = APIRouter(prefix=f"{PREFIX}/responses", tags=["openai"], route_class=ConversationRoute)

ResponsePath = Annotated[str, Path(pattern=RESPONSE_ID, description="A response of the caller's.")]


class NoSuchResponse(NotFound):
    code = "response_not_found"
    message = "There is no such response, or no longer."


@router.post("", response_model=ResponseBody, responses={**EVENTS, **{status: {} for status in (404, 409, 429, 502, 504)}})
async def create_response(request: Request, asked: ResponseCreate, turn_id: TurnId = None) -> Response:
    """Ask the agent. With previous_response_id only what is new is sent, and the conversation goes on from there."""
    started = time.monotonic()
    check_model(asked.model)
    if asked.store is False and asked.previous_response_id:
        raise InvalidRequest("store: must not be false where there is a previous_response_id.")
    settings = services(request).settings
    completion = asked.completion()
    thread_id, checkpoint_id = await _place(request, asked.previous_response_id)
    given = conversation_of(completion, settings.max_message_chars, settings.context_tokens, goes_on=thread_id is not None)
    sending = await read_sending(request, thread_id, turn_id)
    options = RunOptions(
        stream=("messages",) if asked.stream else ("updates",),
        waited=True,
        on_completion="delete" if asked.store is False else "keep",
        checkpoint_id=checkpoint_id,
        model=parameters_of(completion, settings.max_tokens),
        metadata=metadata_of(completion),
        request=sending.request,
    )
    run, begun = await submit(request, thread_id, given, options, sending, turn_id)
    responding = Responding(Answering(services(request).followers, run), run, _told_back(asked))
    gone = patient_canceller(request, run, sending, started) if begun and asked.store is False else None
    if asked.stream:
        return event_stream(responding.events(), on_disconnect=gone)
    return Attended(responding.answer, gone)


@router.get("/{response_id}", response_model=ResponseBody, responses={404: {}})
async def get_response(request: Request, response_id: ResponsePath) -> Json:
    return Json(stored_response(await _find(request, response_id)))


@router.delete("/{response_id}", response_model=ResponseDeleted, responses={404: {}, 409: {}})
async def delete_response(request: Request, response_id: ResponsePath) -> Json:
    """Forget a response. The last one of a thread takes the thread with it."""
    run = await _find(request, response_id)
    if len(await services(request).engine.list(run.owner, run.thread_id, limit=2)) > 1:
        await services(request).engine.delete(run.owner, run.run_id)
    else:
        await services(request).threads.delete(run.owner, run.thread_id)
    return Json({"id": response_id, "object": "response", "deleted": True})


async def _find(request: Request, response_id: str) -> Run:
    try:
        return await services(request).followers.get(owner(request), response_id.removeprefix("resp_"))
    except NotFound:
        raise NoSuchResponse from None


async def _place(request: Request, previous: str | None) -> tuple[str | None, str | None]:
    """The thread of a response, and the checkpoint that it left where others came after it."""
    if previous is None:
        return None, None
    run = await _find(request, previous)
    graph = services(request).graph
    latest = await graph.aget_state(config_of(run.thread_id))
    if (latest.metadata or {}).get("run_id") == run.run_id or not run.final:
        return run.thread_id, None
    async for state in graph.aget_state_history(config_of(run.thread_id), filter={"run_id": run.run_id}, limit=1):
        return run.thread_id, state.config["configurable"]["checkpoint_id"]
    raise NoSuchResponse


def _told_back(asked: ResponseCreate) -> dict[str, Any]:
    """What a response says of its request."""
    told = asked.model_dump(include={"instructions", "max_output_tokens", "previous_response_id", "temperature", "top_p", "truncation", "user"})
    told["tools"] = [tool.model_dump() for tool in asked.tools or ()]
    told["tool_choice"] = asked.model_dump(include={"tool_choice"})["tool_choice"] or "auto"
    told["text"] = {"format": asked.text.format.model_dump(by_alias=True) if asked.text and asked.text.format else {"type": "text"}}
    told["store"] = asked.store is not False
    return told

"""Runs: a message or an answer given to a thread, and the work on it followed, waited for or stopped."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlencode
from uuid import UUID

import psycopg
from fastapi import APIRouter, Body, Header, Query, Request, Response
from langchain_core.messages import AIMessage

from agent.access.in_flight import LARGE_BYTES
from agent.api import streams
from agent.api.admission import canceller, count, submit
from agent.api.answers import EVENTS, Json, Live, dump, event_stream, late_json, pick, sse
from agent.api.assistants import options_of
from agent.api.messages import given_messages, open_results
from agent.api.requests import JsonRoute, TurnId, owner
from agent.api.schemas import (
    ASSISTANT_ID,
    BatchRun,
    CancelAction,
    Node,
    Run,
    RunBase,
    RunCreate,
    RunField,
    RunPath,
    RunsCancel,
    RunStatus,
    StatelessRunCreate,
    StreamMode,
    ThreadPath,
)
from agent.api.schemas import RunInput as Input
from agent.api.threads import PAGE, Reading, check_checkpoint, config_of, listed
from agent.errors import InvalidRequest, MessageExists, NotFound, NothingWaits, ServiceError, StorageUnavailable
from agent.runs.records import Run as StoredRun
from agent.runs.records import RunInput, RunOptions, describe_failure
from agent.services import Services, services
from agent.tools.approval import check_answer

router = APIRouter(tags=["runs"], route_class=JsonRoute)

ALL_MODES: tuple[StreamMode, ...] = ("values", "updates", "messages-tuple", "custom")
# Above what any service allows. A client may write a number that no column holds.
MAX_STEPS = 10_000
MAX_BATCH = 20
NO_CALL = "messages: there is no tool call that this is the result of."
# How often a thread is asked for new runs while its stream is followed.
JOINED_SECONDS = 1.0
NEW: dict[int | str, dict[str, Any]] = {404: {}, 409: {}, 429: {}}
STATE: dict[int | str, dict[str, Any]] = {200: {"description": "The thread's values, or `__error__` with what went wrong."}}

StreamModes = Annotated[list[StreamMode | Literal[""]] | None, Query()]
Namespaces = Annotated[str, Query(description="Of subgraphs. The agent has none.")]
LastEventId = Annotated[str, Header(alias="Last-Event-ID", pattern=r"^(-?[0-9]{1,18})?$", description="Only what came after this one.")]


# Runs on a thread


@router.post("/threads/{thread_id}/runs", response_model=Run, responses=NEW)
async def create_run(request: Request, thread_id: ThreadPath, asked: RunCreate, turn_id: TurnId = None) -> Json:
    """Start a run and do not wait for it."""
    run = await _submit(request, thread_id, asked, modes_of(asked) or ALL_MODES, turn_id, resumable=True)
    return Json(describe_run(run), headers={"Content-Location": _path(run)})


@router.post("/threads/{thread_id}/runs/wait", response_model=dict[str, Any], responses=STATE | NEW)
async def wait_for_run(request: Request, thread_id: ThreadPath, asked: RunCreate, turn_id: TurnId = None) -> Live:
    """Run and answer with what the thread then holds. Blank lines before it keep the connection open."""
    run = await _submit(request, thread_id, asked, modes_of(asked), turn_id)
    return _wait(request, run, cancel=_leaves(asked, run))


@router.post("/threads/{thread_id}/runs/stream", response_class=Response, responses=EVENTS | NEW)
async def stream_run(request: Request, thread_id: ThreadPath, asked: RunCreate, turn_id: TurnId = None, namespace: Namespaces = "") -> Live:
    """Run and tell what happens. Location takes up a stream that broke, with Last-Event-ID."""
    modes = modes_of(asked) or ("values",)
    run = await _submit(request, thread_id, asked, modes, turn_id)
    return _stream(request, run, modes, cancel=_leaves(asked, run))


@router.get("/threads/{thread_id}/runs", response_model=list[Run], responses={404: {}, 429: {}})
async def list_runs(
    request: Request,
    thread_id: ThreadPath,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
    offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
    status: RunStatus | None = None,
    select: Annotated[list[RunField] | None, Query()] = None,
) -> Response:
    """Newest first. An answer ends after some MiB: go on with `offset`."""

    async def described(reading: Reading) -> AsyncGenerator[bytes]:
        for start in range(offset, offset + limit, PAGE):
            wanted = min(PAGE, offset + limit - start)
            runs = await services(request).engine.list(owner(request), thread_id, wanted, start, status)
            for run in runs:
                yield dump(pick(describe_run(run), select))
            if len(runs) < wanted:
                return

    return await listed(request, described)


@router.get("/threads/{thread_id}/runs/{run_id:uuid}", response_model=Run, responses={404: {}})
async def get_run(request: Request, thread_id: ThreadPath, run_id: RunPath) -> Json:
    return Json(describe_run(await _find(request, thread_id, run_id)))


@router.delete("/threads/{thread_id}/runs/{run_id:uuid}", status_code=204, responses={404: {}, 409: {}})
async def delete_run(request: Request, thread_id: ThreadPath, run_id: RunPath) -> Response:
    """Forget a run that has ended. What was said stays in the thread."""
    await _find(request, thread_id, run_id)
    await services(request).engine.delete(owner(request), str(run_id))
    return Response(status_code=204)


@router.get("/threads/{thread_id}/runs/{run_id:uuid}/join", response_model=dict[str, Any], responses=STATE | {404: {}, 429: {}})
async def join_run(request: Request, thread_id: ThreadPath, run_id: RunPath, cancel_on_disconnect: bool = False) -> Live:
    """Wait for a run and answer as /runs/wait does."""
    threads = services(request).threads
    if await threads.size(await threads.get(owner(request), thread_id)) > LARGE_BYTES:
        await count(request)
    return _wait(request, await _find(request, thread_id, run_id), cancel=cancel_on_disconnect)


@router.get("/threads/{thread_id}/runs/{run_id:uuid}/stream", response_class=Response, responses=EVENTS | {404: {}})
async def join_run_stream(
    request: Request,
    thread_id: ThreadPath,
    run_id: RunPath,
    stream_mode: StreamModes = None,
    cancel_on_disconnect: bool = False,
    last_event_id: LastEventId = "",
    namespace: Namespaces = "",
) -> Live:
    """Tell what happened since Last-Event-ID, as far as it is kept, and what happens, in the modes the run has."""
    return _joined(request, await _find(request, thread_id, run_id), stream_mode, last_event_id, cancel=cancel_on_disconnect)


@router.get("/runs/{run_id:uuid}/stream", response_class=Response, responses=EVENTS | {404: {}})
async def join_stateless_run_stream(
    request: Request,
    run_id: RunPath,
    stream_mode: StreamModes = None,
    cancel_on_disconnect: bool = False,
    last_event_id: LastEventId = "",
    namespace: Namespaces = "",
) -> Live:
    """The same, where the thread is not known."""
    return _joined(request, await _find(request, None, run_id), stream_mode, last_event_id, cancel=cancel_on_disconnect)


def _joined(request: Request, run: StoredRun, stream_mode: StreamModes, last_event_id: str, *, cancel: bool) -> Live:
    modes = tuple(mode for mode in stream_mode or () if mode) or tuple(mode for mode in ALL_MODES if streams.SOURCES[mode] in run.options.stream)
    return _stream(request, run, modes, max(0, int(last_event_id or 0)), cancel=cancel)


@router.post("/threads/{thread_id}/runs/{run_id:uuid}/cancel", status_code=204, responses={404: {}})
async def cancel_run(
    request: Request,
    thread_id: ThreadPath,
    run_id: RunPath,
    wait: bool = False,
    action: CancelAction = "interrupt",
    reason: Annotated[str, Query(max_length=1000, description="It is not kept.")] = "",
) -> Response:
    """Stop a run. `rollback` also deletes it, and what it put into the thread."""
    await _find(request, thread_id, run_id)
    await services(request).engine.cancel(owner(request), str(run_id), wait=wait, rollback=action == "rollback")
    return Response(status_code=204)


@router.post("/runs/cancel", status_code=204, responses={404: {}})
async def cancel_runs(request: Request, asked: RunsCancel, action: CancelAction = "interrupt") -> Response:
    """Stop some runs of a thread."""
    for run_id in asked.run_ids:
        await _find(request, asked.thread_id, run_id)
    for run_id in asked.run_ids:
        await services(request).engine.cancel(owner(request), run_id, rollback=action == "rollback")
    return Response(status_code=204)


# Runs on a thread that is made for them, and deleted when they end unless it is to be kept


@router.post("/runs/batch", response_model=list[Run], responses=NEW)
async def create_runs(request: Request, asked: Annotated[list[BatchRun], Body(min_length=1, max_length=MAX_BATCH)]) -> Json:
    """Start some runs and do not wait for them. Each is counted; where one is refused, those before it were started."""
    runs = []
    for each in asked:
        modes = modes_of(each) or ALL_MODES
        if each.thread_id is not None:
            runs.append(await _submit(request, each.thread_id, each, modes, None, resumable=True))
        elif isinstance(each.input, Input):
            runs.append(await _submit_stateless(request, each, each.input, modes, None, resumable=True))
        else:
            raise InvalidRequest("input: must be given where there is no thread_id.")
    return Json([describe_run(run) for run in runs])


@router.post("/runs", response_model=Run, responses=NEW)
async def create_stateless_run(request: Request, asked: StatelessRunCreate, turn_id: TurnId = None) -> Json:
    run = await _submit_stateless(request, asked, asked.input, modes_of(asked) or ALL_MODES, turn_id, resumable=True)
    return Json(describe_run(run), headers={"Content-Location": _path(run)})


@router.post("/runs/wait", response_model=dict[str, Any], responses=STATE | NEW)
async def wait_for_stateless_run(request: Request, asked: StatelessRunCreate, turn_id: TurnId = None) -> Live:
    run = await _submit_stateless(request, asked, asked.input, modes_of(asked), turn_id)
    return _wait(request, run, cancel=_leaves(asked, run))


@router.post("/runs/stream", response_class=Response, responses=EVENTS | NEW)
async def stream_stateless_run(request: Request, asked: StatelessRunCreate, turn_id: TurnId = None, namespace: Namespaces = "") -> Live:
    modes = modes_of(asked) or ("values",)
    run = await _submit_stateless(request, asked, asked.input, modes, turn_id)
    return _stream(request, run, modes, cancel=_leaves(asked, run))


# All that happens on a thread


@router.get("/threads/{thread_id}/stream", response_class=Response, responses=EVENTS | {404: {}})
async def join_thread_stream(
    request: Request,
    thread_id: ThreadPath,
    stream_mode: Annotated[list[Literal["run_modes", "lifecycle", "state_update"]] | None, Query()] = None,
    last_event_id: LastEventId = "",
) -> Live:
    """Tell what the runs of a thread tell, those that begin later too, each followed by `run_done`. It ends with the connection.

    With `lifecycle` only the first and the last event of each run, with `state_update` only its states. Nothing is kept
    from before, so Last-Event-ID changes nothing.
    """
    thread = await services(request).threads.get(owner(request), thread_id)
    return event_stream(
        _until_it_goes(request, thread.thread_id, set(stream_mode or ("run_modes",))), weigh=functools.partial(services(request).answers.of, owner(request))
    )


async def _until_it_goes(request: Request, thread_id: str, wanted: set[str]) -> AsyncGenerator[bytes]:
    """The stream ends where the thread is deleted, or the storage goes away."""
    with suppress(ServiceError):
        async with aclosing(_thread_events(request, thread_id, wanted)) as events:
            async for piece in events:
                yield piece


async def _thread_events(request: Request, thread_id: str, wanted: set[str]) -> AsyncGenerator[bytes]:
    engine, followers, caller = services(request).engine, services(request).followers, owner(request)
    since = datetime.now(UTC)
    told: set[str] = set()
    while True:
        # Those that began before are followed only while they work.
        runs = [run for run in await engine.list(caller, thread_id, MAX_BATCH) if not run.final or run.created_at > since]
        for run in reversed(runs):
            if run.run_id in told:
                continue
            told.add(run.run_id)
            async with aclosing(followers.events(caller, run.run_id)) as events:
                async for event in events:
                    kind = event.event.partition("|")[0]
                    if kind == "end":
                        yield sse("run_done", {"run_id": run.run_id, "thread_id": thread_id, "status": event.data["status"]})
                    elif (
                        "run_modes" in wanted
                        or ("state_update" in wanted and kind in ("values", "updates"))
                        or ("lifecycle" in wanted and kind in ("metadata", "error"))
                    ):
                        yield sse(event.event, streams.describe_error(event.data) if kind == "error" else event.data)
        await asyncio.sleep(JOINED_SECONDS)


# How it is done


async def _find(request: Request, thread_id: str | None, run_id: UUID | str) -> StoredRun:
    run = await services(request).followers.get(owner(request), str(run_id))
    if thread_id not in (None, run.thread_id):
        raise NotFound("There is no such run.")
    request.state.log = {"thread_id": run.thread_id, "run_id": run.run_id}
    return run


async def _submit(
    request: Request,
    thread_id: str,
    asked: RunCreate,
    modes: tuple[StreamMode, ...],
    turn_id: str | None,
    *,
    resumable: bool = False,
) -> StoredRun:
    checkpoint_id = check_checkpoint(thread_id, asked.checkpoint) or asked.checkpoint_id
    run_input: RunInput = None
    command = asked.command if asked.command and not asked.command.empty else None
    if command and asked.input:
        raise InvalidRequest("command: cannot be given together with input.")
    if command:
        run_input = {"resume": command.resume}
    elif isinstance(asked.input, Input):
        run_input = {"messages": given_messages(asked.input.messages, services(request).settings.max_message_chars)}
    if turn_id is None:  # or it may be a repetition, which was accepted already
        await _check_state(request, thread_id, run_input, checkpoint_id)
    return await submit(
        request,
        thread_id,
        run_input,
        await run_options(services(request), owner(request), asked, modes, resumable=resumable, checkpoint_id=checkpoint_id),
        turn_id=turn_id,
        strategy=asked.multitask_strategy,
        create_thread=asked.if_not_exists == "create",
    )


async def _submit_stateless(
    request: Request,
    asked: StatelessRunCreate | BatchRun,
    given: Input,
    modes: tuple[StreamMode, ...],
    turn_id: str | None,
    *,
    resumable: bool = False,
) -> StoredRun:
    if asked.command and not asked.command.empty:
        raise InvalidRequest("command: cannot be given without a thread.")
    return await submit(
        request,
        None,
        {"messages": stateless_messages(services(request), given)},
        # There will be no thread to see the values in.
        await run_options(services(request), owner(request), asked, (*modes, "values"), resumable=resumable, on_completion=asked.on_completion),
        turn_id=turn_id,
    )


async def run_options(worker: Services, caller: str, asked: RunBase, modes: tuple[StreamMode, ...], *, resumable: bool, **more: Any) -> RunOptions:
    """As the engine takes them; the rest is for RunOptions. Raises NotFound (the assistant), InvalidRequest."""
    set_options = await options_of(worker, caller, asked.assistant_id, asked.config.configurable if asked.config else None, asked.context)
    return RunOptions(
        stream=streams.sources(modes),
        subgraphs=asked.stream_subgraphs,
        # What is only created is followed later, and perhaps through another worker.
        resumable=resumable or asked.stream_resumable,
        recursion_limit=_steps(asked),
        interrupt_before=_nodes(asked.interrupt_before),
        interrupt_after=_nodes(asked.interrupt_after),
        metadata={**((asked.config and asked.config.metadata) or {}), **(asked.metadata or {})},
        **set_options,
        **more,
    )


def _steps(asked: RunBase) -> int | None:
    limit = asked.config.recursion_limit if asked.config else None
    return min(limit, MAX_STEPS) if limit else None


def _nodes(names: Literal["*"] | list[Node] | None) -> tuple[str, ...]:
    return get_args(Node) if names == "*" else tuple(names or ())


async def _check_state(request: Request, thread_id: str, run_input: RunInput, checkpoint_id: str | None) -> None:
    """Refuse at once what could only fail later. Most runs have nothing to look up."""
    given: Mapping[str, Any] = run_input or {}
    resumes = "resume" in given
    ids = {message["id"] for message in given.get("messages", ()) if "id" in message}
    results = open_results(given.get("messages", ()))
    if not (resumes or ids or results or checkpoint_id or run_input is None):
        return
    try:
        thread = await services(request).threads.get(owner(request), thread_id)
    except NotFound:
        if resumes or checkpoint_id or results:
            raise
        return
    state = await services(request).graph.aget_state(config_of(thread_id, checkpoint_id))
    if checkpoint_id and state.created_at is None:
        raise NotFound("There is no such checkpoint.")
    if run_input is None and not state.next and (checkpoint_id or thread.status != "busy"):
        raise InvalidRequest("The thread has nothing to go on with.")
    if resumes and not state.interrupts:
        raise NothingWaits
    if resumes and any(_is_approval(waiting.value) for waiting in state.interrupts):
        answer = given["resume"]
        named = answer.keys() <= {waiting.id for waiting in state.interrupts} if isinstance(answer, dict) and answer else False
        for each in answer.values() if named else [answer]:
            check_answer(each)
    calls = {call["id"] for message in state.values.get("messages", ()) if isinstance(message, AIMessage) for call in message.tool_calls}
    if results - calls:
        raise InvalidRequest(NO_CALL)
    if ids & {message.id for message in state.values.get("messages", ())}:
        # It would take that message's place, and leave no new one to answer.
        raise MessageExists


def stateless_messages(worker: Services, given: Input) -> list[dict[str, Any]]:
    """The messages of a run whose thread has none. Raises InvalidRequest."""
    listed = given_messages(given.messages, worker.settings.max_message_chars)
    if open_results(listed):
        raise InvalidRequest(NO_CALL)
    return listed


def _is_approval(question: Any) -> bool:
    return isinstance(question, dict) and question.get("type") == "approval"


def modes_of(asked: RunBase) -> tuple[StreamMode, ...]:
    wanted = asked.stream_mode or ()
    return tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,)


def _path(run: StoredRun) -> str:
    return f"/threads/{run.thread_id}/runs/{run.run_id}"


def describe_run(run: StoredRun) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "thread_id": run.thread_id,
        "assistant_id": run.options.assistant_id or ASSISTANT_ID,
        "status": run.status,
        "metadata": run.metadata,
        "kwargs": {"input": run.input},
        "multitask_strategy": run.options.strategy,
        "cancel_reason": None,
        "created_at": run.created_at,
        "updated_at": run.updated_at,
    }


def _stream(request: Request, run: StoredRun, modes: tuple[StreamMode, ...], after: int = 0, *, cancel: bool = False) -> Live:
    # The client asks there again with no word on the modes, so they are in the address.
    location = f"{_path(run)}/stream?{urlencode([('stream_mode', mode) for mode in modes])}"
    return event_stream(
        streams.stream(services(request).followers, owner(request), run.run_id, modes, after),
        {"Location": location, "Content-Location": _path(run)},
        canceller(request, run) if cancel else None,
        functools.partial(services(request).answers.of, owner(request)),
    )


def _leaves(asked: RunBase, run: StoredRun) -> bool:
    """Whether the run is to be cancelled when this client goes away, who must be the one that started it."""
    return run.created and asked.on_disconnect == "cancel"


def _wait(request: Request, run: StoredRun, *, cancel: bool) -> Live:
    async def answer() -> AsyncGenerator[bytes]:
        yield dump(await _outcome(request, run))

    return late_json(
        answer(),
        {"Location": f"{_path(run)}/join", "Content-Location": _path(run)},
        canceller(request, run) if cancel else None,
        functools.partial(services(request).answers.of, owner(request)),
    )


async def _outcome(request: Request, run: StoredRun) -> Any:
    """What the run left in the thread. An error has no status here: the answer has begun long ago."""
    try:
        if run.options.on_completion == "delete":
            return await streams.last_values(services(request).followers, owner(request), run.run_id)
        ended = await services(request).followers.wait(owner(request), run.run_id)
        if ended.error:
            return {"__error__": streams.describe_error(ended.error)}
        return await _values(request, ended)
    except psycopg.Error:
        error: ServiceError = StorageUnavailable()
    except ServiceError as raised:
        error = raised
    return {"__error__": streams.describe_error(describe_failure(error))}


async def _values(request: Request, run: StoredRun) -> dict[str, Any]:
    """The thread as this run left it, whatever came after."""
    graph, config = services(request).graph, config_of(run.thread_id)
    states = [state async for state in graph.aget_state_history(config, filter={"run_id": run.run_id}, limit=1)]
    state = states[0] if states else await graph.aget_state(config)  # it had nothing to do
    return {**state.values, **({"__interrupt__": state.interrupts} if state.interrupts else {})}

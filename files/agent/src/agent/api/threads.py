"""Threads: made, found, copied, forgotten; their state looked at and changed."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar

from fastapi import APIRouter, Header, Query, Request, Response
from langchain_core.runnables import RunnableConfig
from langgraph.errors import InvalidUpdateError
from langgraph.types import StateSnapshot

from agent.access.in_flight import LARGE_BYTES
from agent.api.admission import count
from agent.api.answers import Json, Weighed, dump, pick
from agent.api.messages import written
from agent.api.requests import JsonRoute, owner
from agent.api.schemas import (
    ASSISTANT_ID,
    GRAPH_ID,
    Checkpoint,
    CheckpointPath,
    History,
    Pruned,
    StateAt,
    StateField,
    StatePatch,
    StateUpdate,
    StateUpdated,
    Thread,
    ThreadCount,
    ThreadCreate,
    ThreadPath,
    ThreadPrune,
    ThreadSearch,
    ThreadState,
    ThreadUpdate,
)
from agent.errors import MIB, InvalidRequest, NotFound, ServiceError
from agent.runs.threads import Thread as StoredThread
from agent.services import services

router = APIRouter(prefix="/threads", tags=["threads"], route_class=JsonRoute)


class StateConflict(ServiceError):
    status = 409
    code = "state_conflict"
    message = "As the thread stands it cannot be changed like this."


# An answer that lists states ends after so many, and the next page is asked for: no worker has to hold much more.
ANSWER_BYTES = 8 * MIB
PAGE = 50
Item = TypeVar("Item")
# True of every thread that the only graph has worked on, and no one's to set otherwise.
OUR_METADATA = {"graph_id": GRAPH_ID, "assistant_id": ASSISTANT_ID}


@router.post("", response_model=Thread, responses={403: {}, 404: {}, 409: {}, 429: {}})
async def create_thread(request: Request, asked: ThreadCreate) -> Response:
    thread = await services(request).threads.create(owner(request), asked.thread_id, _own(asked.metadata), if_exists=asked.if_exists)
    return await _shown(request, thread)


@router.post("/search", response_model=list[Thread], responses={429: {}})
async def search_threads(request: Request, asked: ThreadSearch) -> Response:
    """An answer ends after some MiB, but not before its first thread: go on with `offset`."""
    wanted = _filter(asked.metadata)
    if wanted is None:
        return Json([])
    fields = asked.select
    with_state = fields is None or not {"values", "interrupts"}.isdisjoint(fields)

    async def described(reading: Reading) -> AsyncGenerator[bytes]:
        for offset in range(asked.offset, asked.offset + asked.limit, PAGE):
            limit = min(PAGE, asked.offset + asked.limit - offset)
            found = await services(request).threads.search(
                owner(request),
                metadata=wanted,
                status=asked.status,
                used=_names_graph(asked.metadata),
                thread_ids=asked.ids,
                limit=limit,
                offset=offset,
                sort_by=asked.sort_by,
                descending=asked.sort_order == "desc",
            )
            for group in _groups(found, lambda thread: LARGE_BYTES if thread.bytes is None else thread.bytes):
                if with_state:
                    await reading.grow(group[0].bytes or 0)
                for thread in await asyncio.gather(*(_thread(request, thread, with_state=with_state) for thread in group)):
                    yield dump(pick(thread, fields))
            if len(found) < limit:
                return

    return await listed(request, described)


@router.post("/count", response_model=int)
async def count_threads(request: Request, asked: ThreadCount) -> Json:
    wanted = _filter(asked.metadata)
    if wanted is None:
        return Json(0)
    return Json(await services(request).threads.count(owner(request), metadata=wanted, status=asked.status, used=_names_graph(asked.metadata)))


@router.post("/prune", response_model=Pruned, responses={409: {}})
async def prune_threads(request: Request, asked: ThreadPrune) -> Json:
    """Threads that are not the caller's, or not there, are not counted. A busy one keeps its history, and the answer is 409."""
    threads = services(request).threads
    pruned = 0
    for thread_id in dict.fromkeys(asked.thread_ids):
        with suppress(NotFound):
            if asked.strategy == "delete":
                await threads.delete(owner(request), thread_id)
            else:
                await threads.keep_latest(owner(request), thread_id)
            pruned += 1
    return Json({"pruned_count": pruned})


@router.get("/{thread_id}", response_model=Thread, responses={404: {}, 429: {}})
async def get_thread(request: Request, thread_id: ThreadPath) -> Response:
    return await _shown(request, await services(request).threads.get(owner(request), thread_id))


@router.patch("/{thread_id}", response_model=Thread, responses={204: {"description": "Done."}, 403: {}, 404: {}, 429: {}})
async def update_thread(request: Request, thread_id: ThreadPath, asked: ThreadUpdate, prefer: Annotated[str | None, Header()] = None) -> Response:
    thread = await services(request).threads.update(owner(request), thread_id, _own(asked.metadata))
    if prefer == "return=minimal":
        return Response(status_code=204)
    return await _shown(request, thread)


@router.delete("/{thread_id}", status_code=204, responses={404: {}})
async def delete_thread(request: Request, thread_id: ThreadPath) -> Response:
    await services(request).threads.delete(owner(request), thread_id)
    return Response(status_code=204)


@router.post("/{thread_id}/copy", response_model=Thread, responses={404: {}, 409: {}, 429: {}})
async def copy_thread(request: Request, thread_id: ThreadPath) -> Response:
    """Counted like a turn."""
    await count(request)
    return await _shown(request, await services(request).threads.copy(owner(request), thread_id), counted=True)


# State

Select = Annotated[list[StateField] | None, Query()]


@router.get("/{thread_id}/state", response_model=ThreadState, responses={404: {}, 429: {}})
async def get_state(request: Request, thread_id: ThreadPath, subgraphs: bool = False, select: Select = None) -> Response:
    """The agent has no subgraphs, so `subgraphs` shows no more."""
    return weighed(request, await _state_at(request, thread_id, None, select))


@router.get("/{thread_id}/state/{checkpoint_id:uuid}", response_model=ThreadState, responses={404: {}, 429: {}})
async def get_state_at(
    request: Request,
    thread_id: ThreadPath,
    checkpoint_id: CheckpointPath,
    subgraphs: bool = False,
    select: Select = None,
) -> Response:
    return weighed(request, await _state_at(request, thread_id, str(checkpoint_id), select))


@router.post("/{thread_id}/state/checkpoint", response_model=ThreadState, responses={404: {}, 429: {}})
async def get_state_at_checkpoint(request: Request, thread_id: ThreadPath, asked: StateAt) -> Response:
    check_checkpoint(thread_id, asked.checkpoint)
    return weighed(request, await _state_at(request, thread_id, asked.checkpoint.checkpoint_id, asked.select))


@router.post("/{thread_id}/state", response_model=StateUpdated, responses={404: {}, 409: {}, 429: {}})
async def update_state(request: Request, thread_id: ThreadPath, asked: StateUpdate) -> Json:
    """Put messages into a thread, or take some out. It must not be busy. Counted like a turn."""
    await services(request).threads.get(owner(request), thread_id)
    checkpoint_id = check_checkpoint(thread_id, asked.checkpoint) or asked.checkpoint_id
    await count(request)
    await services(request).quota.admit(owner(request))
    if checkpoint_id and not await services(request).threads.checkpoints(thread_id, 1, at=checkpoint_id):
        raise NotFound("There is no such checkpoint.")
    try:
        place = await services(request).engine.update_state(owner(request), thread_id, written(asked.values), asked.as_node, checkpoint_id)
    except InvalidUpdateError:
        raise StateConflict("As the thread stands it is not clear whose step this is: give as_node.") from None
    except (InvalidRequest, LookupError):  # such as a message to remove that is not there
        raise StateConflict from None
    return Json({"checkpoint": checkpoint(place)})


@router.patch("/{thread_id}/state", status_code=204, responses={403: {}, 404: {}})
async def patch_state(request: Request, thread_id: ThreadPath, asked: StatePatch) -> Response:
    """Change the thread's metadata, as PATCH of the thread does, which replaces this."""
    await services(request).threads.update(owner(request), thread_id, _own(asked.metadata))
    return Response(status_code=204)


@router.post("/{thread_id}/history", response_model=list[ThreadState], responses={404: {}, 429: {}})
async def get_history(request: Request, thread_id: ThreadPath, asked: History) -> Response:
    """The states of a thread, newest first. An answer ends after some MiB, but not before its first: go on with `before`."""
    thread = await services(request).threads.get(owner(request), thread_id)
    at = check_checkpoint(thread_id, asked.checkpoint)
    before = asked.before
    if isinstance(before, Checkpoint):
        before = check_checkpoint(thread_id, before)
    graph = services(request).graph
    size = await services(request).threads.size(thread)

    async def described(reading: Reading) -> AsyncGenerator[bytes]:
        await reading.grow(size)
        if size <= LARGE_BYTES:
            place = config_of(thread_id, before) if before else None
            async for state in graph.aget_state_history(config_of(thread_id, at), filter=asked.metadata, before=place, limit=asked.limit):
                yield dump(pick(describe_state(state), asked.select))
            return
        found = await services(request).threads.checkpoints(thread_id, asked.limit, at=at, before=before, metadata=asked.metadata)
        for group in _groups(found, lambda checkpoint: checkpoint[1]):
            for state in await asyncio.gather(*(graph.aget_state(config_of(thread_id, checkpoint_id)) for checkpoint_id, _ in group)):
                yield dump(pick(describe_state(state), asked.select))

    return await listed(request, described)


class Reading:
    """A request while it reads states. Where they turn out to be large, it is counted like a turn, and waits for its place."""

    def __init__(self, request: Request, *, counted: bool = False) -> None:
        self._request = request
        self._counted = counted
        self._places = services(request).answers.loading
        self._large = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._large:
            self._places.release()

    async def grow(self, size: int) -> None:
        """So much is read, or about to be. Raises RateLimited."""
        if size <= LARGE_BYTES or self._large:
            return
        if not self._counted:
            await count(self._request)
        self._counted = True
        await self._places.acquire()
        self._large = True


async def listed(request: Request, describe: Callable[[Reading], AsyncGenerator[bytes]], form: bytes = b"[%s]") -> Weighed:
    """What is described in one answer, as far as that may be long.

    form: what is around it
    """
    taken: list[bytes] = []
    length = 0
    async with Reading(request) as reading, aclosing(describe(reading)) as parts:
        async for part in parts:
            taken.append(part)
            length += len(part)
            await reading.grow(length)
            if length > ANSWER_BYTES:
                break
        return weighed(request, form % b",".join(taken))


def weighed(request: Request, body: bytes) -> Weighed:
    return Weighed(body, owner(request), services(request).answers)


def _groups(items: Iterable[Item], size_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """What may be loaded together, in order: as many as have LARGE_BYTES, or one that has more."""
    group: list[Item] = []
    size = 0
    for item in items:
        if group and size + size_of(item) > LARGE_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += size_of(item)
    if group:
        yield group


def config_of(thread_id: str, checkpoint_id: str | None = None) -> RunnableConfig:
    place = {"thread_id": thread_id, "checkpoint_ns": ""}
    return {"configurable": place | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


def check_checkpoint(thread_id: str, place: Checkpoint | None) -> str | None:
    """The checkpoint's id; one of another thread is as good as none."""
    if place and place.thread_id not in (None, thread_id):
        raise NotFound("There is no such checkpoint.")
    return place.checkpoint_id if place else None


async def _state_at(request: Request, thread_id: str, checkpoint_id: str | None, select: list[StateField] | None) -> bytes:
    threads = services(request).threads
    size = await threads.size(await threads.get(owner(request), thread_id))
    async with Reading(request) as reading:
        await reading.grow(size)
        state: StateSnapshot = await services(request).graph.aget_state(config_of(thread_id, checkpoint_id))
        if checkpoint_id and state.created_at is None:
            raise NotFound("There is no such checkpoint.")
        return dump(pick(describe_state(state), select))


async def _shown(request: Request, thread: StoredThread, *, counted: bool = False) -> Weighed:
    async with Reading(request, counted=counted) as reading:
        await reading.grow(await services(request).threads.size(thread))
        return weighed(request, dump(await _thread(request, thread)))


async def _thread(request: Request, thread: StoredThread, *, with_state: bool = True) -> dict[str, Any]:
    described: dict[str, Any] = {
        "thread_id": thread.thread_id,
        "created_at": thread.created_at,
        "updated_at": thread.updated_at,
        "state_updated_at": thread.last_active,
        "metadata": (OUR_METADATA if thread.used else {}) | thread.metadata,
        "config": {},
        "context": {},
        "status": thread.status,
        "error": None,
    }
    if with_state:
        state: StateSnapshot = await services(request).graph.aget_state(config_of(thread.thread_id))
        described["values"] = state.values or None
        described["interrupts"] = {task.id: task.interrupts for task in state.tasks if task.interrupts}
    return described


def describe_state(state: StateSnapshot) -> dict[str, Any]:
    return {
        "values": state.values,
        "next": state.next,
        "tasks": [
            {
                "id": task.id,
                "name": task.name,
                # Not its text: it may quote what a tool or a server said to us alone.
                "error": type(task.error).__name__ if task.error else None,
                "interrupts": task.interrupts,
                "checkpoint": None,
                "state": None,
                "result": task.result,
            }
            for task in state.tasks
        ],
        "checkpoint": checkpoint(state.config["configurable"]),
        "parent_checkpoint": checkpoint(state.parent_config["configurable"]) if state.parent_config else None,
        "metadata": state.metadata or {},
        "created_at": state.created_at,
        "interrupts": state.interrupts,
    }


def checkpoint(place: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "thread_id": place["thread_id"],
        "checkpoint_ns": place.get("checkpoint_ns", ""),
        "checkpoint_id": place.get("checkpoint_id"),
        "checkpoint_map": {},
    }


def _own(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """As it is kept. A client may name the graph, as there is none but one."""
    own = {name: value for name, value in (metadata or {}).items() if value is not None or name not in OUR_METADATA}
    for name in OUR_METADATA:
        if own.get(name, GRAPH_ID) not in OUR_METADATA.values():
            raise InvalidRequest(f"metadata: {name} can only be `{GRAPH_ID}` or `{ASSISTANT_ID}`.")
    return own


def _names_graph(metadata: Mapping[str, Any] | None) -> bool:
    return not OUR_METADATA.keys().isdisjoint(metadata or {})


def _filter(metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What is left to look for, or None where no thread can fit."""
    wanted = dict(metadata or {})
    for name, ours in OUR_METADATA.items():
        # LangGraph's chat page names the graph in either field.
        if wanted.pop(name, ours) not in OUR_METADATA.values():
            return None
    return wanted

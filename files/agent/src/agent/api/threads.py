"""Threads: made, found, copied, forgotten; their state looked at and changed."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, RemoveMessage
from langchain_core.runnables import RunnableConfig
from langgraph.errors import InvalidUpdateError
from langgraph.types import StateSnapshot

from agent.api.answers import Json, pick
from agent.api.requests import JsonRoute, owner
from agent.api.schemas import (
    ASSISTANT_ID,
    GRAPH_ID,
    Checkpoint,
    CheckpointPath,
    History,
    Removal,
    RoleAnswer,
    RoleMessage,
    StateAt,
    StateField,
    StateUpdate,
    StateUpdated,
    StateValues,
    TextBlock,
    Thread,
    ThreadCount,
    ThreadCreate,
    ThreadPath,
    ThreadSearch,
    ThreadState,
    ThreadUpdate,
    TypeAnswer,
    TypeMessage,
    WrittenMessage,
)
from agent.errors import InvalidRequest, NotFound, ServiceError
from agent.runs.threads import Thread as StoredThread
from agent.services import services

router = APIRouter(prefix="/threads", tags=["threads"], route_class=JsonRoute)


class StateConflict(ServiceError):
    status = 409
    code = "state_conflict"
    message = "As the thread stands it cannot be changed like this."


# Every thread is one of the only graph, so this is no one's to set and always true.
OUR_METADATA = {"graph_id": GRAPH_ID, "assistant_id": ASSISTANT_ID}


@router.post("", response_model=Thread, responses={404: {}, 409: {}})
async def create_thread(request: Request, asked: ThreadCreate) -> Json:
    thread = await services(request).threads.create(owner(request), asked.thread_id, _own(asked.metadata), if_exists=asked.if_exists)
    return Json(await _thread(request, thread))


@router.post("/search", response_model=list[Thread])
async def search_threads(request: Request, asked: ThreadSearch) -> Json:
    wanted = _filter(asked.metadata)
    if wanted is None:
        return Json([])
    found = await services(request).threads.search(
        owner(request),
        metadata=wanted,
        status=asked.status,
        thread_ids=asked.ids,
        limit=asked.limit,
        offset=asked.offset,
        sort_by=asked.sort_by,
        descending=asked.sort_order == "desc",
    )
    fields = asked.select
    with_state = fields is None or not {"values", "interrupts"}.isdisjoint(fields)
    described = await asyncio.gather(*(_thread(request, thread, with_state=with_state) for thread in found))
    return Json([pick(thread, fields) for thread in described])


@router.post("/count", response_model=int)
async def count_threads(request: Request, asked: ThreadCount) -> Json:
    wanted = _filter(asked.metadata)
    if wanted is None:
        return Json(0)
    return Json(await services(request).threads.count(owner(request), metadata=wanted, status=asked.status))


@router.get("/{thread_id}", response_model=Thread, responses={404: {}})
async def get_thread(request: Request, thread_id: ThreadPath) -> Json:
    return Json(await _thread(request, await services(request).threads.get(owner(request), thread_id)))


@router.patch("/{thread_id}", response_model=Thread, responses={204: {"description": "Done."}, 404: {}})
async def update_thread(request: Request, thread_id: ThreadPath, asked: ThreadUpdate, prefer: Annotated[str | None, Header()] = None) -> Response:
    thread = await services(request).threads.update(owner(request), thread_id, _own(asked.metadata))
    if prefer == "return=minimal":
        return Response(status_code=204)
    return Json(await _thread(request, thread))


@router.delete("/{thread_id}", status_code=204, responses={404: {}})
async def delete_thread(request: Request, thread_id: ThreadPath) -> Response:
    await services(request).threads.delete(owner(request), thread_id)
    return Response(status_code=204)


@router.post("/{thread_id}/copy", response_model=Thread, responses={404: {}, 409: {}})
async def copy_thread(request: Request, thread_id: ThreadPath) -> Json:
    return Json(await _thread(request, await services(request).threads.copy(owner(request), thread_id)))


# State

Select = Annotated[list[StateField] | None, Query()]


@router.get("/{thread_id}/state", response_model=ThreadState, responses={404: {}})
async def get_state(request: Request, thread_id: ThreadPath, subgraphs: bool = False, select: Select = None) -> Json:
    """The agent has no subgraphs, so `subgraphs` shows no more."""
    return Json(pick(await _state_at(request, thread_id, None), select))


@router.get("/{thread_id}/state/{checkpoint_id:uuid}", response_model=ThreadState, responses={404: {}})
async def get_state_at(
    request: Request,
    thread_id: ThreadPath,
    checkpoint_id: CheckpointPath,
    subgraphs: bool = False,
    select: Select = None,
) -> Json:
    return Json(pick(await _state_at(request, thread_id, str(checkpoint_id)), select))


@router.post("/{thread_id}/state/checkpoint", response_model=ThreadState, responses={404: {}})
async def get_state_at_checkpoint(request: Request, thread_id: ThreadPath, asked: StateAt) -> Json:
    check_checkpoint(thread_id, asked.checkpoint)
    return Json(pick(await _state_at(request, thread_id, asked.checkpoint.checkpoint_id), asked.select))


@router.post("/{thread_id}/state", response_model=StateUpdated, responses={404: {}, 409: {}})
async def update_state(request: Request, thread_id: ThreadPath, asked: StateUpdate) -> Json:
    """Put messages into a thread, or take some out. It must not be busy."""
    checkpoint_id = check_checkpoint(thread_id, asked.checkpoint) or asked.checkpoint_id
    if checkpoint_id:
        await _state_at(request, thread_id, checkpoint_id)
    try:
        written = await services(request).engine.update_state(owner(request), thread_id, _values(asked.values), asked.as_node, checkpoint_id)
    except InvalidUpdateError:
        raise StateConflict("As the thread stands it is not clear whose step this is: give as_node.") from None
    except (InvalidRequest, LookupError):  # such as a message to remove that is not there
        raise StateConflict from None
    return Json({"checkpoint": checkpoint(written)})


@router.post("/{thread_id}/history", response_model=list[ThreadState], responses={404: {}})
async def get_history(request: Request, thread_id: ThreadPath, asked: History) -> Json:
    """The states of a thread, newest first."""
    await services(request).threads.get(owner(request), thread_id)
    check_checkpoint(thread_id, asked.checkpoint)
    before = asked.before
    if isinstance(before, Checkpoint):
        check_checkpoint(thread_id, before)
        before = before.checkpoint_id
    states = services(request).graph.aget_state_history(
        config_of(thread_id, asked.checkpoint.checkpoint_id if asked.checkpoint else None),
        filter=asked.metadata,
        before=config_of(thread_id, before) if before else None,
        limit=asked.limit,
    )
    return Json([pick(describe_state(state), asked.select) async for state in states])


def config_of(thread_id: str, checkpoint_id: str | None = None) -> RunnableConfig:
    place = {"thread_id": thread_id, "checkpoint_ns": ""}
    return {"configurable": place | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


def check_checkpoint(thread_id: str, place: Checkpoint | None) -> str | None:
    """The checkpoint's id; one of another thread is as good as none."""
    if place and place.thread_id not in (None, thread_id):
        raise NotFound("There is no such checkpoint.")
    return place.checkpoint_id if place else None


async def _state_at(request: Request, thread_id: str, checkpoint_id: str | None) -> dict[str, Any]:
    await services(request).threads.get(owner(request), thread_id)
    state: StateSnapshot = await services(request).graph.aget_state(config_of(thread_id, checkpoint_id))
    if checkpoint_id and state.created_at is None:
        raise NotFound("There is no such checkpoint.")
    return describe_state(state)


async def _thread(request: Request, thread: StoredThread, *, with_state: bool = True) -> dict[str, Any]:
    described: dict[str, Any] = {
        "thread_id": thread.thread_id,
        "created_at": thread.created_at,
        "updated_at": thread.updated_at,
        "metadata": thread.metadata | OUR_METADATA,
        "status": thread.status,
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
        "metadata": state.metadata,
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
    """Without what is true of every thread anyway."""
    own = dict(metadata or {})
    for name in OUR_METADATA:
        if own.pop(name, GRAPH_ID) not in OUR_METADATA.values():
            raise InvalidRequest(f"metadata: {name} can only be `{GRAPH_ID}` or `{ASSISTANT_ID}`.")
    return own


def _filter(metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What is left to look for, or None where no thread can fit."""
    wanted = dict(metadata or {})
    for name, ours in OUR_METADATA.items():
        # LangGraph's chat page names the graph in either field.
        if wanted.pop(name, ours) not in OUR_METADATA.values():
            return None
    return wanted


def _values(values: StateValues | None) -> dict[str, Any] | None:
    if values is None:
        return None
    given = values.messages if isinstance(values.messages, list) else [values.messages]
    return {"messages": [_written(message) for message in given]}


def _written(message: WrittenMessage) -> AnyMessage | RemoveMessage:
    match message:
        case str():
            return HumanMessage(message)
        case Removal():
            return RemoveMessage(id=message.id)
        case RoleAnswer() | TypeAnswer():
            return AIMessage(text_of(message.content), id=message.id)
        case RoleMessage() | TypeMessage():
            return HumanMessage(text_of(message.content), id=message.id)


def text_of(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)

"""Crons: runs that begin at the times of a schedule."""

import logging
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from agent.access.auth import Limits, Principal
from agent.api.answers import Json, dump, pick
from agent.api.assistants import is_deployed
from agent.api.requests import JsonRoute, owner
from agent.api.runs import ALL_MODES, modes_of, run_options, stateless_messages
from agent.api.schemas import (
    ASSISTANT_ID,
    Cron,
    CronCount,
    CronCreate,
    CronPath,
    CronRun,
    CronSearch,
    CronUpdate,
    StatelessCronCreate,
    ThreadPath,
)
from agent.errors import InvalidRequest, RateLimited, ServiceError
from agent.runs.crons import Cron as StoredCron
from agent.runs.crons import Due
from agent.runs.quota import ROW_BYTES
from agent.runs.records import RunOptions, new_run_id
from agent.services import Services, services

logger = logging.getLogger(__name__)

router = APIRouter(tags=["crons"], route_class=JsonRoute)

# What is a cron's own; all else goes to its runs.
OWN = {"schedule", "timezone", "end_time", "enabled", "on_run_completed"}


# Firing


async def fire(worker: Services, due: Due) -> None:
    """Begin the run of a cron whose time has come, as a request of its owner would. What the limits refuse comes later or, as the reason is, not at all."""
    cron = due.cron
    run_id = new_run_id()
    principal = Principal(cron.owner, Limits(due.requests_per_minute, due.tokens_per_minute, due.concurrent_runs))
    begun = False
    try:
        if not due.known:
            logger.info("a cron's owner is gone", extra={"cron_id": cron.cron_id})
            await worker.crons.skip(due)
            return
        asked = CronRun.model_validate(cron.payload)
        options = await _options(worker, cron, asked)
        given = stateless_messages(worker, asked.input)
        await worker.quota.admit(cron.owner, ROW_BYTES)
        await worker.limiter.admit(principal, run_id)
        begun = await worker.engine.fire(due, {"messages": given}, options, run_id) is not None
        if begun:
            logger.info("a cron's run begins", extra={"cron_id": cron.cron_id, "run_id": run_id, "due_at": due.due_at.isoformat()})
    except RateLimited as error:
        await worker.crons.defer(due, error.retry_after or 1)
        return
    except ServiceError as error:
        if error.status >= 500:  # it is free again when its lease ends
            raise
        logger.warning("a cron's run is left out", extra={"cron_id": cron.cron_id, "code": error.code})
        await worker.crons.skip(due)
    finally:
        if not begun:
            await worker.limiter.finish(cron.owner, run_id)


async def _options(worker: Services, cron: StoredCron, asked: CronRun) -> RunOptions:
    modes = modes_of(asked) or ALL_MODES
    on_completion: Literal["delete", "keep"] = "keep"
    if cron.thread_id is None:
        modes = (*modes, "values")  # there may be no thread to see them in
        on_completion = cron.on_run_completed or "delete"
    asked.metadata = {**cron.metadata, "cron_id": cron.cron_id}
    return await run_options(worker, cron.owner, asked, modes, resumable=True, on_completion=on_completion, strategy=asked.multitask_strategy)


# Routes


@router.post("/runs/crons", response_model=Cron, responses={403: {}, 404: {}})
async def create_cron(request: Request, asked: StatelessCronCreate) -> Json:
    """Run at the times of a schedule, each time on a thread of its own. An owner may have a hundred crons."""
    return await _create(request, None, asked, asked.on_run_completed)


@router.post("/threads/{thread_id}/runs/crons", response_model=Cron, responses={403: {}, 404: {}})
async def create_thread_cron(request: Request, thread_id: ThreadPath, asked: CronCreate) -> Json:
    """Run on a thread at the times of a schedule. It goes with the thread."""
    return await _create(request, thread_id, asked, None)


async def _create(request: Request, thread_id: str | None, asked: CronCreate, on_run_completed: Literal["delete", "keep"] | None) -> Json:
    worker, caller = services(request), owner(request)
    _check_end(asked.end_time)
    # What could never run is refused now.
    await run_options(worker, caller, asked, (), resumable=False)
    stateless_messages(worker, asked.input)
    payload = _payload(asked)
    await worker.quota.admit(caller, ROW_BYTES + len(dump(payload)))
    try:
        made = await worker.crons.create(
            caller,
            thread_id=thread_id,
            assistant_id=None if is_deployed(asked.assistant_id) else asked.assistant_id,
            schedule=asked.schedule,
            timezone=asked.timezone,
            end_time=asked.end_time,
            enabled=asked.enabled,
            on_run_completed=on_run_completed,
            payload=payload,
            metadata=asked.metadata or {},
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return Json(_describe(made))


@router.post("/runs/crons/search", response_model=list[Cron])
async def search_crons(request: Request, asked: CronSearch) -> Json:
    """The newest first, unless asked otherwise. X-Pagination-Next has the offset of the next page."""
    found = [each for each in await _found(request, asked) if asked.enabled in (None, each["enabled"])]
    found.sort(key=lambda each: (each[asked.sort_by] is not None, each[asked.sort_by] or "", each["cron_id"]), reverse=asked.sort_order == "desc")
    page = found[asked.offset : asked.offset + asked.limit]
    if asked.select and "now" in asked.select:
        page = [{**each, "now": datetime.now(UTC)} for each in page]
    more = asked.offset + asked.limit < len(found)
    return Json([pick(each, asked.select) for each in page], headers={"X-Pagination-Next": str(asked.offset + asked.limit)} if more else None)


@router.post("/runs/crons/count", response_model=int)
async def count_crons(request: Request, asked: CronCount) -> Json:
    return Json(len(await _found(request, asked)))


@router.patch("/runs/crons/{cron_id:uuid}", response_model=Cron, responses={403: {}, 404: {}})
async def update_cron(request: Request, cron_id: CronPath, asked: CronUpdate) -> Json:
    """Change what is given. Where the times change, they count from now."""
    worker, caller = services(request), owner(request)
    _check_end(asked.end_time)
    cron = await worker.crons.get(caller, str(cron_id))
    payload = _payload(asked)
    if asked.on_run_completed is not None and cron.thread_id is not None:
        raise InvalidRequest("on_run_completed: this cron runs on a thread, which is kept.")
    if asked.assistant_id is not None and asked.assistant_id != cron.payload["assistant_id"]:
        raise InvalidRequest("assistant_id: this cannot be changed. Create another cron.")
    changed = CronRun.model_validate({**cron.payload, **payload})
    await run_options(worker, caller, changed, (), resumable=False)
    stateless_messages(worker, changed.input)
    await worker.quota.admit(caller, len(dump(payload)))
    try:
        own = {name: getattr(asked, name) for name in OWN & asked.model_fields_set}
        updated = await worker.crons.update(caller, str(cron_id), own, payload, asked.metadata or {})
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return Json(_describe(updated))


@router.delete("/runs/crons/{cron_id:uuid}", status_code=204, responses={404: {}})
async def delete_cron(request: Request, cron_id: CronPath) -> Response:
    """The runs that it has begun go on."""
    await services(request).crons.delete(owner(request), str(cron_id))
    return Response(status_code=204)


def _payload(asked: BaseModel) -> dict[str, Any]:
    """What its client wrote of the runs. Metadata is kept beside it."""
    return asked.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={*OWN, "metadata"})


def _check_end(end_time: datetime | None) -> None:
    if end_time is not None and end_time <= datetime.now(UTC):
        raise InvalidRequest("end_time: must be in the future.")


async def _found(request: Request, asked: CronCount) -> list[dict[str, Any]]:
    wanted = asked.metadata or {}
    assistant_id = ASSISTANT_ID if asked.assistant_id is not None and is_deployed(asked.assistant_id) else asked.assistant_id
    return [
        each
        for each in map(_describe, await services(request).crons.all(owner(request)))
        if asked.thread_id in (None, each["thread_id"])
        and assistant_id in (None, each["assistant_id"])
        and all(name in each["metadata"] and each["metadata"][name] == value for name, value in wanted.items())
    ]


def _describe(cron: StoredCron) -> dict[str, Any]:
    return {
        "cron_id": cron.cron_id,
        "assistant_id": cron.assistant_id or ASSISTANT_ID,
        "thread_id": cron.thread_id,
        "on_run_completed": cron.on_run_completed,
        "end_time": cron.end_time,
        "schedule": cron.schedule,
        "timezone": cron.timezone,
        "created_at": cron.created_at,
        "updated_at": cron.updated_at,
        "payload": cron.payload,
        "user_id": None,
        "next_run_date": cron.next_at,
        "metadata": cron.metadata,
        "enabled": cron.enabled,
    }

"""A run is let in by the limits before it is recorded, and its place is given back if it is not."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from fastapi import Request

from agent.access.auth import Principal
from agent.errors import ServiceError
from agent.runs.records import Run, RunInput, RunOptions, new_run_id
from agent.services import services
from agent.storage.postgres import bounded

# A Postgres that hangs must not hold a client for as long as a turn may take.
SUBMIT_SECONDS = 8.0


async def submit(
    request: Request,
    thread_id: str | None,
    run_input: RunInput,
    options: RunOptions | None = None,
    *,
    known: Run | None = None,
    **more: Any,
) -> Run:
    """Count a run for the caller and submit it, or another try of the known one; the rest is as Engine.submit takes it.

    Raises RateLimited and StorageFull too.
    """
    principal: Principal = request.state.principal
    worker = services(request)
    run_id = new_run_id()

    async def begin() -> Run:
        await worker.quota.admit(principal.name)
        if known is not None and (again := await worker.engine.reopen(known)) is not None:
            return again
        return await worker.engine.submit(principal.name, thread_id, run_input, options, run_id=run_id, **more)

    await worker.limiter.admit(principal, run_id)
    try:
        run = await bounded(begin(), min(worker.settings.turn_timeout_seconds, SUBMIT_SECONDS))
    except BaseException:
        await worker.limiter.finish(principal.name, run_id)
        raise
    if run.run_id != run_id:  # a repetition of one that was counted
        await worker.limiter.finish(principal.name, run_id)
    request.state.log = {"thread_id": run.thread_id, "run_id": run.run_id}
    return run


async def count(request: Request) -> None:
    """Count a request that starts no turn, but costs as much as one. Raises RateLimited."""
    await services(request).limiter.admit(request.state.principal)


def canceller(request: Request, run: Run) -> Callable[[], Awaitable[None]]:
    """What stops a run when the client that started it goes away, wherever it runs or waits."""

    async def cancel() -> None:
        with suppress(ServiceError):
            await services(request).engine.cancel(run.owner, run.run_id)

    return cancel

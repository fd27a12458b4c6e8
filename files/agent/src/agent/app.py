"""The HTTP service: everything is made here, once a worker, and handed to the routes as its `Services`."""

import functools
import gc
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast
from uuid import uuid4

import psycopg
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from langgraph.store.postgres.aio import AsyncPostgresStore
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from agent import logs
from agent.access.auth import Authenticate, Authenticator, KeyRing
from agent.access.in_flight import InFlight
from agent.access.rate_limit import RateLimiter
from agent.api import chat, crons, langgraph, openai, openai_errors, openapi, page, responses
from agent.api.middleware import Observe, error_response
from agent.api.requests import explain
from agent.errors import BadRequest, MethodNotAllowed, NotFound, ServiceError, StorageUnavailable
from agent.http_client import create_client
from agent.llm.graph import create_graph
from agent.metrics import Metrics
from agent.readiness import PROBE_SECONDS, Readiness, model_probe, postgres_probe, redis_probe
from agent.retention import RetentionMetrics
from agent.runs.assistants import Assistants
from agent.runs.checkpoints import ThreadSaver
from agent.runs.crons import Crons, Scheduler
from agent.runs.engine import Engine
from agent.runs.events import EventStreams
from agent.runs.ledger import Channel, Ledger
from agent.runs.quota import Quota
from agent.runs.threads import Threads
from agent.services import Services, services
from agent.settings import Settings, SettingsError
from agent.storage.postgres import Database, create_pool, reason
from agent.storage.redis import create_redis
from agent.tools import create_tools, serve_tools
from agent.tools.toolbox import Toolbox
from agent.tracing import Tracing

logger = logging.getLogger(__name__)

GC_THRESHOLD = (20_000, 20, 20)


def from_environment() -> FastAPI:
    """What uvicorn starts."""
    logs.configure()
    try:
        return create_app(Settings.from_environment(os.environ))
    except SettingsError as error:
        raise SystemExit(f"agent: bad settings\n{error}") from None


def create_app(settings: Settings) -> FastAPI:
    """Raises SettingsError where a plug-in cannot be used."""
    metrics = Metrics()
    tools = create_tools(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            started = app.state.services = await _start(settings, tools, metrics, stack)
            # What is there by now stays: looking through it for garbage again and again took a tenth of every turn.
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLD)
            extra = {"worker": started.engine.worker, "pid": os.getpid(), "tools": started.tools.names}
            logger.info("started", extra={"model": settings.model_name, **extra})
            yield

    app = FastAPI(title="agent", lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None)
    # The last one added is the outermost.
    app.add_middleware(Authenticate, authenticator=lambda: app.state.services.authenticator, refuse=_service_error)
    app.add_middleware(Observe, metrics=metrics, refuse=_failed, proxy_secret=settings.proxy_secret)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(psycopg.Error, _no_storage)

    app.include_router(chat.router)
    app.include_router(langgraph.router)
    app.include_router(openai.router)
    app.include_router(responses.router)
    app.include_router(page.router)
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]  # FastAPI's way to replace it

    @app.get("/health")
    async def health() -> Response:
        """Whether this process works."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", responses={503: {}})
    async def ready(request: Request) -> Response:
        """Whether a turn could succeed now."""
        failing = await services(request).readiness.failing()
        if not failing:
            return JSONResponse({"status": "ready"})
        error = {"code": "not_ready", "message": f"Not ready: {', '.join(failing)}.", "not_ready": failing}
        return JSONResponse({"error": error}, 503, {"Retry-After": "5"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus(request: Request) -> Response:
        services(request).retention.refresh()
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


async def _start(settings: Settings, tools: Toolbox, metrics: Metrics, stack: AsyncExitStack) -> Services:
    pool = create_pool(settings)
    stack.push_async_callback(pool.close)
    await pool.open()
    unchecked = create_pool(settings, checked=False)
    stack.push_async_callback(unchecked.close)
    await unchecked.open()
    redis = create_redis(settings)
    stack.push_async_callback(redis.aclose)
    client = await stack.enter_async_context(create_client(timeout=PROBE_SECONDS))
    tracing = Tracing(settings.otlp_endpoint)
    stack.callback(tracing.close)

    await stack.enter_async_context(serve_tools(settings, tools, metrics.registry))
    database = Database(unchecked)
    quota = Quota(database, settings.storage_mib)
    ledger = Ledger(database, str(uuid4()), quota.charge)
    saver = ThreadSaver(pool, database)
    store = AsyncPostgresStore(cast(Any, pool))
    graph = create_graph(settings, tools, saver, store, tracing=tracing)
    limiter = RateLimiter(redis, settings, metrics)
    stack.push_async_callback(limiter.close)
    keys = KeyRing(pool)
    stack.push_async_callback(keys.close)
    retention = RetentionMetrics(pool)
    retention.refresh()
    stack.push_async_callback(retention.close)
    metrics.add(retention)
    engine = Engine(
        settings,
        graph,
        saver,
        ledger,
        EventStreams(settings),
        functools.partial(Channel, settings, ledger.worker),
        lambda: tools.names,
        metrics,
        tracing,
        limiter.finish,
    )
    readiness = Readiness({"postgres": postgres_probe(pool), "redis": redis_probe(redis), "model": model_probe(settings, client)}, metrics)
    metrics.know_tools(tools.names)
    await engine.start()
    stack.push_async_callback(engine.close)
    readiness.start()
    stack.push_async_callback(readiness.close)
    started = Services(
        settings=settings,
        tools=tools,
        graph=graph,
        store=store,
        authenticator=Authenticator(keys, settings.proxy_secret, settings.wrong_keys),
        limiter=limiter,
        threads=Threads(database, ledger, quota, limiter.finish),
        quota=quota,
        assistants=Assistants(database),
        crons=Crons(database),
        answers=InFlight(),
        engine=engine,
        followers=engine.followers,
        readiness=readiness,
        retention=retention,
    )
    scheduler = Scheduler(started.crons, functools.partial(crons.fire, started))
    scheduler.start()
    stack.push_async_callback(scheduler.close)
    return started


def _failed(path: str, error: ServiceError, request_id: str) -> Response:
    """The error in the form of the API that the path belongs to."""
    if path == openai.PREFIX or path.startswith(f"{openai.PREFIX}/"):
        return openai_errors.openai_error(error)
    return error_response(error, request_id)


async def _service_error(request: Request, error: Any) -> Response:
    return _failed(request.url.path, error, request.state.request_id)


async def _invalid(request: Request, error: Any) -> Response:
    return await _service_error(request, explain(error, openapi.names(request.app)))


async def _no_storage(request: Request, error: Any) -> Response:
    logger.error("the storage failed", extra={"error": reason(error)})
    return await _service_error(request, StorageUnavailable())


async def _http_error(request: Request, error: Any) -> Response:
    kind = {404: NotFound, 405: MethodNotAllowed}.get(error.status_code, BadRequest)
    response = await _service_error(request, kind())
    response.headers.update(error.headers or {})
    if error.status_code == 405 and (methods := openapi.allowed(request.app, request.url.path)):
        response.headers["Allow"] = ", ".join(methods)
    return response

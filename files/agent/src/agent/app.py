"""The HTTP service."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any, cast
from uuid import uuid4

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from agent import logs
from agent.database import create_pool
from agent.errors import BodyTooLarge, InvalidJson, InvalidRequest, ServiceError, UnsupportedMediaType
from agent.graph import create_graph
from agent.metrics import Metrics
from agent.middleware import Observe, error_response
from agent.rate_limit import RateLimiter, create_redis
from agent.readiness import PROBE_SECONDS, Readiness, model_probe, postgres_probe, redis_probe
from agent.settings import Settings, SettingsError
from agent.tools import create_tools
from agent.turns import Turns

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    message: str
    thread_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None


def from_environment() -> FastAPI:
    """What uvicorn starts."""
    logs.configure()
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        raise SystemExit(f"agent: bad settings\n{error}") from None
    return create_app(settings)


def create_app(settings: Settings) -> FastAPI:
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            pool = create_pool(settings)
            stack.push_async_callback(pool.close)
            await pool.open()
            redis = create_redis(settings)
            stack.push_async_callback(redis.aclose)
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=PROBE_SECONDS, trust_env=False))

            saver = AsyncPostgresSaver(pool)
            # The saver's lock is for a single connection; over a pool it would make every thread wait for every other.
            saver.lock = cast(asyncio.Lock, asyncio.Semaphore(pool.max_size))
            tools = create_tools(settings)
            app.state.turns = Turns(
                create_graph(settings, tools, saver),
                [tool.name for tool in tools],
                metrics,
                timeout_seconds=settings.turn_timeout_seconds,
                recursion_limit=settings.recursion_limit,
            )
            stack.push_async_callback(app.state.turns.close)
            app.state.limiter = RateLimiter(redis, settings.rate_limit, metrics)
            app.state.readiness = Readiness(
                {"postgres": postgres_probe(pool), "redis": redis_probe(redis), "model": model_probe(settings, client)},
                metrics,
            )
            logger.info("started", extra={"model": settings.model_name, "tools": [tool.name for tool in tools]})
            yield

    app = FastAPI(
        title="agent", lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_middleware(Observe, metrics=metrics)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        await app.state.limiter.check(principal(request))
        asked = await read_chat_request(request, settings.max_message_chars)
        thread_id = asked.thread_id or str(uuid4())
        request.state.log = {"thread_id": thread_id}
        answer = await app.state.turns.answer(thread_id, asked.message)
        return JSONResponse({"response": answer, "thread_id": thread_id})

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        failing = await app.state.readiness.failing()
        if not failing:
            return JSONResponse({"status": "ready"})
        error = {"code": "not_ready", "message": f"Not ready: {', '.join(failing)}.", "not_ready": failing}
        return JSONResponse({"error": error}, 503, {"Retry-After": "5"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def principal(request: Request) -> str:
    """Whom to count a request for. Only the proxy reaches this service, and it sets the header itself."""
    user = request.headers.get("X-Forwarded-User")
    return f"user:{user}" if user else f"address:{request.client.host if request.client else ''}"


async def read_chat_request(request: Request, max_message_chars: int) -> ChatRequest:
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType
    try:
        asked = ChatRequest.model_validate_json(await _read_body(request))
    except ValidationError as error:
        raise _explain(error) from None
    if not asked.message.strip() or "\0" in asked.message or len(asked.message) > max_message_chars:
        raise InvalidRequest(f"message: must be a text of 1 to {max_message_chars} characters, not blank, without NUL.")
    return asked


async def _read_body(request: Request) -> bytes:
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise BodyTooLarge
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge
    return bytes(body)


def _explain(error: ValidationError) -> ServiceError:
    """Say what is wrong in words of our own: the validator's would quote the input."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    match first["type"], first["loc"]:
        case "json_invalid", _:
            return InvalidJson()
        case _, ("message", *_):
            return InvalidRequest("message: must be given and be a text.")
        case _, ("thread_id", *_):
            return InvalidRequest("thread_id: must be 1 to 64 of the characters A-Z a-z 0-9 _ - or left out.")
        case _:
            return InvalidRequest("The body must be an object with message and, if wanted, thread_id.")


async def _service_error(request: Request, error: Any) -> Response:
    return error_response(error, request.state.request_id)


async def _http_error(request: Request, error: Any) -> Response:
    known = {404: ("not_found", "There is nothing here."), 405: ("method_not_allowed", "This method is not allowed.")}
    code, message = known.get(error.status_code, ("bad_request", "The request cannot be understood."))
    return JSONResponse({"error": {"code": code, "message": message}}, error.status_code, error.headers)

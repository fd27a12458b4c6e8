"""Around every request: a number, a log line, two metrics, and an answer where there would have been a traceback."""

import logging
import re
import time
from collections.abc import Callable
from uuid import uuid4

from fastapi.responses import JSONResponse
from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.access.auth import Proxy
from agent.errors import ServiceError
from agent.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[0-9a-f]{32}")
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
PROBES = frozenset({"/health", "/metrics", "/ready"})


def error_response(error: ServiceError, request_id: str) -> JSONResponse:
    body = {"code": error.code, "message": error.message}
    if error.status >= 500:
        body["id"] = request_id
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
    return JSONResponse({"error": body}, error.status, headers)


class Observe:
    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        proxy_secret: SecretStr | None = None,
        refuse: Callable[[str, ServiceError, str], Response] = lambda path, error, request_id: error_response(error, request_id),
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._refuse = refuse
        self._proxy = Proxy(proxy_secret)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        started = time.monotonic()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            logger.exception("internal error", extra={"request_id": request_id})
            if status:
                raise
            await self._refuse(scope["path"], ServiceError(), request_id)(scope, receive, send_and_note)
        finally:
            self._note(scope, request_id, status, time.monotonic() - started)

    def _request_id(self, scope: Scope) -> str:
        """The proxy's own number where there is one: its clients are shown that, and not ours."""
        headers = Headers(scope=scope)
        given = headers.get("X-Request-ID", "")
        return given if REQUEST_ID.fullmatch(given) and self._proxy.sent(headers) else uuid4().hex

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.requests.labels(method, route, status).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if route in PROBES and status < 400:
            return
        logger.info(
            "request",
            extra={
                "request_id": request_id,
                "method": method,
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
                **scope["state"].get("log", {}),
            },
        )

"""Whether a turn could succeed now: asked of the things themselves, briefly, all at once."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping

import httpx
from redis.asyncio import Redis

from agent.metrics import Metrics
from agent.migrate import missing
from agent.settings import Settings
from agent.storage.postgres import Pool

logger = logging.getLogger(__name__)

PROBE_SECONDS = 2
CACHE_SECONDS = 1
WATCH_SECONDS = 10

Probe = Callable[[], Awaitable[None]]


class NotReady(Exception):
    """Why a probe failed, for the log."""


class Readiness:
    def __init__(self, probes: Mapping[str, Probe], metrics: Metrics) -> None:
        self._probes = probes
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self._checked_at = -math.inf
        self._failing: list[str] = []
        self._abandoned: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Probe every WATCH_SECONDS, so that the metrics are true while nobody asks /ready."""
        self._watch = asyncio.create_task(self._probe_for_ever())

    async def close(self) -> None:
        if self._watch:
            self._watch.cancel()
            await asyncio.wait({self._watch}, timeout=1)

    async def _probe_for_ever(self) -> None:
        while True:
            await self.failing()
            await asyncio.sleep(WATCH_SECONDS)

    async def failing(self) -> list[str]:
        """The names of what is not ready, at most CACHE_SECONDS old."""
        async with self._lock:
            if time.monotonic() - self._checked_at >= CACHE_SECONDS:
                self._failing = await self._probe()
                self._checked_at = time.monotonic()
            return self._failing

    async def _probe(self) -> list[str]:
        tasks = {name: asyncio.ensure_future(probe()) for name, probe in self._probes.items()}
        _, late = await asyncio.wait(tasks.values(), timeout=PROBE_SECONDS)
        for task in late:
            # Not awaited: a driver may take seconds to give up a dead connection.
            task.cancel()
            self._abandoned.add(task)
            task.add_done_callback(self._abandoned.discard)
        failing = []
        for name, task in tasks.items():
            error = NotReady("no answer in time") if task in late else task.exception()
            self._metrics.ready.labels(name).set(error is None)
            if error is not None:
                failing.append(name)
                logger.warning("not ready", extra={"dependency": name, "error": f"{type(error).__name__}: {error}"})
        return failing


def postgres_probe(pool: Pool) -> Probe:
    async def probe() -> None:
        async with pool.connection(timeout=PROBE_SECONDS) as connection:
            absent = await missing(connection)
        if absent:
            raise NotReady(f"migrations are missing: {', '.join(absent)}")

    return probe


def redis_probe(redis: "Redis") -> Probe:
    async def probe() -> None:
        await redis.ping()

    return probe


def model_probe(settings: Settings, client: httpx.AsyncClient) -> Probe:
    key = settings.model_api_key
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}

    async def probe() -> None:
        answer = await client.get(f"{settings.model_base_url}/models", headers=headers)
        if answer.status_code != httpx.codes.OK:
            raise NotReady(f"status {answer.status_code}")
        if settings.model_name not in [model["id"] for model in answer.json()["data"]]:
            raise NotReady(f"no model is named {settings.model_name}")

    return probe

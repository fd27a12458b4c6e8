"""A moving window for each principal, counted in Redis.

While Redis is away the process counts by itself in bounded memory: limits stay in force (a restart forgets them), and
requests wait for Redis for REDIS_SECONDS at most, and only every RETRY_SECONDS.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections import OrderedDict, deque

import limits
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from agent.errors import RateLimited
from agent.metrics import Metrics
from agent.settings import Settings

logger = logging.getLogger(__name__)

KEY_PREFIX = "agent:rl"
REDIS_SECONDS = 0.5
RETRY_SECONDS = 2
MAX_LOCAL_PRINCIPALS = 10_000


def create_redis(settings: Settings) -> "Redis":
    return Redis.from_pool(
        BlockingConnectionPool(
            host=settings.redis_host,
            port=settings.redis_port,
            username=settings.redis_user,
            password=settings.redis_password.get_secret_value(),
            max_connections=16,
            timeout=REDIS_SECONDS,
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
            socket_keepalive=True,
            # Keeps the commands to the few that the ACL allows.
            protocol=2,
            lib_name=None,
            lib_version=None,
        )
    )


class LocalWindow:
    """The same moving window in memory. Where there are too many principals the longest silent one is forgotten."""

    def __init__(self, amount: int, seconds: int) -> None:
        self._amount = amount
        self._seconds = seconds
        self._hits: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_seconds(self, key: str) -> float:
        """Count a request and return 0, or return how long until one is admitted."""
        now = time.monotonic()
        hits = self._hits.setdefault(key, deque(maxlen=self._amount))
        self._hits.move_to_end(key)
        if len(self._hits) > MAX_LOCAL_PRINCIPALS:
            self._hits.popitem(last=False)
        if len(hits) == self._amount and hits[0] > now - self._seconds:
            return hits[0] + self._seconds - now
        hits.append(now)
        return 0


class RateLimiter:
    def __init__(self, redis: "Redis", rate: str, metrics: Metrics) -> None:
        self._item = limits.parse(rate)
        self._limiter = MovingWindowRateLimiter(
            RedisStorage(
                "async+redis://",
                implementation="redispy",
                key_prefix=KEY_PREFIX,
                connection_pool=redis.connection_pool,  # type: ignore[arg-type]  # documented, but not in the annotation
            )
        )
        self._local = LocalWindow(self._item.amount, self._item.get_expiry())
        self._metrics = metrics
        self._away_until = 0.0

    async def check(self, principal: str) -> None:
        """Count a request of this principal, or raise RateLimited."""
        # A digest: a key of known length from a name of any length and alphabet.
        key = hashlib.sha256(principal.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        wait = await self._wait_seconds(key)
        if wait > 0:
            self._metrics.rate_limited.inc()
            raise RateLimited(retry_after=math.ceil(wait))

    async def _wait_seconds(self, key: str) -> float:
        if time.monotonic() >= self._away_until:
            try:
                async with asyncio.timeout(REDIS_SECONDS):
                    wait = await self._ask_redis(key)
            except (RedisError, OSError) as error:  # a TimeoutError is an OSError
                self._away_until = time.monotonic() + RETRY_SECONDS
                self._metrics.rate_limit_local.set(1)
                logger.warning("redis is away, counting locally", extra={"error": type(error).__name__})
            else:
                self._metrics.rate_limit_local.set(0)
                return wait
        return self._local.wait_seconds(key)

    async def _ask_redis(self, key: str) -> float:
        if await self._limiter.hit(self._item, key):
            return 0
        window = await self._limiter.get_window_stats(self._item, key)
        return max(1.0, window.reset_time - time.time())

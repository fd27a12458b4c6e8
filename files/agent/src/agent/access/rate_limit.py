"""What each principal may do in a while: requests and tokens in a moving window, and runs at once.

Redis counts for all workers, in one script for each request. Every worker also remembers what it let through itself:
while Redis is away it goes on alone by that, so nobody gets more than the limit from any one worker, and when Redis is
back the worker tells it what it has missed before it asks again.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from agent.access.auth import Principal
from agent.errors import RateLimited
from agent.metrics import Metrics
from agent.settings import Settings, rate
from agent.storage.redis import REDIS_SECONDS

logger = logging.getLogger(__name__)

KEY_PREFIX = "agent:rl"
RETRY_SECONDS = 1
# Finished runs are told together, unless their principal is near a limit.
FLUSH_SECONDS = 0.05
MAX_PRINCIPALS = 10_000
MAX_ENTRIES = 2000

MINUTE = 60_000
# Tokens are summed by the second. Each sum counts until the last of its tokens is a minute old.
BUCKET = 1000
# Where a run ends without a word, as after a crash of every worker, its place is free again by then.
MIN_LEASE = 600_000
# Nobody can say when a run will end. Clients ask again after a second.
RUN_WAIT = 1000

# Times are milliseconds of the machine's monotonic clock: a step of the wall clock moves no window. A generous expiry,
# which does go by the wall clock, clears what is left of principals that went silent.
# The first line makes Redis refuse the whole script where its memory is full, instead of some of its commands.
ADMIT = """#!lua
local now, id = tonumber(ARGV[1]), ARGV[2]
local requests, window, tokens, runs = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local wait, running, crowded = 0, 0, 0
if requests > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now - window))
  local count = redis.call('ZCARD', KEYS[1])
  if count >= requests then
    local due = redis.call('ZRANGE', KEYS[1], count - requests, count - requests, 'WITHSCORES')
    -- Not longer than the window, though another worker's request may be a moment younger than this one.
    wait = math.min(tonumber(due[2]) + window - now, window)
  end
end
if tokens > 0 then
  local all, used, sums = redis.call('HGETALL', KEYS[2]), 0, {}
  for i = 1, #all, 2 do
    local over = tonumber(string.match(all[i], '^%d+')) + 61000
    if over <= now then
      redis.call('HDEL', KEYS[2], all[i])
    else
      used = used + tonumber(all[i + 1])
      sums[#sums + 1] = {over, tonumber(all[i + 1])}
    end
  end
  if used >= tokens then
    table.sort(sums, function(a, b) return a[1] < b[1] end)
    for _, sum in ipairs(sums) do
      used = used - sum[2]
      if used < tokens then
        wait = math.max(wait, sum[1] - now)
        break
      end
    end
  end
end
if runs > 0 and ARGV[7] ~= '' then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', string.format('%d', now))
  running = redis.call('ZCARD', KEYS[3])
  if running >= runs then
    crowded = wait == 0 and 1 or 0
    wait = math.max(wait, 1000)
  end
end
if wait > 0 then
  return {wait, running, crowded}
end
if requests > 0 then
  redis.call('ZADD', KEYS[1], string.format('%d', now), id)
  redis.call('PEXPIRE', KEYS[1], 86400000 + window)
end
if runs > 0 and ARGV[7] ~= '' then
  redis.call('ZADD', KEYS[3], ARGV[7], id)
  redis.call('PEXPIRE', KEYS[3], 86400000)
end
return {0, running + 1, 0}
"""

# What a worker knows. Whatever is told twice counts once.
REPORT = """#!lua
for i, text in ipairs(ARGV) do
  local key, told = (i - 1) * 3, cjson.decode(text)
  for _, entry in ipairs(told.requests) do
    redis.call('ZADD', KEYS[key + 1], string.format('%d', entry[1]), entry[2])
    redis.call('PEXPIRE', KEYS[key + 1], 86400000 + told.window)
  end
  for _, entry in ipairs(told.tokens) do
    redis.call('HSET', KEYS[key + 2], entry[1], string.format('%d', entry[2]))
    redis.call('PEXPIRE', KEYS[key + 2], 86400000)
  end
  for _, entry in ipairs(told.runs) do
    redis.call('ZADD', KEYS[key + 3], string.format('%d', entry[1]), entry[2])
    redis.call('PEXPIRE', KEYS[key + 3], 86400000)
  end
  for _, id in ipairs(told.ended) do
    redis.call('ZREM', KEYS[key + 3], id)
  end
end
return 0
"""


def clock() -> int:
    """The same for every process of this machine, and never set back."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000


def boot_id() -> str:
    """Times of another boot, or of another machine, mean nothing here, and are kept apart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return "unknown"


@dataclass(frozen=True, slots=True)
class Rates:
    """The limits of one principal, 0 for none."""

    requests: int
    window: int
    tokens: int
    runs: int


@dataclass(slots=True)
class Account:
    """What this worker let one principal do. The rules are those of the script, which counts for all workers."""

    rates: Rates | None = None
    requests: deque[tuple[int, str]] = field(default_factory=deque)
    tokens: dict[int, int] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    # Not yet told to Redis.
    charged: set[int] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    crowded: bool = False

    def wait(self, now: int, rates: Rates, *, is_run: bool) -> int:
        """How long until one more is admitted, 0 if it is now."""
        self.forget(now, rates.window)
        wait = 0
        if rates.requests and len(self.requests) >= rates.requests:
            wait = self.requests[len(self.requests) - rates.requests][0] + rates.window - now
        used = sum(self.tokens.values())
        if rates.tokens and used >= rates.tokens:
            for start, tokens in sorted(self.tokens.items()):
                used -= tokens
                if used < rates.tokens:
                    wait = max(wait, start + BUCKET + MINUTE - now)
                    break
        if is_run and rates.runs and len(self.runs) >= rates.runs:
            wait = max(wait, RUN_WAIT)
        return wait

    def add(self, now: int, entry: str, rates: Rates, lease_end: int | None) -> None:
        self.rates = rates
        self.forget(now, rates.window)
        if rates.requests:
            self.requests.append((now, entry))
        if lease_end is not None and rates.runs:
            self.runs[entry] = lease_end

    def charge(self, now: int, tokens: int) -> None:
        start = now - now % BUCKET
        self.tokens[start] = self.tokens.get(start, 0) + tokens
        self.charged.add(start)

    def forget(self, now: int, window: int) -> None:
        while self.requests and self.requests[0][0] <= now - window:
            self.requests.popleft()
        for start in [start for start in self.tokens if start + BUCKET + MINUTE <= now]:
            del self.tokens[start]
            self.charged.discard(start)
        # In the order of their ends, which are all equally far away when they begin.
        while self.runs and (entry := next(iter(self.runs))) and self.runs[entry] <= now:
            del self.runs[entry]


class RateLimiter:
    def __init__(self, redis: "Redis", settings: Settings, metrics: Metrics) -> None:
        requests, seconds = rate(settings.rate_limit)
        self._default = Rates(requests, seconds * 1000, settings.tokens_per_minute, settings.concurrent_runs)
        self._lease = max(MIN_LEASE, 3000 * math.ceil(settings.turn_timeout_seconds))
        self._admit_script = redis.register_script(ADMIT)
        self._report_script = redis.register_script(REPORT)
        self._metrics = metrics
        self._boot = boot_id()
        self._worker = uuid4().hex[:8]
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        # Principals of whom Redis lacks the end of a run or the price of one; and those of whom it may lack anything.
        self._pending: set[str] = set()
        self._missed: set[str] = set()
        self._reporting = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._away = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def admit(self, principal: Principal, run_id: str | None = None) -> None:
        """Count a request, and with run_id a run until it is finished, or raise RateLimited and count nothing."""
        rates = self._rates(principal)
        name = _digest(principal.name)
        account = self._account(name)
        now = clock()
        entry = run_id or uuid4().hex
        lease_end = now + self._lease if run_id else None
        wait: int | None = None
        if not self._away:
            args = [now, entry, rates.requests, rates.window, rates.tokens, rates.runs, lease_end or ""]
            try:
                wait, running, crowded = await self._call(self._admit_script, self._keys(name), args)
                if crowded:
                    # Some of them may have ended, and this worker or another one is about to tell.
                    await self._report_pending()
                    await asyncio.sleep(1.5 * FLUSH_SECONDS)
                    wait, running, _ = await self._call(self._admit_script, self._keys(name), args)
            except (RedisError, OSError) as error:  # a TimeoutError is an OSError
                self._lost(error)
            else:
                account.crowded = bool(rates.runs) and running * 2 > rates.runs
        if wait is None:
            wait = account.wait(now, rates, is_run=run_id is not None)
            self._missed.add(name)
            if wait and run_id:
                # Redis may have counted it before its answer got lost.
                account.ended.add(entry)
                self._pending.add(name)
        if wait:
            self._metrics.rate_limited.inc()
            raise RateLimited(retry_after=math.ceil(wait / 1000))
        account.add(now, entry, rates, lease_end)

    async def finish(self, owner: str, run_id: str, tokens: int = 0) -> None:
        """The run has ended and cost this much. Whatever was admitted must come here, in any worker. Never raises."""
        name = _digest(owner)
        account = self._account(name)
        rates = account.rates
        known = account.runs.pop(run_id, None) is not None
        # A run of a principal whom this worker does not know was admitted by another one.
        if known or rates is None or rates.runs:
            account.ended.add(run_id)
        if tokens and (rates is None or rates.tokens):
            account.charge(clock(), tokens)
        if not (account.ended or account.charged):
            return
        self._pending.add(name)
        if self._away:
            return
        if account.crowded or rates is None or rates.tokens:
            await asyncio.shield(self._start(self._report_pending()))
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._report_soon)

    async def close(self) -> None:
        """Tell what is not told yet, if that can be done quickly."""
        if self._timer:
            self._timer.cancel()
        if not self._away:
            await self._report_pending()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _rates(self, principal: Principal) -> Rates:
        own, default = principal.limits, self._default
        requests, window = default.requests, default.window
        if own.requests_per_minute is not None:
            requests, window = own.requests_per_minute, MINUTE
        tokens = default.tokens if own.tokens_per_minute is None else own.tokens_per_minute
        runs = default.runs if own.concurrent_runs is None else own.concurrent_runs
        return Rates(requests, window, tokens, runs)

    def _account(self, name: str) -> Account:
        """Where there are too many the longest silent one is forgotten."""
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account()
            if len(self._accounts) > MAX_PRINCIPALS:
                self._pending.discard(self._accounts.popitem(last=False)[0])
        else:
            self._accounts.move_to_end(name)
        return account

    def _keys(self, name: str) -> list[str]:
        return [f"{KEY_PREFIX}:{self._boot}:{kind}:{name}" for kind in ("requests", "tokens", "runs")]

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _report_soon(self) -> None:
        self._timer = None
        self._start(self._report_pending())

    async def _report_pending(self) -> None:
        async with self._reporting:
            if self._away:
                return
            try:
                await self._report()
            except (RedisError, OSError) as error:
                self._lost(error)

    def _lost(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            self._metrics.rate_limit_local.set(1)
            logger.warning("redis is away, counting locally", extra={"error": type(error).__name__})
            self._start(self._come_back())

    async def _come_back(self) -> None:
        while self._away:
            await asyncio.sleep(RETRY_SECONDS)
            async with self._reporting:
                # Redis may have forgotten something too. Its own clock decides nothing, so all of it can be told again.
                self._missed.update(self._accounts)
                try:
                    await self._call(self._report_script, self._keys("probe"), [_update(tokens=[(f"0:{self._worker}", 0)])])
                    for _ in range(3):
                        await self._report()
                        if not self._missed:
                            break
                except (RedisError, OSError):
                    continue
                self._away = False
        self._metrics.rate_limit_local.set(0)
        logger.info("redis is back")
        await self._report_pending()

    async def _report(self) -> None:
        """Tell Redis what it does not know. What cannot be told stays untold."""
        names = self._pending | self._missed
        missed = self._missed
        self._pending, self._missed = set(), set()
        told: list[tuple[Account, set[int], set[str]]] = []
        keys: list[str] = []
        args: list[bytes] = []
        try:
            for name in names:
                account = self._accounts.get(name)
                if account is None:
                    continue
                requests = list(account.requests) if name in missed else []
                # One call must not keep Redis from everybody else for long.
                while len(requests) > MAX_ENTRIES:
                    part, requests = requests[:MAX_ENTRIES], requests[MAX_ENTRIES:]
                    await self._call(self._report_script, self._keys(name), [_update(account, requests=part)])
                charged, ended = set(account.charged), set(account.ended)
                tokens = [(f"{start}:{self._worker}", account.tokens[start]) for start in (account.tokens if name in missed else charged)]
                runs = [(end, run) for run, end in account.runs.items()] if name in missed else []
                keys += self._keys(name)
                args.append(_update(account, requests=requests, tokens=tokens, runs=runs, ended=ended))
                told.append((account, charged, ended))
            if args:
                await self._call(self._report_script, keys, args)
        except BaseException:
            self._pending |= names
            self._missed |= missed
            raise
        for account, charged, ended in told:
            account.charged -= charged
            account.ended -= ended

    async def _call(self, script: AsyncScript, keys: list[str], args: list[Any]) -> Any:
        async with asyncio.timeout(REDIS_SECONDS):
            return await script(keys=keys, args=args)


def _update(
    account: Account | None = None,
    *,
    requests: Iterable[tuple[int, str]] = (),
    tokens: Iterable[tuple[str, int]] = (),
    runs: Iterable[tuple[int, str]] = (),
    ended: Iterable[str] = (),
) -> bytes:
    window = account.rates.window if account and account.rates else MINUTE
    told = {"requests": list(requests), "tokens": list(tokens), "runs": list(runs), "ended": list(ended)}
    return orjson.dumps({**told, "window": window})


def _digest(name: str) -> str:
    """A key of known length from a name of any length and alphabet."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]

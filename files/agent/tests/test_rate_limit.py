"""The limits against a real Redis: exact over workers, and in force while Redis is away."""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis import Redis as RedisClient
from redis.exceptions import NoPermissionError

from agent.access import rate_limit
from agent.access.auth import Limits, Principal
from agent.access.rate_limit import BUCKET, MINUTE, Account, RateLimiter, Rates
from agent.errors import RateLimited
from agent.metrics import Metrics
from agent.settings import Settings
from agent.storage.redis import create_redis
from graphs import secret_files
from servers import AGENT, ODD_PASSWORD, REDIS_COMMANDS, Redis

WORKER = """
import asyncio, json, os, sys
from agent.access.auth import Principal
from agent.errors import RateLimited
from agent.metrics import Metrics
from agent.access.rate_limit import RateLimiter
from agent.storage.redis import create_redis
from agent.settings import Settings

async def main(count):
    settings = Settings.from_environment(os.environ)
    limiter = RateLimiter(create_redis(settings), settings, Metrics())
    async def one(number):
        try:
            await limiter.admit(Principal("user:ada"), f"{os.getpid()}-{number}")
        except RateLimited as refusal:
            return refusal.retry_after
        return 0
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(await asyncio.gather(*(one(number) for number in range(count)))))

asyncio.run(main(int(sys.argv[1])))
"""


class Workers:
    """Limiters that know nothing of each other but Redis, as in workers of their own."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.settings = Settings.from_environment(environ)
        self.metrics: list[Metrics] = []

    @asynccontextmanager
    async def start(self, count: int = 1) -> AsyncIterator[list[RateLimiter]]:
        clients = [create_redis(self.settings) for _ in range(count)]
        self.metrics = [Metrics() for _ in clients]
        limiters = [RateLimiter(client, self.settings, metrics) for client, metrics in zip(clients, self.metrics, strict=True)]
        try:
            yield limiters
        finally:
            for limiter, client in zip(limiters, clients, strict=True):
                await limiter.close()
                await client.aclose()

    def local(self) -> list[float]:
        return [metrics.registry.get_sample_value("agent_rate_limit_local") or 0 for metrics in self.metrics]


@pytest.fixture
def environ(redis: Redis, tmp_path: Path) -> dict[str, str]:
    secret = tmp_path / "secret"
    secret.write_text(ODD_PASSWORD)
    return {
        "PYTHONPATH": str(AGENT / "src"),
        **secret_files(secret),
        "AGENT_REDIS_HOST": "127.0.0.1",
        "AGENT_REDIS_PORT": str(redis.port),
        "AGENT_RATE_LIMIT": "5/minute",
        "AGENT_CONCURRENT_RUNS": "0",
    }


@pytest.fixture
def ada() -> Principal:
    """Somebody whom no other test counts."""
    return Principal(f"user:{random.getrandbits(64):x}")


@pytest.fixture
def admin(redis: Redis) -> Iterator[RedisClient]:
    """A user of the tests' own who may do everything."""
    acl = redis.acl.read_text()
    if "user admin" not in acl:
        redis.acl.write_text(acl + "user admin on nopass ~* +@all\n")
        redis.stop()
        redis.start()
    client = RedisClient(port=redis.port, username="admin", password="-")
    yield client
    client.close()


async def admitted(limiter: RateLimiter, principal: Principal, run_id: str | None = None) -> int:
    """0 for yes, else the seconds to wait."""
    try:
        await limiter.admit(principal, run_id)
    except RateLimited as refusal:
        assert refusal.retry_after  # noqa: PT017  admitted or refused, both are answers here
        return refusal.retry_after
    return 0


async def admit_many(limiters: list[RateLimiter], principal: Principal, count: int) -> int:
    answers = await asyncio.gather(*(admitted(limiters[number % len(limiters)], principal) for number in range(count)))
    return answers.count(0)


async def until(true: Callable[[], bool], seconds: float) -> float:
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - started


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_exactly_the_limit_over_two_processes(environ: dict[str, str]) -> None:
    for number, (settings, limit) in enumerate([({"AGENT_RATE_LIMIT": "5/minute"}, 5), ({"AGENT_RATE_LIMIT": "1000/minute", "AGENT_CONCURRENT_RUNS": "5"}, 5)]):
        program = WORKER.replace("user:ada", f"user:processes-{number}")
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", program, "50"],
                env=environ | settings,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        answers = [answer for worker in workers for answer in json.loads(worker.communicate(timeout=30)[0])]
        assert len(answers) == 100
        assert answers.count(0) == limit
        assert all(1 <= answer <= 60 for answer in answers if answer)


def test_no_window_holds_more_and_retry_after_is_true(environ: dict[str, str], ada: Principal) -> None:
    """Two workers are asked all the time: whatever window one lays over the answers, it holds the limit and no more."""
    environ["AGENT_RATE_LIMIT"] = "5/1 second"

    async def test() -> None:
        spans: list[tuple[float, float]] = []
        async with Workers(environ).start(2) as limiters:
            started = time.monotonic()
            while time.monotonic() < started + 4:
                for limiter in limiters:
                    asked = time.monotonic()
                    if not await admitted(limiter, ada):
                        spans.append((asked, time.monotonic()))
                await asyncio.sleep(0.01)
            assert len(spans) >= 15
            # The decision falls between question and answer; Redis' clock ticks in milliseconds.
            assert all(answered - asked > 0.99 for (asked, _), (_, answered) in zip(spans, spans[5:], strict=False))
            while not (wait := await admitted(limiters[0], ada)):
                pass
            await asyncio.sleep(wait)
            assert await admitted(limiters[1], ada) == 0

    run(test)


def test_a_refused_request_counts_nothing(environ: dict[str, str], ada: Principal) -> None:
    environ["AGENT_RATE_LIMIT"] = "2/1 second"

    async def test() -> None:
        async with Workers(environ).start() as [limiter]:
            assert await admit_many([limiter], ada, 50) == 2
            await asyncio.sleep(1.05)
            assert await admit_many([limiter], ada, 50) == 2

    run(test)


def test_tokens(environ: dict[str, str], ada: Principal, monkeypatch: pytest.MonkeyPatch) -> None:
    environ |= {"AGENT_RATE_LIMIT": "1000/minute", "AGENT_TOKENS_PER_MINUTE": "100"}

    async def test() -> None:
        async with Workers(environ).start(2) as [first, second]:
            now = rate_limit.clock()
            monkeypatch.setattr(rate_limit, "clock", lambda: now)
            for number, tokens in enumerate((60, 39)):
                assert await admitted(first, ada, f"run-{number}") == 0
                await first.finish(ada.name, f"run-{number}", tokens)
            assert await admitted(second, ada, "run-3") == 0
            now += 30_000
            await second.finish(ada.name, "run-3", 500)
            wait = await admitted(first, ada)
            assert 29 <= wait <= 61
            now += (wait - 2) * 1000
            assert await admitted(second, ada)
            now += 30_000 + 2_000
            assert await admitted(second, ada) == 0

    run(test)


def test_concurrent_runs(environ: dict[str, str], ada: Principal) -> None:
    environ |= {"AGENT_RATE_LIMIT": "1000/minute", "AGENT_CONCURRENT_RUNS": "2"}

    async def test() -> None:
        async with Workers(environ).start(2) as [first, second]:
            assert await admitted(first, ada, "a") == 0
            assert await admitted(second, ada, "b") == 0
            assert await admitted(first, ada, "c") == 1
            assert await admitted(first, ada) == 0  # no run
            # A run may end in another worker than the one that admitted it, and its place is free at once.
            for number in range(20):
                await second.finish(ada.name, "a" if number == 0 else f"d{number - 1}")
                assert await admitted(first, ada, f"d{number}") == 0
                assert await admitted(second, ada, "e") == 1

    run(test)


def test_an_end_that_is_not_told_yet_keeps_nobody_out(environ: dict[str, str], ada: Principal) -> None:
    """Each worker by itself was far from the limit, so that neither told at once that its runs had ended."""
    environ |= {"AGENT_RATE_LIMIT": "1000/minute", "AGENT_CONCURRENT_RUNS": "4"}

    async def test() -> None:
        async with Workers(environ).start(2) as [first, second]:
            for round_ in range(5):
                assert await admitted(first, ada, f"{round_}-a") == 0
                assert await admitted(first, ada, f"{round_}-b") == 0
                assert await admitted(second, ada, f"{round_}-c") == 0
                assert await admitted(second, ada, f"{round_}-d") == 0
                second._accounts[rate_limit._digest(ada.name)].crowded = False
                for run_id in "abcd":
                    await (second if run_id in "cd" else first).finish(ada.name, f"{round_}-{run_id}")

    run(test)


def test_places_far_from_the_limit_are_told_together(environ: dict[str, str], ada: Principal) -> None:
    environ |= {"AGENT_RATE_LIMIT": "1000/minute", "AGENT_CONCURRENT_RUNS": "100"}

    async def test() -> None:
        async with Workers(environ).start() as [limiter]:
            calls = 0
            call = limiter._call

            async def count(*arguments: object) -> object:
                nonlocal calls
                calls += 1
                return await call(*arguments)

            limiter._call = count
            for number in range(40):
                assert await admitted(limiter, ada, str(number)) == 0
            for number in range(40):
                await limiter.finish(ada.name, str(number), 7)
            await asyncio.sleep(0.3)
            assert calls == 41

    run(test)


def test_a_lease_ends(environ: dict[str, str], ada: Principal, monkeypatch: pytest.MonkeyPatch) -> None:
    environ["AGENT_CONCURRENT_RUNS"] = "1"
    environ["AGENT_TURN_TIMEOUT_SECONDS"] = "110"  # three of them are less than MIN_LEASE

    async def test() -> None:
        async with Workers(environ).start() as [limiter]:
            now = rate_limit.clock()
            monkeypatch.setattr(rate_limit, "clock", lambda: now)
            assert await admitted(limiter, ada, "a") == 0
            now += rate_limit.MIN_LEASE - 1
            assert await admitted(limiter, ada, "b")
            now += 1
            assert await admitted(limiter, ada, "b") == 0

    run(test)


def test_a_key_has_limits_of_its_own(environ: dict[str, str], ada: Principal) -> None:
    environ |= {"AGENT_RATE_LIMIT": "5/second", "AGENT_CONCURRENT_RUNS": "1"}
    generous = Principal(ada.name, Limits(requests_per_minute=0, concurrent_runs=0))
    narrow = Principal(ada.name + "-narrow", Limits(requests_per_minute=2, tokens_per_minute=10))

    async def test() -> None:
        async with Workers(environ).start(2) as limiters:
            assert await admit_many(limiters, generous, 50) == 50
            assert [await admitted(limiters[0], generous, str(number)) for number in range(5)] == [0] * 5
            assert await admitted(limiters[0], narrow, "x") == 0
            await limiters[0].finish(narrow.name, "x", 10)
            assert 59 <= await admitted(limiters[1], narrow) <= 62

    run(test)


def test_a_step_of_the_wall_clock_moves_no_window(environ: dict[str, str], ada: Principal, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with Workers(environ).start() as [limiter]:
            assert await admit_many([limiter], ada, 4) == 4
            for step in (3600, -7200, 86_400):
                now = time.time() + step
                monkeypatch.setattr(time, "time", lambda: now)  # noqa: B023
                monkeypatch.setattr(time, "time_ns", lambda: int(now * 1e9))  # noqa: B023
                assert await admitted(limiter, Principal(f"{ada.name}{step}")) == 0
            assert await admit_many([limiter], ada, 10) == 1

    run(test)


@pytest.mark.parametrize("step", ["+3h", "-3h"])
def test_a_step_of_redis_clock(environ: dict[str, str], ada: Principal, admin: RedisClient, step: str) -> None:
    """Expiry is all that Redis's own clock decides, and it is a day away: what a step could take is not taken."""

    async def test() -> None:
        async with Workers(environ).start() as [limiter]:
            assert await admit_many([limiter], ada, 5) == 5
            keys = admin.keys("agent:rl:*:" + rate_limit._digest(ada.name))
            assert keys
            for key in keys:
                # What is left of the time to live after such a step.
                admin.pexpire(key, admin.pttl(key) + (-1 if step[0] == "+" else 1) * 3 * 3_600_000)
            assert await admit_many([limiter], ada, 5) == 0

    run(test)


class TestRedisAway:
    @pytest.fixture(params=["stop", "freeze", "half-open", "full"])
    def outage(self, request: pytest.FixtureRequest, redis: Redis, admin: RedisClient) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
        """How Redis goes, and how it comes back."""
        away = False

        def begin() -> None:
            nonlocal away
            away = True
            match request.param:
                case "stop":
                    redis.stop()
                case "full":
                    admin.config_set("maxmemory", "1")
                case _:
                    redis.freeze()

        def end() -> None:
            nonlocal away
            if away:
                away = False
                match request.param:
                    case "stop":
                        redis.start()
                    case "full":
                        admin.config_set("maxmemory", "0")
                    case "half-open":
                        # The old connections stay dead: a server that has forgotten them.
                        redis.stop()
                        redis.start()
                    case _:
                        redis.thaw()

        yield begin, end
        end()

    def test_away_and_back(self, environ: dict[str, str], ada: Principal, outage: tuple[Callable[[], None], Callable[[], None]]) -> None:
        begin, end = outage
        environ["AGENT_CONCURRENT_RUNS"] = "3"
        bob = Principal(f"{ada.name}-bob")

        async def test() -> None:
            workers = Workers(environ)
            async with workers.start(2) as limiters:
                first, second = limiters
                assert await admitted(first, ada, "before-1") == 0
                assert await admitted(second, ada, "before-2") == 0
                begin()
                started = time.monotonic()
                assert await admitted(first, ada, "away") == 0
                assert time.monotonic() - started < 1
                await first.finish(ada.name, "before-1")
                started = time.monotonic()
                # One worker alone: what it let through before counts, and nothing waits.
                assert await admit_many([first], ada, 40) == 3
                assert 1 <= await admitted(first, ada) <= 60
                assert time.monotonic() - started < 0.2
                assert workers.local()[0] == 1
                started = time.monotonic()
                assert await admit_many([second], ada, 2) == 2
                assert await admit_many(limiters, bob, 6) == 6
                assert time.monotonic() - started < 1
                end()
                assert await until(lambda: workers.local() == [0, 0], 5) < 5
                # Seven are counted, of six in the window, and of two runs.
                assert await admit_many(limiters, ada, 20) == 0
                assert await admit_many(limiters, bob, 20) == 0

        run(test)

    def test_runs_of_an_outage_count_afterwards(self, environ: dict[str, str], ada: Principal, outage: tuple[Callable[[], None], Callable[[], None]]) -> None:
        begin, end = outage
        environ |= {"AGENT_CONCURRENT_RUNS": "3", "AGENT_RATE_LIMIT": "1000/minute", "AGENT_TOKENS_PER_MINUTE": "50"}

        async def test() -> None:
            workers = Workers(environ)
            async with workers.start(2) as [first, second]:
                assert await admitted(first, ada, "a") == 0
                assert await admitted(second, ada, "b") == 0
                begin()
                assert await admitted(first, ada, "c") == 0
                assert await admitted(second, ada, "d") == 0
                await first.finish(ada.name, "a", 20)
                await second.finish(ada.name, "b", 20)
                end()
                await until(lambda: workers.local() == [0, 0], 5)
                assert await admitted(second, ada, "e") == 0
                assert await admitted(first, ada, "f") == 1
                await first.finish(ada.name, "c", 10)
                assert await admitted(second, ada, "f") > 1

        run(test)


def test_what_redis_forgot_is_told_again(environ: dict[str, str], ada: Principal, redis: Redis) -> None:
    """The tests' Redis keeps nothing on disk: a restart empties it."""

    async def test() -> None:
        workers = Workers(environ)
        async with workers.start(2) as limiters:
            assert await admit_many(limiters, ada, 4) == 4
            redis.stop()
            assert await admit_many(limiters, Principal("user:x"), 2) == 2
            redis.start()
            await until(lambda: workers.local() == [0, 0], 5)
            assert await admit_many(limiters, ada, 20) == 1

    run(test)


def test_the_worker_alone_decides_as_the_script_does(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same requests, charges and ends at the same made-up times, to both."""
    rates = Limits(requests_per_minute=6, tokens_per_minute=300, concurrent_runs=3)

    async def test() -> None:
        async with Workers(environ).start(2) as [shared, alone]:
            alone._away = True
            seen: Counter[bool] = Counter()
            for seed in range(30):
                draw = random.Random(seed)
                principal = Principal(f"user:{draw.getrandbits(64):x}-{time.monotonic_ns()}", rates)
                now = rate_limit.clock()
                monkeypatch.setattr(rate_limit, "clock", lambda: now)  # noqa: B023
                running: list[str] = []
                for step in range(60):
                    now += draw.choice((0, 1, 400, 3_000, 15_000))
                    if running and draw.random() < 0.4:
                        run_id, tokens = running.pop(draw.randrange(len(running))), draw.choice((0, 1, 90, 250))
                        for limiter in (shared, alone):
                            await limiter.finish(principal.name, run_id, tokens)
                        continue
                    run_id = f"{seed}-{step}" if draw.random() < 0.7 else None
                    answers = [await admitted(limiter, principal, run_id) for limiter in (shared, alone)]
                    assert answers[0] == answers[1], (seed, step, answers)
                    seen[answers[0] == 0] += 1
                    if run_id and answers[0] == 0:
                        running.append(run_id)
            assert min(seen.values()) > 100
            alone._accounts.clear()

    run(test)


def test_memory_is_bounded(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MAX_PRINCIPALS", 10)

    async def test() -> None:
        async with Workers(environ).start() as [limiter]:
            limiter._away = True
            for number in range(50):
                assert await admitted(limiter, Principal(f"user:{number}")) == 0
            assert len(limiter._accounts) == 10

    run(test)


def test_an_account_forgets_what_is_over() -> None:
    account, rates = Account(), Rates(requests=1000, window=MINUTE, tokens=1000, runs=1000)
    for now in range(0, 10 * MINUTE, 500):
        account.add(now, str(now), rates, now + MINUTE)
        account.charge(now, 1)
        assert len(account.requests) <= MINUTE // 500 + 1
        assert len(account.tokens) <= MINUTE // BUCKET + 2
        assert len(account.runs) <= MINUTE // 500 + 1


def test_the_user_in_redis_can_do_nothing_else(redis: Redis) -> None:
    client = RedisClient(port=redis.port, username="agent", password=ODD_PASSWORD, protocol=2)
    for command in (
        "CONFIG GET *",
        "FLUSHALL",
        "KEYS *",
        "GET agent:rl",
        "EVAL x 0",
        "ACL LIST",
        "SCRIPT FLUSH",
        "ZADD other 1 x",
    ):
        with pytest.raises(NoPermissionError):
            client.execute_command(*command.split())


def test_the_role_gives_the_commands_that_the_tests_give() -> None:
    acl = (AGENT.parents[1] / "roles" / "redis" / "templates" / "users.acl.j2").read_text()
    [line] = [line for line in acl.splitlines() if line.startswith("user agent ")]
    assert line.partition(" -@all ")[2] == REDIS_COMMANDS

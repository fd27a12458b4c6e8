"""Who is let in: by API key, or by the proxy's word for a user."""

import asyncio
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, Response
from pydantic import SecretStr

from agent.access import auth
from agent.access.auth import KEY, Authenticate, Authenticator, KeyRing, Limits, Principal, authenticate
from agent.api.middleware import Observe, error_response
from agent.errors import ServiceError
from agent.keys import main
from agent.metrics import Metrics
from agent.settings import Settings
from agent.storage.postgres import create_pool
from servers import PROXY_SECRET, Model, Postgres, Redis, environment

WRONG_KEYS = 20
ASK = "ask_ci_" + "x" * 43


@pytest.fixture
def environ(migrated: Postgres, redis: Redis, model: Model) -> Iterator[dict[str, str]]:
    yield environment(migrated, redis, model, migrated.directory)
    migrated.query("DELETE FROM api_keys RETURNING 1")


Keys = Callable[..., dict[str, object]]


@pytest.fixture
def keys(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Keys:
    """The program, without the second that a process takes to start."""

    def call(*arguments: str, status: int = 0, text: str = "") -> dict[str, object]:
        output, errors = io.StringIO(), io.StringIO()
        ended: object = 0
        with monkeypatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
            patch.setattr(os, "environ", environ)
            patch.setattr(sys, "argv", ["keys", *arguments])
            patch.setattr(sys, "stdin", io.StringIO(text))
            try:
                main()
            except SystemExit as error:
                ended = error.code
        if isinstance(ended, str):
            assert status == 1
            return {"error": ended}
        assert ended == status, errors.getvalue()
        return json.loads(output.getvalue()) if status == 0 else {"error": errors.getvalue()}

    return call


@pytest.fixture
def program(environ: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agent.keys", *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)

    return call


class Service:
    def __init__(self, client: httpx.AsyncClient, ring: KeyRing) -> None:
        self.client = client
        self.ring = ring

    async def ask(self, path: str = "/whoami", /, **headers: str | bytes) -> tuple[int, str]:
        answer = await self.client.get(path, headers={name.replace("_", "-"): headers[name] for name in headers})
        if answer.status_code == 200:
            return 200, answer.json()
        assert answer.headers["X-Request-ID"]
        error = answer.json()["error"]
        assert error.keys() == {"code", "message"} | ({"id"} if answer.status_code >= 500 else set())
        assert ("WWW-Authenticate" in answer.headers) == (answer.status_code == 401)
        assert ("Retry-After" in answer.headers) == (answer.status_code in {429, 503})
        return answer.status_code, error["code"]


@asynccontextmanager
async def serve(environ: dict[str, str], secret: str | None = PROXY_SECRET) -> AsyncIterator[Service]:
    settings = Settings.from_environment(environ)
    pool = create_pool(settings)
    await pool.open()
    ring = KeyRing(pool)
    app = FastAPI()
    authenticator = Authenticator(ring, SecretStr(secret) if secret else None, WRONG_KEYS)

    async def refuse(request: Request, error: ServiceError) -> Response:
        return error_response(error, request.state.request_id)

    app.add_middleware(Authenticate, authenticator=lambda: authenticator, refuse=refuse)
    app.add_middleware(Observe, metrics=Metrics())

    @app.get("/whoami")
    async def whoami(principal: Principal = Depends(authenticate)) -> str:  # noqa: B008
        return principal.name

    @app.get("/health")
    async def health() -> str:
        return "open"

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
        yield Service(client, ring)
    await ring.close()
    await pool.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 90))


def test_the_proxys_word(environ: dict[str, str]) -> None:
    async def test() -> None:
        async with serve(environ) as service:
            given = {"X_Proxy_Secret": PROXY_SECRET}
            assert await service.ask(X_Forwarded_User="ada", **given) == (200, "user:ada")
            assert await service.ask(X_Forwarded_User="é中".encode(), **given) == (200, "user:é中")
            refused = (401, "unauthorized")
            assert await service.ask() == refused
            assert await service.ask(X_Forwarded_User="ada") == refused
            assert await service.ask(X_Forwarded_User="ada", X_Proxy_Secret="") == refused
            assert await service.ask(X_Forwarded_User="ada", X_Proxy_Secret=PROXY_SECRET + "x") == refused
            assert await service.ask(X_Forwarded_User="ada", X_Proxy_Secret="é".encode("latin-1")) == refused
            assert await service.ask(X_Forwarded_User="", **given) == refused
            assert await service.ask(X_Forwarded_User="x" * 256, **given) == refused
            assert await service.ask(X_Forwarded_User=b"a\x01b", **given) == refused
            assert await service.ask(X_Forwarded_User=b"\xff", **given) == refused
            assert await service.ask(X_Forwarded_For="10.0.0.1", **given) == refused
            assert await service.ask(Authorization="Basic YWRhOnB3", **given) == refused
        async with serve(environ, secret=None) as service:
            assert await service.ask(X_Forwarded_User="ada", X_Proxy_Secret="") == refused

    run(test)


def test_only_probes_are_open(environ: dict[str, str]) -> None:
    async def test() -> None:
        async with serve(environ) as service:
            assert await service.ask("/health") == (200, "open")
            for path in (
                "/",
                "/health/",
                "//health",
                "/Health",
                "/health/x",
                "/nothing",
                "/health%2f",
                "/whoami?/health",
            ):
                assert (await service.ask(path))[0] == 401, path

    run(test)


def test_a_key_in_each_header(environ: dict[str, str], keys: Keys) -> None:
    key = str(keys("create", "ci")["key"])

    async def test() -> None:
        async with serve(environ) as service:
            assert await service.ask(X_Api_Key=key) == (200, "key:ci")
            for scheme in ("Bearer", "bearer", "BEARER "):
                assert await service.ask(Authorization=f"{scheme} {key}") == (200, "key:ci")
            refused = (401, "unauthorized")
            for wrong in (key[:-1], key + "x", key.upper(), ASK, "x", key.replace("_ci_", "_ada_"), "é", "x" * 9000):
                assert await service.ask(X_Api_Key=wrong.encode()) == refused, wrong
                assert await service.ask(Authorization=f"Bearer {wrong}".encode()) == refused, wrong
            assert await service.ask(Authorization=f"Basic {key}") == refused
            assert await service.ask(Authorization=key) == refused
            # A key decides, right or wrong, whoever else is named.
            user = {"X_Forwarded_User": "ada", "X_Proxy_Secret": PROXY_SECRET}
            assert await service.ask(X_Api_Key=key, **user) == (200, "key:ci")
            assert await service.ask(X_Api_Key="wrong", **user) == refused

    run(test)


def test_a_new_key_is_known_at_once(environ: dict[str, str], keys: Keys) -> None:
    async def test() -> None:
        async with serve(environ) as service:
            assert (await service.ask(X_Api_Key=ASK))[0] == 401
            key = str(keys("create", "ci")["key"])
            assert await service.ask(X_Api_Key=key) == (200, "key:ci")

    run(test)


def test_no_query_for_each_request(environ: dict[str, str], keys: Keys) -> None:
    key = str(keys("create", "ci")["key"])

    async def test() -> None:
        async with serve(environ) as service:
            loads = 0
            query = service.ring._query

            async def count(started: float) -> None:
                nonlocal loads
                loads += 1
                await query(started)

            service.ring._query = count
            answers = await asyncio.gather(*(service.ask(X_Api_Key=key) for _ in range(100)))
            assert answers == [(200, "key:ci")] * 100
            guesses = (service.ask(X_Api_Key=ASK[:-3] + f"{number:03}") for number in range(100))
            assert {status for status, _ in await asyncio.gather(*guesses)} == {401}
            assert loads <= 3

    run(test)


def test_revoked_within_five_seconds_without_a_restart(environ: dict[str, str], keys: Keys) -> None:
    key = str(keys("create", "ci")["key"])

    async def test() -> None:
        async with serve(environ) as service:
            assert await service.ask(X_Api_Key=key) == (200, "key:ci")
            assert (await asyncio.to_thread(keys, "revoke", "ci"))["changed"] is True
            revoked = time.monotonic()
            while (await service.ask(X_Api_Key=key))[0] == 200:
                assert time.monotonic() - revoked < 5
                await asyncio.sleep(0.05)
            # A new key of the same name is another key of the same owner, and works within a second or so.
            new = str((await asyncio.to_thread(keys, "create", "ci"))["key"])
            created = time.monotonic()
            while (await service.ask(X_Api_Key=new))[0] != 200:
                assert time.monotonic() - created < 2
                await asyncio.sleep(0.05)
            assert (await service.ask(X_Api_Key=key))[0] == 401
            # Also when nobody has asked for a while.
            await asyncio.to_thread(keys, "revoke", "ci")
            await asyncio.sleep(auth.MAX_AGE_SECONDS)
            assert (await service.ask(X_Api_Key=new))[0] == 401

    run(test)


@pytest.mark.parametrize("how", ["stop", "freeze"])
def test_postgres_away(environ: dict[str, str], keys: Keys, migrated: Postgres, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    key, unseen = (str(keys("create", name)["key"]) for name in ("ci", "unseen"))
    monkeypatch.setattr(auth, "AWAY_SECONDS", 8)

    async def test() -> None:
        async with serve(environ) as service:
            assert await service.ask(X_Api_Key=key) == (200, "key:ci")
            getattr(migrated, how)()
            away = time.monotonic()
            try:
                while time.monotonic() - away < 6:
                    started = time.monotonic()
                    assert await service.ask(X_Api_Key=key) == (200, "key:ci")
                    assert time.monotonic() - started < 0.5
                    await asyncio.sleep(0.1)
                # Both were read; a third one may exist or not.
                assert await service.ask(X_Api_Key=unseen) == (200, "key:unseen")
                started = time.monotonic()
                assert await service.ask(X_Api_Key=ASK) == (503, "keys_unavailable")
                assert time.monotonic() - started < 2.5
                await asyncio.sleep(away + 8.2 - time.monotonic())
                started = time.monotonic()
                assert await service.ask(X_Api_Key=key) == (503, "keys_unavailable")
                assert time.monotonic() - started < 2.5
                user = {"X_Forwarded_User": "ada", "X_Proxy_Secret": PROXY_SECRET}
                assert await service.ask(**user) == (200, "user:ada")
            finally:
                if how == "stop":
                    migrated.start()
                else:
                    migrated.thaw()
            back = time.monotonic()
            while (await service.ask(X_Api_Key=key))[0] != 200:
                assert time.monotonic() - back < 10
                await asyncio.sleep(0.1)

    run(test)


def test_use_and_limits_reach_where_they_belong(environ: dict[str, str], keys: Keys, migrated: Postgres) -> None:
    key = str(keys("create", "ci", "--requests-per-minute", "7", "--concurrent-runs", "0")["key"])

    async def test() -> None:
        async with serve(environ) as service:
            found = await service.ring.find(key)
            assert found == Principal("key:ci", Limits(7, None, 0))
            await asyncio.sleep(auth.REFRESH_SECONDS + 0.1)
            await service.ask(X_Api_Key=key)
            await asyncio.sleep(0.5)

    run(test)
    [(name, used)] = migrated.query("SELECT name, last_used IS NOT NULL FROM api_keys")
    assert (name, used) == ("ci", True)


class TestKeys:
    def test_create_list_revoke(self, keys: Keys, migrated: Postgres) -> None:
        first = keys("create", "ci")
        assert first.keys() == {"name", "changed", "key"}
        assert KEY.fullmatch(str(first["key"]))
        assert str(first["key"]).startswith("ask_ci_")
        assert keys("create", "ci") == {"name": "ci", "changed": False}
        assert keys("create", "ada", "--tokens-per-minute", "1000")["changed"] is True
        listed = keys("list")["keys"]
        assert [entry["name"] for entry in listed] == ["ada", "ci"]
        assert [entry["tokens_per_minute"] for entry in listed] == [1000, None]
        assert str(first["key"]) not in json.dumps(listed)
        assert keys("revoke", "ci") == {"name": "ci", "changed": True}
        assert keys("revoke", "ci") == {"name": "ci", "changed": False}
        assert keys("revoke", "never") == {"name": "never", "changed": False}
        assert [(entry["name"], bool(entry["revoked_at"])) for entry in keys("list")["keys"]] == [
            ("ada", False),
            ("ci", True),
        ]
        assert keys("create", "ci")["key"] != first["key"]
        stored = migrated.query("SELECT hash FROM api_keys WHERE name = 'ci' ORDER BY id")
        assert bytes(stored[0][0]) == auth.key_hash(str(first["key"]))

    def test_limits_of_a_key_can_be_changed(self, keys: Keys) -> None:
        keys("create", "ci")
        assert keys("create", "ci", "--requests-per-minute", "9") == {"name": "ci", "changed": True}
        assert keys("create", "ci", "--requests-per-minute", "9") == {"name": "ci", "changed": False}
        # What is not named stays; `default` gives it back to the service's settings.
        assert keys("create", "ci") == {"name": "ci", "changed": False}
        assert keys("create", "ci", "--requests-per-minute", "default") == {"name": "ci", "changed": True}
        assert keys("list")["keys"][0]["requests_per_minute"] is None

    def test_a_key_that_was_made_elsewhere(self, keys: Keys) -> None:
        assert keys("create", "ci", "--stdin", text=ASK + "\n") == {"name": "ci", "changed": True}
        assert keys("create", "ci", "--stdin", text=ASK + "\n") == {"name": "ci", "changed": False}
        keys("revoke", "ci")
        assert "revoked" in keys("create", "ci", "--stdin", text=ASK, status=1)["error"]
        for bad in ("", "x", ASK.replace("_ci_", "_ada_"), ASK + "x", "é"):
            error = keys("create", "ci", "--stdin", text=bad, status=1)["error"]
            assert "ask_ci_" in error
            assert "xxx" not in error

    @pytest.mark.parametrize("name", ["", "Ci", "-ci", "a b", "a" * 33, "a_b", "a;b", "ci\n", "é", "$(id)", "a.b"])
    def test_bad_names_are_refused(self, keys: Keys, name: str) -> None:
        for command in ("create", "revoke"):
            error = keys(command, "--", name, status=2)["error"]
            assert "allowed are" in error

    @pytest.mark.parametrize("value", ["-1", "x", "1000000", "1.5"])
    def test_bad_limits_are_refused(self, keys: Keys, value: str) -> None:
        assert "--requests-per-minute" in keys("create", "ci", "--requests-per-minute", value, status=2)["error"]

    def test_two_at_once_make_one(self, keys: Keys, program: Callable[..., subprocess.CompletedProcess[str]]) -> None:
        with ThreadPoolExecutor(4) as threads:
            made = [json.loads(run.stdout) for run in threads.map(lambda _: program("create", "ci"), range(4))]
        assert sorted(entry["changed"] for entry in made) == [False, False, False, True]
        assert len(keys("list")["keys"]) == 1

    def test_it_says_why_it_cannot(self, environ: dict[str, str], program: Callable[..., subprocess.CompletedProcess[str]]) -> None:
        for variable, value, error in (
            ("AGENT_POSTGRES_PORT", "1", "agent: cannot use the database: "),
            ("AGENT_POSTGRES_PORT", "x", "AGENT_POSTGRES_PORT='x'"),
        ):
            environ[variable] = value
            run = program("list")
            assert (run.returncode, run.stdout) == (1, "")
            assert error in run.stderr
            assert "Traceback" not in run.stderr


def test_wrong_keys_are_slowed_down_and_right_ones_never(environ: dict[str, str], keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise each takes half a second.
    monkeypatch.setattr(auth, "UNKNOWN_SECONDS", 0)
    key = str(keys("create", "ci")["key"])

    def client(number: int) -> dict[str, str | bytes]:
        return {"X_Real_IP": f"192.0.2.{number}", "X_Proxy_Secret": PROXY_SECRET}

    async def test() -> None:
        async with serve(environ) as service:
            assert await service.ask(X_Api_Key=key, **client(1)) == (200, "key:ci")
            for number in range(WRONG_KEYS):
                assert await service.ask(X_Api_Key=f"ask_{number}_" + "x" * 43, **client(1)) == (401, "unauthorized")
            assert await service.ask(X_Api_Key=ASK, **client(1)) == (429, "too_many_wrong_keys")
            # Who gives the right key of before, who comes from elsewhere, and who only says so without the proxy's secret.
            assert await service.ask(X_Api_Key=key, **client(1)) == (200, "key:ci")
            assert await service.ask(X_Api_Key=ASK, **client(2)) == (401, "unauthorized")
            assert await service.ask(X_Api_Key=ASK, X_Real_IP="192.0.2.1") == (401, "unauthorized")
            # The name in the key is counted over all addresses.
            for number in range(WRONG_KEYS * auth.NAME_TIMES):
                await service.ask(X_Api_Key=ASK, **client(3 + number))
            assert await service.ask(X_Api_Key=ASK, **client(200)) == (429, "too_many_wrong_keys")
            assert await service.ask(X_Api_Key="ask_other_" + "x" * 43, **client(200)) == (401, "unauthorized")
            assert await service.ask(X_Api_Key=key, **client(200)) == (200, "key:ci")

    run(test)


def test_the_wait_doubles_and_ends() -> None:
    now = 1000.0
    guesses = auth.Guesses(lambda: now)
    waits = []
    for _ in range(12):
        guesses.wrong("a", 3)
        waits.append(guesses.wait("a"))
        now += waits[-1]
    assert waits == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert guesses.wait("b") == 0
    now += auth.FORGOTTEN_SECONDS + 1
    guesses.wrong("a", 3)
    assert guesses.wait("a") == 0
    guesses.right("a")
    assert guesses.wait("a") == 0


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "GUESSERS", 3)
    guesses = auth.Guesses()
    for who in "abcdef":
        guesses.wrong(who, 1)
    assert [who for who in "abcdef" if guesses.wait(who)] == ["d", "e", "f"]

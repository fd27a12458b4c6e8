"""Who asks: the holder of an API key, or the user whose password the proxy has checked.

Other containers reach this service too, so the proxy's word counts only together with a secret that it shares with us.
"""

import asyncio
import hashlib
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hmac import compare_digest
from urllib.parse import urlsplit

import psycopg
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.errors import ServiceError
from agent.settings import accepted
from agent.storage.postgres import Pool

logger = logging.getLogger(__name__)

KEY_PREFIX = "ask"
KEY_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
# The random part is what secrets.token_urlsafe(32) gives, 256 bits.
KEY = re.compile(rf"{KEY_PREFIX}_{KEY_NAME.pattern}_[A-Za-z0-9_-]{{43}}")

# The keys in memory are read anew in the background from REFRESH_SECONDS on; nobody is let in by any older than
# MAX_AGE_SECONDS, unless Postgres does not answer, and then until AWAY_SECONDS.
REFRESH_SECONDS = 2.5
MAX_AGE_SECONDS = 5
AWAY_SECONDS = 60
# An unknown key may be a new one: it makes us look, but not at every guess, so that some must wait for it.
UNKNOWN_SECONDS = 0.5
# After a failure, the next try comes no sooner.
FAILED_SECONDS = 1
LOAD_SECONDS = 2

# One name is guessed from many addresses: it may be wrong so many times as often as one address before it waits.
NAME_TIMES = 5
# Each further wrong one doubles the wait. A key that is right never waits.
LONGEST_WAIT = 60
# After so long without a wrong one, an address or a name begins anew.
FORGOTTEN_SECONDS = 600
GUESSERS = 10_000
READING = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS = frozenset({"/health", "/metrics", "/ready"})


class Unauthorized(ServiceError):
    status = 401
    code = "unauthorized"
    message = "Give a valid API key, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`."


class TooManyWrongKeys(ServiceError):
    status = 429
    code = "too_many_wrong_keys"
    message = "Too many API keys were wrong. Wait before you try another one."


class ForeignSite(ServiceError):
    status = 403
    code = "foreign_site"
    message = "A page of another site may not act in a user's name. Give programs an API key."


class KeysUnavailable(ServiceError):
    status = 503
    code = "keys_unavailable"
    message = "API keys cannot be checked at the moment."
    retry_after = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """What one principal may do. None is the service's own setting, 0 no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_runs: int | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom threads belong to and requests are counted for: `user:NAME` of the proxy, or `key:NAME`."""

    name: str
    limits: Limits = Limits()


def key_hash(key: str) -> bytes:
    """A plain digest is enough: nobody guesses 256 random bits."""
    return hashlib.sha256(key.encode()).digest()


class Guesses:
    """Wrong keys in a row by whoever sent them, in this worker. Each costs a question to Postgres, and a line in the log."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # How many, when the last was, and until when no other is looked at.
        self._wrong: OrderedDict[str, tuple[int, float, float]] = OrderedDict()

    def wait(self, who: str) -> int:
        """Seconds until another key of theirs is looked at."""
        _, _, until = self._wrong.get(who, (0, 0.0, 0.0))
        return max(0, math.ceil(until - self._clock()))

    def wrong(self, who: str, free: int) -> None:
        now = self._clock()
        count, last, _ = self._wrong.get(who, (0, now, 0.0))
        count = count + 1 if now - last <= FORGOTTEN_SECONDS else 1
        wait = min(2 ** min(count - free, 10), LONGEST_WAIT) if count >= free else 0
        self._wrong[who] = (count, now, now + wait)
        self._wrong.move_to_end(who)
        while len(self._wrong) > GUESSERS:
            self._wrong.popitem(last=False)

    def right(self, who: str) -> None:
        self._wrong.pop(who, None)


class KeyRing:
    """The active keys, in memory. They are few, so all are read at once and a request costs no query."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._keys: dict[bytes, Principal] = {}
        self._loaded_at = -math.inf
        self._failed_at = -math.inf
        self._used: set[str] = set()
        self._loading: asyncio.Task[bool] | None = None
        self._abandoned: set[asyncio.Task[None]] = set()

    async def find(self, key: str) -> Principal | None:
        """Whose key this is, or None. Raises KeysUnavailable where only Postgres could tell, and does not."""
        if not KEY.fullmatch(key):
            return None
        digest = key_hash(key)
        age = time.monotonic() - self._loaded_at
        away = self._failed_at > self._loaded_at
        if digest not in self._keys:
            fresh = await self._look(time.monotonic())
        elif age < MAX_AGE_SECONDS or (away and age < AWAY_SECONDS):
            if age >= REFRESH_SECONDS:
                self._start_loading()
            fresh = True
        else:
            fresh = await self._load() or age < AWAY_SECONDS
        if not fresh:
            raise KeysUnavailable
        principal = self._keys.get(digest)
        if principal:
            self._used.add(principal.name)
        return principal

    def knows(self, key: str) -> bool:
        """Whether it was among the keys that were read last, which costs nothing to say."""
        return key_hash(key) in self._keys

    async def close(self) -> None:
        tasks = [task for task in (self._loading, *self._abandoned) if task]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LOAD_SECONDS)

    def _start_loading(self) -> asyncio.Task[bool]:
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load_in_time())
        return self._loading

    async def _look(self, asked_at: float) -> bool:
        """Whether what is known now was read after that moment."""
        await asyncio.sleep(self._loaded_at + UNKNOWN_SECONDS - asked_at)
        while self._loaded_at < asked_at:
            if not await self._load():
                return False
        return True

    async def _load(self) -> bool:
        # Shielded: a client that hangs up must not take the others' answer with it.
        return await asyncio.shield(self._start_loading())

    async def _load_in_time(self) -> bool:
        started = time.monotonic()
        if started - self._failed_at < FAILED_SECONDS:
            return False
        query = asyncio.create_task(self._query(started))
        # Not awaited longer: a driver may take many seconds to give up a dead connection.
        done, _ = await asyncio.wait({query}, timeout=LOAD_SECONDS)
        error: BaseException | None = TimeoutError("no answer in time")
        if done:
            error = query.exception()
        else:
            query.cancel()
            self._abandoned.add(query)
            query.add_done_callback(self._abandoned.discard)
        if error:
            self._failed_at = time.monotonic()
            logger.warning("api keys cannot be read", extra={"error": type(error).__name__})
        return error is None

    async def _query(self, started: float) -> None:
        async with self._pool.connection(timeout=LOAD_SECONDS) as connection:
            cursor = await connection.execute(
                "SELECT hash, name, requests_per_minute, tokens_per_minute, concurrent_runs FROM api_keys WHERE revoked_at IS NULL"
            )
            rows = await cursor.fetchall()
            if started < self._loaded_at:
                return  # given up long ago, and overtaken
            self._keys = {
                bytes(row["hash"]): Principal(
                    f"key:{row['name']}",
                    Limits(row["requests_per_minute"], row["tokens_per_minute"], row["concurrent_runs"]),
                )
                for row in rows
            }
            self._loaded_at = started
            used, self._used = self._used, set()
            if used:
                await self._note_use(connection, [name.removeprefix("key:") for name in used])

    async def _note_use(self, connection: psycopg.AsyncConnection[Mapping[str, object]], names: list[str]) -> None:
        try:
            await connection.execute(
                "UPDATE api_keys SET last_used = now() WHERE revoked_at IS NULL AND name = ANY(%s)"
                " AND (last_used IS NULL OR last_used < now() - interval '1 minute')",
                [names],
            )
        except psycopg.Error as error:
            # A database that cannot write can still say who is who.
            logger.warning("use of api keys not noted", extra={"error": type(error).__name__})


class Proxy:
    """The proxy in front, whose word counts only together with the secret."""

    def __init__(self, secret: SecretStr | None) -> None:
        self._secret = secret

    def sent(self, headers: Headers) -> bool:
        given = headers.get("X-Proxy-Secret", "").encode("latin-1")
        # All of them are compared: how long it takes says nothing about any.
        found = [compare_digest(given, value.encode()) for value in (accepted(self._secret) if self._secret else ())]
        return any(found)


class Authenticator:
    def __init__(self, keys: KeyRing, proxy_secret: SecretStr | None, wrong_keys: int) -> None:
        self._keys = keys
        self._proxy = Proxy(proxy_secret)
        self._guesses = Guesses()
        self._wrong_keys = wrong_keys

    async def principal(self, headers: Headers) -> Principal:
        """Whom these headers speak for, or raise Unauthorized or TooManyWrongKeys. A key that is given decides, right or wrong."""
        key = headers.get("X-Api-Key")
        if not key:
            scheme, _, value = headers.get("Authorization", "").partition(" ")
            key = value.strip() if scheme.lower() == "bearer" else None
        found = await self._holder(key, headers) if key else self._user(headers)
        if found is None:
            raise Unauthorized
        return found

    async def _holder(self, key: str, headers: Headers) -> Principal | None:
        if self._keys.knows(key):
            return await self._keys.find(key)
        # Only the proxy says whose address it was. Whoever comes past it is a neighbour in the stack's own networks.
        address = "address " + (headers.get("X-Real-IP", "") if self._proxy.sent(headers) else "")
        # ask_NAME_RANDOM, whose random part is always as long.
        name = "name " + key[len(KEY_PREFIX) + 1 : -44]
        if wait := max(self._guesses.wait(address), self._guesses.wait(name)):
            raise TooManyWrongKeys(retry_after=wait)
        found = await self._keys.find(key)
        if found:
            self._guesses.right(address)
            self._guesses.right(name)
        else:
            self._guesses.wrong(address, self._wrong_keys)
            self._guesses.wrong(name, self._wrong_keys * NAME_TIMES)
        return found

    def check_site(self, method: str, headers: Headers) -> None:
        """Refuse what a browser sends for another site's page, with a password that it was told for this one.

        A key is sent by no browser by itself. Raises ForeignSite.
        """
        if method in READING or headers.get("X-Api-Key") or headers.get("Authorization", "").lower().startswith("bearer "):
            return
        site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
        if site not in (None, "same-origin", "none") or (site is None and origin is not None and (_host(origin) or "") != _host(f"//{headers.get('Host')}")):
            raise ForeignSite

    def _user(self, headers: Headers) -> Principal | None:
        if not self._proxy.sent(headers):
            return None
        try:
            user = headers.get("X-Forwarded-User", "").encode("latin-1").decode()
        except UnicodeDecodeError:
            return None
        # Not shortened or cleaned: two users must never become one.
        return Principal(f"user:{user}") if 1 <= len(user) <= 255 and user.isprintable() else None


def _host(address: str) -> str | None:
    """The name in an address. The proxy passes a host on without its port."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


class Authenticate:
    """Lets nobody past without a principal, but for OPEN_PATHS. A new route is closed unless it is named there."""

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Callable[[], Authenticator],
        refuse: Callable[[Request, ServiceError], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            state = scope.setdefault("state", {})
            try:
                headers, authenticator = Headers(scope=scope), self._authenticator()
                state["principal"] = await authenticator.principal(headers)
                authenticator.check_site(scope["method"], headers)
            except ServiceError as error:
                response = await self._refuse(Request(scope), error)
                if error.status == Unauthorized.status:
                    response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def authenticate(request: Request) -> Principal:
    """The principal of this request, for a route or as a dependency of one."""
    principal: Principal = request.state.principal
    return principal

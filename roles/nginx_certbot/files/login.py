"""Says to nginx whether a name and a password belong together. nginx asks before it passes a request on; a systemd socket starts this.

    login.py serve PASSWORDS         answer on the socket that systemd hands over
    login.py hash NAME               read passwords from standard input, one a line, print their lines for the file PASSWORDS
    login.py check PASSWORDS NAME    read passwords from standard input, one a line, exit with 0 if they are those of that name in the file

A name has two passwords while one is rotated.

A password costs a tenth of a second and 32 MiB to check, so a right one is remembered for its address for a while, as a keyed digest. Wrong ones are counted
for each address and each name: after five in a row the next is looked at after a second only, then after two, four and so on. Who was right before from an
address waits for no name.
An unknown name takes as long as a known one.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import math
import secrets
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

REMEMBERED_SECONDS = 300
# Wrong ones in a row before the first wait, and the longest wait. Of a name they are milder: whoever guesses must not keep its owner out.
ADDRESS = (5, 300)
NAME = (20, 15)
# After so long without a wrong one, an address or a name begins anew.
FORGOTTEN_SECONDS = 3600
# Of each table; the entries that were used longest ago go.
ENTRIES = 20_000
# More checks at once would keep the processors from what is served. Who would wait for longer is sent away.
AT_ONCE = 2
WAITING = 32
HEAD_BYTES = 32_768
SECONDS = 5
CHALLENGE = 'WWW-Authenticate: Basic realm="agent"'

Key = TypeVar("Key")
Value = TypeVar("Value")
Entries = dict[str, list[tuple[bytes, bytes]]]


def hashed(password: bytes, salt: bytes) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=2**15, r=8, p=1, maxmem=64 * 2**20, dklen=32)


def line(name: str, password: bytes) -> str:
    """What the file of passwords has for a name."""
    salt = secrets.token_bytes(16)
    return f"{name}:{salt.hex()}:{hashed(password, salt).hex()}"


def read(path: Path) -> Entries:
    """Salt and hash of each password of a name. Raises OSError, ValueError."""
    entries: Entries = {}
    for name, salt, digest in (entry.split(":") for entry in path.read_text().splitlines() if entry):
        entries.setdefault(name, []).append((bytes.fromhex(salt), bytes.fromhex(digest)))
    return entries


@dataclass
class Tries:
    """Wrong ones in a row, when the last was, and until when no other is looked at, by a clock that is never set back."""

    wrong: int = 0
    last: float = 0.0
    until: float = 0.0


class Slowdown:
    """Counts wrong tries by a key."""

    def __init__(self, free: int, longest: float, clock: Callable[[], float]) -> None:
        self._free = free
        self._longest = longest
        self._clock = clock
        self._tries: OrderedDict[str, Tries] = OrderedDict()

    def wait(self, key: str) -> int:
        """Seconds until this key may try again."""
        tries = self._tries.get(key)
        return max(0, math.ceil(tries.until - self._clock())) if tries else 0

    def wrong(self, key: str) -> None:
        now = self._clock()
        tries = self._tries.get(key, Tries())
        if now - tries.last > FORGOTTEN_SECONDS:
            tries.wrong = 0
        tries.wrong += 1
        tries.last = now
        if tries.wrong >= self._free:
            tries.until = now + min(2 ** min(tries.wrong - self._free, 20), self._longest)
        put(self._tries, key, tries)

    def right(self, key: str) -> None:
        self._tries.pop(key, None)


@dataclass(frozen=True)
class Verdict:
    """Whose login it is, if anybody's; how long to wait before the next try."""

    name: str = ""
    wait: int = 0


class Logins:
    """Judges logins. A changed file counts from the next login on."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._stamp: tuple[int, int, int] | None = None
        self._entries: Entries = {}
        self._right: OrderedDict[bytes, float] = OrderedDict()
        self._known: OrderedDict[str, None] = OrderedDict()
        self.addresses = Slowdown(*ADDRESS, clock)
        self.names = Slowdown(*NAME, clock)
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._places = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0
        # What an unknown name is compared with.
        self._nobody = (secrets.token_bytes(16), secrets.token_bytes(32))

    async def judge(self, name: str, password: bytes, address: str) -> Verdict:
        self._load()
        network = neighbourhood(address)
        # Of this address: a guess from elsewhere must not be told apart while the owner is in.
        digest = hmac.digest(self._key, b"\0".join((network.encode(), name.encode(), password)), "sha256")
        if self._right.get(digest, -math.inf) > self._clock():
            return Verdict(name)
        pair = f"{network} {name}"
        wait = max(self.addresses.wait(network), 0 if pair in self._known else self.names.wait(name))
        if wait:
            return Verdict(wait=wait)
        if self._waiting >= WAITING:
            return Verdict(wait=1)
        self._waiting += 1
        try:
            async with self._places:
                # Several of one address came at once: those that waited are judged by what the first were.
                wait = max(self.addresses.wait(network), 0 if pair in self._known else self.names.wait(name))
                if wait:
                    return Verdict(wait=wait)
                # As many as the name with the most has, so that each costs the same.
                known = self._entries.get(name, [])
                most = max(map(len, self._entries.values()), default=1)
                right = False
                for salt, expected in known + [self._nobody] * (most - len(known)):
                    found = await asyncio.get_running_loop().run_in_executor(self._pool, hashed, password, salt)
                    right |= hmac.compare_digest(found, expected) and (salt, expected) in self._entries.get(name, [])
        finally:
            self._waiting -= 1
        if not right:
            self.addresses.wrong(network)
            self.names.wrong(name)
            return Verdict()
        self.addresses.right(network)
        self.names.right(name)
        put(self._right, digest, self._clock() + REMEMBERED_SECONDS)
        put(self._known, pair, None)
        return Verdict(name)

    def _load(self) -> None:
        status = self._path.stat()
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            self._entries = read(self._path)
            # An old password is refused from now on.
            self._right.clear()
            self._stamp = stamp


def put(table: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    """Set it, as the one that was used last."""
    table[key] = value
    table.move_to_end(key)
    while len(table) > ENTRIES:
        table.popitem(last=False)


def neighbourhood(address: str) -> str:
    """The address, of IPv6 its /64, which one client has whole."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ""
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))


def credentials(header: str) -> tuple[str, bytes] | None:
    """Name and password of basic auth, or None."""
    scheme, _sep, value = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, password = base64.b64decode(value.strip(), validate=True).partition(b":")
        return (name.decode(), password) if colon and name.decode().isprintable() else None
    except (binascii.Error, UnicodeDecodeError):
        return None


async def answer(logins: Logins, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request of nginx: HTTP/1.0 without a body. 204 with the name, or 401 with how long to wait."""
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
        pairs = (entry.partition(":") for entry in head.decode("latin-1").split("\r\n")[1:])
        headers = {name.strip().lower(): value.strip() for name, _sep, value in pairs}
        given = credentials(headers.get("authorization", ""))
        verdict = await logins.judge(*given, headers.get("x-real-ip", "")) if given else Verdict()
        status = ["HTTP/1.0 204 No Content", f"X-Login: {verdict.name}"] if verdict.name else ["HTTP/1.0 401 Unauthorized", CHALLENGE]
        wait = [f"X-Wait: {verdict.wait}"] if verdict.wait else []
        writer.write("\r\n".join([*status, *wait, "Content-Length: 0", "", ""]).encode())
        await asyncio.wait_for(writer.drain(), SECONDS)
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError) as error:  # noqa: UP041  Ubuntu 22.04 has Python 3.10
        # nginx answers 500 to its client where it gets none.
        print(f"no answer: {type(error).__name__}", file=sys.stderr, flush=True)
    finally:
        writer.close()


async def serve(path: Path) -> None:
    logins = Logins(path)
    # The first that systemd hands over.
    listener = socket.socket(fileno=3)
    server = await asyncio.start_unix_server(lambda reader, writer: answer(logins, reader, writer), sock=listener, limit=HEAD_BYTES)
    async with server:
        await server.serve_forever()


def main(arguments: list[str]) -> None:
    if len(arguments) == 2 and arguments[0] == "serve":
        asyncio.run(serve(Path(arguments[1])))
    elif len(arguments) == 2 and arguments[0] == "hash":
        print(*(line(arguments[1], password) for password in sys.stdin.buffer.read().split(b"\n")), sep="\n")
    elif len(arguments) == 3 and arguments[0] == "check":
        try:
            entries = read(Path(arguments[1]))[arguments[2]]
        except (OSError, ValueError, KeyError):
            sys.exit(1)
        passwords = sys.stdin.buffer.read().split(b"\n")
        same = [hmac.compare_digest(hashed(password, salt), expected) for password, (salt, expected) in zip(passwords, entries, strict=False)]
        sys.exit(len(passwords) != len(entries) or not all(same))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])

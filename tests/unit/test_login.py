"""What the login says, by a clock that the test turns; tests/unit/test_nginx_conf.py has it answer a real nginx."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import ROOT, load

login = load("roles/nginx_certbot/files/login.py")
ADDRESS = "192.0.2.7"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Site:
    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.hashes = 0
        # The real one takes a tenth of a second.
        monkeypatch.setattr(login, "hashed", self.hashed)
        self.file = directory / "passwords"
        self.write("right")
        self.logins = login.Logins(self.file, self.clock)

    def hashed(self, password: bytes, salt: bytes) -> bytes:
        self.hashes += 1
        return salt + password

    def write(self, *passwords: str) -> None:
        # As Ansible does: another file of the same name.
        new = self.file.with_suffix(".new")
        new.write_text("".join(login.line("agent", password.encode()) + "\n" for password in passwords))
        new.replace(self.file)

    def judge(self, password: str, name: str = "agent", address: str = ADDRESS) -> tuple[str, int]:
        verdict = asyncio.run(self.logins.judge(name, password.encode(), address))
        return verdict.name, verdict.wait


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_a_right_password_is_hashed_once_in_a_while(site: Site) -> None:
    site.hashes = 0
    assert [site.judge("right") for _ in range(3)] == [("agent", 0)] * 3
    assert site.hashes == 1
    site.clock.now += login.REMEMBERED_SECONDS + 1
    assert site.judge("right") == ("agent", 0)
    assert site.hashes == 2


def test_another_password_counts_at_once_and_the_old_one_no_more(site: Site) -> None:
    assert site.judge("right") == ("agent", 0)
    site.write("other")
    assert site.judge("right") == ("", 0)
    assert site.judge("other") == ("agent", 0)


def test_both_passwords_count_while_one_is_rotated(site: Site) -> None:
    site.write("new", "right")
    assert [site.judge(password) for password in ("right", "new", "wrong")] == [("agent", 0), ("agent", 0), ("", 0)]
    site.write("new")
    assert [site.judge(password) for password in ("right", "new")] == [("", 0), ("agent", 0)]


@pytest.mark.parametrize("name", ["agent", "nobody"])
def test_names_cost_the_same_while_a_password_is_rotated(site: Site, name: str) -> None:
    site.write("new", "right")
    for password in ("wrong", "new"):
        site.hashes = 0
        site.judge(password, name)
        assert site.hashes == 2


# What the file has, what is asked, and whether that is the same.
@pytest.mark.parametrize(
    ("stored", "asked", "same"),
    [
        (b"one", b"one", True),
        (b"one", b"two", False),
        (b"new\nold", b"new\nold", True),
        (b"new\nold", b"new", False),
        (b"new\nold", b"old\nnew", False),
        (b"new", b"new\nold", False),
    ],
)
def test_the_program_compares_all_passwords_of_a_name(tmp_path: Path, stored: bytes, asked: bytes, same: bool) -> None:
    program = [sys.executable, str(ROOT / "roles/nginx_certbot/files/login.py")]
    file = tmp_path / "passwords"
    file.write_bytes(subprocess.run([*program, "hash", "agent"], input=stored, capture_output=True, check=True).stdout)
    found = subprocess.run([*program, "check", str(file), "agent"], input=asked, capture_output=True, check=False)
    assert found.returncode == (0 if same else 1), found.stderr


@pytest.mark.parametrize("name", ["agent", "nobody", "", "x" * 1000, "\u00fc"])
def test_a_known_and_an_unknown_name_cost_the_same(site: Site, name: str) -> None:
    site.hashes = 0
    assert site.judge("wrong", name) == ("", 0)
    assert site.hashes == 1


def test_an_address_waits_longer_and_longer(site: Site) -> None:
    waits = []
    for _ in range(16):
        assert site.judge("wrong", name=os.urandom(4).hex()) == ("", 0)
        waits.append(site.logins.addresses.wait(ADDRESS))
        site.clock.now += waits[-1]
    assert waits == [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert site.judge("wrong", address="198.51.100.1") == ("", 0)


def test_while_an_address_waits_not_even_the_right_password_is_looked_at(site: Site) -> None:
    assert site.judge("right", address="198.51.100.1") == ("agent", 0)
    for _ in range(5):
        assert site.judge("wrong") == ("", 0)
    site.hashes = 0
    assert site.judge("right") == site.judge("wrong") == ("", 1)
    assert site.hashes == 0
    assert site.judge("right", address="198.51.100.1") == ("agent", 0)
    site.clock.now += 1
    assert site.judge("right") == ("agent", 0)


def test_an_address_begins_anew_after_a_right_password_or_a_long_time(site: Site) -> None:
    for forget in (lambda: site.judge("right"), lambda: setattr(site.clock, "now", site.clock.now + login.FORGOTTEN_SECONDS + 1)):
        for _ in range(4):
            assert site.judge("wrong") == ("", 0)
        forget()
        site.clock.now += login.REMEMBERED_SECONDS + 1
        for _ in range(4):
            assert site.judge("wrong") == ("", 0)
        site.logins.addresses.right(ADDRESS)


def test_a_name_is_slowed_for_all_but_those_who_were_right_before(site: Site) -> None:
    assert site.judge("right", address="10.0.0.1") == ("agent", 0)
    for number in range(20):
        assert site.judge("wrong", address=f"203.0.113.{number}") == ("", 0)
    assert site.judge("right", address="198.51.100.1") == ("", 1)
    assert site.judge("wrong", name="other", address="198.51.100.1") == ("", 0)
    site.clock.now += login.REMEMBERED_SECONDS + 1
    for _ in range(20):
        site.logins.names.wrong("agent")
    assert site.logins.names.wait("agent") == 15
    assert site.judge("right", address="10.0.0.1") == ("agent", 0)


def test_guesses_at_once_do_not_get_past_the_count(site: Site) -> None:
    async def guess() -> None:
        await asyncio.gather(*(site.logins.judge("agent", str(number).encode(), ADDRESS) for number in range(200)))

    site.hashes = 0
    asyncio.run(guess())
    # Those that were being looked at when the fifth was found wrong.
    assert site.hashes <= 5 + login.AT_ONCE


@pytest.mark.parametrize(
    ("address", "same", "other"),
    [("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1"), ("192.0.2.7", "192.0.2.7", "192.0.2.8")],
)
def test_one_client_of_ipv6_has_a_whole_network(address: str, same: str, other: str) -> None:
    assert login.neighbourhood(address) == login.neighbourhood(same) != login.neighbourhood(other)


def basic(text: bytes) -> str:
    return "Basic " + base64.b64encode(text).decode()


@pytest.mark.parametrize(
    ("header", "given"),
    [
        (basic(b"agent:a:b"), ("agent", b"a:b")),
        (basic(b"agent:\xff\x00"), ("agent", b"\xff\x00")),
        ("basic YTpi", ("a", b"b")),
        (basic(b"agent"), None),
        (basic(b"\xff:a"), None),
        (basic(b"a\nb:c"), None),
        ("Basic ???", None),
        ("Bearer YTpi", None),
        ("", None),
        ("Basic", None),
    ],
)
def test_what_counts_as_a_login(header: str, given: tuple[str, bytes] | None) -> None:
    assert login.credentials(header) == given


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "ENTRIES", 10)
    clock: Callable[[], float] = Clock()
    slowdown = login.Slowdown(1, 300, clock)
    for number in range(100):
        slowdown.wrong(str(number))
    assert [slowdown.wait(str(number)) > 0 for number in (0, 89, 90, 99)] == [False, False, True, True]


def test_no_wait_overflows() -> None:
    slowdown = login.Slowdown(1, 300, Clock())
    for _ in range(5000):
        slowdown.wrong("a")
    assert slowdown.wait("a") == 300


def test_a_line_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text(login.line("agent", b"secret") + "\n")
    [(salt, digest)] = login.read(tmp_path / "passwords")["agent"]
    assert login.hashed(b"secret", salt) == digest != login.hashed(b"other", salt)
    assert (ROOT / "roles/nginx_certbot/files/login.py").read_text().count("scrypt(") == 1

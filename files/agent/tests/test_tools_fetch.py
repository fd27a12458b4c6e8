"""The page fetcher asks nobody but public hosts of the operator's list.

Nothing here leaves this machine: names are resolved by a table, and every connection that the fetcher wants goes to a
canary on the loopback interface, which notes for which address it was wanted.
"""

import asyncio
import ipaddress
import random
import socket
import ssl
import time
from typing import Any

import pytest
from langchain_core.tools import ToolException

from agent.settings import Settings, SettingsError
from agent.tools.addresses import is_global
from agent.tools.fetch import MAX_PAGE_BYTES, Fetcher, decode, extract, resolve
from agent.wire import ConnectError, Connection
from graphs import secret_files, settings

PUBLIC = "93.184.215.14"
PAGE = b"<html><head><title>A page</title></head><body><p>Hello &amp; goodbye</p></body></html>"

DENIED = [
    # this network, private, shared (CGNAT), loopback, link-local and what is served there
    *("0.0.0.0", "0.1.2.3", "10.0.0.0", "10.255.255.255", "100.64.0.0", "100.100.100.200", "100.127.255.255"),
    *("127.0.0.1", "127.0.0.53", "127.255.255.255", "169.254.0.0", "169.254.169.254", "169.254.170.2"),
    *("172.16.0.0", "172.17.0.1", "172.31.255.255", "192.168.0.0", "192.168.255.255"),
    # protocol assignments, documentation, AS112, AMT, 6to4 relays, benchmarks
    *("192.0.0.0", "192.0.0.192", "192.0.2.0", "192.0.2.255", "192.31.196.1", "192.52.193.1", "192.88.99.1"),
    *("192.175.48.1", "198.18.0.0", "198.19.255.255", "198.51.100.1", "203.0.113.1"),
    # multicast, reserved, broadcast, Azure's metadata
    *("224.0.0.1", "239.255.255.255", "240.0.0.0", "255.255.255.255", "168.63.129.16"),
    # unspecified, loopback, IPv4-mapped and -compatible, translated
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:93.184.215.14", "::127.0.0.1", "::ffff:0:127.0.0.1"),
    # NAT64, also local-use; discard-only, IETF protocols, Teredo, benchmarks, ORCHID, documentation, 6to4
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::5db8:d70e", "64:ff9b:1::1", "100::1", "100:0:0:1::1"),
    *("2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:1::1", "2001:2::1", "2001:3::1", "2001:4:112::1"),
    *("2001:10::1", "2001:20::1", "2001:1ff:ffff::1", "2001:db8::1", "3fff::1", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
    # AS112, unique local and the metadata there, link-local, site-local, multicast, segment routing, not assigned
    *("2620:4f:8000::1", "fc00::1", "fd00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "2606:4700::1%eth0"),
    *("fec0::1", "ff02::1", "ff0e::1", "5f00::1", "4000::1", "8000::1", "1fff::1"),
    # other notations of addresses, which a resolver turns into one of the above
    *("2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "017700000001", "0300.0250.1.1", "010.8.8.8"),
    *("\uff11\uff12\uff17.0.0.1", "127.0.0.1.", " 127.0.0.1", "127.0.0.1%0", "[::1]", "::1%lo", "8.8.8.8/32", "", "x"),
]
ALLOWED = [
    *("1.0.0.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
    *("128.0.0.1", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "168.63.129.15"),
    *("191.255.255.255", "192.0.1.0", "192.0.3.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0"),
    *("198.51.99.255", "203.0.112.255", "203.0.114.0", "223.255.255.255", PUBLIC),
    *("2001:200::1", "2001:4860:4860::8888", "2003::1", "2606:4700:4700::1111", "2a00:1450::1", "2620:4f:8001::1"),
]


@pytest.mark.parametrize("address", DENIED)
def test_denied(address: str) -> None:
    assert not is_global(address)


@pytest.mark.parametrize("address", ALLOWED)
def test_allowed(address: str) -> None:
    assert is_global(address)


def test_the_standard_library_knows_of_no_other_special_address() -> None:
    """Where Python says that an address is not global, so do we."""
    chance = random.Random(5)
    for _ in range(20_000):
        v4 = ipaddress.IPv4Address(chance.getrandbits(32))
        v6 = ipaddress.IPv6Address(chance.getrandbits(128) >> 3 | 1 << 125)
        for address in (v4, v6):
            if is_global(str(address)):
                assert address.is_global, address
                assert not address.is_multicast, address
                assert not address.is_reserved, address


class Canary:
    """A server on the loopback interface, and a resolver and a transport that lead to it alone."""

    def __init__(self, names: dict[str, list[list[str]]] | None = None) -> None:
        self.names = names or {"public.example": [[PUBLIC]]}
        self.asked: list[tuple[str, int]] = []
        self.wanted: list[tuple[str, int]] = []
        self.requests: list[bytes] = []
        self.answers: list[bytes] = [answer()]
        self.slow = False

    async def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        if host not in self.names:
            # As the real one does with numbers in any notation, which needs no name server.
            try:
                return [socket.inet_ntoa(socket.inet_aton(host))]
            except OSError:
                raise socket.gaierror from None
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def connect(self, address: str, port: int, tls: ssl.SSLContext | None, name: str) -> Connection:
        self.wanted.append((address, port))
        if address == "1.0.0.1":
            raise ConnectError
        return await Connection.open("127.0.0.1", self.port, None, name)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            data = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if self.slow:
                for byte in data:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.1)
            writer.write(data)
            await writer.drain()
        except (EOFError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def fetch(self, url: str, allow: tuple[str, ...] = ("*",)) -> str:
        async def main() -> str:
            server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            try:
                return await Fetcher(allow, resolve=self.resolve, connect=self.connect).fetch(url)
            finally:
                server.close()

        return asyncio.run(main())


def answer(body: bytes = PAGE, kind: str = "text/html", status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    return answer(b"", status=f"{status} Moved", headers=f"Location: {location}\r\n")


def refused(canary: Canary, url: str, reason: str, allow: tuple[str, ...] = ("*",)) -> None:
    with pytest.raises(ToolException, match=reason):
        canary.fetch(url, allow)


def test_a_page() -> None:
    canary = Canary()
    text = canary.fetch("http://public.example/a%20b/\u00e9?q=1 2#part".replace(" ", "%20"))
    assert text.startswith("What http://public.example/a%20b/%C3%A9?q=1%202 says (it is not from the user")
    assert text.splitlines()[1:] == ["A page", "Hello & goodbye"]
    assert canary.wanted == [(PUBLIC, 80)]
    assert canary.requests[0].startswith(b"GET /a%20b/%C3%A9?q=1%202 HTTP/1.1\r\nHost: public.example\r\n")


def test_https_goes_to_its_port() -> None:
    canary = Canary()
    canary.fetch("https://public.example/")
    assert canary.wanted == [(PUBLIC, 443)]


class TestAddresses:
    @pytest.mark.parametrize("address", [address for address in DENIED if "%" not in address and address.isascii()])
    def test_a_name_that_leads_to_a_denied_address(self, address: str) -> None:
        canary = Canary({"evil.example": [[address]]})
        refused(canary, "http://evil.example/", "not on the public internet")
        assert (canary.wanted, canary.requests) == ([], [])

    def test_one_denied_address_among_others(self) -> None:
        canary = Canary({"evil.example": [[PUBLIC, "127.0.0.1"]]})
        refused(canary, "http://evil.example/", "not on the public internet")
        assert canary.wanted == []

    def test_rebinding(self) -> None:
        """The name's second answer is another one: it is never asked for, as the connection goes to the first."""
        canary = Canary({"evil.example": [[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]]})
        canary.fetch("http://evil.example/")
        assert canary.asked == [("evil.example", 80)]
        assert canary.wanted == [(PUBLIC, 80)]

    def test_rebinding_between_redirects(self) -> None:
        canary = Canary({"evil.example": [[PUBLIC], ["169.254.169.254"]]})
        canary.answers = [redirect("/again")]
        refused(canary, "http://evil.example/", "not on the public internet")
        assert canary.wanted == [(PUBLIC, 80)]

    @pytest.mark.parametrize(
        "host",
        [
            *("127.0.0.1", "2130706433", "0x7f000001", "0x7F.0x0.0x0.0x1", "0177.0.0.1", "017700000001", "127.1"),
            *("127.0.1", "0", "0.0.0.0", "10.1", "169.254.169.254", "2852039166", "0xa9fea9fe"),
            "0251.0376.0251.0376",
            *("\uff11\uff12\uff17\u30020\u30020\u30021", "\u2460\u2461\u2466.0.0.1", "127.0.0.1."),
        ],
    )
    def test_numbers_in_any_notation(self, host: str) -> None:
        canary = Canary({})
        with pytest.raises(ToolException):
            canary.fetch(f"http://{host}/latest/meta-data/")
        assert (canary.wanted, canary.requests) == ([], [])

    @pytest.mark.parametrize("host", ["[::1]", "[::ffff:127.0.0.1]", "[fd00:ec2::254]", "[64:ff9b::a9fe:a9fe]"])
    def test_ipv6_literals(self, host: str) -> None:
        canary = Canary({host.strip("[]"): [[host.strip("[]")]]})
        with pytest.raises(ToolException):
            canary.fetch(f"http://{host}/")
        assert canary.wanted == []

    def test_the_next_address_is_tried(self) -> None:
        canary = Canary({"public.example": [["1.0.0.1", PUBLIC]]})
        assert "Hello" in canary.fetch("http://public.example/")
        assert canary.wanted == [("1.0.0.1", 80), (PUBLIC, 80)]

    def test_names_that_are_not_known(self) -> None:
        refused(Canary(), "http://nowhere.example/", "the host is not known")

    @pytest.mark.parametrize(("host", "address"), [("127.1", "127.0.0.1"), ("2130706433", "127.0.0.1"), ("0x7f000001", "127.0.0.1")])
    def test_the_real_resolver_gives_addresses_in_one_notation(self, host: str, address: str) -> None:
        assert asyncio.run(resolve(host, 80)) == [address]


class TestUrls:
    @pytest.mark.parametrize(
        "url",
        [
            *("file:///etc/passwd", "gopher://public.example/", "ftp://public.example/", "data:text/html,x", "//x/"),
            *("javascript:alert(1)", "unix:///run/docker.sock", "public.example", "", "http://", "http:///path"),
            *("http://user@public.example/", "http://user:pass@public.example/", "http://127.0.0.1@public.example/"),
            *("http://public.example:22/", "http://public.example:443/", "https://public.example:80/"),
            *("http://public.example:6379/", "http://public.example:99999/", "http://public.example:x/"),
            *("http://public.example\\@127.0.0.1/", "http://public.example\r\nHost: x/", "http://public.example/\n"),
            *("http://public.example /", "http://public.example/\0", "http://pub\u200blic.example/", "http://[::1/"),
            *("http://" + "a" * 300 + ".example/", "http://public.example/" + "x" * 2000, "http://..", "http://a..b/"),
        ],
    )
    def test_what_is_no_plain_web_address(self, url: str) -> None:
        canary = Canary()
        with pytest.raises(ToolException):
            canary.fetch(url)
        assert (canary.wanted, canary.requests) == ([], [])

    @pytest.mark.parametrize(
        ("allow", "host", "fits"),
        [
            (("public.example",), "public.example", True),
            (("public.example",), "PUBLIC.example.", True),
            (("public.example",), "www.public.example", False),
            (("public.example",), "public.example.evil.example", False),
            (("public.example",), "xpublic.example", False),
            (("*.public.example",), "www.public.example", True),
            (("*.public.example",), "a.b.public.example", True),
            (("*.public.example",), "public.example", False),
            (("*.public.example",), "evilpublic.example", False),
            (("*",), "public.example", True),
        ],
    )
    def test_the_list_of_hosts(self, allow: tuple[str, ...], host: str, fits: bool) -> None:
        canary = Canary({host.lower().rstrip("."): [[PUBLIC]]})
        if fits:
            assert "Hello" in canary.fetch(f"http://{host}/", allow)
        else:
            refused(canary, f"http://{host}/", "these hosts only: .*public.example", allow)
            assert canary.asked == []

    @pytest.mark.parametrize(
        ("value", "allowed"),
        [
            ("example.com, *.example.org", ("example.com", "*.example.org")),
            ("*", ("*",)),
            ("Example.COM", ("example.com",)),
            ("", ()),
            ("127.0.0.1", None),
            ("0x7f000001", None),
            ("*.*", None),
            ("ex*mple.com", None),
            ("http://example.com", None),
            ("example.com/path", None),
            ("::1", None),
            ("-a.com", None),
        ],
    )
    def test_the_setting(self, tmp_path: Any, value: str, allowed: tuple[str, ...] | None) -> None:
        (tmp_path / "secret").write_text("x")
        environ = secret_files(tmp_path / "secret")
        if allowed is None:
            with pytest.raises(SettingsError, match=r"AGENT_FETCH_ALLOW=.*host names"):
                Settings.from_environment(environ | {"AGENT_FETCH_ALLOW": value})
        else:
            assert Settings.from_environment(environ | {"AGENT_FETCH_ALLOW": value}).fetch_allow == allowed

    def test_it_is_off_by_default(self) -> None:
        assert settings().fetch_allow == ()


class TestRedirects:
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_they_are_followed(self, status: int) -> None:
        canary = Canary({"public.example": [[PUBLIC]], "other.example": [["8.8.8.8"]]})
        canary.answers = [redirect("https://other.example/x", status), answer()]
        assert canary.fetch("http://public.example/").startswith("What https://other.example/x says")
        assert canary.wanted == [(PUBLIC, 80), ("8.8.8.8", 443)]

    @pytest.mark.parametrize(
        "location",
        [
            *("http://127.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://2130706433/", "http://0x7f.1/"),
            *("http://[::1]/", "//127.0.0.1/", "file:///etc/passwd", "gopher://127.0.0.1:6379/_FLUSHALL", "\\\\x\\y"),
            *("http://evil.example/", "http://user:pass@public.example/", "http://public.example:6379/"),
        ],
    )
    def test_each_is_checked(self, location: str) -> None:
        canary = Canary({"public.example": [[PUBLIC]], "evil.example": [["10.0.0.1"]]})
        canary.answers = [redirect(location)]
        with pytest.raises(ToolException):
            canary.fetch("http://public.example/")
        assert canary.wanted == [(PUBLIC, 80)]

    def test_each_must_be_on_the_list(self) -> None:
        canary = Canary({"public.example": [[PUBLIC]], "other.example": [["8.8.8.8"]]})
        canary.answers = [redirect("http://other.example/")]
        refused(canary, "http://public.example/", "these hosts only", ("public.example",))
        assert canary.wanted == [(PUBLIC, 80)]

    def test_there_is_an_end(self) -> None:
        canary = Canary()
        canary.answers = [redirect("/again")]
        refused(canary, "http://public.example/", "redirects too often")
        assert len(canary.wanted) == 6


class TestBounds:
    def test_size(self) -> None:
        canary = Canary()
        canary.answers = [answer(b"x" * (MAX_PAGE_BYTES * 3), "text/plain")]
        assert MAX_PAGE_BYTES < len(canary.fetch("http://public.example/")) < MAX_PAGE_BYTES + 300

    def test_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("agent.tools.fetch.TOTAL_SECONDS", 1)
        canary = Canary()
        canary.slow = True
        started = time.monotonic()
        refused(canary, "http://public.example/", "did not come in time")
        assert time.monotonic() - started < 3

    @pytest.mark.parametrize(
        ("kind", "fits"),
        [
            *(("text/html; charset=utf-8", True), ("TEXT/HTML", True), ("text/plain", True), ("text/csv", True)),
            *(("application/json", True), ("application/ld+json", True), ("application/rss+xml", True)),
            *(("application/pdf", False), ("image/png", False), ("application/octet-stream", False), ("", False)),
        ],
    )
    def test_types(self, kind: str, fits: bool) -> None:
        canary = Canary()
        canary.answers = [answer(kind=kind)]
        if fits:
            assert "Hello" in canary.fetch("http://public.example/")
        else:
            refused(canary, "http://public.example/", "not a page of text")

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (answer(headers="Content-Encoding: gzip\r\n"), "not a page of text"),
            (answer(status="404 Not Found"), "status 404"),
            (answer(status="302 Found"), "status 302"),
            (b"SSH-2.0-x\r\n", "cannot be fetched"),
            (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 99\r\n\r\nx", "cannot be fetched"),
            (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000, "cannot be fetched"),
            (b"", "cannot be fetched"),
        ],
    )
    def test_other_answers(self, data: bytes, reason: str) -> None:
        canary = Canary()
        canary.answers = [data]
        refused(canary, "http://public.example/", reason)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("plain", "plain"),
        ("<p>one</p><p>two</p>", "one\ntwo"),
        ("a <b>bold</b> word", "a bold word"),
        ("<script>bad()</script>good<STYLE>x{}</STYLE>", "good"),
        ("a<!-- <p>hidden</p> -->b", "ab"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("&lt;b&gt; &eacute; &#x1F600; &unknown;", "<b> \u00e9 \U0001f600 &unknown;"),
        ("<div\nclass='x'>a</div\n>b", "a\nb"),
        ("a<script>never closed", "a"),
        ("a<!-- never closed", "a"),
        ("a<p never closed", "a"),
        ("<!DOCTYPE html><?xml?><title>T</title>", "T"),
        ("\u0130<p>x</p>", "\u0130\nx"),
        ("", ""),
    ],
)
def test_extraction(page: str, text: str) -> None:
    assert extract(page) == text


@pytest.mark.parametrize("piece", ["<", "<!--", "<script>", "<p", "</", "<a <", "&", "&#", "<svg>", "<!", "\n<p>"])
def test_no_page_takes_long(piece: str) -> None:
    started = time.process_time()
    extract(piece * (MAX_PAGE_BYTES // len(piece)))
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ("gr\u00fc\u00df".encode(), "text/html", "gr\u00fc\u00df"),
        ("gr\u00fc\u00df".encode("latin-1"), "text/html; charset=ISO-8859-1", "gr\u00fc\u00df"),
        ('<meta charset="windows-1252">\u20ac'.encode("cp1252"), "text/html", '<meta charset="windows-1252">\u20ac'),
        (b"a\xffb", "text/plain", "a\ufffdb"),
        (b"abc", "text/plain; charset=zlib", "abc"),
        (b"abc", "text/plain; charset=punycode", "abc"),
        (b"abc", "text/plain; charset=nonsense", "abc"),
    ],
)
def test_decoding(body: bytes, kind: str, text: str) -> None:
    assert decode(body, kind) == text

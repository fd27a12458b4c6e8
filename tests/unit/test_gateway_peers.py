"""A front and its peers, each with a real HAProxy: who gets requests, who waits, and who is let in."""

from __future__ import annotations

import contextlib
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_gateway import Stack, directory_for_haproxy, traffic_of

NAMES = ("one", "two")


def certificate(directory: Path) -> str:
    """Make what the role makes with community.crypto. Return the certificate."""
    directory.mkdir()
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "9", "-subj", "/"]
    subprocess.run([*command, "-keyout", directory / "own.crt.key", "-out", directory / "own.crt"], check=True, capture_output=True)
    return (directory / "own.crt").read_text()


class Hosts:
    """A front that serves nothing itself, and two peers."""

    def __init__(self, directory: Path, *, front_serves: bool = False) -> None:
        self.peers: dict[str, Stack] = {}
        of_front = certificate_in(directory / "front")
        certificates = {}
        for name in NAMES:
            certificates[name] = certificate_in(directory / name)
            (directory / name / "peers" / "front.crt").write_text(of_front)
            self.peers[name] = Stack(directory / name, {"is_peer": True, "front": "front"})
        for name, text in certificates.items():
            (directory / "front" / "peers" / f"{name}.crt").write_text(text)
        self.directory = directory
        addresses = {name: {"vllm_peer_address": "127.0.0.1"} for name in NAMES}
        self.front = Stack(directory / "front", {"serves": front_serves, "peers": list(NAMES)}, hostvars=addresses, vllm_peer_port="PORT")
        # All peers have the same port on addresses of their own; here it is the other way round.
        for file in (directory / "front" / "haproxy.cfg", self.front.paths.servers):
            text = file.read_text()
            for name in NAMES:
                text = text.replace(f"host-{name} 127.0.0.1:PORT", f"host-{name} 127.0.0.1:{self.peers[name].front_port}")
            file.write_text(text)

    def start(self) -> None:
        for stack in (*self.peers.values(), self.front):
            stack.start()

    def close(self) -> None:
        for stack in (*self.peers.values(), self.front):
            stack.close()

    def serve(self, name: str) -> None:
        self.peers[name].model("blue", name)
        self.peers[name].gateway.route("blue")

    def wait_until(self, *up: str) -> None:
        """Wait until the front's checks found just these peers up."""
        deadline = time.monotonic() + 10
        while True:
            rows = self.front.gateway.statistics()
            found = {name for name in NAMES if rows[f"host-{name}"]["status"].startswith("UP")}
            if found == set(up):
                return
            assert time.monotonic() < deadline, f"up are {found}"
            time.sleep(0.1)


def certificate_in(directory: Path) -> str:
    directory.mkdir()
    return certificate(directory / "peers")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with directory_for_haproxy() as directory, contextlib.closing(Hosts(directory)) as hosts:
        hosts.start()
        yield hosts


def test_both_peers_get_requests(hosts: Hosts) -> None:
    for name in NAMES:
        hosts.serve(name)
    hosts.wait_until(*NAMES)
    assert {hosts.front.ask() for _ in range(10)} == set(NAMES)
    assert {hosts.front.ask(stream=True) for _ in range(10)} == set(NAMES)
    assert traffic_of(hosts.front).failed == 0


def test_the_peer_with_the_fewest_requests_gets_the_next(hosts: Hosts) -> None:
    for name in NAMES:
        hosts.serve(name)
    hosts.wait_until(*NAMES)
    with ThreadPoolExecutor(3) as pool:
        long = [pool.submit(hosts.front.ask, "[[delay 2]] hello") for _ in range(3)]
        time.sleep(0.5)
        rows = hosts.front.gateway.statistics()
        busy = {name: int(rows[f"host-{name}"]["scur"]) for name in NAMES}
        assert sorted(busy.values()) == [1, 2]
        idler = min(NAMES, key=lambda name: busy[name])
        assert hosts.front.ask() == idler
        assert {answer.result() for answer in long} == set(NAMES)


def test_a_peer_that_holds_requests_gets_none(hosts: Hosts) -> None:
    """As while it swaps its model on one GPU: the other peer answers, and nobody waits."""
    for name in NAMES:
        hosts.serve(name)
    hosts.wait_until(*NAMES)
    with ThreadPoolExecutor(8) as pool:
        hosts.peers["one"].gateway.route("hold")
        early = [pool.submit(hosts.front.ask) for _ in range(8)]
        hosts.wait_until("two")
        started = time.monotonic()
        assert {hosts.front.ask() for _ in range(10)} == {"two"}
        assert time.monotonic() - started < 1
        hosts.peers["one"].gateway.route("blue")
        assert {answer.result() for answer in early} <= set(NAMES)
    hosts.wait_until(*NAMES)
    assert traffic_of(hosts.front).failed == 0


def test_without_any_peer_requests_wait(hosts: Hosts) -> None:
    hosts.wait_until()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(hosts.front.ask) for _ in range(8)]
        time.sleep(1)
        assert traffic_of(hosts.front).held == 8
        hosts.serve("two")
        assert [answer.result() for answer in answers] == ["two"] * 8
    assert traffic_of(hosts.front).failed == 0


def test_a_peer_that_went_away(hosts: Hosts) -> None:
    for name in NAMES:
        hosts.serve(name)
    hosts.wait_until(*NAMES)
    hosts.peers["one"].stop()
    assert {hosts.front.ask() for _ in range(10)} == {"two"}


def test_a_peer_lets_nobody_in_but_the_front(hosts: Hosts) -> None:
    hosts.serve("one")
    url = f"https://127.0.0.1:{hosts.peers['one'].front_port}/health"

    def ask(own: str | None, newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> int:
        context = ssl.create_default_context(cafile=hosts.directory / "one" / "peers" / "own.crt")
        context.check_hostname = False
        context.maximum_version = newest
        if own:
            context.load_cert_chain(hosts.directory / own / "peers" / "own.crt", hosts.directory / own / "peers" / "own.crt.key")
        with urllib.request.urlopen(url, context=context, timeout=5) as response:
            return int(response.status)

    assert ask("front") == 200
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        ask("front", ssl.TLSVersion.TLSv1_2)
    for own in (None, "two"):
        with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
            ask(own)


def test_the_front_takes_no_other_certificate(hosts: Hosts) -> None:
    """A host that took over a peer's address is not given a conversation."""
    hosts.serve("one")
    hosts.wait_until("one")
    peers = hosts.directory / "front" / "peers"
    shutil.copy(peers / "two.crt", peers / "one.crt")
    hosts.front.stop()
    hosts.front.start()
    hosts.wait_until()


def test_metrics_of_each_peer(hosts: Hosts) -> None:
    hosts.serve("two")
    url = f"http://127.0.0.1:{hosts.front.metrics_port}"
    with urllib.request.urlopen(f"{url}/hosts/two/metrics", timeout=5) as response:
        assert b"vllm:num_requests_running" in response.read()
    for path, status in (("/hosts/one/metrics", 503), ("/metrics", 503), ("/hosts/three/metrics", 404), ("/hosts/two/sleep", 404)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}{path}", timeout=5)
        assert caught.value.code == status


@pytest.mark.parametrize("path", ["/sleep?level=1", "/wake_up", "/v1/completions", "/is_sleeping", "/metrics", "/ready"])
def test_the_agent_reaches_nothing_else(hosts: Hosts, path: str) -> None:
    hosts.serve("one")
    hosts.wait_until("one")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{hosts.front.url}{path}", b"{}", timeout=5)
    assert caught.value.code == 404

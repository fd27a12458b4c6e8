"""The firewall's rules in a real kernel: a host with bridges as Docker makes them, containers, and a neighbour, each a network namespace of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from programs import ROOT, load

ROLE = ROOT / "roles" / "firewall"
firewall = load("roles/firewall/files/firewall.py")

# Listens on each port of the arguments, on both families, and says so; answers whoever connects.
SERVER = """
import socket, sys, threading
def serve(listener):
    while True:
        listener.accept()[0].close()
for port in sys.argv[1:]:
    listener = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""
# Prints which of the addresses in the argument answer. A packet that is dropped is never answered.
CLIENT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def answers(address):
    try:
        socket.create_connection(address, 1).close()
    except OSError:
        return False
    return True
addresses = [tuple(address) for address in json.loads(sys.argv[1])]
with ThreadPoolExecutor(32) as pool:
    print(json.dumps([address for address, reached in zip(addresses, pool.map(answers, addresses)) if reached]))
"""
Address = tuple[str, int]


class Namespace:
    """A network namespace, kept by a process that sleeps. Without root's rights, all are below one user namespace."""

    def __init__(self, within: Namespace | None = None) -> None:
        user = os.geteuid() != 0
        self.prefix = within.enter if within else []
        command = ["unshare", *(["--user", "--map-root-user"] if user and not within else []), "--net"]
        self.process = subprocess.Popen([*self.prefix, *command, "sh", "-c", "echo ready; exec sleep 600"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.enter: list[str] = ["nsenter", "--target", str(self.process.pid), "--net", *(["--user", "--preserve-credentials"] if user else [])]
        self.servers: list[subprocess.Popen[str]] = []

    def __call__(self, command: str, check: bool = True) -> str:
        result = subprocess.run([*self.enter, "sh", "-euc", command], capture_output=True, text=True, check=False)
        assert result.returncode == 0 or not check, f"{command}: {result.stderr}"
        return result.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        server = subprocess.Popen([*self.enter, *command], stdout=subprocess.PIPE, text=True)
        self.servers.append(server)
        return server

    def listen(self, *ports: int) -> None:
        server = self.start(sys.executable, "-c", SERVER, *map(str, ports))
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

    def reaches(self, *addresses: Address) -> list[Address]:
        found = subprocess.run([*self.enter, sys.executable, "-c", CLIENT, json.dumps(addresses)], capture_output=True, text=True, check=True).stdout
        return [(address, port) for address, port in json.loads(found)]

    def close(self) -> None:
        for process in (*self.servers, self.process):
            process.kill()
            process.wait()


class Site:
    """A neighbour at 10.9.0.2, the host at 10.9.0.1, and a container in each of three networks."""

    def __init__(self) -> None:
        self.host = Namespace()
        self.neighbour, self.monitor, self.data, self.theirs = (Namespace(self.host) for _ in range(4))
        self.host("ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        self.host(f"ip link add up0 type veth peer name eth0 netns {self.neighbour.process.pid}; ip link set up0 up")
        self.host("ip address add 10.9.0.1/24 dev up0; ip address add fd09::1/64 dev up0 nodad; sysctl -qw net.ipv4.conf.up0.route_localnet=1")
        # Its own loopback stays down, so that it sends what is for 127.0.0.1 to the host.
        self.neighbour("ip link set eth0 up; sysctl -qw net.ipv4.conf.all.route_localnet=1 net.ipv4.conf.eth0.route_localnet=1")
        self.neighbour("ip address add 10.9.0.2/24 dev eth0; ip address add fd09::2/64 dev eth0 nodad")
        self.neighbour("ip route add default via 10.9.0.1; ip -6 route add default via fd09::1; ip route add 127.0.0.0/8 via 10.9.0.1")
        for number, (bridge, container) in enumerate({"as-monitor": self.monitor, "as-data": self.data, "docker0": self.theirs}.items(), 24):
            self.host(f"ip link add {bridge} type bridge; ip link set {bridge} up; ip address add 172.{number}.0.1/24 dev {bridge}")
            self.host(f"ip address add fd{number}::1/64 dev {bridge} nodad")
            self.host(f"ip link add v{number} type veth peer name eth0 netns {container.process.pid}; ip link set v{number} up master {bridge}")
            container(f"ip link set lo up; ip link set eth0 up; ip address add 172.{number}.0.2/24 dev eth0; ip address add fd{number}::2/64 dev eth0 nodad")
            container(f"ip route add default via 172.{number}.0.1; ip -6 route add default via fd{number}::1")

    def close(self) -> None:
        for namespace in (self.neighbour, self.monitor, self.data, self.theirs, self.host):
            namespace.close()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with contextlib.closing(Site()) as site:
        site.monitor.listen(9090, 9093, 9187)
        site.data.listen(5432, 6379)
        site.theirs.listen(80)
        site.neighbour.listen(443)
        # 10022 is an SSH server's that was given a port of its own; 3306 and 9100 are the host's, and no one else's affair.
        site.host.listen(22, 80, 443, 3306, 8080, 9100, 10022, 51000)
        # Bridges take a moment until they pass on what IPv6 asks for.
        deadline = time.monotonic() + 10
        while site.neighbour.reaches(*UNPUBLISHED, *THEIRS) != [*UNPUBLISHED, *THEIRS]:
            assert time.monotonic() < deadline, "the neighbour does not reach what no rule keeps from it"
        yield site


@pytest.fixture
def rules(site: Site, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(ROLE / "files", tmp_path, dirs_exist_ok=True)
    yield tmp_path
    site.host("nft flush ruleset")


def program(site: Site, directory: Path, command: str) -> str:
    return site.host(f"PYTHONDONTWRITEBYTECODE=1 {sys.executable} {directory}/firewall.py {command} {directory}").strip()


def host_rules(**values: Any) -> str:
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)  # noqa: S701  no HTML
    environment.filters["comment"] = lambda text: f"# {text}"
    defaults: dict[str, Any] = {"__firewall_tcp_ports": [80, 443], "firewall_udp_ports": [], "firewall_trusted_networks": [], "firewall_ssh_ports": []}
    return environment.from_string((ROLE / "templates" / "host.nft.j2").read_text()).render(ansible_managed="managed", **(defaults | values))


UNPUBLISHED: list[Address] = [
    *(("172.24.0.2", port) for port in (9090, 9093, 9187)),
    *(("172.25.0.2", port) for port in (5432, 6379)),
    *(("fd24::2", port) for port in (9090, 9093, 9187)),
    *(("fd25::2", port) for port in (5432, 6379)),
    ("127.0.0.1", 8080),
]
PUBLISHED: list[Address] = [("10.9.0.1", 8443), ("fd09::1", 8443)]
THEIRS: list[Address] = [("172.26.0.2", 80), ("fd26::2", 80), ("10.9.0.1", 443), ("fd09::1", 443), ("10.9.0.1", 3306)]


def publish(site: Site, iptables: str) -> None:
    """As Docker does: a translated port, and a FORWARD chain that accepts all that a bridge gets."""
    with contextlib.suppress(AssertionError):
        site.host(f"{iptables} -F; {iptables} -t nat -F; ip6{iptables.removeprefix('ip')} -t nat -F")
    site.host(f"{iptables} -t nat -A PREROUTING -p tcp -d 10.9.0.1 --dport 8443 -j DNAT --to-destination 172.24.0.2:9090")
    site.host(f"ip6{iptables.removeprefix('ip')} -t nat -A PREROUTING -p tcp -d fd09::1 --dport 8443 -j DNAT --to-destination [fd24::2]:9090")
    site.host(f"{iptables} -A FORWARD -o as-monitor -j ACCEPT")


@pytest.mark.parametrize("iptables", ["iptables-nft", "iptables-legacy"])
def test_a_neighbour_reaches_what_is_published_and_nothing_else(site: Site, rules: Path, iptables: str) -> None:
    if iptables == "iptables-legacy" and "filter" not in Path("/proc/net/ip_tables_names").read_text() and os.geteuid() != 0:
        pytest.skip("this kernel has the new tables only")
    publish(site, iptables)
    # Without the rules all of them answer: the test can fail.
    assert site.neighbour.reaches(*UNPUBLISHED, *PUBLISHED, *THEIRS) == [*UNPUBLISHED, *PUBLISHED, *THEIRS]
    program(site, rules, "apply")
    assert site.neighbour.reaches(*UNPUBLISHED, *PUBLISHED, *THEIRS) == [*PUBLISHED, *THEIRS]
    # The host, containers among themselves, and their way out.
    assert site.host.reaches(*UNPUBLISHED) == UNPUBLISHED
    assert site.monitor.reaches(("10.9.0.2", 443), ("fd09::2", 443), ("172.25.0.2", 5432)) == [("10.9.0.2", 443), ("fd09::2", 443), ("172.25.0.2", 5432)]
    # Containers of others are no better than a neighbour.
    assert site.theirs.reaches(("172.24.0.2", 9090), ("172.25.0.2", 5432), ("10.9.0.2", 443)) == [("10.9.0.2", 443)]
    site.host(f"{iptables} -t nat -F; {iptables} -F; ip6{iptables.removeprefix('ip')} -t nat -F")


@pytest.mark.parametrize(
    "event",
    [
        "nft flush ruleset",
        # What Debian's nftables.service loads.
        "printf '#!/usr/sbin/nft -f\\nflush ruleset\\ntable inet filter { chain input { type filter hook input priority 0; }; }' | nft -f -",
        "nft delete table inet agent_stack",
        # What ufw and Docker do when they start again.
        "iptables-nft -F; iptables-nft -X; iptables-nft -t nat -F; iptables-nft -N DOCKER-USER; iptables-nft -I FORWARD -j DOCKER-USER",
        "nft flush ruleset; sleep 0.02; nft flush ruleset; nft flush ruleset",
    ],
)
def test_the_rules_come_back(site: Site, rules: Path, event: str) -> None:
    assert program(site, rules, "state") == "outdated"
    watch = site.host.start(sys.executable, str(rules / "firewall.py"), "watch", str(rules))
    try:
        wait_for(site, rules)
        site.host(event)
        wait_for(site, rules)
        assert site.neighbour.reaches(*UNPUBLISHED) == []
        # It does not answer to what it does itself.
        before = site.host("nft --handle list table inet agent_stack")
        time.sleep(0.3)
        assert site.host("nft --handle list table inet agent_stack") == before
    finally:
        watch.kill()
        watch.wait()


def wait_for(site: Site, directory: Path) -> None:
    deadline = time.monotonic() + 30
    while program(site, directory, "state") != "current":
        assert time.monotonic() < deadline, "the rules did not come back within 30 s"
        time.sleep(0.05)


def test_changed_rules_are_noticed_and_replace_the_old_ones(site: Site, rules: Path) -> None:
    program(site, rules, "apply")
    assert program(site, rules, "state") == "current"
    (rules / "host.nft").write_text(host_rules())
    assert program(site, rules, "state") == "outdated"
    program(site, rules, "apply")
    assert program(site, rules, "state") == "current"
    assert site.host("nft list table inet agent_stack").count("chain ") == 3
    (rules / "host.nft").unlink()
    program(site, rules, "apply")
    assert site.host("nft list table inet agent_stack").count("chain ") == 2


@pytest.mark.parametrize(
    ("values", "open_ports"),
    [
        ({}, {22, 80, 443}),
        ({"__firewall_tcp_ports": [80, 443, 3306]}, {22, 80, 443, 3306}),
        ({"firewall_ssh_ports": [10022]}, {22, 80, 443, 10022}),
        ({"firewall_trusted_networks": ["10.9.0.0/24", "fd09::2"]}, {22, 80, 443, 3306, 8080, 9100, 10022, 51000}),
        ({"firewall_trusted_networks": ["10.9.1.0/24"], "firewall_udp_ports": [51820]}, {22, 80, 443}),
    ],
)
def test_the_host_answers_ssh_always_and_otherwise_what_is_wanted(site: Site, rules: Path, values: dict[str, Any], open_ports: set[int]) -> None:
    everything: list[Address] = [(address, port) for address in ("10.9.0.1", "fd09::1") for port in (22, 80, 443, 3306, 8080, 9100, 10022, 51000)]
    assert site.neighbour.reaches(*everything) == everything
    (rules / "host.nft").write_text(host_rules(**values))
    program(site, rules, "apply")
    assert {port for _, port in site.neighbour.reaches(*everything)} == open_ports
    assert len(site.neighbour.reaches(*everything)) == 2 * len(open_ports)
    # The host itself, its containers, and what others sent pings for.
    assert site.host.reaches(("10.9.0.1", 3306), ("127.0.0.1", 9100)) == [("10.9.0.1", 3306), ("127.0.0.1", 9100)]
    assert site.monitor.reaches(("172.24.0.1", 3306), ("10.9.0.1", 3306)) == [("172.24.0.1", 3306), ("10.9.0.1", 3306)]
    assert site.theirs.reaches(("172.26.0.1", 3306)) == [("172.26.0.1", 3306)]
    assert site.host.reaches(("10.9.0.2", 443)) == [("10.9.0.2", 443)]


@pytest.mark.parametrize(
    ("sshd", "socket", "ports"),
    [
        ("", "", [22]),
        ("port 22\naddressfamily any\nlistenaddress 0.0.0.0:22\nlistenaddress [::]:22\n", "", [22]),
        ("port 2222\nlistenaddress [::]:2222\nlistenaddress 0.0.0.0:2222\n", "", [22, 2222]),
        ("port 22\nport 2200\nlistenaddress 192.0.2.7:10022\n", "Listen=\n", [22, 2200, 10022]),
        ("port 22\n", "Listen=0.0.0.0:2022 (Stream)\nListen=[::]:2023 (Stream)\n\nListen=/run/x.sock (Stream)\n", [22, 2022, 2023]),
    ],
)
def test_the_ports_of_ssh(monkeypatch: pytest.MonkeyPatch, sshd: str, socket: str, ports: list[int]) -> None:
    monkeypatch.setattr(firewall, "output", lambda *command: sshd if command[0].endswith("sshd") else socket)
    assert firewall.ssh_ports() == ports


def test_a_program_that_is_not_there_says_nothing() -> None:
    assert firewall.output("/nowhere/sshd", "-T") == ""

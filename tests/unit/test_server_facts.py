"""How a server is read: a table for each form that its files and programs have, and a real reading of this machine."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _server_facts
from server_cases import BARE, SETTINGS


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nNAME="Debian GNU/Linux"\nVERSION_ID="13"\nID=debian\n', "Debian 13"),
        ("NAME=Ubuntu\nID=ubuntu\nVERSION_ID=24.04\n", "Ubuntu 24.04"),
        ('NAME="Fedora Linux"\nID=fedora\nVERSION_ID=42\n', "Fedora Linux 42"),
        ('NAME="Debian GNU/Linux"\nID=debian\n', "Debian"),
        ("", "an unknown system"),
    ],
)
def test_platform(text: str, name: str) -> None:
    assert _server_facts.platform(text) == name


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock", {"containerd": "/run/containerd/containerd.sock"}),
        ("/usr/bin/dockerd -H fd:// --log-driver=journald --live-restore", {"log-driver": "journald", "live-restore": "true"}),
        ("/usr/bin/dockerd --log-driver journald --iptables=false -D", {"log-driver": "journald", "iptables": "false"}),
        ("/usr/bin/dockerd $DOCKER_OPTS", {}),
        ("/usr/bin/dockerd --label 'a b' --debug --mtu 1400", {"label": "a b", "debug": "true", "mtu": "1400"}),
        ("/usr/bin/dockerd --label 'unbalanced --debug", {"label": "'unbalanced", "debug": "true"}),
        ("", {}),
    ],
)
def test_the_flags_of_the_daemon(command: str, flags: dict[str, str]) -> None:
    assert _server_facts.dockerd_flags(command) == flags


@pytest.mark.parametrize(
    ("text", "settings", "wrong"),
    [
        ("", {}, False),
        (" \n", {}, False),
        ('{"a": 1}', {"a": 1}, False),
        ('{"a": 1,}', {}, True),
        ("[]", {}, True),
    ],
)
def test_daemon_json(text: str, settings: dict[str, Any], wrong: bool) -> None:
    found, error = _server_facts.daemon_settings(text)
    assert (found, bool(error)) == (settings, wrong)


@pytest.mark.parametrize(
    ("packages", "program", "snap", "version", "source"),
    [
        ([], "", False, "", ""),
        (["docker-ce", "docker-ce-cli"], "/usr/bin/docker", False, "28.1.1", "docker-ce"),
        (["docker.io"], "/usr/bin/docker", False, "26.1.5", "docker.io"),
        (["moby-engine"], "/usr/bin/docker", False, "25.0.3", "moby-engine"),
        ([], "/usr/local/bin/docker", False, "29.0.1", "other"),
        ([], "/usr/bin/snap", True, "28.1.1", "snap"),
        (["docker.io"], "/usr/bin/docker", True, "26.1.5", "snap"),
        (["podman-docker"], "/usr/bin/docker", False, "", "podman-docker"),
        (["podman"], "", False, "", ""),
    ],
)
def test_who_installed_the_engine(packages: list[str], program: str, snap: bool, version: str, source: str) -> None:
    assert _server_facts.engine_source(dict.fromkeys(packages), program, snap, version) == source


BEFORE = '{"complete": true, "packages": ["curl", "docker.io"]}'


@pytest.mark.parametrize(
    ("source", "record", "ours"),
    [
        pytest.param("", "", True, id="none yet"),
        pytest.param("docker-ce", "", False, id="no record"),
        pytest.param("docker.io", BEFORE, False, id="there before the stack"),
        pytest.param("docker-ce", BEFORE, True, id="came with the stack"),
        pytest.param("other", BEFORE, False, id="of no package"),
        pytest.param("docker-ce", BEFORE.replace("true", "false"), False, id="a record of an older version's host"),
        pytest.param("docker-ce", "{", False, id="a broken record"),
    ],
)
def test_whose_engine_it_is(source: str, record: str, ours: bool) -> None:
    assert _server_facts.ours(source, record) is ours


@pytest.mark.parametrize(
    ("environment", "config", "remote"),
    [
        ({}, "", ""),
        ({}, '{"auths": {}}', ""),
        ({}, '{"currentContext": "default"}', ""),
        ({}, '{"currentContext": "build"}', "The Docker context build"),
        ({}, "no JSON", ""),
        ({"DOCKER_HOST": "unix:///var/run/docker.sock"}, "", ""),
        ({"DOCKER_HOST": "ssh://x"}, "", "DOCKER_HOST=ssh://x"),
    ],
)
def test_another_engine(environment: dict[str, str], config: str, remote: str) -> None:
    assert _server_facts.remote_engine(environment, config) == remote


@pytest.mark.parametrize(
    ("ports", "numbers"),
    [
        ("127.0.0.1:8080->8080/tcp", [8080]),
        ("0.0.0.0:80->80/tcp, [::]:80->80/tcp, 443/tcp", [80, 80]),
        ("0.0.0.0:9000-9002->9000-9002/tcp, 0.0.0.0:53->53/udp", [9000, 9001, 9002]),
        ("", []),
    ],
)
def test_published_ports(ports: str, numbers: list[int]) -> None:
    assert [entry["port"] for entry in _server_facts.published_ports("x", ports)] == numbers


TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0
   1: 0100007F:1F91 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 112 1 0 100 0 0 10 0
"""
TCP6 = """  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 113 1
   1: 0000000000000000FFFF00000100007F:0051 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 114 1
"""


def test_listening_sockets() -> None:
    assert _server_facts.listening_sockets(TCP) == [{"port": 8080, "address": "127.0.0.1", "inode": "111"}]
    found = [(entry["address"], entry["port"], entry["inode"]) for entry in _server_facts.listening_sockets(TCP6)]
    assert found == [("::", 80, "113"), ("::ffff:127.0.0.1", 81, "114")]
    assert _server_facts.listening_sockets("") == []


ROUTE = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
ZERO = "0" * 32
REJECTED = f"{ZERO} 00 {ZERO} 00 {ZERO} ffffffff 00000001 00000000 00200200       lo\n"
ROUTE6 = f"{ZERO} 00 {ZERO} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003     eth0\n"


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "devices"),
    [
        (ROUTE, REJECTED, {"ipv4": "eth0"}),
        (ROUTE, ROUTE6 + REJECTED, {"ipv4": "eth0", "ipv6": "eth0"}),
        ("", ROUTE6, {"ipv6": "eth0"}),
        ("", REJECTED, {}),
        ("", "", {}),
    ],
)
def test_uplinks(ipv4: str, ipv6: str, devices: dict[str, str]) -> None:
    assert {family: uplink["device"] for family, uplink in _server_facts.uplinks(ipv4, ipv6).items()} == devices


def test_routes() -> None:
    assert _server_facts.routes(ROUTE) == [{"network": "192.0.2.0/255.255.255.0", "device": "eth0"}]


SITE = """
# server { listen 1; }
upstream server_pool { server 10.0.0.1:80; }
server {
    listen 80 default_server;  # listen 81;
    listen [::]:80   default_server;
    server_name shop.example.com
                www.example.com;
    location / { proxy_set_header X-Server "a server"; return 200; }
}
server{ listen 443 ssl; server_name _; }
"""


def test_server_blocks() -> None:
    assert _server_facts.server_blocks(SITE) == [
        {"listen": ["80 default_server", "[::]:80 default_server"], "names": ["shop.example.com", "www.example.com"]},
        {"listen": ["443 ssl"], "names": ["_"]},
    ]


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, {}),
        ({"http_proxy": "http://user:word@proxy:3128/"}, {"http_proxy": "http://proxy:3128/"}),
        ({"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "localhost"}, {"https_proxy": "http://proxy:3128", "no_proxy": "localhost"}),
    ],
)
def test_a_proxy_is_shown_without_its_login(environment: dict[str, str], found: dict[str, str]) -> None:
    assert _server_facts.proxy(environment) == found


def test_what_is_printed_has_no_secrets_of_others() -> None:
    engine = {**BARE["engine"], "daemon": {"proxies": {"http-proxy": "http://user:word@proxy"}}, "flags": {"http-proxy": "http://user:word@proxy"}}
    sources = [{"file": "/a.list", "uri": "https://user:word@mirror.example.com/deb", "suite": "/", "signed_by": ""}]
    found = _server_facts.shown({**BARE, "engine": engine, "sources": sources, "packages": {"nginx": {}, "bash": {}}})
    assert "word" not in json.dumps(found)
    assert found["engine"]["daemon"] == ["proxies"]
    assert list(found["packages"]) == ["nginx"]


def test_this_process_is_found_behind_its_port() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        (entry,) = [entry for entry in _server_facts.listeners() if entry["port"] == port]
        assert (entry["pid"], entry["address"]) == (os.getpid(), "127.0.0.1")
        assert entry["process"]


def test_who_holds_the_lock_of_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    monkeypatch.setattr(_server_facts, "LOCKS", (str(lock), str(tmp_path / "none")))
    assert _server_facts.lock_holder() == ""
    with lock.open("w") as stream:
        assert _server_facts.lock_holder() == ""
        fcntl.lockf(stream, fcntl.LOCK_EX)
        assert _server_facts.lock_holder()
    assert _server_facts.lock_holder() == ""


def test_a_program_that_hangs_or_is_missing_is_no_answer() -> None:
    assert _server_facts.run("sleep", "5", timeout=0.2) == (124, "")
    assert _server_facts.run("/nowhere/program") == (127, "")


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="needs a Debian or Ubuntu machine")
def test_all_of_this_machine_is_read_and_nothing_is_written() -> None:
    """With no program of Docker's or systemd's to ask, as on a bare machine, so that the engine of this one is left in peace."""
    script = f"import json; from {_server_facts.__name__} import gather; print(json.dumps(gather({{**{SETTINGS!r}, 'domain': 'localhost'}})))"
    environment = {"PATH": "/nowhere", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) == set(BARE)

"""What of a server is refused, with which words, and what is only told: a table over facts that were not read from any host."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _server_rules
from server_cases import GPU, NOW, facts, listener, settings

CE = {"version": "28.1.1", "source": "docker-ce", "compose": "2.40.0", "buildx": "0.29.0", "running": True}
NETWORKS = {"agent-stack-egress": {"subnets": ["172.24.0.0/16"], "mtu": ""}}
NVIDIA = "https://nvidia.github.io/libnvidia-container/stable/deb/amd64"
DOCKER = "https://download.docker.com/linux/debian"
CONFLICT = [
    {"file": "/etc/apt/sources.list.d/docker.list", "uri": DOCKER, "suite": "trixie", "signed_by": "/etc/apt/keyrings/docker.gpg"},
    {"file": "/etc/apt/sources.list.d/docker.sources", "uri": DOCKER, "suite": "trixie", "signed_by": "/etc/apt/keyrings/docker.asc"},
]
TOOLKIT = [
    {"file": "/etc/apt/sources.list.d/nvidia.list", "uri": NVIDIA, "suite": "/", "signed_by": "/a.gpg"},
    {"file": "/etc/apt/sources.list.d/nvidia-container-toolkit.sources", "uri": NVIDIA, "suite": "/", "signed_by": "/b.asc"},
]


def site(*listen: str, names: tuple[str, ...] = (), file: str = "/etc/nginx/sites-enabled/shop") -> dict[str, Any]:
    return {"file": file, "listen": list(listen), "names": list(names)}


TAKEN: list[Any] = [
    pytest.param({}, {}, id="a bare Debian 13"),
    *[pytest.param({"platform": name}, {}, id=name) for name in ("Debian 12", "Ubuntu 22.04", "Ubuntu 24.04")],
    pytest.param({"architecture": "aarch64"}, {}, id="ARM"),
    pytest.param({"engine": CE, "packages": ["docker-ce", "containerd.io"]}, {}, id="docker-ce"),
    pytest.param({"engine": {**CE, "swarm": True, "daemon": {"log-driver": "syslog"}}}, {}, id="a node of a swarm that logs to syslog"),
    pytest.param({"listening": [listener(80, "nginx"), listener(443, "nginx", "::")]}, {}, id="the host's own nginx"),
    pytest.param({"listening": [listener(8080, "docker-proxy")], "published": [{"port": 8080, "container": "agent-stack-agent-agent-1"}]}, {}, id="ours"),
    pytest.param({"listening": [listener(8080, "java", "192.0.2.10")]}, {}, id="another address of a port on loopback"),
    pytest.param({"listening": [listener(9090, "systemd", pid=1)]}, {"ports": []}, id="a port that this host does not use"),
    pytest.param({"listening": [listener(22, "sshd")]}, {}, id="another port"),
    pytest.param({"disk": {"/var/lib/docker": 3.0}, "engine": {**CE, "networks": NETWORKS}}, {"gpu": False}, id="a disk that is full of our images"),
    pytest.param({"uplinks": {"ipv6": {"device": "eth0", "mtu": 1500}}, "engine": CE}, {}, id="IPv6 alone with an engine of today"),
    pytest.param({"uplinks": {}, "proxy": {"https_proxy": "http://proxy:3128"}}, {}, id="no route, but a proxy"),
    pytest.param({"uplinks": {}}, {"needs_way_out": False}, id="no route, and none needed"),
    pytest.param({"time": NOW + 59}, {}, id="a clock that is a minute ahead"),
    pytest.param({"time": NOW + 40 * 86400}, {"controller_time": 0}, id="a clock that is not compared"),
    pytest.param({"sources": CONFLICT[:1]}, {}, id="a source of somebody else's"),
    pytest.param({"sources": TOOLKIT, "gpu": GPU, "engine": CE}, {"gpu": True, "replaced_sources": [TOOLKIT[0]["file"]]}, id="a source that is replaced"),
    pytest.param({"sites": [site("80", names=("shop.example.com",))]}, {}, id="a neighbour's site"),
    pytest.param({"sites": [site("8000 default_server")]}, {}, id="a default server on another port"),
    pytest.param({"sites": [site("80 default_server", file="/etc/nginx/sites-enabled/default")]}, {}, id="the package's welcome page"),
    pytest.param({"sites": [site("443 ssl default_server", names=("agent.example.com",), file="/etc/nginx/conf.d/agent-stack.conf")]}, {}, id="our site"),
    pytest.param({"sites": [site("80 default_server", names=("agent.example.com",))]}, {"nginx": False}, id="sites on a host without our nginx"),
    pytest.param({"gpu": GPU, "engine": CE}, {"gpu": True}, id="a GPU"),
    pytest.param({"gpu": GPU, "engine": CE, "nvswitch": True, "fabric_manager": "active"}, {"gpu": True}, id="NVSwitch with its manager"),
    pytest.param({"gpu": {"state": "absent", "reason": "no driver"}}, {}, id="no GPU, and none needed"),
    pytest.param({}, {"subnets": {"egress": "10.89.1.0/24", "data": "10.89.2.0/24", "edge": "fd00:89:3::/64"}}, id="ranges of one's own"),
    pytest.param({"engine": {**CE, "networks": NETWORKS}}, {"subnets": {"egress": "172.24.0.0/16"}}, id="a range that is there already"),
    pytest.param(
        {"routes": [{"network": "10.89.1.0/255.255.255.0", "device": "as-egress"}]}, {"subnets": {"egress": "10.89.1.0/24"}}, id="the route of our own bridge"
    ),
    pytest.param({"disk": {"/var/lib/agent-stack": 10.0}}, {"model": "Qwen/Qwen3-8B-AWQ"}, id="room for a model of 4 bits"),
    pytest.param({"memory_mib": 4000}, {"cpu_model": True, "model": "SmolLM2-135M-Instruct"}, id="memory for a small model"),
    pytest.param({"memory_mib": 900}, {"front": False}, id="little memory on a host that serves from its GPU"),
    pytest.param({"gpu": GPU, "engine": CE}, {"gpu": True, "toolkit_packages": ["docker-ce"]}, id="a package that is not on hold"),
]
REFUSED: list[Any] = [
    pytest.param({"platform": "Fedora Linux 42"}, {}, "The host runs Fedora Linux 42; supported are Debian 12 and 13, Ubuntu 22.04 and 24.04.", id="Fedora"),
    pytest.param({"platform": "Debian 11"}, {}, "The host runs Debian 11; supported are", id="Debian 11"),
    pytest.param({"platform": "Ubuntu 23.10"}, {}, "The host runs Ubuntu 23.10; supported are", id="Ubuntu between"),
    pytest.param({"architecture": "riscv64"}, {}, "kind riscv64; supported are x86_64 and aarch64", id="RISC-V"),
    pytest.param({"systemd": False, "init": "bash"}, {}, "runs no systemd (its first process is bash)", id="a pod"),
    pytest.param({"user": 1000}, {}, "user id 1000 on the host; allowed is root", id="not root"),
    pytest.param({"engine": {**CE, "version": "20.10.5"}}, {}, "Docker Engine is 20.10.5 (docker-ce); needed is 23", id="an old engine"),
    pytest.param({"engine": {**CE, "version": "24.0.7"}, "gpu": GPU}, {"gpu": True}, "is 24.0.7 (docker-ce); needed is 25", id="no CDI"),
    pytest.param(
        {"engine": {**CE, "version": "26.1.5"}, "uplinks": {"ipv6": {"device": "eth0", "mtu": 1500}}}, {}, "needed is 27 or newer", id="IPv6 alone before 27"
    ),
    pytest.param({"engine": {**CE, "source": "snap"}}, {}, "installed as a snap", id="snap"),
    pytest.param({"engine": {**CE, "daemon": {"ip-forward": False}}}, {}, "told not to forward", id="no forwarding"),
    pytest.param({"sources": CONFLICT}, {}, "/docker.list and /etc/apt/sources.list.d/docker.sources name different keys for https://download", id="two keys"),
    pytest.param({"sources": TOOLKIT, "gpu": GPU, "engine": CE}, {}, "name different keys for https://nvidia", id="two keys of NVIDIA's, and no GPU wanted"),
    pytest.param({"sources": TOOLKIT[:1], "gpu": GPU, "engine": CE}, {"gpu": True}, "among other sources", id="NVIDIA's in somebody's own file"),
    pytest.param(
        {"listening": [listener(80, "apache2", "::", unit="apache2.service")]},
        {},
        "Port 80 is taken by apache2 (process 812, apache2.service). Stop that",
        id="apache on 80",
    ),
    pytest.param({"listening": [listener(443, "caddy")]}, {}, "Port 443 is taken by caddy (process 812).", id="caddy on 443"),
    pytest.param(
        {"listening": [listener(9090, "systemd", "::", pid=1)]}, {}, "Port 9090 of monitoring_prometheus_port is taken by a socket of systemd", id="Cockpit"
    ),
    pytest.param(
        {"listening": [listener(8080, "java", "127.0.0.1")]},
        {},
        "Port 8080 of agent_port is taken by java (process 812). Stop that, or set agent_port",
        id="8080",
    ),
    pytest.param({"listening": [listener(80, "nginx", container=True)]}, {}, "taken by nginx in a container on the host's network", id="nginx in a container"),
    pytest.param(
        {"published": [{"port": 443, "container": "traefik"}]}, {}, "Port 443 is taken by the container traefik", id="a container without a proxy process"
    ),
    pytest.param({"listening": [listener(8080, "", pid=0)]}, {}, "an unknown process (process 0)", id="nobody to be seen"),
    pytest.param({"disk": {"/opt/agent-stack": 0.4}}, {}, "/opt/agent-stack is on a file system with 0.4 GiB free; needed are 2", id="a full disk"),
    pytest.param({"disk": {"/var/lib/docker": 4.0}}, {}, "/var/lib/docker has 4.0 GiB free; the images of the stack take about 6", id="no room for images"),
    pytest.param({"disk": {"/var/lib/docker": 20.0}, "gpu": GPU, "engine": CE}, {"gpu": True}, "take about 36 GiB", id="no room for vLLM's image"),
    pytest.param(
        {"disk": {"/var/lib/agent-stack": 100.0}},
        {"model": "meta-llama/Llama-3.1-70B-Instruct"},
        "weights of meta-llama/Llama-3.1-70B-Instruct take about 130",
        id="no room for the model",
    ),
    pytest.param({"memory_mib": 1000}, {}, "has 1000 MiB of memory; the stack needs about 1800", id="a small server"),
    pytest.param({"memory_mib": 8000}, {"cpu_model": True, "model": "Qwen/Qwen3-8B"}, "on the CPU needs about 17", id="a large model on the CPU"),
    pytest.param({"uplinks": {}}, {}, "no default route", id="no way out"),
    pytest.param({"time": NOW - 40 * 86400}, {}, "clock is 40 days behind the controller's", id="a clock that is wrong by 40 days"),
    pytest.param({"time": NOW + 1800}, {}, "clock is 30 minutes ahead of the controller's", id="a clock that is half an hour ahead"),
    pytest.param({}, {"subnets": {"egress": "192.0.2.128/25"}}, "overlaps 192.0.2.0/24 of the host's route over eth0", id="a range of the host's network"),
    pytest.param({}, {"subnets": {"data": "10.1.0.0/16", "egress": "10.1.2.0/24"}}, "overlaps 10.1.0.0/16 of the network data", id="two ranges that overlap"),
    pytest.param({}, {"subnets": {"egress": "10.89.1.1/24"}}, 'has "10.89.1.1/24" for egress; allowed is an address range', id="an address for a range"),
    pytest.param(
        {"engine": {**CE, "networks": NETWORKS}}, {"subnets": {"egress": "10.89.1.0/24"}}, "network agent-stack-egress has 172.24.0.0/16", id="another range"
    ),
    pytest.param({"sites": [site("443 ssl", names=("x", "agent.example.com"))]}, {}, "shop already serves agent.example.com", id="a site with our name"),
    pytest.param({"sites": [site("80 default_server")]}, {}, "has a default_server on 80", id="another default server"),
    pytest.param({"sites": [site("[::]:443 ssl default_server")]}, {}, "has a default_server on [::]:443", id="another default server with TLS"),
    pytest.param(
        {"gpu": {"state": "absent", "reason": "there is no driver"}, "engine": CE}, {"gpu": True}, "no GPU that works: there is no driver.", id="no driver"
    ),
    pytest.param({"gpu": {**GPU, "cuda_version": "12.8"}, "engine": CE}, {"gpu": True}, "supports CUDA 12.8; vLLM's image needs CUDA 13.0", id="an old driver"),
    pytest.param({"gpu": {**GPU, "cuda_version": ""}, "engine": CE}, {"gpu": True}, "supports CUDA of an unknown version", id="a driver that says nothing"),
    pytest.param({"gpu": GPU, "engine": CE, "nvswitch": True, "fabric_manager": "inactive"}, {"gpu": True}, "error 802", id="NVSwitch without its manager"),
]


@pytest.mark.parametrize(("found", "wanted"), TAKEN)
def test_what_can_be_served_is(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    refused, _notes = _server_rules.judge(facts(**found), settings(**wanted))
    assert refused == []


@pytest.mark.parametrize(("found", "wanted", "words"), REFUSED)
def test_what_is_refused_in_one_sentence(found: dict[str, Any], wanted: dict[str, Any], words: str) -> None:
    refused, _notes = _server_rules.judge(facts(**found), settings(**wanted))
    assert len(refused) == 1
    assert words in refused[0]
    assert refused[0].endswith(".")


def test_everything_is_said_at_once() -> None:
    found = {
        "listening": [listener(80, "apache2"), listener(9090, "systemd", pid=1)],
        "sources": CONFLICT,
        "disk": {"/opt/agent-stack": 0.1},
        "engine": {**CE, "version": "20.10.5", "daemon": {"iptables": False}},
    }
    refused, _notes = _server_rules.judge(facts(**found), settings())
    assert len(refused) == 6
    assert len(set(refused)) == 6


def test_a_pod_is_told_that_it_is_one_and_nothing_that_follows_from_it() -> None:
    refused, notes = _server_rules.judge(facts(systemd=False, init="sh", listening=[listener(80, "x")], uplinks={}), settings())
    assert len(refused) == 1
    assert notes == []


@pytest.mark.parametrize(
    ("found", "wanted", "words"),
    [
        pytest.param({"resolved": []}, {}, "agent.example.com has no address in DNS yet", id="no record"),
        pytest.param({"resolved": ["198.51.100.7"]}, {}, "leads to 198.51.100.7, and this host has 192.0.2.10", id="a record that leads elsewhere"),
        pytest.param({"resolved": []}, {"certificate": "self_signed"}, "", id="no record, and nobody who asks"),
        pytest.param({"resolved": ["127.0.0.1"]}, {}, "", id="a name of this host alone"),
        pytest.param({"engine": {**CE, "swarm": True}}, {}, "excludes live-restore", id="a swarm"),
        pytest.param({"apt_lock": "unattended-upgr"}, {}, "unattended-upgr holds the lock of apt", id="apt is busy"),
        pytest.param({"engine": {**CE, "networks": NETWORKS}, "uplinks": {"ipv4": {"device": "wg0", "mtu": 1420}}}, {}, "made for packets of 1500", id="MTU"),
        pytest.param(
            {"gpu": GPU, "engine": CE, "packages": ["nvidia-driver-580-server"], "unattended_upgrades": True},
            {"gpu": True},
            "apt-mark hold nvidia-driver-580-server",
            id="a driver that moves",
        ),
        pytest.param({"gpu": GPU, "engine": CE, "packages": ["nvidia-driver-580"]}, {"gpu": True}, "", id="a driver that nobody moves"),
        pytest.param({"proxy": {"https_proxy": "http://proxy:3128"}, "engine": CE}, {"pulls": True}, "Docker pulls images through it only if", id="a proxy"),
        pytest.param(
            {"proxy": {"https_proxy": "http://p:1"}, "engine": {**CE, "daemon": {"proxies": {"x": "y"}}}}, {"pulls": True}, "", id="Docker has it too"
        ),
    ],
)
def test_what_is_told(found: dict[str, Any], wanted: dict[str, Any], words: str) -> None:
    refused, notes = _server_rules.judge(facts(**found), settings(**wanted))
    assert refused == []
    assert words in " ".join(notes)
    assert bool(notes) == bool(words)


def test_a_held_package_of_the_toolkit() -> None:
    host = facts(gpu=GPU, engine=CE)
    host["packages"]["nvidia-container-toolkit"] = {"version": "1.17.8-1", "held": True}
    refused, _notes = _server_rules.judge(host, settings(gpu=True))
    assert "apt-mark unhold nvidia-container-toolkit" in refused[0]
    assert _server_rules.judge(host, settings(gpu=True, toolkit_version="1.17.8-1"))[0] == []


@pytest.mark.parametrize(
    ("uplinks", "wanted", "mtu"),
    [
        ({"ipv4": {"device": "eth0", "mtu": 1500}}, 0, 0),
        ({"ipv4": {"device": "eth0", "mtu": 9001}}, 0, 0),
        ({"ipv4": {"device": "eth0", "mtu": 1450}}, 0, 1450),
        ({"ipv4": {"device": "eth0", "mtu": 1500}, "ipv6": {"device": "wg0", "mtu": 1420}}, 0, 1420),
        ({"ipv4": {"device": "eth0", "mtu": 1450}}, 1400, 1400),
        ({}, 0, 0),
    ],
)
def test_the_mtu_of_the_networks(uplinks: dict[str, Any], wanted: int, mtu: int) -> None:
    assert _server_rules.network_mtu(facts(uplinks=uplinks), wanted) == mtu


@pytest.mark.parametrize(
    ("model", "gib"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 13.0),
        ("Qwen/Qwen3-32B-FP8", 29.8),
        ("hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4", 39.1),
        ("mistralai/Mixtral-8x7B-v0.1", 104.3),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.3),
        ("openai/gpt-oss", 0),
        ("/srv/models/llama-70b", 0),
        ("", 0),
    ],
)
def test_what_a_model_takes(model: str, gib: float) -> None:
    assert _server_rules.model_gib(model) == pytest.approx(gib, abs=0.1)


HARDENING = {"docker_daemon_hardening": {"icc": False, "no-new-privileges": True}}


@pytest.mark.parametrize(
    ("engine", "changes", "wanted", "told"),
    [
        pytest.param({"ours": True}, {}, {"icc": False, "no-new-privileges": True}, [], id="none yet"),
        pytest.param({**CE, "ours": True}, {}, {"icc": False, "no-new-privileges": True}, [], id="the stack's own"),
        pytest.param({**CE, "ours": True}, {"docker_daemon_options": {"icc": True}}, {"icc": True, "no-new-privileges": True}, [], id="asked otherwise"),
        pytest.param(CE, {}, {}, ["icc and no-new-privileges"], id="somebody else's"),
        pytest.param({**CE, "daemon": {"icc": False}}, {}, {}, ["no-new-privileges"], id="somebody else's, half of it there"),
        pytest.param({**CE, "daemon": {"icc": False, "no-new-privileges": True}}, {}, {}, [], id="somebody else's, all of it there"),
        pytest.param(CE, {"docker_daemon_options": {"icc": False}}, {"icc": False}, ["no-new-privileges"], id="somebody else's, asked for"),
    ],
)
def test_an_engine_of_somebody_else_is_not_hardened(engine: dict[str, Any], changes: dict[str, Any], wanted: dict[str, Any], told: list[str]) -> None:
    found, wish = facts(engine=engine), settings(**HARDENING, **changes)
    options = _server_rules.docker_plan(found, wish).options
    assert {key: value for key, value in options.items() if key in ("icc", "no-new-privileges")} == wanted
    notes = [note for note in _server_rules.judge(found, wish)[1] if "docker_daemon_hardening" in note]
    assert notes == [
        f"The Docker Engine was not installed by this collection, so {keys} of docker_daemon_hardening stay as they are. docker_daemon_options sets them."
        for keys in told
    ]

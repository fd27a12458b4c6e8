"""Who can reach what, and where secrets are: asked of the running host."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import demo
import pytest

from .conftest import Play

Containers = Callable[[], dict[str, dict[str, Any]]]
OPEN_PORTS = {22, 80, 443}
# Rotated passwords, with everything that quotes badly. They double as the canary that must appear nowhere.
ROTATED = ("postgres_agent_password", "postgres_exporter_password", "redis_agent_password", "redis_exporter_password", "nginx_certbot_password")
ODD = "q$z'w\"e\\r#t%y@u:i/o{p}a s"

# The demo's model comes from a package, so nobody is ever sent this.
TOKEN = "hf_0123456789canary0123456789canary0123"


def test_only_the_front_door_listens(on_host: Callable[..., str]) -> None:
    lines = on_host("ss", "--listening", "--tcp", "--udp", "--numeric", "--no-header").splitlines()
    addresses = {line.split()[4] for line in lines if line.split()[1] in {"LISTEN", "UNCONN"}}
    outside = {address for address in addresses if not re.match(r"127\.|\[::1\]", address)}
    assert {int(address.rpartition(":")[2]) for address in outside} <= OPEN_PORTS
    assert any(address.endswith(":443") for address in outside)


def test_docker_publishes_on_loopback_only(containers: Containers) -> None:
    published = {
        name: binding["HostIp"] for name, item in containers().items() for bindings in item["NetworkSettings"]["Ports"].values() for binding in bindings or []
    }
    assert "agent-stack-agent-agent-1" in published
    assert set(published.values()) == {"127.0.0.1"}


def test_every_container_is_confined(containers: Containers) -> None:
    for name, item in containers().items():
        host = item["HostConfig"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert item["Config"]["User"].split(":")[0] not in {"", "0", "root"}, name
        assert host["PidsLimit"], name
        assert host["RestartPolicy"]["Name"] == "unless-stopped", name
        assert not any(mount["Source"].endswith("docker.sock") for mount in item["Mounts"]), name


# A machine on the host's network: its packets arrive at the interface up0, and it knows the way to every address of the host's containers.
NEIGHBOUR = """
mount -o remount,rw /proc/sys
ip netns add neighbour
ip link add up0 type veth peer name eth0 netns neighbour
ip address add 10.99.0.1/24 dev up0; ip link set up0 up; echo 1 > /proc/sys/net/ipv4/conf/up0/route_localnet
ip -n neighbour address add 10.99.0.2/24 dev eth0; ip -n neighbour link set eth0 up
ip netns exec neighbour sh -c 'echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet'
ip -n neighbour route add default via 10.99.0.1; ip -n neighbour route add 127.0.0.0/8 via 10.99.0.1
"""
REACHED = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def reached(address):
    try:
        socket.create_connection(address, 2).close()
    except OSError:
        return False
    return True
addresses = [tuple(address) for address in json.loads(sys.argv[1])]
with ThreadPoolExecutor(64) as pool:
    print(json.dumps([address for address, answer in zip(addresses, pool.map(reached, addresses)) if answer]))
"""


@pytest.fixture
def neighbour(on_host: Callable[..., str]) -> Iterator[Callable[..., list[list[Any]]]]:
    """Asks, from there or from the host, which of some addresses answer."""
    on_host("sh", "-euc", NEIGHBOUR)

    def reached(addresses: list[list[Any]], host: bool = False) -> list[list[Any]]:
        enter = () if host else ("ip", "netns", "exec", "neighbour")
        answer: list[list[Any]] = json.loads(on_host(*enter, "python3", "-c", REACHED, json.dumps(addresses)))
        return answer

    yield reached
    on_host("ip", "link", "delete", "up0")
    on_host("ip", "netns", "delete", "neighbour")


def listening(on_host: Callable[..., str], item: dict[str, Any]) -> list[list[Any]]:
    """Every TCP port of a container, on each address that it has in a network."""
    enter = ("nsenter", "--target", str(item["State"]["Pid"]), "--net")
    ports = {line.split()[3].rpartition(":")[2] for line in on_host(*enter, "ss", "--listening", "--tcp", "--numeric", "--no-header").splitlines()}
    networks = item["NetworkSettings"]["Networks"].values()
    addresses = [address for network in networks for address in (network["IPAddress"], network["GlobalIPv6Address"]) if address]
    return [[address, int(port)] for address in addresses for port in sorted(ports)]


EVENTS = {
    "nothing": "true",
    "Docker was restarted": "systemctl restart docker",
    "Docker was reloaded": "systemctl reload docker",
    # With all others in tests/unit/test_firewall.py: without its own tables Docker would have lost every published port, until the containers start again.
    "the table was removed": "nft delete table inet agent_stack; sleep 2",
}


@pytest.mark.parametrize("event", EVENTS)
def test_a_neighbour_reaches_no_container(
    on_host: Callable[..., str],
    containers: Containers,
    neighbour: Callable[..., list[list[Any]]],
    wait_until_ready: Callable[[float], float],
    event: str,
) -> None:
    on_host("sh", "-euc", EVENTS[event])
    wait_until_ready(60)
    every = [address for item in containers().values() for address in listening(on_host, item)]
    every += [["127.0.0.1", port] for port in (8080, 9090, 9093)]
    assert len(every) > 15
    # From the host most of them answer, so a neighbour's silence says something.
    assert len(neighbour(every, host=True)) > 10
    assert neighbour([["10.99.0.1", 80], ["10.99.0.1", 443]]) == [["10.99.0.1", 80], ["10.99.0.1", 443]]
    assert neighbour(every) == []


def test_without_the_rules_a_neighbour_does(on_host: Callable[..., str], containers: Containers, neighbour: Callable[..., list[list[Any]]]) -> None:
    """What the drill above would see. An engine that is new enough forwards nothing of the kind either, but for the loopback address."""
    every = [address for item in containers().values() for address in listening(on_host, item)] + [["127.0.0.1", 8080]]
    on_host("systemctl", "stop", "agent-stack-firewall.service")
    try:
        on_host("nft", "delete", "table", "inet", "agent_stack")
        # From 28 on engines drop what is addressed to a container; 26, as on Debian 13, does not.
        assert ["127.0.0.1", 8080] in neighbour(every)
    finally:
        on_host("systemctl", "start", "agent-stack-firewall.service")
    assert neighbour(every) == []


def python_in(on_host: Callable[..., str], container: str, code: str) -> str:
    return on_host("docker", "exec", container, "python3", "-c", code, check=False)


STATUS = """
import urllib.request, urllib.error
try:
    print(urllib.request.urlopen({url!r}, timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError as error:
    print('unreachable')
"""


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        ("http://gateway.inference.internal:8000/v1/models", "200"),
        ("http://gateway.inference.internal:8000/metrics", "404"),
        ("http://gateway.inference.internal:8000/invocations", "404"),
        ("http://blue.model.internal:8000/v1/models", "unreachable"),
        ("http://green.model.internal:8000/v1/models", "unreachable"),
        ("http://1.1.1.1/", "unreachable"),
    ],
)
def test_what_the_agent_reaches(on_host: Callable[..., str], url: str, answer: str) -> None:
    assert python_in(on_host, "agent-stack-agent-agent-1", STATUS.format(url=url)) == answer


def test_the_model_has_no_way_out_and_nobody_else_reaches_it(on_host: Callable[..., str], containers: Containers) -> None:
    server = f"agent-stack-vllm-{demo.active_slot()}-server-1"
    assert python_in(on_host, server, STATUS.format(url="http://1.1.1.1/")) == "unreachable"
    address = containers()[server]["NetworkSettings"]["Networks"]["agent-stack-model"]["IPAddress"]
    models = STATUS.format(url=f"http://{address}:8000/v1/models")
    assert python_in(on_host, server, models) == "200"
    assert python_in(on_host, "agent-stack-agent-agent-1", models) == "unreachable"
    networks = {name: set(item["NetworkSettings"]["Networks"]) for name, item in containers().items()}
    gateway = containers()["agent-stack-vllm-gateway-1"]["NetworkSettings"]["Networks"]
    assert {name for name, joined in networks.items() if "agent-stack-model" in joined} == {server, "agent-stack-vllm-gateway-1"}
    assert {name for name, joined in networks.items() if "agent-stack-inference" in joined} == {
        "agent-stack-agent-agent-1",
        "agent-stack-vllm-gateway-1",
    }
    # The gateway's API port answers on the inference network's address alone.
    monitor = gateway["agent-stack-monitor"]["IPAddress"]
    probe = STATUS.format(url=f"http://{monitor}:8000/v1/models")
    assert python_in(on_host, "agent-stack-agent-agent-1", probe) == "unreachable"
    metrics = STATUS.format(url=f"http://{monitor}:8001/v1/models")
    assert python_in(on_host, "agent-stack-agent-agent-1", metrics) == "404"


WORLD_READABLE = "find /opt/agent-stack /etc/nginx /etc/systemd/system -type f -perm -o=r -exec cat {} +"


def traces(on_host: Callable[..., str], containers: Containers) -> dict[str, str]:
    """Every place where a secret could show up."""
    names = sorted(containers())
    return {
        "docker inspect": json.dumps(containers()),
        "docker history": "".join(on_host("docker", "history", "--no-trunc", item["Image"]) for item in containers().values()),
        "container logs": "".join(on_host("sh", "-c", f"docker logs {name} 2>&1") for name in names),
        "ps": on_host("ps", "-eww", "-o", "args"),
        "environments": on_host("sh", "-c", "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'", check=False),
        "journal": on_host("journalctl", "--no-pager", "--boot"),
        "nginx logs": on_host("sh", "-c", "cat /var/log/nginx/*.log"),
        "compose files": on_host("sh", "-c", "cat /opt/agent-stack/*/compose.yml"),
        "world-readable files": on_host("sh", "-c", WORLD_READABLE),
    }


def forms(secret: str) -> set[str]:
    """A secret as such, and as JSON writes it."""
    return {secret, json.dumps(secret)[1:-1]}


METRICS = ("http://127.0.0.1:9090/metrics", "http://127.0.0.1:9090/api/v1/targets", "http://127.0.0.1:9093/metrics", "http://127.0.0.1:8080/metrics")


def test_no_secret_shows(on_host: Callable[..., str], containers: Containers, secrets: dict[str, str]) -> None:
    """The secrets that were generated for this host are in no other place than their files."""
    assert len(secrets) >= 8
    assert all(len(secret) >= 12 for secret in secrets.values())
    places = traces(on_host, containers) | {url: on_host("curl", "--silent", "--max-time", "10", url) for url in METRICS}
    assert all(places[place] for place in ("docker inspect", "container logs", "ps", "environments", "journal", *METRICS[:3]))
    found = {(place, name) for place, text in places.items() for name, secret in secrets.items() for form in forms(secret) if form in text}
    assert found == set()


@pytest.mark.long
def test_rotation_takes_effect_and_leaves_no_trace(
    play: Callable[..., Play],
    on_host: Callable[..., str],
    containers: Containers,
    secrets: dict[str, str],
    tmp_path: Any,
    wait_until_ready: Callable[[float], float],
) -> None:
    variables = tmp_path / "rotated.json"
    variables.write_text(json.dumps({**dict.fromkeys(ROTATED, ODD), "vllm_hf_token": TOKEN}))
    tags = ("--tags", "postgres,redis,vllm,agent,nginx_certbot,monitoring")
    server = f"agent-stack-vllm-{demo.active_slot()}-server-1"
    model = containers()[server]["State"]["StartedAt"]
    result = play(*tags, "-vvv", "--diff", "-e", f"@{variables}")
    try:
        assert result.returncode == 0, result.output[-3000:]
        assert result.recap["changed"] > 0
        wait_until_ready(60)
        logins = [on_host("curl", "--config", "-", stdin=curl_config(password)) for password in (ODD, secrets["nginx_certbot_password"])]
        assert logins == ["422", "401"]
        # An exporter that cannot log in answers all the same, and says so.
        for name, url in {"pg_up": "http://postgres-exporter:9187/metrics", "redis_up": "http://redis-exporter:9121/metrics"}.items():
            text = python_in(on_host, "agent-stack-agent-agent-1", f"import urllib.request as u; print(u.urlopen({url!r}, timeout=10).read().decode())")
            assert re.findall(rf"^{name} (\d+)$", text, re.M) == ["1"]
        # The one secret whose reader, which fetches the model, does not run: nothing else shows that it arrived.
        file = "/opt/agent-stack/vllm/fetch/secrets/hf_token"
        assert (on_host("cat", file), on_host("stat", "--format", "%a %u %g", file)) == (TOKEN, "400 10001 10001")
        places = {"the play's output": result.output, **traces(on_host, containers)}
        found = {place for place, text in places.items() for secret in (ODD, TOKEN, *secrets.values()) for form in forms(secret) if form in text}
        assert found == set()
        again = play(*tags, "-e", f"@{variables}")
        assert again.recap["changed"] == 0, again.output[-6000:]
    finally:
        back = play(*tags)
    assert back.returncode == 0, back.output[-3000:]
    wait_until_ready(60)
    assert containers()[server]["State"]["StartedAt"] == model


def curl_config(password: str) -> str:
    """A request that passes the login and is refused by the agent, as curl's configuration: passwords in arguments would show in ps."""
    escaped = password.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f'user = "agent:{escaped}"\nurl = "https://agent.localhost/chat"\ncacert = "/var/lib/pebble/roots.pem"\nsilent\noutput = "/dev/null"\n'
        'write-out = "%{http_code}"\nheader = "Content-Type: application/json"\ndata = "{}"\n'
    )

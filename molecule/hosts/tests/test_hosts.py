"""Several hosts: a front, two that serve the model, and one that shares that of the first, with real Docker, systemd and HAProxy on each.

They run in this order.
"""

from __future__ import annotations

import re
import subprocess
import time

import pytest
from swap_host import GATEWAY, ROOT, SwapHost

INVENTORY = ROOT / "molecule" / "hosts" / "inventory" / "hosts.yml"
FRONT, ONE, TWO, FOLLOWER = (SwapHost(f"agent-stack-{name}", INVENTORY, "playbooks/site.yml") for name in ("front", "gpu1", "gpu2", "gpu3"))
RATE = 20
# `make drills` runs these too.
LONG = pytest.mark.long


def site(model: str, strategy: str = "side_by_side", *arguments: str) -> list[str]:
    return ["--tags", "vllm", "--limit", "inference,followers", *FRONT.wish(model, strategy), *arguments]


def served(host: SwapHost) -> str:
    """The model that a host serves by its own account."""
    record = host.state()
    return str(record["slots"][record["active"]]["model"]).removeprefix("/srv/models/")


def test_both_hosts_answer_and_the_front_has_no_model() -> None:
    with FRONT.load(RATE) as traffic:
        time.sleep(3)
    assert traffic.problems == []
    assert traffic.models == {"first"}
    for host in (ONE, TWO):
        assert answered(host) > RATE
    assert FRONT.on_host("docker", "ps", "--format", "{{.Names}}") == GATEWAY


def answered(host: SwapHost) -> int:
    """How many requests a host's gateway has sent to its model."""
    rows = host.on_host("curl", "--silent", "--fail", f"http://{monitor(host)}:8405/metrics").splitlines()
    return sum(int(float(row.split()[-1])) for row in rows if re.match(r'haproxy_server_http_responses_total{proxy="model",server="blue",code="2xx"}', row))


def monitor(host: SwapHost) -> str:
    return host.on_host("docker", "inspect", "--format", '{{(index .NetworkSettings.Networks "agent-stack-monitor").IPAddress}}', GATEWAY)


def meeting_ports() -> set[str]:
    """Where the models of the head's two slots wait for the hosts that share them."""
    return set(re.findall(r'"--master-port",\s*"(\d+)"', ONE.on_host("sh", "-c", "cat /opt/agent-stack/vllm-*/compose.yml")))


def followers() -> set[str]:
    """Those for which a container runs on the host that shares them."""
    names = FOLLOWER.on_host("docker", "ps", "--format", "{{.Names}}").split()
    return {found[1] for name in names if (found := re.fullmatch(r"agent-stack-vllm-(\d+)-server-1", name))}


def test_two_hosts_share_a_model() -> None:
    """The scripted head, like vLLM, answers its health check only once the other host has come."""
    (port,) = meeting_ports()
    assert followers() == {port}
    address = ONE.on_host("hostname", "--ip-address")
    assert f"scripted follower 1 of {address}:{port}" in FOLLOWER.on_host("docker", "logs", f"agent-stack-vllm-{port}-server-1")
    assert ONE.serving() == "first"
    # What the model's server can be told to do is told through its socket, and nobody else has that.
    assert ONE.on_host("stat", "--format", "%a %u %g", "/opt/agent-stack/vllm/sockets/blue") == "750 10001 10001"


def test_prometheus_can_read_each_host() -> None:
    for name in ("agent-stack-gpu1", "agent-stack-gpu2"):
        text = FRONT.on_host("curl", "--silent", "--fail", f"http://{monitor(FRONT)}:8001/hosts/{name}/metrics")
        assert "vllm:num_requests_running" in text


def test_nothing_but_the_door_for_the_front_listens() -> None:
    for host in (ONE, TWO):
        listening = host.on_host("ss", "--listening", "--tcp", "--numeric", "--no-header").split("\n")
        addresses = {line.split()[3] for line in listening}
        outside = {address for address in addresses if not address.startswith(("127.", "[::1]"))}
        own = host.on_host("hostname", "--ip-address")
        # A head waits there for those that share its model.
        assert outside == {f"{own}:8443"} | ({f"{own}:{port}" for port in meeting_ports()} if host is ONE else set()), addresses


def test_the_door_is_closed_without_the_fronts_key() -> None:
    address = ONE.on_host("hostname", "--ip-address")
    command = ["curl", "--silent", "--show-error", "--insecure", "--max-time", "5", f"https://{address}:8443/health"]
    result = subprocess.run(["docker", "exec", FRONT.name, *command], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "certificate required" in result.stderr or "alert" in result.stderr, result.stderr
    keys = {host.on_host("sha256sum", "/opt/agent-stack/vllm/config/peers/own.crt.key").split()[0] for host in (FRONT, ONE, TWO)}
    assert len(keys) == 3
    assert FRONT.on_host("stat", "--format", "%a %u", "/opt/agent-stack/vllm/config/peers/own.crt.key") == "400 99"


@LONG
def test_a_second_run_changes_nothing() -> None:
    done = FRONT.play("--tags", "docker,vllm", playbook="molecule/default/converge.yml")
    assert done.returncode == 0, done.output
    assert re.findall(r"changed=(\d+)", done.output.split("PLAY RECAP")[-1]) == ["0", "0", "0", "0"], done.output


def test_swap_one_host_after_the_other_under_load() -> None:
    with FRONT.load(RATE) as traffic:
        done = FRONT.play(*site("second"))
    assert done.returncode == 0, done.output
    assert traffic.problems == []
    assert traffic.models == {"first", "second"}
    assert served(ONE) == served(TWO) == "second"
    # The one that waits for a rollback can come back.
    assert followers() == meeting_ports()
    assert len(followers()) == 2


@LONG
def test_swap_on_one_gpu_each_makes_nobody_wait() -> None:
    """While one host loads for four seconds, the other answers."""
    with FRONT.load(RATE) as traffic:
        done = FRONT.play(*site("third-slow-4", "hold_and_recreate"))
    assert done.returncode == 0, done.output
    assert traffic.problems == []
    # Those that were on their way when a host began to hold requests wait there; the next ones go to the other.
    slow = [record for record in traffic.records if record["seconds"] > 3]
    assert len(slow) < 4 * RATE, f"{len(slow)} of {len(traffic.records)} requests waited"
    assert served(ONE) == served(TWO) == "third-slow-4"
    assert followers() == meeting_ports()


@LONG
def test_rollback_of_all() -> None:
    with FRONT.load(RATE) as traffic:
        done = FRONT.play(playbook="playbooks/rollback.yml")
    assert done.returncode == 0, done.output
    assert traffic.problems == []
    assert served(ONE) == served(TWO) == "second"


def test_a_bad_model_stops_at_the_first_host() -> None:
    with FRONT.load(RATE) as traffic:
        done = FRONT.play(*site("a-dull"))
    assert done.returncode == 2
    assert "was judged unfit" in done.output
    # All hosts are looked at before anything changes; then they come one after the other.
    deployed = done.output.split("PLAY [Deploy the model servers", 1)[1].split("PLAY RECAP")[0]
    assert "agent-stack-gpu1" in deployed
    assert "agent-stack-gpu2" not in deployed
    assert traffic.problems == []
    assert traffic.models == {"second"}
    # Those of models that the head has no more are removed by the next play that succeeds.
    assert followers() > meeting_ports()


@LONG
def test_a_follower_that_dies_is_there_again() -> None:
    """The head's engine then takes no step any more, which is what the watchdog restarts it for."""
    (port,) = re.findall(r'"--master-port",\s*"(\d+)"', ONE.on_host("cat", f"/opt/agent-stack/vllm-{ONE.state()['active']}/compose.yml"))
    ONE.on_host("systemctl", "start", "agent-stack-vllm-watchdog.service")
    name = f"agent-stack-vllm-{port}-server-1"
    FOLLOWER.on_host("kill", "-9", FOLLOWER.on_host("docker", "inspect", "--format", "{{.State.Pid}}", name))
    # Nobody has to tell: a request that finds no answer is what the watchdog sees.
    deadline = time.monotonic() + 120
    while True:
        try:
            assert ONE.serving() == "second"
            break
        except AssertionError:
            assert time.monotonic() < deadline
    assert FOLLOWER.on_host("docker", "inspect", "--format", "{{.RestartCount}}", name) != "0"


def test_a_host_is_lost_and_comes_back() -> None:
    with FRONT.load(RATE) as traffic:
        time.sleep(2)
        subprocess.run(["docker", "kill", TWO.name], check=True, capture_output=True)
        lost = time.time()
        time.sleep(6)
    # Only what that host was answering at that moment is lost.
    begun_before = [record for record in traffic.records if record["problem"] and record["at"] < lost]
    assert len([record for record in traffic.records if record["problem"]]) == len(begun_before), traffic.problems
    assert len(begun_before) <= 2 * RATE
    subprocess.run(["docker", "start", TWO.name], check=True, capture_output=True)
    deadline = time.monotonic() + 120
    while front_says(TWO) != "UP":
        assert time.monotonic() < deadline
        time.sleep(1)


def front_says(peer: SwapHost) -> str:
    rows = FRONT.on_host("curl", "--silent", "--fail", f"http://{monitor(FRONT)}:8405/metrics").splitlines()
    state = [row for row in rows if row.startswith("haproxy_server_status{") and f'server="host-{peer.name}"' in row and 'proxy="model"' in row]
    return next((match[1] for row in state if row.endswith(" 1") and (match := re.search(r'state="(\w+)"', row))), "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--limit", "inference", "-e", "vllm_peer_address=gpu.example.com"],
            'vllm_peer_address of agent-stack-gpu1 is "gpu.example.com"; allowed is the IP address at which',
        ),
        (["-e", "vllm_peer_port=70000"], "vllm_peer_port is 70000; allowed is 1 to 65535"),
        (["-e", "vllm_peer_address=203.0.113.7"], 'vllm_peer_address of agent-stack-gpu3 is "203.0.113.7"; where hosts share a model'),
        (["-e", "vllm_head=agent-stack-front"], 'vllm_head of agent-stack-gpu3, which is in the group followers, is "agent-stack-front"; allowed is a host of'),
        (["-e", "vllm_node_port=80"], "vllm_node_port is 80; allowed is 1024 to 64536"),
        (["-i", "another,"], "has the hosts agent-stack-front, another outside of its group inference; allowed is one"),
    ],
)
def test_bad_input(arguments: list[str], said: str) -> None:
    done = FRONT.play(*site("second"), *arguments)
    assert done.returncode != 0
    assert said in " ".join(done.output.split())
    assert done.changed == 0

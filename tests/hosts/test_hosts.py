"""Several hosts: a front, and two that serve the model, with real Docker, systemd and HAProxy on each. They run in this order."""

from __future__ import annotations

import re
import subprocess
import time

import pytest
from swap_host import GATEWAY, ROOT, SwapHost

INVENTORY = ROOT / "molecule" / "hosts" / "inventory" / "hosts.yml"
FRONT, ONE, TWO = (SwapHost(f"agent-stack-{name}", INVENTORY, "playbooks/site.yml") for name in ("front", "gpu1", "gpu2"))
RATE = 20
# `make test` has no time for these; `molecule test -s hosts` and `make molecule-hosts` run them.
LONG = pytest.mark.long


def site(model: str, strategy: str = "side_by_side", *arguments: str) -> list[str]:
    return ["--tags", "vllm", "--limit", "inference", *FRONT.wish(model, strategy), *arguments]


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


def test_prometheus_can_read_each_host() -> None:
    for name in ("agent-stack-gpu1", "agent-stack-gpu2"):
        text = FRONT.on_host("curl", "--silent", "--fail", f"http://{monitor(FRONT)}:8001/hosts/{name}/metrics")
        assert "vllm:num_requests_running" in text


def test_nothing_but_the_door_for_the_front_listens() -> None:
    for host in (ONE, TWO):
        listening = host.on_host("ss", "--listening", "--tcp", "--numeric", "--no-header").split("\n")
        addresses = {line.split()[3] for line in listening}
        outside = {address for address in addresses if not address.startswith(("127.", "[::1]"))}
        assert outside == {f"{host.on_host('hostname', '--ip-address')}:8443"}, addresses


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
    assert re.findall(r"changed=(\d+)", done.output.split("PLAY RECAP")[-1]) == ["0", "0", "0"], done.output


def test_swap_one_host_after_the_other_under_load() -> None:
    with FRONT.load(RATE) as traffic:
        done = FRONT.play(*site("second"))
    assert done.returncode == 0, done.output
    assert traffic.problems == []
    assert traffic.models == {"first", "second"}
    assert served(ONE) == served(TWO) == "second"


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
    assert "agent-stack-gpu2" not in done.output.split("PLAY RECAP")[0]
    assert traffic.problems == []
    assert traffic.models == {"second"}


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
        (["-e", "vllm_peer_address=gpu.example.com"], 'vllm_peer_address of agent-stack-gpu1 is "gpu.example.com"; allowed is the IP address at which'),
        (["-e", "vllm_peer_port=70000"], "vllm_peer_port is 70000; allowed is 1 to 65535"),
        (["-i", "another,"], "has the hosts agent-stack-front, another outside of its group inference; allowed is one"),
    ],
)
def test_bad_input(arguments: list[str], said: str) -> None:
    done = FRONT.play(*site("second"), *arguments)
    assert done.returncode != 0
    assert said in " ".join(done.output.split())
    assert done.changed == 0

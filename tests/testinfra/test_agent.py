"""Read-only questions to the running agent and gateway; usable against production."""

from __future__ import annotations

import json
import re

from testinfra.host import Host

AGENT = "docker compose --file /opt/agent-stack/agent/compose.yml"
SLOTS = "/var/lib/agent-stack/vllm/swap.json"
GATEWAY = "http://gateway.inference.internal:8000"
STATUS = """
import sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[2], method=sys.argv[1])
try:
    print(urllib.request.urlopen(request, timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print('unreachable')
"""


def from_agent(host: Host, url: str, method: str = "GET") -> str:
    return str(host.check_output(f"{AGENT} exec --no-TTY agent python -c %s %s %s", STATUS, method, url))


def test_agent_is_ready(host: Host) -> None:
    address = host.check_output(f"{AGENT} port agent 8080")
    assert address.startswith("127.0.0.1:")
    fetch = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"
    assert json.loads(host.check_output("python3 -c %s %s", fetch, f"http://{address}/ready")) == {"status": "ready"}


def test_nobody_is_a_user_by_saying_so(host: Host) -> None:
    """Neither another container nor a program on the host: only nginx knows the secret."""
    address = f"http://{host.check_output(f'{AGENT} port agent 8080')}/threads"
    curl = "curl -s -o /dev/null -w '%{http_code}' -X POST -H 'X-Forwarded-User: agent'"
    assert host.check_output(f"{curl} {address}") == "401"
    assert host.check_output(f"{curl} -H 'X-Proxy-Secret: none' {address}") == "401"


def test_what_is_old_goes_every_night(host: Host) -> None:
    timer = host.service("agent-stack-agent-retention.timer")
    assert timer.is_running
    assert timer.is_enabled
    summary = json.loads(host.check_output(f"{AGENT} run --rm --no-TTY --no-deps retention --dry-run").splitlines()[0])
    assert summary["dry_run"] is True


def test_the_keys_can_be_listed(host: Host) -> None:
    listed = json.loads(host.check_output(f"{AGENT} run --rm --no-TTY --no-deps keys list"))["keys"]
    assert all(len(key["sha256"]) == 64 for key in listed)


def test_gateway_lets_the_agent_do_what_it_needs_and_no_more(host: Host) -> None:
    assert from_agent(host, f"{GATEWAY}/v1/models") == "200"
    for method, path in (("POST", "/v1/models"), ("GET", "/metrics"), ("POST", "/invocations"), ("POST", "/sleep"), ("GET", "/v1/completions")):
        assert from_agent(host, f"{GATEWAY}{path}", method) == "404", path


def test_agent_does_not_reach_the_model_past_the_gateway(host: Host) -> None:
    slot = json.loads(host.file(SLOTS).content_string)["active"]
    address = '{{(index .NetworkSettings.Networks "agent-stack-model").IPAddress}}'
    server = host.check_output("docker inspect --format %s %s", address, f"agent-stack-vllm-{slot}-server-1")
    assert server
    for name in ("blue.model.internal", "green.model.internal", server):
        assert from_agent(host, f"http://{name}:8000/v1/models") == "unreachable", name


def test_agent_idles_within_its_memory(host: Host) -> None:
    usage = host.check_output("docker stats --no-stream --format '{{.MemUsage}}' agent-stack-agent-agent-1")
    value, unit = re.match(r"([\d.]+)(\w+)", usage).groups()  # type: ignore[union-attr]
    assert float(value) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit] < 300, usage

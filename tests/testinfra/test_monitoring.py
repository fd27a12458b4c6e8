"""Read-only questions to the running monitoring services; usable against production."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from testinfra.host import Host

COMPOSE = "/opt/agent-stack/monitoring/compose.yml"
JOBS = {"agent", "alertmanager", "gateway", "node", "postgres", "probe", "prometheus", "redis", "vllm"}
# Prints status and body, whatever the status is; every host that Ansible manages has Python, not every one has curl.
FETCH = """
import sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[2], method=sys.argv[1])
try:
    answer = urllib.request.urlopen(request, timeout=10)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status)
print(answer.read().decode())
"""


def published(host: Host, service: str, port: int) -> str:
    return str(host.check_output("docker compose --file %s port %s %s", COMPOSE, service, str(port)))


def fetch(host: Host, url: str, method: str = "GET") -> tuple[int, str]:
    status, _, body = host.check_output("python3 -c %s %s %s", FETCH, method, url).partition("\n")
    return int(status), body


def query(host: Host, expression: str) -> list[dict[str, Any]]:
    status, body = fetch(host, f"http://{published(host, 'prometheus', 9090)}/api/v1/query?query={quote(expression)}")
    assert status == 200, body
    result: list[dict[str, Any]] = json.loads(body)["data"]["result"]
    return result


def rules(host: Host) -> dict[str, dict[str, Any]]:
    _, body = fetch(host, f"http://{published(host, 'prometheus', 9090)}/api/v1/rules")
    return {rule["name"]: rule for group in json.loads(body)["data"]["groups"] for rule in group["rules"]}


def test_every_target_is_up(host: Host) -> None:
    assert {(row["metric"]["job"], row["value"][1]) for row in query(host, "up")} == {(job, "1") for job in JOBS}


@pytest.mark.parametrize("metric", ["pg_up", "redis_up"])
def test_exporter_is_logged_in(host: Host, metric: str) -> None:
    assert [row["value"][1] for row in query(host, metric)] == ["1"]


def test_redis_exporter_may_read_all_that_it_asks_for(host: Host) -> None:
    assert [row["value"][1] for row in query(host, "redis_exporter_last_scrape_error")] == ["0"]


def test_node_exporter_sees_the_host(host: Host) -> None:
    total_kib = int(host.check_output("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"))
    assert [int(float(row["value"][1])) for row in query(host, "node_memory_MemTotal_bytes")] == [total_kib * 1024]
    assert query(host, "node_filesystem_avail_bytes")


def test_the_host_is_asked(host: Host) -> None:
    """By a service of its own, whose file the node exporter reads."""
    assert host.service("agent-stack-host-metrics").is_running
    assert {(row["metric"]["source"], row["value"][1]) for row in query(host, "agent_stack_host_source_up")} >= {
        ("docker", "1"),
        ("systemd", "1"),
        ("swap", "1"),
    }
    running = {row["metric"]["container"]: row["value"][1] for row in query(host, "agent_stack_container_running")}
    assert running["agent-stack-monitoring-prometheus-1"] == "1"
    assert query(host, "time() - node_textfile_mtime_seconds{file=~'.*host.prom'} < 60")


@pytest.mark.parametrize("alert", ["ModelLatencyHigh", "ModelKvCacheFull", "AgentErrorsHigh"])
def test_the_guides_alert_is_evaluated(host: Host, alert: str) -> None:
    assert rules(host)[alert]["health"] == "ok"


def test_heartbeat_reaches_alertmanager(host: Host) -> None:
    heartbeat = quote('alertname="Watchdog"')
    _, body = fetch(host, f"http://{published(host, 'alertmanager', 9093)}/api/v2/alerts?filter={heartbeat}")
    assert len(json.loads(body)) == 1


@pytest.mark.parametrize("path", ["/api/v1/admin/tsdb/snapshot", "/-/reload", "/-/quit"])
def test_prometheus_cannot_be_changed_over_http(host: Host, path: str) -> None:
    # The admin API answers "admin APIs disabled" (an error 500 in some versions), the lifecycle API "not enabled" (403).
    status, body = fetch(host, f"http://{published(host, 'prometheus', 9090)}{path}", method="POST")
    assert status >= 400
    assert "disabled" in body or "not enabled" in body


def test_listens_on_loopback_only(host: Host) -> None:
    ports = host.check_output("docker compose --file %s ps --format '{{range .Publishers}}{{.URL}} {{.PublishedPort}},{{end}}'", COMPOSE)
    bound = {tuple(entry.split()) for line in ports.splitlines() for entry in line.split(",") if entry}
    assert {address for address, port in bound if port != "0"} == {"127.0.0.1"}


def test_containers_are_confined(host: Host) -> None:
    for container in host.check_output("docker compose --file %s ps --quiet", COMPOSE).split():
        inspected = json.loads(host.check_output("docker inspect %s", container))[0]
        settings = inspected["HostConfig"]
        assert settings["ReadonlyRootfs"], inspected["Name"]
        assert settings["CapDrop"] == ["ALL"], inspected["Name"]
        assert "no-new-privileges:true" in settings["SecurityOpt"], inspected["Name"]
        assert inspected["Config"]["User"] not in {"", "0", "root"}, inspected["Name"]
        assert not any("docker.sock" in mount["Source"] for mount in inspected["Mounts"]), inspected["Name"]


def test_node_exporter_cannot_read_secrets(host: Host) -> None:
    command = host.run("docker compose --file %s exec -T node-exporter ls /host/opt/agent-stack/monitoring/secrets", COMPOSE)
    assert command.rc != 0
    assert "Permission denied" in command.stderr

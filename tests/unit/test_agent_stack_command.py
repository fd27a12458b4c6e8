"""The command agent-stack: what it says of a host, also while half of the stack is down, and that it always answers in time."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agent_stack_host import __main__ as command
from agent_stack_host import doctor, logs, screen, status
from agent_stack_host.ask import Config, Host, Unknown, ask_all
from programs import ROOT

NOW = 1_800_000_000
FILES = ROOT / "roles" / "agent_stack" / "files"
PEM = "-----BEGIN CERTIFICATE-----"


def container(component: str, service: str, state: str = "running", health: str = "healthy", **labels: str) -> dict[str, Any]:
    project = f"agent-stack-{component}"
    return {
        "Name": f"/{project}-{service}-1",
        "RestartCount": 0,
        "Config": {"Image": f"agent-stack/{service}:1f", "Labels": {"com.docker.compose.project": project} | labels},
        "State": {"Status": state, "StartedAt": "2026-11-27T20:00:00Z", **({"Health": {"Status": health}} if health else {})},
    }


def unit(name: str, state: str = "active", boot: str = "enabled") -> str:
    result = "" if name.endswith((".slice", ".target")) else "Result=success\n"
    return f"Id={name}\nLoadState=loaded\nActiveState={state}\nSubState={state}\n{result}UnitFileState={boot}"


class Fake(Host):
    """A host that answers by a table; what is not in it is not there."""

    def __init__(self, root: Path, *, front: bool = True, gpu: bool = False) -> None:
        ports = {"agent": 8080, "prometheus": 9090} if front else {}
        super().__init__(Config("0.2.0", "agent.example.com", root / "opt", root / "data", ports, gpu, front), root)
        self.containers = [container("agent", "agent"), container("postgres", "postgres"), container("vllm", "gateway"), container("vllm-blue", "server")]
        self.units = [unit("agent-stack.target"), unit("agent-stack@agent.service"), unit("docker.service"), unit("nginx.service")]
        self.programs: dict[str, str] = {
            "docker version": "27.5.1\n",
            "docker exec": json.dumps([{"name": "ci", "created": NOW - 900000, "last_used": NOW - 7200}, {"name": "new", "created": NOW, "last_used": None}]),
            "docker network": "".join(f"agent-stack-{name}\n" for name in doctor.NETWORKS),
            "docker info": "true\n",
            "openssl x509": "notAfter=Feb 25 21:04:11 2027 GMT\nissuer=CN=R11,O=Let's Encrypt\n",
            "timedatectl show": "yes\n",
            "nginx -t": "",
            "getent hosts": "192.0.2.1 agent.example.com\n",
        }
        self.ready: tuple[int, Any] | None = (200, {"status": "ready"})
        self.door: tuple[int, str] | None = (200, PEM)
        self.samples: dict[str, float] | None = dict.fromkeys(status.TRAFFIC.values(), 2.0)
        self.firing: list[dict[str, Any]] = []
        self.engine = True
        (root / "data" / "vllm").mkdir(parents=True)
        slots = {"blue": {"model": "Qwen/Qwen3-8B", "condition": "serving", "since": NOW - 60}}
        (root / "data" / "vllm" / "swap.json").write_text(json.dumps({"active": "blue", "target": "", "slots": slots}))
        wants = root / "etc/systemd/system/agent-stack.target.wants"
        wants.mkdir(parents=True)
        for name in ("agent", "postgres", "vllm", "vllm-blue"):
            (wants / f"agent-stack@{name}.service").touch()
            (root / "opt" / name / "secrets").mkdir(parents=True)

    def program(self, *command: str, stdin: str = "", seconds: float = 4) -> str:
        name = " ".join(command[:2])
        if command[0] == "docker" and not self.engine:
            raise Unknown("docker ended with 1: Cannot connect to the Docker daemon")
        if name == "docker ps":
            return "".join(f"{number}\n" for number, _ in enumerate(self.containers))
        if name == "docker inspect":
            return json.dumps(self.containers)
        if name == "systemctl show":
            # A pattern finds what is not active only with --all.
            shown = [each for each in self.units if "--all" in command or "ActiveState=inactive" not in each or "Id=agent-stack" not in each]
            return "\n\n".join(shown) + "\n"
        if name not in self.programs:
            raise Unknown(f"{command[0]} cannot be run: No such file or directory")
        return self.programs[name]

    def http(self, port: str, path: str) -> tuple[int, Any]:
        answer: tuple[int, Any] | None = self.ready
        if port == "prometheus":
            answer = None if self.samples is None else (200, {"data": {"alerts": self.firing}})
        if answer is None:
            raise Unknown(f"{port} does not answer: Connection refused")
        return answer

    def front_door(self) -> tuple[int, str]:
        if self.door is None:
            raise Unknown("nginx does not answer on 127.0.0.1:443: Connection refused")
        return self.door

    def prometheus(self, expression: str) -> list[tuple[dict[str, str], float]]:
        if self.samples is None:
            raise Unknown("prometheus does not answer: Connection refused")
        return [({}, self.samples[expression])] if expression in self.samples else []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    return Fake(tmp_path)


def test_a_host_that_is_well(host: Fake) -> None:
    found = status.report(host)
    assert (found["verdict"], found["reasons"], found["unknown"]) == ("ok", [], {})
    assert found["model"]["serves"] == "blue"
    assert found["certificate"] == {"not_after": "2027-02-25T21:04:11Z", "days": 41, "issuer": "CN=R11,O=Let's Encrypt"}
    assert found["traffic"]["turn_p95_seconds"] == 2.0
    assert [key["name"] for key in found["keys"]] == ["ci", "new"]
    assert found["expected"] == ["agent", "postgres", "vllm", "vllm-blue"]


def well(host: Fake) -> None:
    """Nothing is changed."""


def stop(component: str) -> Callable[[Fake], None]:
    def change(host: Fake) -> None:
        host.containers = [
            container(component, "x", "exited") if item["Config"]["Labels"]["com.docker.compose.project"] == f"agent-stack-{component}" else item
            for item in host.containers
        ]

    return change


def assign(**values: Any) -> Callable[[Fake], None]:
    def change(host: Fake) -> None:
        for name, value in values.items():
            setattr(host, name, value)

    return change


def break_record(host: Fake) -> None:
    (host.config.data / "vllm" / "swap.json").write_text("{")


def add_step(host: Fake) -> None:
    host.containers.append(container("agent", "migrate", "exited", **{"com.docker.compose.oneoff": "True"}))


def add_theirs(host: Fake) -> None:
    host.containers.append(container("x", "x", "exited", **{"com.docker.compose.project": "theirs"}))


def backups(hours: float, days: float, *, restored: int = 1, up: int = 1) -> Callable[[Fake], None]:
    def change(host: Fake) -> None:
        (host.config.data / "textfile").mkdir()
        lines = [f'agent_stack_backup_last_timestamp_seconds{{type="{kind}"}} {NOW - ago * 3600}' for kind, ago in (("full", hours + 24), ("diff", hours))]
        lines += [f"agent_stack_backup_wal_last_timestamp_seconds {NOW}", f"agent_stack_backup_repository_up {up}"]
        lines += [f"agent_stack_backup_drill_timestamp_seconds {NOW - days * 86400}", f"agent_stack_backup_drill_success {restored}"]
        lines += ["# HELP other", "other_metric 1"]
        (host.config.data / "textfile" / "backup.prom").write_text("\n".join(lines) + "\n")

    return change


ALERT = {
    "labels": {"alertname": "DiskAlmostFull", "severity": "critical"},
    "state": "firing",
    "activeAt": "2026-11-27T20:00:00.1Z",
    "annotations": {"summary": "/ is almost full"},
}


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        pytest.param(assign(door=None), "down", "nginx does not answer on 127.0.0.1:443: Connection refused", id="nginx is away"),
        pytest.param(assign(door=(502, PEM)), "down", "nginx answers 502 for /health", id="the agent is away from nginx"),
        pytest.param(assign(ready=None), "down", "agent does not answer: Connection refused", id="the agent is away"),
        pytest.param(assign(ready=(503, {"error": {"not_ready": ["model"]}})), "down", "the agent lacks model", id="no model"),
        pytest.param(assign(ready=(503, None)), "down", "the agent lacks something", id="an answer that is no JSON"),
        pytest.param(assign(engine=False), "down", "the Docker engine does not answer: docker ended with 1: Cannot connect to", id="no engine"),
        pytest.param(stop("postgres"), "degraded", "agent-stack-postgres-x-1 is exited, healthy", id="a container stopped"),
        pytest.param(
            assign(containers=[container("agent", "agent", health="unhealthy")]), "degraded", "agent-stack-agent-agent-1 is running, unhealthy", id="ill"
        ),
        pytest.param(assign(containers=[]), "degraded", "postgres has no container", id="containers are gone"),
        pytest.param(assign(units=[unit("agent-stack@agent.service", "failed")]), "degraded", "agent-stack@agent.service failed (success)", id="a unit failed"),
        pytest.param(assign(units=[unit("nginx.service", "inactive")]), "degraded", "nginx.service is inactive", id="a unit that should run"),
        pytest.param(
            assign(units=[unit("agent-stack-firewall.service", "inactive")]),
            *("degraded", "agent-stack-firewall.service is inactive"),
            id="a unit of the stack that should run",
        ),
        pytest.param(assign(samples=None), "degraded", "traffic is not known: prometheus does not answer", id="Prometheus is away"),
        pytest.param(assign(firing=[ALERT]), "degraded", "alert DiskAlmostFull: / is almost full", id="an alert"),
        pytest.param(backups(40, 1), "degraded", "the last backup is 40 h old", id="an old backup"),
        pytest.param(backups(2, 1, restored=0), "degraded", "the last restore drill failed", id="a drill that failed"),
        pytest.param(backups(2, 1, up=0), "degraded", "the repository of the backups cannot be read", id="no repository"),
        pytest.param(backups(2, 9), "degraded", "the last restore drill was 9 d ago", id="an old drill"),
        pytest.param(
            lambda host: (host.config.data / "vllm" / "swap.json").write_text("{"), "degraded", "model is not known: the answer", id="a broken record"
        ),
        pytest.param(lambda host: host.programs.pop("docker exec"), "degraded", "keys is not known", id="Postgres is away"),
        pytest.param(
            lambda host: host.programs.update({"openssl x509": "notAfter=Jan 17 00:00:00 2027 GMT\nissuer=CN=x\n"}),
            *("degraded", "the certificate ends in 1 days"),
            id="the certificate ends",
        ),
    ],
)
def test_what_is_wrong_is_said(host: Fake, change: Callable[[Fake], Any], verdict: str, reason: str) -> None:
    change(host)
    found = status.report(host)
    assert found["verdict"] == verdict, found["reasons"]
    assert any(text.startswith(reason) for text in found["reasons"]), found["reasons"]
    text = screen.render(found)
    assert text.startswith(verdict.upper())
    assert f"! {reason}" in text


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(assign(firing=[{**ALERT, "state": "pending"}]), id="an alert that waits"),
        pytest.param(assign(firing=[{**ALERT, "labels": {"alertname": "Watchdog", "severity": "none"}}]), id="the heartbeat"),
        pytest.param(backups(2, 1), id="a fresh backup"),
        pytest.param(assign(units=[unit("agent-stack-agent-retention.service", "inactive", "static")]), id="a service that a timer starts"),
        pytest.param(add_step, id="a step of a play"),
        pytest.param(add_theirs, id="others"),
    ],
)
def test_what_is_well_is_not_reported(host: Fake, change: Callable[[Fake], Any]) -> None:
    change(host)
    assert status.report(host)["reasons"] == []


def test_a_model_that_waits_for_a_rollback_may_be_stopped(host: Fake) -> None:
    host.containers.append(container("vllm-green", "server", "exited", ""))
    host.units.append(unit("agent-stack@vllm-green.service", "inactive"))
    (host.slash / "etc/systemd/system/agent-stack.target.wants/agent-stack@vllm-green.service").touch()
    assert status.report(host)["verdict"] == "degraded"
    (host.config.root / "vllm-green").mkdir()
    (host.config.root / "vllm-green" / "standby").touch()
    assert status.report(host)["reasons"] == []


def test_a_host_apart_has_no_agent_to_ask(tmp_path: Path) -> None:
    host = Fake(tmp_path, front=False, gpu=True)
    smi = "nvidia-smi --query-gpu=name,memory.used,memory.total,utilization.gpu"
    host.programs[smi] = "NVIDIA H100, 70000, 81559, 93\nNVIDIA H100 MIG, [N/A], 20000, [N/A]\n"
    found = status.report(host)
    assert found["verdict"] == "ok", found["reasons"]
    assert found["gpus"][0] == {"name": "NVIDIA H100", "used_mib": 70000, "total_mib": 81559, "busy_percent": 93}
    assert found["gpus"][1]["used_mib"] is None
    assert "70000 of 81559 MiB" in screen.render(found)
    (host.config.data / "vllm" / "swap.json").write_text('{"active": "", "slots": {}}')
    assert status.report(host)["reasons"] == ["no model serves"]


def test_a_full_disk_is_said(host: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=100 * 2**30, free=5 * 2**30))
    found = status.report(host)
    assert found["verdict"] == "degraded"
    assert "5 of 100 GiB free" in screen.render(found)
    assert any(finding.wrong.startswith("5.0 GiB (5%) are left") for finding in doctor.examine(host))


def test_the_screen_has_everything_and_fits(host: Fake) -> None:
    backups(5, 3)(host)
    text = screen.render(status.report(host))
    for line in (
        "OK  agent.example.com  2027-01-15T08:00:00Z",
        "blue  serves  Qwen/Qwen3-8B",
        "certificate  41 d   CN=R11,O=Let's Encrypt",
        "turns running  2    pending   2     p50, p95   2.00, 2.00 s",
        "KV cache  200%",
        "agent-stack-agent-agent-1        running  healthy  agent:1f",
        "backup         5 h ago",
        "restore drill  3 d ago",
        "ci   used 2 h ago",
        "new  never used",
    ):
        assert line in text, text
    assert max(map(len, text.splitlines())) <= 160
    assert len(text.splitlines()) < 60


def test_nothing_known_is_a_screen_too(host: Fake) -> None:
    host.engine, host.samples, host.ready, host.door, host.programs = False, None, None, None, {}
    found = status.report(host)
    assert found["verdict"] == "down"
    assert "requests/min   -" in screen.render(found)
    assert json.loads(json.dumps(found)) == found


def test_expressions_name_what_the_agent_and_vllm_have() -> None:
    from test_metrics_contract import agent_metrics, metrics_in, vllm_metrics

    expressions = list(status.TRAFFIC.values())
    assert metrics_in(expressions, "agent_") <= agent_metrics()
    assert metrics_in(expressions, "vllm:") <= vllm_metrics()


def test_backups_have_the_metrics_that_are_read() -> None:
    written = (ROOT / "roles" / "postgres" / "files" / "backup.py").read_text()
    for name in ("last_timestamp_seconds", "drill_timestamp_seconds", "drill_success", "repository_up"):
        assert f'("{name}", "gauge"' in written, name
    assert f"{status.BACKUP}{{" in written


def test_a_question_that_hangs_keeps_nobody_waiting() -> None:
    ever = threading.Event()
    began = time.monotonic()
    answers = ask_all({"hangs": ever.wait, "answers": lambda: 1, "breaks": lambda: {"y": 1}["x"]}, seconds=0.3)
    ever.set()
    assert time.monotonic() - began < 2
    assert answers["answers"] == 1
    assert str(answers["hangs"]) == "no answer in 0.3 s"
    assert str(answers["breaks"]) == "the answer cannot be read: KeyError('x')"


def test_a_fault_of_our_own_is_not_hidden() -> None:
    with pytest.raises(AttributeError):
        raise_all(ask_all({"fault": lambda: None.x}))  # type: ignore[attr-defined]


def raise_all(answers: dict[str, Any]) -> None:
    for answer in answers.values():
        if isinstance(answer, BaseException):
            raise answer


# The program itself, with programs and a server in place of the host's.


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A configuration with the ports of a server, and an environment in which every program hangs."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": {"alerts": [], "result": []}}).encode()
            self.send_response(503 if self.path == "/ready" else 200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = {"agent": server.server_port, "prometheus": server.server_port}
    config = {"version": "0.2.0", "domain": "a.localhost", "root": str(tmp_path), "data": str(tmp_path), "ports": ports, "gpu": True, "front": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "bin").mkdir()
    for name in ("docker", "systemctl", "nvidia-smi", "openssl", "journalctl"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / "bin" / name).chmod(0o755)
    yield tmp_path, {**os.environ, "PYTHONPATH": str(FILES), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
    server.shutdown()


def run(served: tuple[Path, dict[str, str]], *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "agent_stack_host", "--config", str(served[0] / "config.json"), *arguments]
    return subprocess.run(words, env=served[1], capture_output=True, text=True, check=False, timeout=30)


def test_it_answers_within_ten_seconds_while_everything_hangs(served: tuple[Path, dict[str, str]]) -> None:
    began = time.monotonic()
    result = run(served, "status", "--json")
    assert time.monotonic() - began < 10
    found = json.loads(result.stdout)
    assert (result.returncode, found["verdict"]) == (2, "down")
    assert found["unknown"]["docker"] == "docker gave no answer in 4 s"
    assert found["alerts"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(["logs", "x"], 2, "the id is 'x'; allowed are 4 to 128 of the characters", id="too short"),
        pytest.param(["logs", "a" * 8 + ";ls"], 2, "allowed are 4 to 128", id="no id"),
        pytest.param(["logs", "--since", "1w", "abcdef"], 2, "--since is '1w'; allowed is a number and m, h or d", id="no time"),
        pytest.param(["state"], 2, "invalid choice: 'state'", id="no command"),
        pytest.param(["--config", "/nowhere", "status"], 2, "/nowhere cannot be read", id="no configuration"),
    ],
)
def test_bad_input_is_a_sentence(served: tuple[Path, dict[str, str]], arguments: list[str], code: int, said: str) -> None:
    result = run(served, *arguments)
    assert result.returncode == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr


# Logs.


@pytest.fixture
def logged(tmp_path: Path) -> Host:
    """A host with logs of nginx, containers and units."""
    nginx = tmp_path / "var/log/nginx"
    nginx.mkdir(parents=True)

    def stamp(ago: float) -> str:
        return time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(time.time() - ago))

    (nginx / "access.log").write_text(f'1.2.3.4 - ada [{stamp(100)}] "POST /chat" 200 req-1234 0.5\n1.2.3.4 - - [{stamp(90)}] "GET /" 200 req-9999\n')
    with gzip.open(nginx / "access.log.2.gz", "wt") as stream:
        stream.write(f'1.2.3.4 - ada [{stamp(3000)}] "POST /chat" 502 req-1234 0.1\n1.2.3.4 - ada [{stamp(200000)}] "POST /chat" 502 req-1234\n')

    class Logged(Fake):
        def program(self, *command: str, stdin: str = "", seconds: float = 4) -> str:
            if command[:2] == ("docker", "ps"):
                return "agent-stack-agent agent-stack-agent-agent-1\n theirs\nagent-stack-redis agent-stack-redis-redis-1\n"
            if command[0] == "sh":
                at = time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", time.gmtime(time.time() - 99))
                return f'{at} {{"request_id": "{command[-1]}"}}\n' if "agent-stack-agent-agent-1" in command else ""
            if command[0] == "journalctl":
                raise Unknown("journalctl ended with 1: it said nothing")
            return super().program(*command, stdin=stdin, seconds=seconds)

    return Logged(tmp_path)


def test_a_request_is_followed_through_everything(logged: Host) -> None:
    lines, unknown = logs.find(logged, "req-1234", "24h")
    assert unknown == {}
    assert [source for _, source, _ in lines] == ["nginx", "nginx", "agent-stack-agent-agent-1"]
    assert [text.split()[-2] for _, source, text in lines if source == "nginx"] == ["req-1234", "req-1234"]
    assert lines == sorted(lines)
    assert logs.find(logged, "req-5678", "24h")[0][0][1] == "agent-stack-agent-agent-1"
    assert len([line for line in logs.find(logged, "req-1234", "10m")[0] if line[1] == "nginx"]) == 1


def test_the_journal_is_read_as_it_is_written(logged: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"__REALTIME_TIMESTAMP": "1764277200000000", "_SYSTEMD_UNIT": "agent-stack@agent.service", "MESSAGE": "req-1234 failed"}
    monkeypatch.setattr(logged, "program", lambda *_command, **_options: json.dumps(entry) + "\n")
    assert logs._journal(logged, "req-1234", 60) == [("2025-11-27T21:00:00Z", "agent-stack@agent.service: req-1234 failed")]


def test_what_cannot_be_looked_into_is_said(logged: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def away(*_command: str, **_options: Any) -> str:
        raise Unknown("docker cannot be run: No such file or directory")

    monkeypatch.setattr(logged, "program", away)
    assert command.show_logs(logged, command.parse(["--config", "x", "logs", "req-1234"])) == 0
    said = capsys.readouterr()
    assert "not looked into: containers: docker cannot be run" in said.err
    assert said.out.count("req-1234") == 2


# Doctor.


def test_a_host_that_is_well_has_nothing_wrong(host: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.show_doctor(host, as_json=False) == 0
    said = capsys.readouterr().out
    assert "WRONG" not in said
    assert said.splitlines()[-1].endswith("looked at, 0 wrong or unknown")
    assert len(said.splitlines()) >= 15


@pytest.mark.parametrize(
    ("change", "what", "wrong", "remedy"),
    [
        (
            lambda host: host.programs.update({"docker info": "false\n"}),
            "survive a restart of the Docker engine",
            "live-restore is off",
            "site.yml --tags docker",
        ),
        (lambda host: host.programs.update({"docker network": "agent-stack-data\n"}), "networks are there", "agent-stack-edge is missing", "--tags docker"),
        (lambda host: host.programs.update({"timedatectl show": "no\n"}), "clock", "does not know", "systemd-timesyncd or chrony"),
        (lambda host: host.programs.pop("timedatectl show"), "clock", "timedatectl cannot be run", "systemd-timesyncd or chrony"),
        (lambda host: host.programs.pop("nginx -t"), "nginx takes its configuration", "nginx cannot be run", "nginx_certbot"),
        (lambda host: host.programs.pop("getent hosts"), "look its own name up", "getent", "DNS entry"),
        (stop("postgres"), "containers run and are healthy", "agent-stack-postgres-x-1: exited", "docker logs --tail 50 agent-stack-postgres-x-1"),
        (assign(containers=[]), "containers run and are healthy", "agent has none", "systemctl start agent-stack.target"),
        (assign(engine=False), "containers run and are healthy", "Cannot connect", "systemctl status docker"),
        (lambda host: host.containers[0].update({"RestartCount": 9}), "starts again and again", "agent-stack-agent-agent-1 9 times", "docker logs"),
        (assign(units=[unit("agent-stack@agent.service", "failed")]), "no unit failed", "agent-stack@agent.service", "journalctl -u agent-stack@agent.service"),
        (
            assign(units=[unit("agent-stack-firewall.service", "inactive")]),
            *("what starts on boot runs", "agent-stack-firewall.service", "systemctl start agent-stack-firewall.service"),
        ),
        (assign(door=None), "nginx reaches the agent", "does not answer", "systemctl status nginx"),
        (assign(ready=(503, {"error": {"not_ready": ["redis"]}})), "all that a turn needs", "it lacks redis", "agent-stack status"),
        (assign(ready=None), "all that a turn needs", "agent does not answer", "docker logs --tail 50 agent-stack-agent-agent-1"),
        (assign(firing=[ALERT]), "no alert fires", "DiskAlmostFull since 2026-11-27T20:00:00Z", "description"),
        (assign(samples=None), "no alert fires", "prometheus does not answer", "agent-stack@monitoring"),
        (lambda host: (host.config.root / "agent/secrets/key").write_text("x"), "secrets", "agent/secrets/key", "Apply the play again"),
    ],
)
def test_what_is_wrong_comes_with_what_to_do(host: Fake, change: Callable[[Fake], Any], what: str, wrong: str, remedy: str) -> None:
    change(host)
    found = [finding for finding in doctor.examine(host) if what in finding.what]
    assert len(found) == 1
    assert wrong in found[0].wrong
    assert remedy in found[0].remedy
    assert command.show_doctor(host, as_json=True) == 1


def test_every_file_of_it_is_installed() -> None:
    tasks = (ROOT / "roles" / "agent_stack" / "tasks" / "command.yml").read_text()
    for file in (FILES / "agent_stack_host").glob("*.py"):
        assert tasks.count(f"agent_stack_host/{file.name}") == 2, file.name


def test_it_is_python_of_every_supported_host() -> None:
    """Ubuntu 22.04 has Python 3.10."""
    import ast

    for file in (FILES / "agent_stack_host").glob("*.py"):
        ast.parse(file.read_text(), feature_version=(3, 10))

"""The judges of `make audit`, over documents of the agent's container in the form that Docker gives them: each thing that is spoilt is found."""

from __future__ import annotations

import copy
import fnmatch
import json
from pathlib import Path
from typing import Any

import audit
import cis
import pytest
import yaml

# `docker info`, daemon.json, `docker inspect`, `docker top` and `docker history`, without what no rule reads.
DOCUMENTS = Path(__file__).parent / "data" / "audit.json"
AGENT = "agent-stack-agent-agent-1"
# Waived for every container, image and engine.
ALWAYS = {"cis-2.9", "cis-2.16", "cis-4.6", "cis-5.12", "cis-5.15"}


def engine(changes: dict[str, Any] | None = None) -> cis.Engine:
    """An engine that is in order; `changes` sets values by their path, such as `container/HostConfig/Memory`."""
    document = copy.deepcopy(json.loads(DOCUMENTS.read_text()))
    for path, value in (changes or {}).items():
        *parents, last = path.split("/")
        place = document
        for part in parents:
            place = place[part]
        place[last] = value
    return cis.Engine(
        info=document["info"],
        daemon=document["daemon"],
        containers=[document["container"]],
        images={document["image"]["Id"]: document["image"]},
        processes={AGENT: document["processes"]},
        history={document["image"]["Id"]: document["history"]},
    )


def test_what_is_in_order_has_what_is_waived_and_no_more() -> None:
    assert {finding.rule for finding in cis.judge(engine())} == ALWAYS


SPOILT: list[tuple[str, str, Any]] = [
    ("cis-2.2", "daemon/icc", True),
    ("cis-2.4", "daemon/iptables", False),
    ("cis-2.5", "info/RegistryConfig", {"InsecureRegistryCIDRs": ["10.0.0.0/8", "127.0.0.0/8"]}),
    ("cis-2.14", "daemon/no-new-privileges", False),
    ("cis-2.15", "info/LiveRestoreEnabled", False),
    ("cis-2.18", "info/ExperimentalBuild", True),
    ("cis-4.1", "container/Config/User", ""),
    ("cis-4.1", "container/Config/User", "0:0"),
    ("cis-4.9", "history", "ADD https://example.com/x /x"),
    ("cis-4.10", "image/Config/Env", ["PATH=/bin", "DB_PASSWORD=hunter2"]),
    ("cis-4.10", "history", "ENV API_KEY=abc"),
    ("cis-5.1", "info/Swarm", {"LocalNodeState": "active"}),
    ("cis-5.2", "info/SecurityOptions", ["name=apparmor", "name=seccomp,profile=builtin"]),
    ("cis-5.3", "info/SecurityOptions", ["name=selinux"]),
    ("cis-5.4", "container/HostConfig/CapDrop", None),
    ("cis-5.4", "container/HostConfig/CapAdd", ["NET_ADMIN"]),
    ("cis-5.5", "container/HostConfig/Privileged", True),
    ("cis-5.6", "container/Mounts", [{"Type": "bind", "Source": "/", "Propagation": "rslave"}]),
    ("cis-5.6", "container/Mounts", [{"Type": "bind", "Source": "/etc", "Propagation": "rprivate"}]),
    ("cis-5.7", "processes", ["1", "python", "7", "sshd"]),
    ("cis-5.8", "container/NetworkSettings/Ports", {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "80"}]}),
    ("cis-5.10", "container/HostConfig/NetworkMode", "host"),
    ("cis-5.11", "container/HostConfig/Memory", 0),
    ("cis-5.13", "container/HostConfig/ReadonlyRootfs", False),
    ("cis-5.14", "container/NetworkSettings/Ports", {"8080/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}]}),
    ("cis-5.14", "container/NetworkSettings/Ports", {"8080/tcp": [{"HostIp": "::", "HostPort": "8080"}]}),
    ("cis-5.16", "container/HostConfig/PidMode", "host"),
    ("cis-5.17", "container/HostConfig/IpcMode", "host"),
    ("cis-5.18", "container/HostConfig/Devices", [{"PathOnHost": "/dev/kvm"}]),
    ("cis-5.19", "container/HostConfig/Ulimits", None),
    ("cis-5.20", "container/Mounts", [{"Type": "bind", "Source": "/srv", "Propagation": "rshared"}]),
    ("cis-5.21", "container/HostConfig/UTSMode", "host"),
    ("cis-5.22", "container/HostConfig/SecurityOpt", ["no-new-privileges:true", "seccomp=unconfined"]),
    ("cis-5.25", "container/HostConfig/CgroupParent", "/mine"),
    ("cis-5.26", "container/HostConfig/SecurityOpt", None),
    ("cis-5.26", "container/HostConfig/SecurityOpt", ["no-new-privileges:false"]),
    ("cis-5.27", "container/Config/Healthcheck", None),
    ("cis-5.27", "container/Config/Healthcheck", {"Test": ["NONE"]}),
    ("cis-5.29", "container/HostConfig/PidsLimit", None),
    ("cis-5.29", "container/HostConfig/PidsLimit", -1),
    ("cis-5.30", "container/NetworkSettings/Networks", {"bridge": {}}),
    ("cis-5.31", "container/HostConfig/UsernsMode", "host"),
    ("cis-5.32", "container/Mounts", [{"Type": "bind", "Source": "/var/run/docker.sock", "Propagation": "rprivate"}]),
    ("tmpfs-size", "container/HostConfig/Tmpfs", {"/tmp": ""}),
    ("tmpfs-size", "container/HostConfig/Tmpfs", {"/tmp": "size=64m", "/run": "noexec"}),
]


@pytest.mark.parametrize(("rule", "path", "value"), SPOILT)
def test_what_is_spoilt_is_found(rule: str, path: str, value: Any) -> None:
    assert {finding.rule for finding in cis.judge(engine({path: value}))} == ALWAYS | {rule}


@pytest.mark.parametrize(
    ("rule", "path", "value"),
    [
        ("cis-5.12", "container/HostConfig/NanoCpus", 10**9),
        ("cis-5.15", "container/HostConfig/RestartPolicy", {"Name": "on-failure", "MaximumRetryCount": 5}),
        ("cis-5.15", "container/HostConfig/RestartPolicy", {"Name": "no", "MaximumRetryCount": 0}),
        ("cis-2.16", "daemon/userland-proxy", False),
        ("cis-2.9", "info/SecurityOptions", ["name=userns"]),
        ("cis-4.6", "image/Config/Healthcheck", {"Test": ["CMD", "true"]}),
    ],
)
def test_what_is_mended_is_not_found(rule: str, path: str, value: Any) -> None:
    assert {finding.rule for finding in cis.judge(engine({path: value}))} == ALWAYS - {rule}


ONE, OTHER = cis.Finding("cis-5.11", "agent-stack-vllm-blue-server-1", "no limit"), cis.Finding("cis-5.6", "exporter", "it mounts /")
GOOD = {"rule": "cis-5.11", "subject": "agent-stack-vllm-*-server-1", "reason": "It depends on the model."}


@pytest.mark.parametrize(
    ("waivers", "left", "wrong"),
    [
        pytest.param([], [ONE, OTHER], "", id="none"),
        pytest.param([GOOD], [OTHER], "", id="one of two"),
        pytest.param([GOOD, {**GOOD, "rule": "cis-9.9"}], [OTHER], "excuses nothing", id="not used"),
        pytest.param([{**GOOD, "subject": "agent-*-postgres-1"}], [ONE, OTHER], "excuses nothing", id="of another container"),
        pytest.param([{**GOOD, "reason": " "}], [ONE, OTHER], "allowed are rule, subject and reason", id="an empty reason"),
        pytest.param([{"rule": "cis-5.11", "subject": "*"}], [ONE, OTHER], "allowed are rule, subject and reason", id="no reason"),
        pytest.param([{**GOOD, "until": "2030"}], [ONE, OTHER], "allowed are rule, subject and reason", id="more than that"),
    ],
)
def test_only_a_reason_excuses(waivers: list[dict[str, str]], left: list[cis.Finding], wrong: str) -> None:
    found, excused, sentences = cis.weigh([ONE, OTHER], waivers, fnmatch.fnmatchcase)
    assert found == left
    assert set(excused) == {ONE, OTHER} - set(left)
    assert wrong in " ".join(sentences)
    assert bool(sentences) is bool(wrong)


def test_every_waiver_has_a_reason() -> None:
    waivers = yaml.safe_load(audit.WAIVERS.read_text())
    found = [cis.Finding(waiver["rule"], waiver["subject"], "") for waiver in waivers]
    assert cis.weigh(found, waivers, lambda subject, pattern: subject == pattern)[2] == []


@pytest.mark.parametrize(
    ("exposures", "subjects"),
    [
        pytest.param({"agent-stack@redis.service": "1.8"}, [], id="good"),
        pytest.param({"agent-stack@redis.service": "2.0"}, [], id="at the limit"),
        pytest.param({"agent-stack@redis.service": "1.8", "agent-stack-x.service": "2.1"}, ["agent-stack-x.service"], id="bad"),
        pytest.param({"agent-stack@x.service": "1.0", "nginx.service": "9.6"}, ["nginx.service"], id="nginx"),
        pytest.param({"nginx.service": "1.6"}, ["agent-stack*"], id="none of the stack"),
        pytest.param({}, ["agent-stack*"], id="nothing"),
    ],
)
def test_units(exposures: dict[str, str], subjects: list[str]) -> None:
    report = "\n".join(f"  NAME  DESCRIPTION\n\u2192 Overall exposure level for {unit}: {value} MEDIUM" for unit, value in exposures.items())
    assert [finding.subject for finding in audit.units_of(report)] == subjects


def line(name: str, severity: str) -> dict[str, str]:
    return {"id": name, "ip": "agent.localhost/127.0.0.1", "port": "443", "severity": severity, "finding": "as it is"}


@pytest.mark.parametrize(
    ("rows", "rules"),
    [
        pytest.param([line("TLS1_3", "OK"), line("HSTS", "INFO"), line("BREACH", "LOW")], [], id="good"),
        pytest.param([line("TLS1_3", "OK"), line("TLS1", "MEDIUM"), line("heartbleed", "CRITICAL")], ["tls-TLS1", "tls-heartbleed"], id="bad"),
        pytest.param([line("TLS1_3", "OK"), line("scanTime", "WARN")], ["tls-scanTime"], id="a test that could not be done"),
        pytest.param([line("scanProblem", "INFO")], ["tls"], id="no end"),
        pytest.param([], ["tls"], id="nothing"),
    ],
)
def test_testssl(rows: list[dict[str, str]], rules: list[str]) -> None:
    assert [finding.rule for finding in audit.tls_of(json.dumps(rows))] == rules

"""What the role docker does about an engine that it finds: a table for each kind of host."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _docker_found
from server_cases import facts

OPTIONS: dict[str, Any] = {"log-driver": "json-file", "log-opts": {"max-size": "50m"}, "live-restore": True}
WHOLE: dict[str, Any] = {"compose": "2.26.1", "buildx": "0.13.1", "running": True}
CE: dict[str, Any] = {"version": "28.1.1", "source": "docker-ce", **WHOLE}
CE_PACKAGES = ["docker-ce", "docker-ce-cli", "containerd.io", "docker-compose-plugin", "docker-buildx-plugin"]
VENDOR_SOURCE = {"file": "/etc/apt/sources.list.d/docker.list", "uri": "https://download.docker.com/linux/debian", "suite": "trixie", "signed_by": "/x.gpg"}
DEBIAN = ["docker.io", "docker-cli", "docker-compose", "docker-buildx"]
VENDOR = ["docker-ce", "docker-ce-cli", "containerd.io", "docker-compose-plugin", "docker-buildx-plugin"]


@pytest.mark.parametrize(
    ("found", "source", "packages", "repository"),
    [
        pytest.param({}, "auto", DEBIAN, False, id="a bare Debian 13"),
        pytest.param({"platform": "Ubuntu 24.04"}, "auto", ["docker.io", "docker-compose-v2", "docker-buildx"], False, id="a bare Ubuntu 24.04"),
        pytest.param({"platform": "Debian 12"}, "auto", VENDOR, True, id="a bare Debian 12"),
        pytest.param({"platform": "Ubuntu 22.04"}, "auto", VENDOR, True, id="a bare Ubuntu 22.04"),
        pytest.param({}, "docker", VENDOR, True, id="Docker's own, asked for"),
        pytest.param({"sources": [VENDOR_SOURCE]}, "docker", VENDOR, False, id="Docker's own, whose source is there under another name"),
        pytest.param({"packages": ["containerd.io"]}, "auto", VENDOR, True, id="containerd.io without an engine, as Kubernetes has it"),
        pytest.param({"engine": CE, "packages": CE_PACKAGES}, "auto", [], False, id="docker-ce"),
        pytest.param({"engine": CE, "packages": CE_PACKAGES}, "distribution", [], False, id="docker-ce, where the operator would take the distribution's"),
        pytest.param({"engine": CE | {"compose": ""}, "packages": CE_PACKAGES}, "auto", ["docker-compose-plugin"], True, id="docker-ce without Compose"),
        pytest.param(
            {"engine": CE | {"compose": "2.17.2"}, "packages": CE_PACKAGES, "sources": [VENDOR_SOURCE]},
            "auto",
            ["docker-compose-plugin"],
            False,
            id="docker-ce with an old Compose",
        ),
        pytest.param({"engine": {"version": "26.1.5", "source": "docker.io", **WHOLE}, "packages": ["docker.io"]}, "auto", [], False, id="the distribution's"),
        pytest.param(
            {"engine": {"version": "26.1.5", "source": "docker.io"}, "packages": ["docker.io", "containerd", "runc"]},
            "docker",
            ["docker-compose", "docker-buildx"],
            False,
            id="the distribution's alone, where the operator would take Docker's",
        ),
        pytest.param(
            {"platform": "Ubuntu 22.04", "engine": {"version": "28.2.2", "source": "docker.io"}, "packages": ["docker.io"]},
            "auto",
            ["docker-compose-v2", "docker-buildx"],
            False,
            id="a newer one from Ubuntu 22.04's updates",
        ),
        pytest.param({"engine": {"version": "29.0.1", "source": "other", **WHOLE}}, "auto", [], False, id="from an archive"),
        pytest.param({"engine": {"version": "29.0.1", "source": "other", "compose": "5.0.0"}}, "auto", [], False, id="from an archive without Buildx"),
        pytest.param({"engine": {"version": "25.0.3", "source": "moby-engine", **WHOLE}}, "auto", [], False, id="Microsoft's"),
    ],
)
def test_what_is_installed(found: dict[str, Any], source: str, packages: list[str], repository: bool) -> None:
    plan = _docker_found.plan(facts(**found), source, OPTIONS)
    assert (plan.refused, plan.packages, plan.repository) == ([], packages, repository)


def test_what_ansible_talks_to_the_engine_with_is_installed_too() -> None:
    host = facts(engine=CE, packages=CE_PACKAGES)
    del host["packages"]["python3-requests"]
    assert _docker_found.plan(host, "auto", OPTIONS).packages == ["python3-requests"]


@pytest.mark.parametrize(
    ("found", "source", "words"),
    [
        pytest.param({"engine": {**CE, "version": "20.10.24"}}, "auto", "is 20.10.24 (docker-ce); needed is 23 or newer", id="too old"),
        pytest.param({"engine": {**CE, "source": "snap"}}, "auto", "installed as a snap", id="snap"),
        pytest.param({"engine": {"source": "podman-docker"}}, "auto", "package podman-docker", id="Podman"),
        pytest.param({"engine": {**CE, "rootless": True}}, "auto", "rootless", id="rootless"),
        pytest.param({"engine": {**CE, "remote": "DOCKER_HOST=tcp://x:2375"}}, "auto", "DOCKER_HOST=tcp://x:2375 sends root's docker command", id="remote"),
        pytest.param({"engine": {**CE, "daemon": {"iptables": False}}}, "auto", '"iptables": false', id="no rules"),
        pytest.param({"engine": {**CE, "flags": {"iptables": "false"}}}, "auto", '"iptables": false', id="no rules, by a flag"),
        pytest.param({"engine": {**CE, "daemon": {"userns-remap": "default"}}}, "auto", "userns-remap is default", id="other users"),
        pytest.param({"engine": {**CE, "daemon_error": "Expecting"}}, "auto", "is not a JSON object. Repair it or move it away", id="no JSON"),
        pytest.param({"platform": "Debian 12"}, "distribution", 'on Debian 12 allowed are "auto" and "docker"', id="no Compose in the distribution"),
        pytest.param({"engine": {"version": "29.0.1", "source": "other"}}, "auto", "has no Compose v2.18 or newer", id="from an archive without Compose"),
        pytest.param(
            {"platform": "Debian 12", "packages": ["podman", "runc"]}, "auto", "would have apt remove runc, which something on the host may need", id="runc"
        ),
        pytest.param(
            {"packages": ["containerd.io"]}, "distribution", "remove containerd.io, which something on the host may need. Remove it yourself", id="io"
        ),
        pytest.param({"packages": ["docker.io", "containerd"]}, "docker", "would have apt remove docker.io, containerd", id="an engine that does not start"),
    ],
)
def test_what_is_refused(found: dict[str, Any], source: str, words: str) -> None:
    plan = _docker_found.plan(facts(**found), source, OPTIONS)
    (sentence,) = plan.refused
    assert words in sentence


def test_a_held_engine_is_named() -> None:
    host = facts(engine={**CE, "version": "20.10.24", "source": "docker.io"})
    host["packages"]["docker.io"] = {"version": "20.10.24", "held": True}
    (sentence,) = _docker_found.plan(host, "auto", OPTIONS).refused
    assert "apt-mark unhold docker.io" in sentence


@pytest.mark.parametrize(
    ("engine", "kept", "words"),
    [
        pytest.param({}, {"log-driver", "log-opts", "live-restore"}, "", id="an ordinary one"),
        pytest.param({"swarm": True}, {"log-driver", "log-opts"}, "excludes live-restore", id="a node of a swarm"),
        pytest.param({"flags": {"log-driver": "journald"}}, {"live-restore"}, "sets --log-driver", id="a unit that logs to the journal"),
        pytest.param({"flags": {"live-restore": "true"}}, {"log-driver", "log-opts"}, "sets --live-restore", id="a unit with live-restore"),
        pytest.param({"flags": {"log-opt": "max-size=1m"}}, {"log-driver", "live-restore"}, "sets --log-opt", id="a unit with options of the log"),
        pytest.param(
            {"daemon": {"log-driver": "syslog", "log-opts": {"syslog-address": "udp://x"}}}, {"live-restore"}, "driver syslog, which stays", id="syslog"
        ),
        pytest.param({"daemon": {"log-driver": "json-file"}}, {"log-driver", "log-opts", "live-restore"}, "", id="the same driver"),
        pytest.param({"daemon": {"log-opts": {"max-size": "1m"}}}, {"log-driver", "log-opts", "live-restore"}, "", id="options of the usual driver"),
    ],
)
def test_which_options_the_engine_can_live_with(engine: dict[str, Any], kept: set[str], words: str) -> None:
    options, notes = _docker_found.daemon_options(facts(engine=engine)["engine"], OPTIONS)
    assert set(options) == kept
    assert {name: OPTIONS[name] for name in kept} == options
    assert words in " ".join(notes)
    assert bool(notes) == bool(words)


@pytest.mark.parametrize(
    ("text", "numbers"), [("26.1.5+dfsg1", (26, 1, 5)), ("v2.40.3-desktop.1", (2, 40, 3)), ("28.2.2-0ubuntu1~22.04.1", (28, 2, 2)), ("", ()), ("dev", ())]
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert _docker_found.version(text) == numbers

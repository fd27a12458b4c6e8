"""The throw-away host says in a sentence what it lacks, and removes all that it made. Docker is played by a program of the test's own."""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

import host
import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._docker_found import DISTRIBUTION_PACKAGES

# `docker info` fails as it does where no daemon runs.
NO_DAEMON = 'echo "Cannot connect to the Docker daemon" >&2; exit 1'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all of PATH; the few programs in it write down what they were asked."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setattr(host, "DOCKERD_LOG", tmp_path / "dockerd.log")
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    return directory


def program(directory: Path, name: str, script: str = "exit 0") -> None:
    file = directory / name
    file.write_text(f'#!/bin/sh\necho "{name} $*" >> {directory.parent}/asked\n{script}\n')
    file.chmod(0o755)


def asked(directory: Path) -> list[str]:
    file = directory.parent / "asked"
    return file.read_text().splitlines() if file.exists() else []


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["host.py", *arguments])
    return host.main()


@pytest.mark.parametrize("docker", [None, NO_DAEMON])
@pytest.mark.parametrize("arguments", [("engine",), ("up", "x")])
def test_no_engine_and_not_root(
    programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], docker: str | None, arguments: tuple[str, ...]
) -> None:
    program(programs, "apt-get")
    if docker:
        program(programs, "docker", docker)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert command(monkeypatch, *arguments) == 1
    assert capsys.readouterr().err == (
        "error: No Docker engine answers `docker info`. Start Docker, or run this as root on Debian or Ubuntu, where it installs one.\n"
    )
    assert not any(line.startswith("apt-get") for line in asked(programs))


def test_no_engine_and_another_distribution(programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert command(monkeypatch, "engine") == 1
    assert "run this as root on Debian or Ubuntu" in capsys.readouterr().err


def test_an_engine_that_cannot_be_installed(programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program(programs, "apt-get", 'echo "E: Unable to locate package docker.io" >&2; exit 100')
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert command(monkeypatch, "engine") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: `apt-get update")
    assert error.endswith("exited with 100:\nE: Unable to locate package docker.io\n")


def test_an_engine_that_does_not_start_shows_its_log(programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program(programs, "apt-get")
    program(programs, "docker", NO_DAEMON)
    program(programs, "dockerd")
    program(programs, "systemctl")
    host.DOCKERD_LOG.write_text("failed to start daemon: no space left on device\n")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert command(monkeypatch, "engine") == 1
    assert "does not answer `docker info`. Its last log lines:\nfailed to start daemon: no space left on device\n" in capsys.readouterr().err


def test_a_host_whose_units_fail_names_them(programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    states = 'case "$*" in *inspect*) echo running;; *is-system-running*) echo degraded;; *--failed*) echo "pebble.service loaded failed failed";; esac'
    program(programs, "docker", states)
    assert command(monkeypatch, "up", "x") == 1
    assert capsys.readouterr().err == "error: In the test host x these units failed: pebble.service.\n"


def test_a_program_that_is_missing_is_named(programs: Path) -> None:
    with pytest.raises(host.HostError, match=r"`unshare` cannot be run: No such file or directory\."):
        host.run("unshare", "--mount")


def test_an_interrupt_ends_without_a_traceback(programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "engine", interrupt)
    assert command(monkeypatch, "engine") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_last_host_takes_its_images_along(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "docker", 'case "$*" in "image ls"*) echo 1; echo 2; echo 1;; esac')
    assert command(monkeypatch, "down", "x") == 0
    assert asked(programs)[1:] == [
        "docker container rm --force --volumes x",
        "docker volume rm --force x-docker",
        f"docker container ls --all --quiet --filter label={host.LABEL}",
        "docker image ls --quiet --filter reference=agent-stack-test/*",
        "docker image rm --force 1",
        "docker image rm --force 2",
    ]


def test_another_host_keeps_the_images(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "docker", 'case "$*" in "container ls"*) echo other;; esac')
    assert command(monkeypatch, "down", "x") == 0
    assert not any("image rm" in line for line in asked(programs))


def test_nothing_to_remove_without_docker(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, "down", "x") == 0


def test_a_host_that_may_still_be_there_is_not_passed_over(programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program(programs, "docker", NO_DAEMON)
    assert command(monkeypatch, "down", "x") == 1
    assert "it is not known whether it keeps the test host x" in capsys.readouterr().err


def test_a_scenario_leaves_the_images_for_the_next_one(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "docker")
    assert command(monkeypatch, "down", "x", "--keep-images") == 0
    assert asked(programs)[1:] == ["docker container rm --force --volumes x", "docker volume rm --force x-docker"]


@pytest.mark.parametrize(("arguments", "packages"), [((), ""), (("--with-docker",), host.DOCKER_PACKAGES)])
def test_a_host_may_have_docker_from_the_start(programs: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], packages: str) -> None:
    states = 'case "$*" in *is-system-running*) echo running;; "image ls"*base*) echo 1;; esac'
    program(programs, "docker", states)
    assert command(monkeypatch, "up", "x", *arguments) == 0
    (build,) = (line for line in asked(programs) if line.startswith("docker build"))
    assert f"--build-arg PACKAGES={packages} --tag agent-stack-test/host:" in build


def test_docker_is_what_the_role_installs() -> None:
    assert host.DOCKER_PACKAGES.split() == list(itertools.chain(*DISTRIBUTION_PACKAGES["Debian 13"].values()))


@pytest.mark.parametrize(("volumes", "copied"), [("seed-docker", 1), ("", 0)])
def test_a_host_starts_with_the_images_of_another(programs: Path, monkeypatch: pytest.MonkeyPatch, volumes: str, copied: int) -> None:
    """Where that one was never made, the host starts without any."""
    states = f"""case "$*" in
      *is-system-running*) echo running;; "image ls"*) echo 1;; "volume ls"*) echo {volumes};;
      "volume inspect"*) echo /var/lib/docker/volumes/seed-docker/_data; echo /var/lib/docker/volumes/x-docker/_data;;
    esac"""
    program(programs, "docker", states)
    assert command(monkeypatch, "up", "x", "--images-of", "seed") == 0
    lines = asked(programs)
    copies = [index for index, line in enumerate(lines) if "--volume /var/lib/docker/volumes:/volumes" in line]
    assert len(copies) == copied
    for index in copies:
        assert "cd /volumes/seed-docker/_data && cp --archive --link overlay2 /volumes/x-docker/_data/" in lines[index]
        assert "docker volume create x-docker" in lines[:index]
        assert any(line.startswith("docker run --detach") for line in lines[index:])


def test_a_running_host_gets_no_other_images(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "docker", 'case "$*" in *inspect*|*is-system-running*) echo running;; "volume ls"*) echo seed-docker;; esac')
    assert command(monkeypatch, "up", "x", "--images-of", "seed") == 0
    assert not any("--link" in line for line in asked(programs))


def test_images_that_others_start_with_are_whole(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine in the host is stopped in order, and its volume stays."""
    program(programs, "docker")
    assert command(monkeypatch, "down", "x", "--keep-images", "--keep-volume") == 0
    assert asked(programs)[1:] == ["docker container stop x", "docker container rm --force --volumes x"]

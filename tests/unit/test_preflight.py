"""A make target says in its first second what the machine lacks. Docker is played by a program of the test's own."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import preflight
import pytest

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only program on PATH, which is not there before something is written to it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "docker"


def answer(docker: Path, script: str) -> None:
    docker.write_text(f"#!/bin/sh\n{script}\n")
    docker.chmod(0o755)


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    assert preflight.python() == "Python is 3.10.13; needed is 3.11 or newer. Install it, and say which with PYTHON=python3.11."


def test_this_python_will_do() -> None:
    assert preflight.python() == ""


@pytest.mark.parametrize(("free", "sentence"), [(14.9, "/x has 14.9 GiB free; needed are 15. Free some, or clone to another disk."), (15.1, "")])
def test_disk(monkeypatch: pytest.MonkeyPatch, free: float, sentence: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(0, 0, int(free * 2**30)))
    assert preflight.disk("/x") == sentence


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 20.10.24+dfsg1", ""),
        ("echo 28.2.2", ""),
        ("echo 19.03.8", "'19.03.8'; needed is Docker 20.10 or newer, with BuildKit"),
        ("echo 5.2.1-podman", "'5.2.1-podman'; needed is Docker 20.10"),
        ("echo permission denied while trying to connect >&2; exit 1", "Join the group docker"),
        ("echo Cannot connect to the Docker daemon >&2; exit 1", "only root can start or install one"),
    ],
)
def test_engine(docker: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    answer(docker, script)
    found = preflight.engine()
    assert words in found
    assert bool(found) == bool(words)


@pytest.mark.parametrize(("uid", "words"), [(1000, "only root can start or install one"), (0, "only on Debian and Ubuntu")])
def test_no_engine(docker: Path, monkeypatch: pytest.MonkeyPatch, uid: int, words: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert words in preflight.engine()


def test_a_port_that_is_taken(docker: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        number = str(holder.getsockname()[1])
        assert preflight.port(number) == f"127.0.0.1:{number} cannot be had: Address already in use. Free it, or choose another with DEMO_PORT=9443."
        answer(docker, f"echo 127.0.0.1:{number}")
        assert preflight.port(number) == "", "the demo's own host holds it"
    assert preflight.port(number) == ""


@pytest.mark.parametrize("number", ["x", "0", "70000", ""])
def test_a_port_that_is_none(number: str) -> None:
    assert preflight.port(number) == f"DEMO_PORT is {number!r}; allowed is 1 to 65535."


def test_no_package_index() -> None:
    """Asked by a pip whose index is a port where nobody listens."""
    environment = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": ""}
    run = subprocess.run([sys.executable, preflight.__file__, "index"], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 1
    assert "pip gets at no package index" in run.stderr
    assert "PIP_INDEX_URL" in run.stderr


def test_all_that_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    monkeypatch.setattr(sys, "argv", ["preflight.py", "python", "port=0"])
    assert preflight.main() == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_makefile_asks_before_it_does_anything() -> None:
    text = MAKEFILE.read_text()
    for target in ("demo", "test", "test-all"):
        recipe = re.search(rf"^{target}:[^\n]*\n\t([^\n]*)\n", text, re.M)
        assert recipe is not None
        assert recipe[1].startswith("@$(PREFLIGHT) "), target
    assert set(re.findall(r"PREFLIGHT\) ([a-z =$()A-Z_]+)", text)) <= {"disk engine port=$(DEMO_PORT)", "disk engine", "python index", "engine disk"}

"""Drills on the host that `make demo` deployed, or on the test host DRILL_HOST. They change it, and leave it as they found it.

They run in the order of their file names. Run `make demo` first; `make system-test` does both.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo
import host as test_host
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
READY_URL = "http://127.0.0.1:8080/ready"
demo.NAME = os.environ.get("DRILL_HOST", demo.NAME)


@dataclass(frozen=True)
class Play:
    """How an ansible-playbook run ended."""

    returncode: int
    output: str
    seconds: float

    @property
    def recap(self) -> dict[str, int]:
        """The counts of the one host's recap line."""
        line = re.search(r"^\S+ +: (ok=.*)$", self.output, re.M)
        return {} if line is None else {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line.group(1))}


@pytest.fixture(scope="session", autouse=True)
def _demo_host() -> None:
    state = test_host.run("docker", "container", "inspect", "--format", "{{.State.Status}}", demo.NAME, check=False)
    if state != "running":
        pytest.exit(f"The host {demo.NAME} does not run: `make demo` first.", returncode=2)


@pytest.fixture(scope="session")
def on_host() -> Callable[..., str]:
    """Run a command on the demo host, return its output."""
    return demo.on_host


@pytest.fixture(scope="session")
def play() -> Callable[..., Play]:
    """Run ansible-playbook on the demo host."""

    def run(*arguments: str, playbook: str = "site.yml", cwd: Path = ROOT, collections: Path | None = None, inventory: Path = demo.INVENTORY) -> Play:
        tools = Path(sys.executable).parent
        command = [str(tools / "ansible-playbook"), playbook, "-i", str(inventory), "-e", f"@{demo.MACHINE}", *arguments]
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"}
        if collections is not None:
            environment |= {"ANSIBLE_COLLECTIONS_PATH": str(collections), "ANSIBLE_INJECT_FACT_VARS": "false"}
        started = time.monotonic()
        result = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        return Play(result.returncode, result.stdout, time.monotonic() - started)

    return run


@pytest.fixture(scope="session")
def secrets() -> dict[str, str]:
    """The generated secrets by name."""
    values: dict[str, str] = yaml.safe_load(demo.SECRETS.read_text())["agent_stack_secrets"]
    return values


@pytest.fixture(scope="session")
def containers(on_host: Callable[..., str]) -> Callable[[], dict[str, dict[str, Any]]]:
    """Return what `docker inspect` says of every running container, by name."""

    def inspect() -> dict[str, dict[str, Any]]:
        ids = on_host("docker", "ps", "--quiet").split()
        return {item["Name"].lstrip("/"): item for item in json.loads(on_host("docker", "inspect", *ids))} if ids else {}

    return inspect


@pytest.fixture(scope="session")
def wait_until_ready(on_host: Callable[..., str]) -> Callable[[float], float]:
    """Wait until the agent says that all it needs is there; return the seconds, or fail after `limit` of them."""

    def wait(limit: float) -> float:
        started = time.monotonic()
        while True:
            status = on_host("curl", "--silent", "--max-time", "5", "--output", "/dev/null", "--write-out", "%{http_code}", READY_URL, check=False)
            seconds = time.monotonic() - started
            if status == "200":
                return seconds
            assert seconds < limit, f"/ready still answers {status} after {seconds:.0f} s"
            time.sleep(0.5)

    return wait


@pytest.fixture(scope="session")
def https() -> Callable[..., tuple[int, bytes]]:
    """Ask nginx through the published port, with raw bodies; return status and body."""
    port = int(test_host.run("docker", "port", demo.NAME, "443/tcp").rpartition(":")[2])

    def ask(path: str, body: bytes | None = None, password: str | None = None, key: str | None = None) -> tuple[int, bytes]:
        return demo.ask(port, path, body, password, key)

    return ask

"""Say in the first second what a make target lacks on this machine, and what to do.

    python3 tools/preflight.py python disk engine port=8443 index

Standard library only, and for Python 3.7 as well, because a Python that is too old is one of the things it names.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DISK_GIB = 15
PYTHON = (3, 11)
ENGINE = (20, 10)
INDEX_SECONDS = 20


def python() -> str:
    """Ansible-core 2.19, which everything runs with, needs it."""
    if sys.version_info[:2] < PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        return f"Python is {found}; needed is 3.11 or newer. Install it, and say which with PYTHON=python3.11."
    return ""


def disk(path: str = ROOT) -> str:
    """Base images, the stack's images and test hosts."""
    free = shutil.disk_usage(path).free / 2**30
    if free < DISK_GIB:
        return f"{path} has {free:.1f} GiB free; needed are {DISK_GIB}. Free some, or clone to another disk."
    return ""


def engine() -> str:
    """A Docker engine that answers and is new enough, or the right to install one."""
    if shutil.which("docker") is not None:
        asked = subprocess.run(["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            return _engine_version(asked.stdout.strip())
        if "permission denied" in asked.stderr:
            return "The Docker engine refuses this user. Join the group docker, or run this as root."
    if os.geteuid() != 0:
        return "No Docker engine answers `docker version`, and only root can start or install one. Start Docker, or run this as root on Debian or Ubuntu."
    if shutil.which("apt-get") is None:
        return "No Docker engine answers `docker version`, and only on Debian and Ubuntu this installs one. Install and start Docker."
    return ""


def _engine_version(version: str) -> str:
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found.group(1)), int(found.group(2))) < ENGINE:
        return f"The engine that answers `docker version` is {version!r}; needed is Docker 20.10 or newer, with BuildKit. Install docker.io or docker-ce."
    return ""


def port(number: str) -> str:
    """The demo publishes its HTTPS port on loopback. Its own running host may hold it."""
    if not (number.isdigit() and 0 < int(number) < 65536):
        return f"DEMO_PORT is {number!r}; allowed is 1 to 65535."
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(number)))
        except OSError as error:
            if not _held_by_the_demo(number):
                return f"127.0.0.1:{number} cannot be had: {error.strerror}. Free it, or choose another with DEMO_PORT=9443."
    return ""


def _held_by_the_demo(number: str) -> bool:
    if shutil.which("docker") is None:
        return False
    asked = subprocess.run(["docker", "port", "agent-stack-demo", "443/tcp"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() == f"127.0.0.1:{number}"


def index() -> str:
    """Whether pip gets at a package index, wherever its settings say that this is."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "0", "--timeout", "10", "download", "--quiet", "--no-deps"]
    target = os.path.join(ROOT, ".cache", "preflight")
    try:
        asked = subprocess.run([*command, "--dest", target, "uv==0.13.9"], capture_output=True, text=True, check=False, timeout=INDEX_SECONDS)
        answer, failed = asked.stderr.strip().splitlines()[-1:], asked.returncode != 0
    except subprocess.TimeoutExpired:
        answer, failed = [f"no answer within {INDEX_SECONDS} s"], True
    finally:
        shutil.rmtree(target, ignore_errors=True)
    if failed:
        return f"pip gets at no package index: {''.join(answer)}. See `pip config list`, PIP_INDEX_URL and the proxy's settings."
    return ""


CHECKS = {"python": python, "disk": disk, "engine": engine, "index": index}


def problems(wanted: list[str]) -> list[str]:
    """Return a sentence for each thing that is missing."""
    found = []
    for name in wanted:
        check, _, argument = name.partition("=")
        found.append(port(argument) if check == "port" else CHECKS[check]())
    return [sentence for sentence in found if sentence]


def main() -> int:
    missing = problems(sys.argv[1:])
    for sentence in missing:
        print("error: " + sentence, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

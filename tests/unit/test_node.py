"""`node.py`, which runs vLLM as one of several hosts that share a model: with real processes and sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import ROOT, load

PROGRAM = ROOT / "roles" / "vllm" / "files" / "node.py"
# Stands in for vLLM on a follower: it has a worker of its own, and notices nothing.
WORKER = "import subprocess, sys, time; subprocess.Popen(['sleep', '300']); print('works', flush=True); time.sleep(300)"

node = load("roles/vllm/files/node.py")


@pytest.fixture
def port() -> int:
    with socket.socket() as asking:
        asking.bind(("127.0.0.1", 0))
        return int(asking.getsockname()[1])


@contextlib.contextmanager
def head(port: int) -> Iterator[None]:
    """Something that listens until it is killed, in a process of its own as the head's vLLM is."""
    script = f"import socket, time; server = socket.create_server(('127.0.0.1', {port})); print('listens', flush=True); time.sleep(300)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def cut_off(process: subprocess.Popen[str]) -> None:
    """With what it started, which has its output too."""
    for pid in [*sessions_of(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def follower(port: int, script: str, address: str = "127.0.0.1") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(PROGRAM), "follow", address, "127.0.0.1", str(port), sys.executable, "-c", script]
    environment = {**os.environ, "NODE_LOOK_SECONDS": "0.1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    # Who waits for a line that never comes then reads the end instead.
    limit = threading.Timer(15, cut_off, [process])
    limit.start()
    try:
        yield process
    finally:
        limit.cancel()
        process.terminate()
        process.wait(10)


def lines(process: subprocess.Popen[str], number: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(number)]


def sessions_of(leader: int) -> list[int]:
    """The processes whose session was begun by a child of this one, or by itself."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,sid="], capture_output=True, text=True, check=True).stdout.split("\n")
    rows = [tuple(map(int, row.split())) for row in found if row]
    children = {pid for pid, parent, _ in rows if parent == leader}
    return [pid for pid, _, session in rows if session in children]


def alive(pid: int) -> bool:
    """One that has ended, and that nobody has asked how, is not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


def within(seconds: float, question: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not question():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_follower_waits_for_the_head_and_ends_with_it(port: int) -> None:
    with follower(port, WORKER) as process:
        assert lines(process, 1) == [f"waiting for the head at 127.0.0.1:{port}"]
        time.sleep(0.3)
        assert sessions_of(process.pid) == []
        with head(port):
            assert lines(process, 2) == ["the head is there", "works"]
            working = sessions_of(process.pid)
            assert len(working) == 2
            # It stays for as long as the head does.
            time.sleep(0.5)
            assert process.poll() is None
        assert lines(process, 1) == ["the head is gone"]
        assert process.wait(10) == 0
        assert not [pid for pid in working if alive(pid)]


def test_a_head_that_is_there_again_at_once_is_another_one(port: int) -> None:
    with follower(port, WORKER) as process:
        with head(port):
            lines(process, 3)
        with head(port):
            assert lines(process, 1) == ["the head is gone"]
            assert process.wait(10) == 0


def test_a_follower_whose_vllm_ends_ends_too(port: int) -> None:
    with head(port), follower(port, "raise SystemExit(3)") as process:
        assert lines(process, 3)[-1] == "vLLM ended with 3"
        assert process.wait(10) == 0


@pytest.mark.parametrize("waiting", [True, False], ids=["while it waits", "while it works"])
def test_a_follower_that_is_stopped_leaves_nothing_behind(port: int, waiting: bool) -> None:
    with contextlib.ExitStack() as stack:
        if not waiting:
            stack.enter_context(head(port))
        process = stack.enter_context(follower(port, WORKER))
        lines(process, 1 if waiting else 3)
        working = sessions_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert within(5, lambda: not [pid for pid in working if alive(pid)])
    assert len(working) == (0 if waiting else 2)


def test_the_head_becomes_vllm_with_the_right_addresses() -> None:
    script = "import os; print(*[os.environ[name] for name in ('VLLM_HOST_IP', 'GLOO_SOCKET_IFNAME', 'NCCL_SOCKET_IFNAME')], oct(os.umask(0)))"
    done = subprocess.run([sys.executable, str(PROGRAM), "serve", "127.0.0.1", sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["127.0.0.1", "lo", "=lo", "0o0"]


def test_the_socket_of_a_killed_server_is_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    monkeypatch.setattr(node, "SOCKET", str(path))
    monkeypatch.setattr(node.os, "execvp", lambda *_: None)
    monkeypatch.setattr(node.os, "umask", lambda _: 0)
    monkeypatch.setattr(sys, "argv", ["node.py", "serve", "127.0.0.1", "vllm", "serve"])
    monkeypatch.setattr(node.os, "environ", dict(os.environ))
    node.main()
    assert not path.exists()


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_an_address_that_the_host_does_not_have(address: str) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "serve", address, "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: no network interface of this host has the address {address}, which is its vllm_peer_address\n"

"""`serve.py` and `pin_weights.py`, which run inside vLLM's container: with a stand-in of vLLM and of torch; and how the host talks to them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_host
from programs import ROOT, load

PROGRAM = ROOT / "roles" / "vllm" / "files" / "serve.py"
pin_weights = load("roles/vllm/files/pin_weights.py")

# What the stand-in of the program `vllm` says of itself.
SAYS = """#!{python}
import json, os, sys
print(json.dumps({{"arguments": sys.argv, "imported": "vllm.v1.engine.core" in sys.modules, "pid": os.getpid(), "name": __name__}}), flush=True)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A directory with the program `vllm` and, in `site`, the package; the gate is in `gate`."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(SAYS.format(python=sys.executable))
    program.chmod(0o755)
    for name in ("entrypoints/cli/main", "v1/engine/core"):
        module = tmp_path / "site" / "vllm" / f"{name}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text("")
    (tmp_path / "gate").mkdir()
    return tmp_path


def serve(image: Path, *, package: bool = True, path: str = "") -> subprocess.Popen[str]:
    environment = {"PATH": path or str(image / "bin"), "SERVE_GATE": str(image / "gate"), "PYTHONPATH": str(image / "site") if package else ""}
    command = [sys.executable, str(PROGRAM), "serve", "model", "--port", "8000"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    return dict(json.loads(out))


@pytest.mark.parametrize("package", [True, False])
def test_vllm_runs_in_the_process_that_docker_started(image: Path, package: bool) -> None:
    process = serve(image, package=package)
    found = said(process)
    expected = {"arguments": [str(image / "bin" / "vllm"), "serve", "model", "--port", "8000"], "imported": package, "pid": process.pid, "name": "__main__"}
    assert found == expected
    assert not (image / "gate" / "imported").exists()


def test_it_imports_and_waits_where_a_swap_says_so(image: Path) -> None:
    (image / "gate" / "wait").touch()
    process = serve(image)
    try:
        deadline = time.monotonic() + 30
        while not (image / "gate" / "imported").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        assert process.poll() is None
        (image / "gate" / "wait").unlink()
        assert said(process)["imported"]
    finally:
        process.kill()


def test_an_image_without_vllm_is_a_sentence(image: Path) -> None:
    process = serve(image, path="/nowhere")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == "error: this image has no program `vllm`\n"


# ---------------------------------------------------------------------------------------------------------------------- the workers


class Memory:
    """torch, as far as it pins: what is held at the same time, and all that was ever taken."""

    uint8 = "uint8"

    def __init__(self, room: int = 1000) -> None:
        self.room, self.held, self.most, self.taken = room, 0, 0, []  # type: ignore[var-annotated]

    def empty(self, size: int, *, dtype: str, device: str, pin_memory: bool) -> Piece:
        assert (dtype, device, pin_memory) == ("uint8", "cpu", True)
        if self.held + size > self.room:
            raise RuntimeError("out of memory")
        self.taken.append(size)
        self.held += size
        self.most = max(self.most, self.held)
        return Piece(self, size)


class Piece:
    def __init__(self, memory: Memory, size: int) -> None:
        self.memory, self.size = memory, size

    def __del__(self) -> None:
        self.memory.held -= self.size


def worker(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> Any:
    pieces = {n: SimpleNamespace(handle=(0, size, n, n), tag=tag) for n, (size, tag) in enumerate([(100, "weights"), (700, "kv_cache"), (200, "weights")])}
    allocator = SimpleNamespace(CuMemAllocator=SimpleNamespace(get_instance=lambda: SimpleNamespace(pointer_to_data=pieces)))
    for name, module in {"torch": memory, "vllm": None, "vllm.device_allocator": None, "vllm.device_allocator.cumem": allocator}.items():
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace())
    return pin_weights.PinWeights()


def pinned(of: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while not of.pin_weights()["done"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return dict(of.pin_weights())


def test_all_pieces_of_the_weights_are_held_at_once_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    assert pinned(worker(monkeypatch, memory)) == {"done": True, "error": ""}
    assert (memory.taken, memory.most, memory.held) == ([100, 200], 300, 0)


def test_a_second_question_pins_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    one = worker(monkeypatch, memory)
    pinned(one)
    pinned(one)
    assert memory.taken == [100, 200]


def test_a_host_without_the_memory_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pinned(worker(monkeypatch, Memory(250))) == {"done": True, "error": "RuntimeError: out of memory"}


# ------------------------------------------------------------------------------------------------------------------------- the host


class Docker(_vllm_host.DockerHost):  # type: ignore[misc]
    """The host without its programs: what they were asked for."""

    def __init__(self, root: Path, answers: list[Any] | None = None) -> None:
        super().__init__(_vllm_host.Paths(root, root))
        self.asked: list[tuple[str, ...]] = []
        self.answers = answers or []

    def run(self, *command: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        self.asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    def inspect(self, slot: str) -> dict[str, Any]:
        return {"State": {"Running": False}, "HostConfig": {"RestartPolicy": {"Name": "no"}}}

    def pause(self, seconds: float) -> None:
        pass

    def http(self, slot: str, path: str, *, post: bytes | None = None, timeout: float = 5) -> bytes:
        assert (path, json.loads(post or b"")) == ("/collective_rpc", {"method": "pin_weights"})
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return json.dumps({"results": answer}).encode()


DEFINITION = {"image": "vllm", "entrypoint": ["python3", _vllm_host.SERVE, "serve"], "user": f"{os.getuid()}:{os.getgid()}", "volumes": ["/models:/models:ro"]}


def test_a_server_waits_behind_a_gate_of_its_own(tmp_path: Path) -> None:
    host = Docker(tmp_path)
    host.create("green", DEFINITION)
    gate = tmp_path / "vllm-green" / "gate"
    assert stat.S_IMODE(gate.stat().st_mode) == 0o700
    project = json.loads((tmp_path / "vllm-green" / "compose.yml").read_text().split("\n", 1)[1])
    assert project["services"]["server"]["volumes"] == ["/models:/models:ro", f"{gate}:/run/agent-stack"]
    (gate / "imported").touch()
    assert host.start_ahead("green")
    assert host.waits("green")
    assert not host.imported("green")
    (gate / "imported").touch()
    assert host.imported("green")
    host.start("green")
    assert not host.waits("green")
    assert [command[4] for command in host.asked if command[:2] == ("docker", "compose")] == ["create", "start", "start"]


@pytest.mark.parametrize(
    "change", [{"entrypoint": ["vllm", "serve"]}, {"entrypoint": ["python3", "/etc/agent-stack/node.py", "serve"], "network_mode": "host"}]
)
def test_another_server_has_no_gate(tmp_path: Path, change: dict[str, Any]) -> None:
    host = Docker(tmp_path)
    host.create("green", DEFINITION | change)
    before = len(host.asked)
    assert not host.start_ahead("green")
    assert not host.waits("green")
    assert len(host.asked) == before


GOOD, BUSY, BAD = {"done": True, "error": ""}, {"done": False, "error": ""}, {"done": True, "error": "RuntimeError: out of memory"}


@pytest.mark.parametrize(
    ("answers", "free", "pinned"),
    [
        pytest.param([[GOOD, GOOD]], 100_000, True, id="at once"),
        pytest.param([[BUSY, GOOD], [GOOD, GOOD]], 100_000, True, id="one later than the other"),
        pytest.param([[GOOD, BAD]], 100_000, False, id="one has not the memory"),
        pytest.param([[]], 100_000, False, id="nobody answers"),
        pytest.param([OSError("404")], 100_000, False, id="a server of before"),
        pytest.param([[None]], 100_000, False, id="another method of that name"),
        pytest.param([], 2 * 14_000 + 4_095, False, id="the host has not the memory"),
        pytest.param([[GOOD]], 2 * 14_000 + 4_096, True, id="the host has just the memory"),
    ],
)
def test_pinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[Any], free: int, pinned: bool) -> None:
    monkeypatch.setattr(_vllm_host, "free_mib", lambda: free)
    host = Docker(tmp_path, answers)
    assert host.pin("blue", 14_000) == pinned
    assert host.answers == []


def test_a_model_of_unknown_size_is_not_pinned(tmp_path: Path) -> None:
    assert not Docker(tmp_path).pin("blue", 0)


def test_the_hosts_free_memory_is_a_number_of_mib() -> None:
    assert 0 < _vllm_host.free_mib() < 2**27

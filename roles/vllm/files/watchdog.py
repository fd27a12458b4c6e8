#!/usr/bin/env python3
"""Restart the model server that serves if it is truly stuck, or lost its GPU; never one that is only busy. A systemd timer runs this.

    watchdog.py CONFIG.json

A swap whose process died, or that a reboot cut off, is ended first: requests may be held for it.

Stuck means: for `stall_seconds` requests ran in the engine, at every look, and not a single step was made; or nothing answered that had answered before.
Lost means: the driver answers on the host, and not in the container, as it happens to containers after a reload of systemd's units.
While the model is being swapped nothing is done. More than `restarts_per_hour` restarts are not done either, because they did not help; the
unit fails then, and the metrics say so.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# The collection's own code, which lies beside this program on the host.
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_host
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_api import ApiError, Progress, progress
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_swap import Limits, State, Swap, SwapError

HOUR = 3600
REASONS = ("stalled", "unreachable", "gpu_lost")


@dataclass
class Memory:
    """What is kept from one look to the next. `moved_at` is when the engine was last seen to move, to be idle, or to be another one."""

    container: str = ""
    moved_at: float = 0.0
    steps: float = -1.0
    tokens: float = -1.0
    answered: bool = False
    restarts: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    given_up: int = 0
    recovered: int = 0


@dataclass(frozen=True)
class Look:
    """What was seen of the server at one time. `progress` is None if it did not answer."""

    container: str
    progress: Progress | None
    gpu_lost: bool = False


def judge(memory: Memory, look: Look, now: float, stall_seconds: float) -> str:
    """Return why the server must be restarted, or nothing. Updates the memory."""
    if look.container != memory.container:
        memory.container, memory.moved_at, memory.steps, memory.tokens, memory.answered = look.container, now, -1.0, -1.0, False
    if look.gpu_lost:
        return "gpu_lost"
    seen = look.progress
    if seen is None:
        # One that is still loading never answered, and may take its time.
        return "unreachable" if memory.answered and now - memory.moved_at >= stall_seconds else ""
    memory.answered = True
    if seen.running == 0 or (seen.steps, seen.tokens) != (memory.steps, memory.tokens):
        memory.moved_at, memory.steps, memory.tokens = now, seen.steps, seen.tokens
        return ""
    return "stalled" if now - memory.moved_at >= stall_seconds else ""


def allowed(memory: Memory, now: float, restarts_per_hour: int) -> bool:
    memory.restarts = [at for at in memory.restarts if now - at < HOUR]
    return len(memory.restarts) < restarts_per_hour


def metrics(memory: Memory) -> str:
    lines = [
        "# HELP agent_stack_vllm_watchdog_restarts_total Restarts of a model server that was stuck, by reason.",
        "# TYPE agent_stack_vllm_watchdog_restarts_total counter",
        *(f'agent_stack_vllm_watchdog_restarts_total{{reason="{reason}"}} {memory.counts.get(reason, 0)}' for reason in REASONS),
        "# HELP agent_stack_vllm_watchdog_given_up_total Looks at a stuck model server that was not restarted, because that had not helped.",
        "# TYPE agent_stack_vllm_watchdog_given_up_total counter",
        f"agent_stack_vllm_watchdog_given_up_total {memory.given_up}",
        "# HELP agent_stack_vllm_watchdog_recovered_total Swaps that were cut off and then ended by the watchdog.",
        "# TYPE agent_stack_vllm_watchdog_recovered_total counter",
        f"agent_stack_vllm_watchdog_recovered_total {memory.recovered}",
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Replace a file at once: the exporter may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.chmod(0o644)
    new.replace(path)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, stdin=subprocess.DEVNULL)


def look_at(slot: str, host: _vllm_host.DockerHost) -> Look | None:
    """Return what there is to see, or None for a container that does not run: restarting that is Docker's affair."""
    if host.status(slot) != "running":
        return None
    seen = None
    try:
        seen = progress(host.http(slot, "/metrics", timeout=10))
        # An engine that hangs in its first step has told nobody yet that it has a request.
        seen = replace(seen, running=max(seen.running, at_gateway(slot, host)))
    except (OSError, ApiError):
        pass
    return Look(host.born(slot), seen, host.gpu and gpu_lost(_vllm_host.container(slot)))


def at_gateway(slot: str, host: _vllm_host.DockerHost) -> int:
    """Return how many requests the gateway waits for. One that does not answer waits for none."""
    try:
        return int(host.gateway.statistics(patience=0).get(slot, {}).get("scur") or 0)
    except SwapError:
        return 0


def gpu_lost(container: str) -> bool:
    """Whether the driver answers on the host, and refuses in the container. A driver that is away on the host is nothing that a restart mends."""
    try:
        if run("nvidia-smi", "-L").returncode != 0:
            return False
    except OSError:
        return False
    inside = run("docker", "exec", container, "nvidia-smi", "-L")
    return inside.returncode != 0 and "NVML" in inside.stdout + inside.stderr


def restart(root: Path, slot: str, reason: str) -> bool:
    """A container whose GPU is lost must be made again; for an engine that is stuck a new process will do."""
    compose = ("docker", "compose", "--file", str(root / f"vllm-{slot}" / "compose.yml"))
    if reason == "gpu_lost":
        return run(*compose, "up", "--detach", "--force-recreate", "--no-build", "--pull", "never").returncode == 0
    # A stuck engine does not end when it is asked to.
    return run(*compose, "restart", "--timeout", "5").returncode == 0


def act(
    config: Mapping[str, Any],
    memory: Memory,
    seen: Look | None,
    slot: str,
    now: float,
    restart: Callable[[str, str], bool],
) -> int:
    """Restart if that is needed and allowed. Return the exit status."""
    if seen is None:
        return 0
    reason = judge(memory, seen, now, config["stall_seconds"])
    if not reason:
        return 0
    if not allowed(memory, now, config["restarts_per_hour"]):
        memory.given_up += 1
        print(f"The model server in {slot} is {reason}. It was restarted {len(memory.restarts)} times within an hour, which did not help.", flush=True)
        return 1
    print(f"The model server in {slot} is {reason}: restarting it.", flush=True)
    memory.restarts.append(now)
    memory.counts[reason] = memory.counts.get(reason, 0) + 1
    return 0 if restart(slot, reason) else 1


def recover(config: Mapping[str, Any], memory: Memory, host: _vllm_host.DockerHost, state: State) -> int:
    print(f"A swap from {state.active or 'nothing'} to {state.target} was cut off: ending it.", flush=True)
    memory.recovered += 1
    Swap(host, state, Limits(**config["limits"]), lambda phase, traffic: print(phase, flush=True)).recover()
    return 0


def look_and_act(config: Mapping[str, Any], paths: _vllm_host.Paths) -> int:
    """Raises SwapError, and whatever a container engine that does not answer leads to."""
    kept = paths.data / "vllm" / "watchdog.json"
    try:
        memory = Memory(**json.loads(kept.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        memory = Memory()

    def remember() -> None:
        write(kept, json.dumps(vars(memory)))
        write(paths.data / "textfile" / "vllm_watchdog.prom", metrics(memory))

    def restart_and_remember(slot: str, reason: str) -> bool:
        # A restart that does not come to an end counts as well.
        remember()
        return restart(paths.root, slot, reason)

    host = _vllm_host.DockerHost(paths, gpu=config["gpu"])
    try:
        state = _vllm_host.read_state(paths)
        if state.target:
            return recover(config, memory, host, state)
        return act(config, memory, look_at(state.active, host), state.active, time.time(), restart_and_remember) if state.active else 0
    finally:
        remember()


def main() -> int:
    config = json.loads(Path(sys.argv[1]).read_text())
    paths = _vllm_host.Paths(Path(config["root"]), Path(config["data"]))
    # Held until the end, so that no swap begins while a server is being restarted.
    with open(paths.lock, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        # The name that a killed swap left would be taken for that of the one who holds it now.
        lock.truncate(0)
        try:
            return look_and_act(config, paths)
        except (SwapError, OSError, subprocess.TimeoutExpired) as error:
            print(error, flush=True)
            return 1


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())

"""Restart the model server that serves if it is truly stuck, or lost its GPU; never one that is only busy. A systemd timer runs this.

    watchdog.py CONFIG.json

A swap whose process died, or that a reboot cut off, is ended first: requests may be held for it.

Stuck means: for `stall_seconds` requests ran in the engine, at every look, and not a single step was made; or nothing answered that had answered before.
Lost means: the driver answers on the host, and not in the container, as it happens to containers after a reload of systemd's units.
While the model is being swapped nothing is done. More than `restarts_per_hour` restarts are not done either, because they did not help; the
unit fails then, and the metrics say so.
"""

import json
import os
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


def look_at(slot: str, host: _vllm_host.DockerHost) -> Look | None:
    """Return what there is to see, or None for a container that does not run: restarting that is Docker's affair."""
    if host.status(slot) != "running":
        return None
    seen = None
    try:
        seen = progress(host.http(slot, "/metrics", timeout=10))
        # An engine that hangs in its first step has told nobody yet that it has a request.
        seen = replace(seen, running=max(seen.running, host.gateway.running(slot, patience=0)))
    except (OSError, ApiError, SwapError):
        pass
    return Look(host.born(slot), seen, gpu_lost(slot, host))


def gpu_lost(slot: str, host: _vllm_host.DockerHost) -> bool:
    """Whether the driver answers on the host, and refuses in the container. A driver that is away on the host is nothing that a restart mends."""
    if not host.gpu:
        return False
    try:
        host.check()
    except SwapError:
        return False
    inside = host.run("docker", "exec", _vllm_host.container(slot), "nvidia-smi", "-L", check=False)
    return inside.returncode != 0 and "NVML" in inside.stdout + inside.stderr


def restart(slot: str, reason: str, host: _vllm_host.DockerHost) -> None:
    """A container whose GPU is lost must be made again; for an engine that is stuck a new process will do. Raises SwapError."""
    if reason == "gpu_lost":
        host.compose(slot, "up", "--detach", "--force-recreate", "--no-build", "--pull", "never")
    else:
        # A stuck engine does not end when it is asked to.
        host.compose(slot, "restart", "--timeout", "5")


def act(
    config: Mapping[str, Any],
    memory: Memory,
    seen: Look | None,
    slot: str,
    now: float,
    restart: Callable[[str, str], None],
) -> int:
    """Restart if that is needed and allowed. Return the exit status. Raises what a restart that fails does."""
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
    restart(slot, reason)
    return 0


def recover(config: Mapping[str, Any], memory: Memory, host: _vllm_host.DockerHost, state: State) -> int:
    print(f"A swap from {state.active or 'nothing'} to {state.target} was cut off: ending it.", flush=True)
    memory.recovered += 1
    Swap(host, state, Limits(**config["limits"]), lambda phase, traffic: print(phase, flush=True)).recover()
    return 0


def look_and_act(config: Mapping[str, Any], paths: _vllm_host.Paths) -> int:
    """Raises SwapError."""
    kept = paths.data / "vllm" / "watchdog.json"
    try:
        memory = Memory(**json.loads(kept.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        memory = Memory()

    def remember() -> None:
        _vllm_host.write(kept, json.dumps(vars(memory)))
        _vllm_host.write(paths.data / "textfile" / "vllm_watchdog.prom", metrics(memory), 0o644)

    def restart_and_remember(slot: str, reason: str) -> None:
        # A restart that does not come to an end counts as well.
        remember()
        restart(slot, reason, host)

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
    with open(paths.lock, "a") as stream:
        if not _vllm_host.lock(stream):
            return 0
        # The name that a killed swap left would be taken for that of the one who holds it now.
        stream.truncate(0)
        try:
            return look_and_act(config, paths)
        except (SwapError, OSError) as error:
            print(error, flush=True)
            return 1


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())

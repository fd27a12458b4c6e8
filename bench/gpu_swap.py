#!/usr/bin/env python3
"""The collection's own swap (plugins/module_utils/_vllm_swap.py) on a real GPU, with vLLM as plain processes in place of containers, while clients ask.

    bench/gpu_swap.py OUT MODEL PYTHON [--clients 8]

One after the other, with two servers of the same shape that fill the GPU each: first start; swap to a model that was never loaded; rollback; the same
swap again, with its compile cache; swap back to the one that sleeps; and again, which is what a swap between two known models costs; rollback.
Prints a line for each, and JSON as the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _vllm_api
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_judge import Judge
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_swap import HOLD, Limits, State, Swap, SwapError, Traffic, Wish

PORTS = {"blue": 8101, "green": 8102}
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class Door:
    """What the gateway does for clients: send them to the slot that serves, or have them wait. Counts what is under way in each."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.to = HOLD
        self.busy = dict.fromkeys(PORTS, 0)
        self.waiting = 0
        self.failed: list[str] = []
        self.seconds: list[tuple[float, float]] = []

    def set(self, to: str) -> bool:
        with self.changed:
            different = bool(self.to != to)
            self.to = to
            self.changed.notify_all()
        return different

    def ask(self, body: bytes) -> None:
        started = time.monotonic()
        with self.changed:
            self.waiting += 1
            while self.to == HOLD:
                self.changed.wait()
            self.waiting -= 1
            slot = self.to
            self.busy[slot] += 1
        try:
            request = Request(f"http://127.0.0.1:{PORTS[slot]}/v1/chat/completions", body, {"Content-Type": "application/json"})
            with urlopen(request, timeout=300) as response:
                answer = response.read()
            if b"[DONE]" not in answer:
                raise OSError("the stream was cut off")
            self.seconds.append((time.time(), time.monotonic() - started))
        except OSError as error:
            self.failed.append(repr(error))
        finally:
            with self.changed:
                self.busy[slot] -= 1


class Processes:
    """`_vllm_swap.Host` without Docker, systemd and HAProxy."""

    def __init__(self, out: Path, python: str, door: Door) -> None:
        self.out, self.python, self.door = out, python, door
        self.commands: dict[str, list[str]] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def now(self) -> float:
        return time.time()

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def save(self, state: State) -> None:
        (self.out / "swap.json").write_text(state.to_json())

    def status(self, slot: str) -> str:
        if slot not in self.commands:
            return "absent"
        return "running" if slot in self.running and self.running[slot].poll() is None else "stopped"

    def create(self, slot: str, definition: dict[str, Any]) -> None:
        self.commands[slot] = [self.python, "-m", "vllm.entrypoints.openai.api_server", *definition["command"], "--port", str(PORTS[slot])]

    def start(self, slot: str) -> None:
        with open(self.out / f"{slot}-{int(time.time())}.log", "wb") as log:
            self.running[slot] = subprocess.Popen(self.commands[slot], stdout=log, stderr=log, start_new_session=True, env=os.environ | ENVIRONMENT)

    def stop(self, slot: str, *, at_once: bool) -> None:
        if self.status(slot) != "running":
            return
        process = self.running[slot]
        os.killpg(process.pid, signal.SIGKILL if at_once else signal.SIGTERM)
        process.wait(120)
        self.wait_for_memory()

    def wait_for_memory(self) -> None:
        """The driver gives the memory of a killed process back a moment later; a container's end waits for that."""
        deadline = time.monotonic() + 20
        while used_mib() > 8000 and time.monotonic() < deadline:
            time.sleep(0.1)

    def remove(self, slot: str) -> None:
        self.stop(slot, at_once=True)
        self.commands.pop(slot, None)

    def log(self, slot: str) -> str:
        newest = max(self.out.glob(f"{slot}-*.log"))
        return "\n".join(newest.read_text(errors="replace").splitlines()[-40:])

    def http(self, slot: str, path: str, *, post: bool = False, timeout: float = 10) -> bytes:
        with urlopen(Request(f"http://127.0.0.1:{PORTS[slot]}{path}", b"" if post else None), timeout=timeout) as response:
            return bytes(response.read())

    def ready(self, slot: str) -> bool:
        try:
            self.http(slot, "/health")
        except OSError:
            return False
        return True

    def asleep(self, slot: str) -> bool:
        try:
            return bool(json.loads(self.http(slot, "/is_sleeping"))["is_sleeping"])
        except (OSError, ValueError, KeyError):
            return False

    def sleep(self, slot: str) -> None:
        self.http(slot, "/sleep?level=1", post=True, timeout=300)

    def wake(self, slot: str) -> None:
        self.http(slot, "/wake_up", post=True, timeout=300)

    def busy(self, slot: str) -> int:
        return max(self.door.busy[slot], int(_vllm_api.progress(self.http(slot, "/metrics")).running))

    def judge(self, slot: str, *, briefly: bool) -> list[str]:
        url = f"http://127.0.0.1:{PORTS[slot]}"
        params = {"url": url, "model": "m", "max_tokens": 4, "timeout": 60, "generate": True, "tool_call": False, "golden_prompts": []}
        return list(Judge(params | {"metrics_url": f"{url}/metrics", "progress_seconds": 5}).judge()["reasons"])

    def route(self, to: str) -> bool:
        return self.door.set(to)

    def keep_route(self, slot: str) -> bool:
        return False

    def promote(self, slot: str) -> bool:
        return False

    def demote(self, slot: str) -> bool:
        return False

    def traffic(self) -> Traffic:
        return Traffic(self.door.waiting, len(self.door.failed))


def used_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def wish(model: str, name: str) -> Wish:
    command = ["--model", model, "--served-model-name", "m", "--load-format", "dummy", "--max-model-len", "8192", "--gpu-memory-utilization", "0.9"]
    command += ["--enable-sleep-mode", "--seed", {"first": "1", "second": "2"}[name]]
    return Wish(name, {"image": "none", "command": command}, "sleep", utilization=0.9, sleep_mode=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("python")
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    door = Door()
    host = Processes(options.out, options.python, door)
    state = State()
    ended = threading.Event()
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello " * 50}], "max_tokens": 64, "ignore_eos": True, "stream": True}).encode()

    def client() -> None:
        while not ended.is_set():
            door.ask(body)

    steps: list[dict[str, Any]] = []

    def step(name: str, act: str, *arguments: Any) -> None:
        phases: list[tuple[str, float]] = []

        def report(phase: str, traffic: Traffic) -> None:
            if not phases or phases[-1][0] != phase:
                phases.append((phase, time.monotonic()))

        swap = Swap(host, state, Limits(start=400, drain=120), report)
        started = time.monotonic()
        getattr(swap, act)(*arguments)
        ends = [*(at for _, at in phases[1:]), time.monotonic()]
        took = {phase: round(end - at, 2) for (phase, at), end in zip(phases, ends, strict=True)}
        steps.append({"step": name, "seconds": round(time.monotonic() - started, 2), "hold_seconds": round(swap.held_seconds, 2), "held": swap.held, **took})
        steps[-1]["used_mib"] = used_mib()
        print(json.dumps(steps[-1]), flush=True)
        time.sleep(5)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(options.clients)]
    try:
        step("first start", "present", wish(options.model, "first"))
        for thread in threads:
            thread.start()
        time.sleep(5)
        step("swap to a model that was never loaded", "present", wish(options.model, "second"))
        step("rollback from a model that never slept", "rollback")
        step("swap to a model that was stopped", "present", wish(options.model, "second"))
        step("swap to one that sleeps", "present", wish(options.model, "first"))
        step("swap, both loaded and slept before", "present", wish(options.model, "second"))
        step("rollback", "rollback")
    except SwapError as error:
        print(error, flush=True)
        return 1
    finally:
        ended.set()
        door.set(state.active or "blue")
        for thread in threads:
            if thread.is_alive():
                thread.join(60)
        for slot in PORTS:
            host.stop(slot, at_once=True)
    print(json.dumps({"requests": len(door.seconds), "failed": len(door.failed), "problems": door.failed[:3], "steps": steps}))
    return 1 if door.failed else 0


if __name__ == "__main__":
    sys.exit(main())

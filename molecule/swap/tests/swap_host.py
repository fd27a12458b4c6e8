"""A test host whose models are swapped: change them, put it under load, see where a swap is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PROGRESS = "/var/lib/agent-stack/vllm/progress.json"
STATE = "/var/lib/agent-stack/vllm/swap.json"
LOCK = "/var/lib/agent-stack/vllm/swap.lock"
GATEWAY = "agent-stack-vllm-gateway-1"


@dataclass(frozen=True)
class Play:
    returncode: int
    output: str
    seconds: float

    @property
    def changed(self) -> int:
        found = re.search(r"changed=(\d+)", self.output)
        return int(found[1]) if found else -1

    @property
    def outcome(self) -> dict[str, float]:
        """What the role said of the swap: seconds for which requests were held, how many, and how many failed."""
        found = re.search(r"held for ([\d.]+) s, (\d+) at most at one time; (\d+)\s+failed", " ".join(self.output.split()))
        return {} if found is None else {"held_seconds": float(found[1]), "held": int(found[2]), "failed": int(found[3])}


@dataclass
class Traffic:
    """What became of the requests of a load, once it has ended."""

    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return [record["problem"] for record in self.records if record["problem"]]

    @property
    def models(self) -> set[str]:
        return {record["model"] for record in self.records if record["model"]}

    def percentile(self, share: float, start: float = 0, end: float = float("inf")) -> float:
        """Seconds that a share of the requests, begun between two times, stayed below."""
        found = sorted(record["seconds"] for record in self.records if start <= record["at"] < end)
        return float(found[min(len(found) - 1, int(share * len(found)))])


@dataclass(frozen=True)
class SwapHost:
    """The container `name`, whose model the playbook changes."""

    name: str
    inventory: Path
    playbook: str

    def on_host(self, *command: str, stdin: str | None = None, check: bool = True) -> str:
        """Run a command on the host, return its output."""
        result = subprocess.run(["docker", "exec", "--interactive", self.name, *command], capture_output=True, text=True, input=stdin or "", check=False)
        if check and result.returncode != 0:
            raise AssertionError(f"`{' '.join(command)}` ended with {result.returncode}: {result.stderr or result.stdout}")
        return result.stdout.strip()

    def start_play(self, *arguments: str, playbook: str = "") -> subprocess.Popen[str]:
        """Start ansible-playbook on the host."""
        tools = Path(sys.executable).parent
        command = [
            str(tools / "ansible-playbook"),
            playbook or self.playbook,
            "-i",
            str(self.inventory),
            "-e",
            f"@{ROOT / '.cache' / 'machine.json'}",
            *arguments,
        ]
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "AGENT_STACK_CHECKOUT": str(ROOT)}
        # Under molecule colours would be asked for, and stand between the words that are looked for.
        environment |= {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def play(self, *arguments: str, playbook: str = "") -> Play:
        started = time.monotonic()
        process = self.start_play(*arguments, playbook=playbook)
        output, _ = process.communicate(timeout=900)
        return Play(process.returncode, output, time.monotonic() - started)

    def swap(self, model: str, strategy: str = "side_by_side", *arguments: str) -> Play:
        return self.play(*self.wish(model, strategy), *arguments)

    def wish(self, model: str, strategy: str = "side_by_side") -> list[str]:
        return ["-e", f"vllm_model=/srv/models/{model}", "-e", f"vllm_swap_strategy={strategy}"]

    def state(self) -> dict[str, Any]:
        """What is written down of the slots."""
        return dict(json.loads(self.on_host("cat", STATE)))

    def serving(self) -> str:
        """The name of the model that answers at the gateway."""
        body = {"model": "agent-model", "messages": [{"role": "user", "content": "hello"}]}
        url = f"http://{self.gateway()}:8000/v1/chat/completions"
        answer = self.on_host("curl", "--silent", "--show-error", "--fail", "--max-time", "30", "--json", "@-", url, stdin=json.dumps(body))
        return str(json.loads(answer)["system_fingerprint"])

    def gateway(self) -> str:
        return self.on_host("docker", "inspect", "--format", '{{(index .NetworkSettings.Networks "agent-stack-inference").IPAddress}}', GATEWAY)

    def phase(self) -> str:
        """The phase that a run is in; nothing if none holds the lock."""
        owner = self.on_host("cat", LOCK, check=False)
        if "process" not in owner:
            return ""
        progress = self.on_host("cat", PROGRESS, check=False)
        return str(json.loads(progress)["current"]["phase"]) if progress else ""

    def process_of_the_run(self) -> int:
        """The process on the host that does the swap, or 0."""
        found = re.search(r"process (\d+)", self.on_host("cat", LOCK, check=False))
        return int(found[1]) if found else 0

    @contextlib.contextmanager
    def load(self, rate: float) -> Iterator[Traffic]:
        """Send requests from within the host, as long as the block runs."""
        self.on_host("sh", "-c", "cat > /var/tmp/load.py", stdin=(Path(__file__).parent / "load.py").read_text())
        command = ["docker", "exec", "--interactive", self.name, "python3", "/var/tmp/load.py", self.gateway(), str(rate)]
        traffic = Traffic()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            time.sleep(1)
            yield traffic
        finally:
            output, _ = process.communicate(timeout=600)
            traffic.records += [json.loads(line) for line in output.splitlines()]
        assert process.returncode == 0
        assert traffic.records

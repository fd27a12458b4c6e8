"""Write down what no exporter sees: containers, units of systemd, GPUs, and the model's swaps. A systemd service runs this.

    host_metrics.py DATA

Every PERIOD seconds DATA/textfile/host.prom is replaced, which the node exporter reads. A source that does not answer is left out, and the
metric `agent_stack_host_source_up` says so; the others are written all the same.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PERIOD = 15
# A swap may take less time than PERIOD, and its record is one small file.
SWAP_PERIOD = 1
TIMEOUT = 10
UNITS = ("agent-stack*", "nginx.service", "docker.service", "containerd.service", "certbot.service", "certbot.timer", "logrotate.service", "ssh.service")
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
MIB = 1024 * 1024
# Why a GPU is slower than it could be, of what nvidia-smi tells: the tag without its beginning, which older drivers name otherwise.
SLOWDOWNS = ("hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown", "sw_power_cap")

Sample = tuple[dict[str, str], float]


@dataclass(frozen=True)
class Family:
    """One metric with its samples."""

    name: str
    kind: str
    help: str
    samples: list[Sample] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self.samples:
            text = ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items())
            yield f"{self.name}{{{text}}} {value:g}" if text else f"{self.name} {value:g}"


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def run(*command: str) -> str:
    """Raises OSError, and CalledProcessError or TimeoutExpired, which are SubprocessErrors."""
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True).stdout


def containers(ask: Callable[..., str] = run) -> list[Family]:
    restarts = Family("agent_stack_container_restarts_total", "counter", "Restarts of a container by Docker since it was made.")
    running = Family("agent_stack_container_running", "gauge", "1 if the container runs.")
    identifiers = ask("docker", "ps", "--all", "--quiet", "--no-trunc", "--filter", "name=^agent-stack-").split()
    described = ask("docker", "inspect", "--format", "{{.Name}} {{.RestartCount}} {{.State.Running}}", *identifiers) if identifiers else ""
    for line in sorted(described.splitlines()):
        name, count, state = line.split()
        restarts.samples.append(({"container": name.removeprefix("/")}, float(count)))
        running.samples.append(({"container": name.removeprefix("/")}, float(state == "true")))
    return [restarts, running]


def units(ask: Callable[..., str] = run) -> list[Family]:
    failed = Family("agent_stack_unit_failed", "gauge", "1 if systemd says that the unit has failed.")
    for line in ask("systemctl", "list-units", "--all", "--plain", "--no-legend", "--full", *UNITS).splitlines():
        name, _load, active, *_more = line.split()
        failed.samples.append(({"unit": name}, float(active == "failed")))
    return [failed]


def gpus(ask: Callable[..., str] = run) -> list[Family]:
    """What the driver says. Raises ParseError if that is no XML."""
    families = {
        name: Family(f"agent_stack_gpu_{name}", "gauge", text)
        for name, text in {
            "temperature_celsius": "Temperature of the GPU.",
            "utilization_ratio": "Part of the time in which a kernel ran.",
            "memory_used_bytes": "Memory in use, without what the driver keeps.",
            "memory_total_bytes": "Memory of the GPU.",
            "power_watts": "Power that the GPU draws.",
            "slowdown": "1 while the clock is lowered for this reason.",
            "uncorrected_errors": "Errors of the memory since the driver was loaded that ECC could not correct.",
            "remapping_failed": "1 if a broken row of the memory could not be replaced.",
        }.items()
    }
    # Its document type names a file that is not there.
    for gpu in ElementTree.fromstring(ask("nvidia-smi", "-q", "-x")).findall("gpu"):  # noqa: S314  the driver is trusted
        labels = {"gpu": gpu.findtext("uuid", "").strip(), "model": gpu.findtext("product_name", "").strip()}
        values: dict[str, float | None] = {
            "temperature_celsius": quantity(gpu, "temperature/gpu_temp"),
            "utilization_ratio": scaled(quantity(gpu, "utilization/gpu_util"), 0.01),
            "memory_used_bytes": scaled(quantity(gpu, "fb_memory_usage/used"), MIB),
            "memory_total_bytes": scaled(quantity(gpu, "fb_memory_usage/total"), MIB),
            "power_watts": first(quantity(gpu, f"gpu_power_readings/{tag}") for tag in ("power_draw", "instant_power_draw", "average_power_draw")),
            "uncorrected_errors": uncorrected(gpu),
            "remapping_failed": flag(gpu, "remapped_rows/remapped_row_failure", "Yes"),
        }
        for name, value in values.items():
            if value is not None:
                families[name].samples.append((labels, value))
        for reason in SLOWDOWNS:
            active = first(flag(gpu, f"clocks_{word}_reasons/clocks_{word}_reason_{reason}", "Active") for word in ("event", "throttle"))
            if active is not None:
                families["slowdown"].samples.append(({**labels, "reason": reason}, active))
    return list(families.values())


def quantity(gpu: ElementTree.Element, path: str) -> float | None:
    """The number before a unit, or None for N/A."""
    found = re.match(r"-?[0-9.]+", gpu.findtext(path, "").strip())
    return float(found[0]) if found else None


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def flag(gpu: ElementTree.Element, path: str, true: str) -> float | None:
    text = gpu.findtext(path, "").strip()
    return None if text in {"", "N/A"} else float(text == true)


def first(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def uncorrected(gpu: ElementTree.Element) -> float | None:
    """The sum over the kinds of memory, whatever the driver calls them."""
    volatile = gpu.find("ecc_errors/volatile")
    counts = [quantity(kind, ".") for kind in ([] if volatile is None else volatile) if "uncorrectable" in kind.tag]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


@dataclass
class Kernel:
    """Errors of GPUs that the driver reports to the kernel's log, counted from the boot on."""

    path: str = "/dev/kmsg"
    stream: int | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def families(self) -> list[Family]:
        """Raises OSError if the log cannot be read."""
        if self.stream is None:
            self.stream = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        while True:
            try:
                record = os.read(self.stream, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:
                # Records were overwritten before they were read; the next read goes on behind them.
                continue
            if not record:
                break
            for match in XID.finditer(record.decode(errors="replace")):
                self.counts[match[2]] += 1
        samples: list[Sample] = [({"xid": code}, float(count)) for code, count in sorted(self.counts.items())]
        total = Family("agent_stack_gpu_errors_total", "counter", "Errors that the GPUs' driver reported (Xid), in all.", [({}, float(self.counts.total()))])
        return [total, Family("agent_stack_gpu_xid_errors_total", "counter", "Errors that the GPUs' driver reported, by Xid.", samples)]


@dataclass
class Swaps:
    """What the record of the model's slots says, and how the swaps ended that were seen in it."""

    path: Path
    active: str = ""
    target: str = ""
    ended: Counter[str] = field(default_factory=lambda: Counter({"done": 0, "failed": 0}))

    def look(self) -> None:
        """A record that is not there, or is being replaced, changes nothing."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            record: Mapping[str, Any] = json.loads(self.path.read_text())
            active, target = str(record.get("active", "")), str(record.get("target", ""))
            if self.target and not target:
                self.ended["done" if active == self.target else "failed"] += 1
            self.active, self.target = active, target

    def families(self) -> list[Family]:
        self.look()
        return [
            Family("agent_stack_swap_under_way", "gauge", "1 while the model is being swapped, or started.", [({}, float(bool(self.target)))]),
            Family("agent_stack_swaps_total", "counter", "Swaps by how they ended.", [({"result": name}, float(count)) for name, count in self.ended.items()]),
        ]


def collected(sources: Mapping[str, Callable[[], list[Family]]]) -> str:
    """The text for Prometheus."""
    up = Family("agent_stack_host_source_up", "gauge", "1 if the source of these metrics answered.")
    families = [up]
    for name, source in sources.items():
        try:
            found = source()
        except (OSError, subprocess.SubprocessError, ElementTree.ParseError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            up.samples.append(({"source": name}, 0.0))
        else:
            up.samples.append(({"source": name}, 1.0))
            families += found
    return "\n".join(line for family in families for line in family.lines()) + "\n"


def replace(path: Path, text: str) -> None:
    """As a whole: the node exporter must never read half of it."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.chmod(0o644)
    beside.replace(path)


def main() -> None:
    data = Path(sys.argv[1])
    swaps = Swaps(data / "vllm" / "swap.json")
    sources: dict[str, Callable[[], list[Family]]] = {"docker": containers, "systemd": units, "swap": swaps.families}
    if shutil.which("nvidia-smi"):
        sources |= {"gpu": gpus, "kernel": Kernel().families}
    while True:
        replace(data / "textfile" / "host.prom", collected(sources))
        for _look in range(PERIOD // SWAP_PERIOD):
            time.sleep(SWAP_PERIOD)
            swaps.look()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The figures of bench/gpu_host.sh: from its logs into docs/measurements/gpu.json, and from there into docs/measurements/gpu.md. Standard library only.

    bench/gpu_host.py record OUT [--baseline OUT] [--json FILE]    what OUT holds, as one machine's object; what was not measured is left out
    bench/gpu_host.py render [--json FILE] [--document FILE]       the part of the document between its two marks

With --baseline, `hold_ratio` is the hold of a swap to a model never loaded in OUT, over the same in the other OUT. Both must be of one machine.
Recording again replaces what was measured again, and keeps the rest of the machine's object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MEASUREMENTS = Path(__file__).resolve().parent.parent / "docs" / "measurements"
BEGIN, END = "<!-- gpu_host: begin -->", "<!-- gpu_host: end -->"
HELD = re.compile(r"Requests were\s+held for ([0-9.]+) s")
PHASE = re.compile(r"^ {2}(\S.*?) +([0-9.]+) s +requests held: \d+, failed: \d+$", re.MULTILINE)
RECAP = re.compile(r"^\S+ +: ok=(\d+) +changed=(\d+) .*?failed=(\d+)", re.MULTILINE)
ENDED = re.compile(r"^gpu_host: ([0-9.]+) s, status (\d+)$", re.MULTILINE)
# What the agent's path consists of, beside the model; the names are those of the containers, and nginx's unit.
PATH = {
    "nginx": "nginx",
    "agent": "agent-stack-agent-agent-1",
    "gateway": "agent-stack-vllm-gateway-1",
    "postgres": "agent-stack-postgres-postgres-1",
    "redis": "agent-stack-redis-redis-1",
}


class RecordError(Exception):
    """What is wrong with the logs; the message is for the user."""


def held(log: str) -> float | None:
    """Seconds for which a swap held requests, or None if the log tells of none. A log may wrap its lines."""
    found = HELD.findall(log)
    return float(found[-1]) if found else None


def phases(log: str) -> dict[str, float]:
    """Seconds of each phase of a swap. A phase that takes long is printed more than once: the last time counts."""
    return {name: float(seconds) for name, seconds in PHASE.findall(log)}


def changed(log: str) -> int | None:
    """Tasks that changed something, over all hosts, or None if the play did not end well."""
    recaps = RECAP.findall(log)
    if not recaps or any(failed != "0" for _, _, failed in recaps):
        return None
    return sum(int(count) for _, count, _ in recaps)


def took(log: str) -> float | None:
    """Seconds of a play that ended well."""
    ended = ENDED.findall(log)
    return float(ended[-1][0]) if ended and ended[-1][1] == "0" else None


def share(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The agent's path against vLLM itself: share of the tokens/s, milliseconds added to the first token, and processor time of each part a token."""
    figures: dict[str, Any] = {}
    seen = {(line["through"], line["result"]["clients"]): line for line in lines if line["result"].get("answers") and not line["result"]["failed"]}
    for clients in sorted({clients for _, clients in seen}):
        alone, through = seen.get(("vllm", clients)), seen.get(("agent", clients))
        for name, line in (("vllm", alone), ("agent", through)):
            if line:
                figures[f"{name}_tokens_per_s_{clients}"] = line["result"]["tokens_per_s"]
                figures[f"{name}_first_token_ms_{clients}"] = round(line["result"]["first_token_p50_s"] * 1000)
        if alone and through:
            figures[f"agent_share_{clients}"] = round(through["result"]["tokens_per_s"] / alone["result"]["tokens_per_s"], 3)
            figures[f"first_token_added_ms_{clients}"] = round((through["result"]["first_token_p50_s"] - alone["result"]["first_token_p50_s"]) * 1000)
        if through:
            tokens = through["result"]["tokens"]
            used = {part: through["cpu_after"].get(name, 0) - through["cpu_before"].get(name, 0) for part, name in PATH.items()}
            figures[f"cpu_us_a_token_{clients}"] = {part: round(value / tokens) for part, value in used.items()}
    return figures


def notes(text: str) -> dict[str, Any]:
    """What the phases noted; the last value of a key counts, and one that could not be measured is left out."""
    merged: dict[str, Any] = {}
    for line in text.splitlines():
        merged |= json.loads(line)
    return {key: value for key, value in merged.items() if value is not None}


def record(out: Path, baseline: Path | None = None) -> dict[str, Any]:
    """One machine's object. Raises RecordError if OUT does not say which GPU it is of, or the baseline is of another one."""

    def text(name: str, directory: Path = out) -> str:
        path = directory / name
        return path.read_text(errors="replace") if path.is_file() else ""

    figures = notes(text("notes.jsonl"))
    if "gpu" not in figures:
        raise RecordError(f"OUT is {out}; allowed is a directory in which the phase `stage` has noted the GPU.")
    readings: list[tuple[str, Callable[[str], Any], str]] = [
        ("converge_seconds", took, "converge.log"),
        ("second_run_seconds", took, "second.log"),
        ("second_run_changed", changed, "second.log"),
        ("hold_seconds", held, "swap-never.log"),
        ("hold_phases", phases, "swap-never.log"),
        ("back_hold_seconds", held, "swap-back.log"),
        ("back_phases", phases, "swap-back.log"),
        ("loaded_hold_seconds", held, "swap-loaded.log"),
        ("rollback_seconds", held, "rollback.log"),
        ("upgrade_hold_seconds", held, "upgrade.log"),
    ]
    figures |= {key: value for key, read, name in readings if (value := read(text(name))) not in (None, {})}
    if text("swaps.json"):
        load = json.loads(text("swaps.json"))
        figures |= {"failed": load["failed"], "requests": load["answers"] + load["failed"]}
        if "longest_s" in load:
            figures["longest_wait_seconds"] = load["longest_s"]
    figures |= share([json.loads(line) for line in text("share.jsonl").splitlines()])
    if baseline:
        other, before = notes(text("notes.jsonl", baseline)).get("gpu"), held(text("swap-never.log", baseline))
        if other != figures["gpu"]:
            raise RecordError(f"--baseline is {baseline}, of {other}; allowed is a directory of {figures['gpu']}.")
        if before and "hold_seconds" in figures:
            figures |= {"baseline_hold_seconds": before, "hold_ratio": round(figures["hold_seconds"] / before, 2)}
    return figures


def merge(machines: Sequence[dict[str, Any]], machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The machines with this one's figures renewed. A machine is its GPU and how many of them it has."""

    def name(one: Mapping[str, Any]) -> tuple[Any, Any]:
        return one["gpu"], one.get("gpus", 1)

    if name(machine) not in map(name, machines):
        return [*machines, dict(machine)]
    return [one | dict(machine) if name(one) == name(machine) else one for one in machines]


def number(value: float) -> str:
    return f"{value:,}"


def seconds(value: float) -> str:
    return f"{value:,.1f} s"


def percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def milliseconds(value: float) -> str:
    return f"{value:,} ms"


def parts(value: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in value.items())


# Key, what it is in the table, and how it is written.
ROWS: Sequence[tuple[str, str, Callable[[Any], str]]] = (
    ("vllm", "vLLM", str),
    ("cores", "processor cores", number),
    ("converge_seconds", "`site.yml`, the first time", seconds),
    ("second_run_changed", "`site.yml` again: tasks that changed something", number),
    ("second_run_seconds", "`site.yml` again", seconds),
    ("requests", "requests during the swaps", number),
    ("failed", "of which failed", number),
    ("hold_seconds", "swap to a model never loaded: held", seconds),
    ("hold_phases", "of which, in seconds", parts),
    ("baseline_hold_seconds", "the same with the baseline", seconds),
    ("hold_ratio", "hold, against the baseline", number),
    ("back_hold_seconds", "swap to a model that sleeps, first sleep of the other: held", seconds),
    ("back_phases", "of which, in seconds", parts),
    ("loaded_hold_seconds", "swap between two that have both slept: held", seconds),
    ("rollback_seconds", "rollback: held", seconds),
    ("upgrade_hold_seconds", "another image of vLLM: held", seconds),
    *(
        row
        for clients in (1, 16, 64, 256)
        for row in (
            (f"vllm_tokens_per_s_{clients}", f"vLLM itself, tokens/s at {clients}", number),
            (f"agent_tokens_per_s_{clients}", f"through nginx, agent and gateway, tokens/s at {clients}", number),
            (f"agent_share_{clients}", f"share at {clients}", percent),
            (f"first_token_added_ms_{clients}", f"added to the first token at {clients}, median", milliseconds),
            (f"cpu_us_a_token_{clients}", f"processor time a token at {clients}, microseconds", parts),
        )
    ),
    ("guide_ratio_1", "tokens/s of one client, against the guide's flags", number),
    ("replicas_ratio", "turns/s of two replicas, against `leastconn`", number),
    ("watchdog_restart_seconds", "an engine that stands still: restarted after", seconds),
    ("watchdog_answer_seconds", "and a turn answered after", seconds),
    ("gpu_recreated_seconds", "a container that lost its GPU: made again after", seconds),
    ("gpu_answer_seconds", "and a turn answered after", seconds),
    ("reboot_up_seconds", "reboot: the system is up after", seconds),
    ("reboot_answer_seconds", "and a turn answered after", seconds),
)


def render(machines: Sequence[Mapping[str, Any]]) -> str:
    """The section, without its marks. A row that no machine has is left out; so is what a machine has not measured."""
    if not machines:
        return "No machine has been recorded.\n"
    names = [f"{one['gpus']} {one['gpu']}" if one.get("gpus", 1) > 1 else one["gpu"] for one in machines]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key, what, write in ROWS:
        if any(key in one for one in machines):
            lines.append(f"| {what} | " + " | ".join(write(one[key]) if key in one else "" for one in machines) + " |")
    return "\n".join(lines) + "\n"


def insert(document: str, section: str) -> str:
    """The document with its generated part renewed. Raises RecordError if its marks are not there."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise RecordError(f"the document lacks {BEGIN} or {END}")
    return f"{head}{BEGIN}\n\n{section}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--baseline", type=Path)
    rendering = commands.add_parser("render")
    rendering.add_argument("--document", type=Path, default=MEASUREMENTS / "gpu.md")
    for one in (recording, rendering):
        one.add_argument("--json", type=Path, default=MEASUREMENTS / "gpu.json")
    options = parser.parse_args(arguments)
    try:
        machines = json.loads(options.json.read_text()) if options.json.exists() else []
        if options.command == "record":
            machines = merge(machines, record(options.out, options.baseline))
            options.json.write_text(json.dumps(machines, indent=2) + "\n")
        else:
            options.document.write_text(insert(options.document.read_text(), render(machines)))
    except RecordError as error:
        print(f"gpu_host.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

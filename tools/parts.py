"""The parts of `make check`, `make test` and `make test-all`: each with a log of its own and its seconds, told in a table at the end.

    python tools/parts.py run NAME COMMAND...     run one part; with PARTS=quiet only its begin and its end are shown
    python tools/parts.py reset                   forget the seconds of an earlier run
    python tools/parts.py table [LIMIT]           print the table; exit with 1 if the whole took longer than LIMIT minutes

Standard library only. Logs are in .cache/parts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent.parent / ".cache" / "parts"
RECORD = "seconds.tsv"
# What says in a log why a part failed: pytest, Ansible, molecule, linters.
TELLING = re.compile(r"FAILED|ERROR|fatal:|msg:|[A-Za-z]+(Error|Exception):|E  +|error:|^\S+:\d+: ")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LINES = 60


def run(name: str, command: list[str]) -> int:
    """Run a command, keep its output in a log, write down its seconds. Returns its exit status."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    log = DIRECTORY / f"{name}.log"
    quiet = os.environ.get("PARTS") == "quiet"
    print(f"== {name}", flush=True)
    started = time.time()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if not quiet:
                print(line, end="", flush=True)
    status = process.wait()
    ended = time.time()
    with (DIRECTORY / RECORD).open("a") as record:
        record.write(f"{name}\t{started:.0f}\t{ended:.0f}\t{status}\n")
    if status and quiet:
        print(f"== {name}: what its log says ({log})\n{reason(log.read_text())}", flush=True)
    print(f"== {name}: {'failed' if status else 'passed'} after {ended - started:.0f} s", flush=True)
    return status


def reason(text: str) -> str:
    """Return the lines of a log that say why it ended badly, and its last ones."""
    lines = [COLOUR.sub("", line) for line in text.splitlines()]
    telling = [line for line in lines[:-15] if TELLING.search(line)]
    return "\n".join([*telling[-LINES:], *lines[-15:]])


def table(record: str) -> tuple[str, float]:
    """Return the table of what was run, in order of its begin, and the minutes that the whole took."""
    rows = [line.split("\t") for line in record.splitlines()]
    parts = sorted((float(begin), float(end), name, status) for name, begin, end, status in rows)
    if not parts:
        return "nothing was run", 0
    first, last = parts[0][0], max(end for _, end, _, _ in parts)
    lines = [f"{'part':<24} {'begin':>6} {'seconds':>8}"]
    lines += [f"{name:<24} {begin - first:>6.0f} {end - begin:>8.0f}{'' if status == '0' else '  failed'}" for begin, end, name, status in parts]
    return "\n".join([*lines, f"{'in all':<24} {'':>6} {last - first:>8.0f}"]), (last - first) / 60


def main(arguments: list[str]) -> int:
    record = DIRECTORY / RECORD
    match arguments:
        case ["run", name, *command] if command:
            return run(name, command)
        case ["reset"]:
            record.unlink(missing_ok=True)
            return 0
        case ["table", *limit] if len(limit) < 2:
            text, minutes = table(record.read_text() if record.exists() else "")
            print(text)
            if limit and minutes > float(limit[0]):
                print(f"error: {minutes:.0f} minutes; allowed are {limit[0]}", file=sys.stderr)
                return 1
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

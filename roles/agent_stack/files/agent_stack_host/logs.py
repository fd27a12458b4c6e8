"""What became of a request: every line that names its id, from nginx, the containers and the units, in the order of time."""

import calendar
import gzip
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agent_stack_host.ask import Host, Unknown, ask_all

# nginx makes 32 hexadecimal digits; the agent takes other ids, and says those of runs, threads and turns.
IDENTIFIER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._:-]{3,127}")
SECONDS = 20.0
# [27/Nov/2026:22:10:04 +0000]
NGINX_TIME = re.compile(r"\[(\d{2}/[A-Z][a-z]{2}/\d{4}:\d{2}:\d{2}:\d{2} [+-]\d{4})\]")
SINCE = re.compile(r"[1-9]\d{0,3}(m|h|d)")


class BadRequest(ValueError):
    """What was asked for cannot be looked for; the message is for the user."""


def find(host: Host, identifier: str, since: str) -> tuple[list[tuple[str, str, str]], dict[str, str]]:
    """Return time (UTC), source and text of each line, and what could not be looked into. Raises BadRequest."""
    if not IDENTIFIER.fullmatch(identifier):
        raise BadRequest(f"the id is {identifier!r}; allowed are 4 to 128 of the characters A-Z a-z 0-9 . _ : - as in the header X-Request-ID")
    if not SINCE.fullmatch(since):
        raise BadRequest(f"--since is {since!r}; allowed is a number and m, h or d, such as 90m")
    seconds = int(since[:-1]) * {"m": 60, "h": 3600, "d": 86400}[since[-1]]
    questions: dict[str, Callable[[], Any]] = {"journal": lambda: _journal(host, identifier, seconds), "nginx": lambda: _nginx(host, identifier, seconds)}
    unknown = {}
    try:
        for name in _containers(host):
            questions[name] = partial(_container, host, name, identifier, seconds)
    except Unknown as error:
        unknown["containers"] = str(error)
    found = []
    for name, answer in ask_all(questions, SECONDS).items():
        if isinstance(answer, Unknown):
            unknown[name] = str(answer)
        else:
            found += [(at, name, text) for at, text in answer]
    return sorted(found), unknown


def _containers(host: Host) -> list[str]:
    listed = host.program("docker", "ps", "--all", "--format", '{{.Label "com.docker.compose.project"}} {{.Names}}')
    rows = [line.split(" ", 1) for line in listed.splitlines()]
    return [name for project, name in rows if project.startswith("agent-stack-")]


def _container(host: Host, name: str, identifier: str, seconds: int) -> list[tuple[str, str]]:
    # Both streams in one, and only what is looked for: an hour of a busy container is hundreds of megabytes.
    script = 'docker logs --timestamps --since "$1" "$2" 2>&1 | grep --fixed-strings --text -- "$3" || test $? -eq 1'
    said = host.program("sh", "-c", script, "sh", f"{seconds}s", name, identifier, seconds=SECONDS)
    return [(line[:19] + "Z", line.partition(" ")[2]) for line in said.splitlines()]


def _journal(host: Host, identifier: str, seconds: int) -> list[tuple[str, str]]:
    pattern = re.escape(identifier)
    command = ("journalctl", "--no-pager", "--quiet", "--output=json", f"--since=-{seconds}s", f"--grep={pattern}", "--case-sensitive=yes")
    try:
        said = host.program(*command, "--unit=agent-stack*", "--unit=nginx.service", seconds=SECONDS)
    except Unknown as error:
        # It ends with 1 where nothing matches.
        if "ended with 1: it said nothing" in str(error):
            return []
        raise
    entries = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return [(_utc(int(entry["__REALTIME_TIMESTAMP"]) / 1e6), f"{entry.get('_SYSTEMD_UNIT', '')}: {entry['MESSAGE']}") for entry in entries]


def _nginx(host: Host, identifier: str, seconds: int) -> list[tuple[str, str]]:
    directory = host.slash / "var/log/nginx"
    oldest = time.time() - seconds
    found = []
    for file in sorted(directory.glob("*.log*")):
        try:
            if file.stat().st_mtime >= oldest:
                found += [line for line in _lines(file) if identifier in line]
        except OSError as error:
            raise Unknown(f"{file} cannot be read: {error}") from error
    rows = [(_nginx_time(line), line) for line in found]
    return [(at, line) for at, line in rows if not at or at >= _utc(oldest)]


def _lines(file: Path) -> list[str]:
    if file.suffix == ".gz":
        with gzip.open(file, "rt", errors="replace") as stream:
            return stream.read().splitlines()
    return file.read_text(errors="replace").splitlines()


def _nginx_time(line: str) -> str:
    match = NGINX_TIME.search(line)
    if match is None:
        return ""
    at = time.strptime(match[1], "%d/%b/%Y:%H:%M:%S %z")
    return _utc(calendar.timegm(at) - (at.tm_gmtoff or 0))


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

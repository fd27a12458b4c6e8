"""The service against its peers: one machine, one run, the same scripted model.

    python bench/bench_agent.py [--seconds 4] [--rounds 3] [--only ours,guide-sync] [--quick]

Every turn starts a new thread, so no history grows: that is what POST /runs/wait of `langgraph dev` does, too. Prints
tables in Markdown and, as the last line, JSON. Ends with 1 where a turn failed or was not recorded; whether the figures are
what we want (`within_limits`: 5 ms added at 1 client, twice the fastest peer's turns at 64) is for the reader to see.

"Added" is what a turn takes more than the same call of the model itself takes, with as many clients, in the same round.
Each figure is the median of the rounds; in a round the services take turns within each cell of the table.
AGENT_* variables change the settings of our service; BENCH_AGENT_DIR names another tree of it to measure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import metadata
from math import isnan, nan
from pathlib import Path
from statistics import median

import uvloop

import load
from model import LAST_WORD, WORDS
from services import PEERS, TICKS, Guide, LangGraphDev, Model, Ours, Postgres, Redis, Service, cpu_seconds, model_target, running

MODEL = "the model alone"
OURS = "ours"
NAMES = (OURS, "guide-sync", "guide-async", "langgraph-dev", "langgraph-dev-10")
MODES = {"chat": "POST /chat: the answer in one piece", "stream": "POST /chat/stream: the answer as it comes"}
CLIENTS = (1, 8, 64)
PACES = (0, 20)
WARM_SECONDS = 0.5
# Where a service answers in hundreds of milliseconds, pools and caches need a while to fill.
FIRST_WARM_SECONDS = 3.0
# The share of one processor that others may take before the figures say more about them.
FOREIGN_LIMIT = 0.1
# What we set ourselves: at one client, and against the fastest peer at 64.
LIMIT_ADDED_MS = 5.0
LIMIT_RATIO = 2.0


@dataclass(frozen=True)
class Cell:
    mode: str
    pace: int
    clients: int


@dataclass
class Figures:
    """What was measured in the rounds of one service in one cell; times in milliseconds, one entry a round."""

    rate: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p95: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class Bench:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.figures: dict[tuple[str, Cell], Figures] = defaultdict(Figures)
        self.threads: dict[str, list[str]] = defaultdict(list)
        self.absent: set[tuple[str, str]] = set()
        self.problems: list[str] = []
        self.turns = 0
        self.foreign: list[float] = []

    def start(self, stack: ExitStack, only: Sequence[str]) -> None:
        self.postgres = Postgres()
        stack.callback(self.postgres.remove)
        self.redis = Redis()
        stack.callback(self.redis.remove)
        self.model = Model()
        stack.callback(self.model.remove)
        self.services: list[Service] = []
        for name in only:
            service = self._create(name)
            stack.callback(service.remove)
            say(f"start {name}")
            service.start()
            service.freeze()
            self.services.append(service)

    def _create(self, name: str) -> Service:
        if name == OURS:
            return Ours(self.postgres, self.redis, self.model)
        if name.startswith("langgraph-dev"):
            return LangGraphDev(self.model, name.removeprefix("langgraph-dev").removeprefix("-"))
        return Guide(self.postgres, self.model, name.removeprefix("guide-"))

    def warm_up(self) -> None:
        for service in self.services:
            with running(service):
                for mode in MODES:
                    target = replace(service.target(mode), events=0)
                    sample = uvloop.run(load.run(target, 1, 0.05))
                    if any(error.startswith("404") for error in sample.errors):
                        say(f"{service.name} has no {target.path}")
                        self.absent.add((service.name, mode))
                        continue
                    self._note(service.name, Cell(mode, 0, 1), sample)
                    for clients in (1, max(CLIENTS)):
                        sample = uvloop.run(load.run(target, clients, FIRST_WARM_SECONDS / 2))
                        self._note(service.name, Cell(mode, 0, clients), sample)

    def round(self, number: int, cells: Sequence[Cell]) -> None:
        # Another one is first in each round, so nobody always follows the same neighbour.
        order = self.services[number % len(self.services) :] + self.services[: number % len(self.services)]
        for cell in cells:
            self.model.pace(cell.pace)
            base = uvloop.run(load.run(model_target(self.model.port, cell.mode), cell.clients, min(1.0, self.seconds), warm=0.2))
            self._add(MODEL, cell, base, nan)
            for service in order:
                if (service.name, cell.mode) not in self.absent:
                    with running(service):
                        self._measure(service, cell)
        self.model.pace(0)

    def _measure(self, service: Service, cell: Cell) -> None:
        calls = self.model.calls()
        foreign, cpu, started = self._foreign_seconds(service), cpu_seconds(service.pid), time.monotonic()
        target = service.target(cell.mode)
        if not cell.pace or cell.clients > 1:
            # Tokens that come at the same moment, or while the service is busy, may go on in one event.
            target = replace(target, events=0)
        sample = uvloop.run(load.run(target, cell.clients, self.seconds, warm=WARM_SECONDS))
        elapsed = time.monotonic() - started
        self.foreign.append((self._foreign_seconds(service) - foreign) / elapsed)
        self._note(service.name, cell, sample)
        self._add(service.name, cell, sample, (cpu_seconds(service.pid) - cpu) * 1000 / max(1, sample.answered))
        called = self.model.calls() - calls
        if not sample.errors and called != sample.answered:
            self.problems.append(f"{service.name}, {cell}: {called} calls of the model for {sample.answered} turns")

    def _add(self, name: str, cell: Cell, sample: load.Sample, cpu: float) -> None:
        figures = self.figures[name, cell]
        figures.rate.append(sample.rate)
        figures.p50.append(load.percentile(sample.latencies, 0.5) * 1000)
        figures.p95.append(load.percentile(sample.latencies, 0.95) * 1000)
        figures.first_token.append(load.percentile(sample.first_tokens, 0.5) * 1000)
        figures.cpu.append(cpu)
        say(f"{name:16} {cell.mode:6} {cell.pace:2} ms {cell.clients:2} clients: {sample.rate:8.1f}/s, p50 {figures.p50[-1]:.2f} ms")

    def _note(self, name: str, cell: Cell, sample: load.Sample) -> None:
        self.turns += sample.answered
        self.threads[name] += sample.threads
        self.problems += [f"{name}, {cell}: {error}" for error in sample.errors]

    def _foreign_seconds(self, service: Service) -> float:
        """The processor time that went to none of what takes part."""
        ours = (os.getpid(), self.postgres.process.pid, self.redis.process.pid, self.model.process.pid, service.pid)
        user, nice, system, _idle, _wait, *interrupts = (int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
        own = {pid: cpu_seconds(pid) for pid in ours[1:]} | {ours[0]: time.process_time()}
        return (user + nice + system + sum(interrupts)) / TICKS - sum(own.values())

    def verify(self) -> dict[str, int]:
        """Compare what was acknowledged with what Postgres has."""
        recorded: dict[str, int] = {}
        for service in self.services:
            if service.database is None:
                continue
            acknowledged = self.threads[service.name]
            found = self._recorded(service.database)
            if set(acknowledged) - found and service.name == "guide-async":
                time.sleep(2)  # its last writes may come after its last answers
                found = self._recorded(service.database)
            recorded[service.name] = len(found)
            for what, threads in (("acknowledged but not recorded", set(acknowledged) - found), ("recorded but not acknowledged", found - set(acknowledged))):
                if threads:
                    self.problems.append(f"{service.name}: {len(threads)} turns were {what}")
            if len(set(acknowledged)) != len(acknowledged):
                self.problems.append(f"{service.name}: two turns were told the same thread")
            self._verify_runs(service.database, len(acknowledged))
        return recorded

    def _recorded(self, database: str) -> set[str]:
        """The threads whose newest checkpoint holds the answer to its end."""
        statement = """
            SELECT b.thread_id FROM checkpoint_blobs b JOIN (
                SELECT DISTINCT ON (thread_id) thread_id, checkpoint->'channel_versions'->>'messages' AS version
                FROM checkpoints WHERE checkpoint_ns = '' ORDER BY thread_id, checkpoint_id DESC
            ) newest ON newest.thread_id = b.thread_id AND newest.version = b.version
            WHERE b.checkpoint_ns = '' AND b.channel = 'messages' AND position(%s::bytea IN b.blob) > 0"""
        return {thread for (thread,) in self.postgres.rows(database, statement, LAST_WORD)}

    def _verify_runs(self, database: str, acknowledged: int) -> None:
        """Where there is a table of runs, it must agree: that many successes, and nothing else."""
        if self.postgres.rows(database, "SELECT to_regclass('runs')")[0][0] is None:
            return
        runs = dict(self.postgres.rows(database, "SELECT status, count(*) FROM runs GROUP BY status"))
        if runs != {"success": acknowledged}:
            self.problems.append(f"{database}: {acknowledged} turns were acknowledged, the table of runs has {runs}")

    def added(self, name: str, cell: Cell, what: str) -> float:
        """The median over the rounds of how much longer than the model alone it took."""
        mine, base = getattr(self.figures[name, cell], what), getattr(self.figures[MODEL, cell], what)
        return middle([own - model for own, model in zip(mine, base, strict=True)]) if mine else nan

    def rate(self, name: str, cell: Cell) -> float:
        return middle(self.figures[name, cell].rate)

    def table(self, mode: str, pace: int) -> str:
        stream = mode == "stream"
        latency = "added p50 / p95" + (" (first token p50)" if stream else "")
        head = ["service", *(title for clients in CLIENTS for title in (f"{clients} client{'s' * (clients > 1)}", latency)), "CPU a turn"]
        rows = [head, ["---"] * len(head)]
        for name in [MODEL, *(service.name for service in self.services)]:
            cells = [Cell(mode, pace, clients) for clients in CLIENTS]
            if (name, mode) in self.absent:
                rows.append([name, *["none"] * (len(head) - 1)])
                continue
            row = [name]
            for cell in cells:
                row.append(f"{self.rate(name, cell):,.0f}/s" if self.rate(name, cell) >= 10 else f"{self.rate(name, cell):.1f}/s")
                if name == MODEL:
                    figures = self.figures[name, cell]
                    row.append(f"takes {ms(middle(figures.p50))} / {ms(middle(figures.p95))} ms" + (f" ({ms(middle(figures.first_token))})" if stream else ""))
                else:
                    first = f" ({ms(self.added(name, cell, 'first_token'))})" if stream else ""
                    row.append(f"{ms(self.added(name, cell, 'p50'))} / {ms(self.added(name, cell, 'p95'))} ms{first}")
            cpu = middle(self.figures[name, cells[-1]].cpu)
            rows.append([*row, "" if isnan(cpu) else f"{cpu:.1f} ms"])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def summary(self) -> dict[str, object]:
        one, many = Cell("chat", 0, 1), Cell("chat", 0, 64)
        peers = {service.name: self.rate(service.name, many) for service in self.services if service.name != OURS}
        fastest = max(peers, key=lambda name: peers[name], default=None)
        rate = self.rate(OURS, many)
        result = {
            "added_p50_ms": self.added(OURS, one, "p50"),
            "added_p95_ms": self.added(OURS, one, "p95"),
            "turns_per_s_at_64": rate,
            "ratio_to_fastest_peer_at_64": rate / peers[fastest] if fastest else nan,
        }
        result["stream_added_first_token_p50_ms"] = self.added(OURS, Cell("stream", 0, 1), "first_token")
        result["stream_turns_per_s_at_64"] = self.rate(OURS, Cell("stream", 0, 64))
        for name, peer_rate in peers.items():
            result[f"{name}_added_p50_ms"], result[f"{name}_turns_per_s_at_64"] = self.added(name, one, "p50"), peer_rate
        rounded: dict[str, object] = {name: None if isnan(value) else round(value, 2) for name, value in result.items()}
        # Nobody can say without a peer.
        within = result["added_p50_ms"] <= LIMIT_ADDED_MS and result["ratio_to_fastest_peer_at_64"] >= LIMIT_RATIO if fastest else None
        rounded["within_limits"] = within
        return rounded | {"fastest_peer": fastest, "foreign_cpu": round(middle(self.foreign), 2), "turns": self.turns, "problems": len(self.problems)}


def middle(values: Sequence[float]) -> float:
    """The median of the rounds in which there was something to measure."""
    values = [value for value in values if not isnan(value)]
    return median(values) if values else nan


def ms(value: float) -> str:
    return "longer than the round" if isnan(value) else f"{value:.1f}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def peer_versions() -> str:
    code = "import importlib.metadata as m; print(*(m.version(p) for p in ('langgraph', 'langgraph-api', 'langgraph-cli')))"
    graph, api, cli = subprocess.run([PEERS / "python", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return (
        f"peers: langgraph {graph}; the guide's service with two workers; langgraph-api {api} in memory, started by langgraph-cli {cli}, "
        "as it comes (one run at a time) and with 10 at a time"
    )


def conditions(bench: Bench, seconds: float, rounds: int) -> str:
    processor = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    postgres = bench.postgres.rows("postgres", "SELECT current_setting('server_version'), current_setting('fsync')")[0]
    redis = subprocess.run([bench.redis.program, "--version"], capture_output=True, text=True, check=True).stdout.split()[2].removeprefix("v=")
    own = {name: metadata.version(name) for name in ("langgraph", "uvicorn", "psycopg")}
    peers = [peer_versions()] if any(service.name != OURS for service in bench.services) else []
    load_generator = "load generator, model, Postgres and Redis on the same processors"
    return "\n".join(
        f"- {line}"
        for line in (
            f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} processors ({processor}), Linux {platform.release()}; {load_generator}",
            f"Postgres {postgres[0]} (fsync {postgres[1]}), Redis {redis}, Python {platform.python_version()}",
            f"ours: langgraph {own['langgraph']}, uvicorn {own['uvicorn']}, psycopg {own['psycopg']}, two workers",
            *peers,
            f"the model answers with {len(WORDS)} tokens; each turn starts a new thread; {rounds} rounds of {seconds:g} s, medians",
            f"others on the machine took {middle(bench.foreign) * 100:.0f}% of a processor (median), {max(bench.foreign, default=nan) * 100:.0f}% at most",
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, help="how long each cell is measured in each round (4; 1 with --quick)")
    parser.add_argument("--rounds", type=int, help="how often everything is measured (3; 1 with --quick)")
    parser.add_argument("--only", default=",".join(NAMES), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="a look in about two minutes: only at 0 ms a token")
    options = parser.parse_args()
    only = options.only.split(",")
    if not set(only) <= set(NAMES):
        parser.error(f"--only takes some of {','.join(NAMES)}")
    seconds, rounds = options.seconds or (1 if options.quick else 4), options.rounds or (1 if options.quick else 3)
    paces = PACES[:1] if options.quick else PACES
    cells = [Cell(mode, pace, clients) for mode in MODES for pace in paces for clients in CLIENTS]
    bench = Bench(seconds)
    with ExitStack() as stack:
        bench.start(stack, only)
        bench.warm_up()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            bench.round(number, cells)
        recorded = bench.verify()
        print(conditions(bench, seconds, rounds))
        if middle(bench.foreign) > FOREIGN_LIMIT:
            print("\nNOT TO BE QUOTED: the machine was not left alone.")
    for mode, title in MODES.items():
        for pace in paces:
            print(f"\n### {title}, {pace} ms a token\n\n{bench.table(mode, pace)}")
    for name, count in recorded.items():
        print(f"\n{name}: {len(bench.threads[name]):,} turns acknowledged, {count:,} recorded in Postgres")
    for problem, times in Counter(bench.problems).most_common(20):
        print(f"\nPROBLEM: {problem}" + (f" ({times} times)" if times > 1 else ""))
    print()
    print(json.dumps(bench.summary()))
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())

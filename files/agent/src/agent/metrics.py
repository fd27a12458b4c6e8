"""What Prometheus may ask. Every label has few values: routes by their template, tools by their registered name.

Several workers answer as one: each writes its values to files in PROMETHEUS_MULTIPROC_DIR, and whichever is asked adds
up all of them. What a worker that died has counted stays; what it had measured last goes.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from agent import errors

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
SAVE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
TURN_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
# The routes that ask for a turn, as the label `route` names them; all are a POST. The alert rules name the same ones.
TURN_ROUTES = (
    "/chat",
    "/chat/stream",
    "/openai/v1/chat/completions",
    "/openai/v1/responses",
    "/runs",
    "/runs/batch",
    "/runs/stream",
    "/runs/wait",
    "/threads/{thread_id}/runs",
    "/threads/{thread_id}/runs/stream",
    "/threads/{thread_id}/runs/wait",
)
TURN_STATUSES = (200, 429, 500, 502, 503, 504)


def prepare_directory(environ: dict[str, str]) -> None:
    """Before the first worker starts: what an earlier start of the service left behind is not counted again."""
    if directory := environ.get(DIRECTORY):
        Path(directory).mkdir(parents=True, exist_ok=True)
        for file in Path(directory).glob("*.db"):
            file.unlink()


def failure_codes() -> list[str]:
    """How a turn can fail for a reason that is not the client's, as the label `outcome` says it."""
    known = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.ServiceError)]
    return sorted(error.code for error in known if error.status >= 500)


def gauge(mode: str) -> dict[str, Any]:
    """How the workers' values of a gauge become one."""
    return {"multiprocess_mode": mode}


class Metrics:
    """One registry for each application, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("agent_http_requests", "HTTP requests answered", ("method", "route", "status"), registry=registry)
        self.request_seconds = Histogram("agent_http_request_duration_seconds", "Time to answer a request", ("route",), registry=registry)
        self.turns = Counter("agent_turns", "Turns by how they ended", ("outcome",), registry=registry)
        self.turn_seconds = Histogram("agent_turn_duration_seconds", "Time of a turn, waiting included", buckets=TURN_SECONDS, registry=registry)
        self.turns_running = Gauge("agent_turns_running", "Turns being worked on", **gauge("livesum"), registry=registry)
        self.first_token_seconds = Histogram("agent_first_token_seconds", "Time from the start of a streamed turn to its first token", registry=registry)
        self.save_seconds = Histogram(
            "agent_checkpoint_save_seconds",
            "Time to store what a turn has so far",
            buckets=SAVE_SECONDS,
            registry=registry,
        )
        self.runs = Gauge(
            "agent_runs",
            "Runs that are not final, in all workers",
            ("status",),
            **gauge("mostrecent"),
            registry=registry,
        )
        self.runs_taken_over = Counter("agent_runs_taken_over", "Runs whose worker died and that another one went on with", registry=registry)
        self.threads_healed = Counter("agent_threads_healed", "Threads in which an interrupted turn was closed or erased", registry=registry)
        self.tool_calls = Counter("agent_tool_calls", "Tool calls by result", ("tool", "status"), registry=registry)
        self.model_tokens = Counter("agent_model_tokens", "Tokens of finished turns, as the model counts them", ("kind",), registry=registry)
        self.rate_limited = Counter("agent_rate_limited", "Requests refused by the rate limit", registry=registry)
        self.rate_limit_local = Gauge(
            "agent_rate_limit_local",
            "1 while Redis is away and a worker counts alone",
            **gauge("livemax"),
            registry=registry,
        )
        self.connections = Gauge(
            "agent_postgres_connections",
            "Connections to Postgres for turns: in use, idle, and those that somebody waits for",
            ("state",),
            **gauge("livesum"),
            registry=registry,
        )
        self.ready = Gauge(
            "agent_dependency_ready",
            "1 if the last probe succeeded",
            ("dependency",),
            **gauge("mostrecent"),
            registry=registry,
        )
        self._own = CollectorRegistry()
        ProcessCollector(registry=self._own)
        GCCollector(registry=self._own)

        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A series that is born with its first event shows no increase, so nobody would hear of the first failures."""
        for route in TURN_ROUTES:
            for status in TURN_STATUSES:
                self.requests.labels("POST", route, status)
        for outcome in ("ok", *failure_codes()):
            self.turns.labels(outcome)
        for kind in ("prompt", "completion"):
            self.model_tokens.labels(kind)

    def know_tools(self, names: Iterable[str]) -> None:
        """Begin the counts of these tools at zero."""
        for name in names:
            for status in ("success", "error"):
                self.tool_calls.labels(name, status)

    def add(self, collector: Collector) -> None:
        """One that says the same in every worker, and is not to be added up."""
        self._own.register(collector)

    def text(self) -> bytes:
        """All workers' metrics, and how this process fares."""
        directory = os.environ.get(DIRECTORY)
        if not directory:
            return generate_latest(self.registry) + generate_latest(self._own)
        _bury_dead(Path(directory))
        every = CollectorRegistry()
        MultiProcessCollector(every, path=directory)  # type: ignore[no-untyped-call]
        return generate_latest(every) + generate_latest(self._own)


def _bury_dead(directory: Path) -> None:
    for file in directory.glob("gauge_live*.db"):
        found = re.search(r"_(\d+)\.db$", file.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            mark_process_dead(int(found[1]), str(directory))  # type: ignore[no-untyped-call]

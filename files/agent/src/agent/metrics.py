"""What Prometheus may ask. Every label has few values: routes by their template, tools by their registered name."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

TURN_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


class Metrics:
    """One registry for each application, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter(
            "agent_http_requests", "HTTP requests answered", ("method", "route", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "agent_http_request_duration_seconds", "Time to answer a request", ("route",), registry=registry
        )
        self.turns = Counter("agent_turns", "Turns by how they ended", ("outcome",), registry=registry)
        self.turn_seconds = Histogram(
            "agent_turn_duration_seconds", "Time of a turn, waiting included", buckets=TURN_SECONDS, registry=registry
        )
        self.turns_running = Gauge("agent_turns_running", "Turns being worked on", registry=registry)
        self.threads_healed = Counter(
            "agent_threads_healed", "Threads in which an interrupted turn was erased", registry=registry
        )
        self.tool_calls = Counter("agent_tool_calls", "Tool calls by result", ("tool", "status"), registry=registry)
        self.model_tokens = Counter(
            "agent_model_tokens", "Tokens of finished turns, as the model counts them", ("kind",), registry=registry
        )
        self.rate_limited = Counter("agent_rate_limited", "Requests refused by the rate limit", registry=registry)
        self.rate_limit_local = Gauge(
            "agent_rate_limit_local", "1 while Redis is away and this process counts alone", registry=registry
        )
        self.ready = Gauge(
            "agent_dependency_ready", "1 if the last probe succeeded", ("dependency",), registry=registry
        )

"""Spans reach a collector as OTLP over HTTP, and hold nothing of what was said."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agent.errors import ModelFailed
from agent.tools import create_tools
from agent.tracing import NO_SPAN, Tracing
from graphs import RUNNER, Graph, settings
from servers import AGENT, Agent, Model, free_port


class Collector(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Content-Type"], body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def collector() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", free_port()), Collector)
    server.received = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def spans(collector: Any) -> list[Any]:
    found = []
    for path, kind, body in collector.received:
        assert (path, kind) == ("/v1/traces", "application/x-protobuf")
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            assert names["service.name"] == "agent"
            found += [span for scope in resource.scope_spans for span in scope.spans]
    return sorted(found, key=lambda span: span.start_time_unix_nano)


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def test_a_turn(collector: Any, model: Model) -> None:
    tracing = Tracing(f"http://127.0.0.1:{collector.server_port}")
    graph = Graph(model, create_tools(settings()), tracing=tracing)

    async def turn() -> None:
        with tracing.span("run", {"thread": "thread"}):
            await graph.asay('canary-in [[tool calculator {"expression": "6*7000"}]] [[tool shell {"x": "canary"}]]')

    RUNNER.run(turn())
    tracing.close()
    found = spans(collector)
    assert [span.name for span in found] == ["run", "model", "tool", "tool", "model"]
    run, first, *tools, last = found
    assert {span.parent_span_id for span in (first, *tools, last)} == {run.span_id}
    assert {span.trace_id for span in found} == {run.trace_id}
    assert attributes(first)["model"] == "agent-model"
    assert attributes(last)["tokens.input"] > 0
    assert sorted(attributes(span)["tool"] for span in tools) == ["calculator", "unknown"]
    sent = b"".join(body for _, _, body in collector.received)
    assert not [word for word in (b"canary", b"7000", b"shell") if word in sent]


def test_the_service_sends_its_turns(collector: Any, start_agent: Callable[..., Agent]) -> None:
    service = start_agent(AGENT_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_port}", AGENT_SYSTEM_PROMPT="canary-prompt")
    answer = service.chat('canary-in [[tool calculator {"expression": "6*7000"}]]', "traced").json()
    service.stop(signal.SIGTERM)  # which sends what is left
    found = spans(collector)
    run = next(span for span in found if span.name == "run")
    assert [span.name for span in found] == ["run", "model", "tool", "model"]
    assert {span.parent_span_id for span in found if span is not run} == {run.span_id}
    assert attributes(run) == {"run_id": answer["run_id"], "thread_id": "traced", "attempt": 1}
    sent = b"".join(body for _, _, body in collector.received)
    assert not [word for word in (b"canary", b"7000") if word in sent]


def test_a_failure_is_marked_with_its_type_alone(collector: Any, model: Model) -> None:
    tracing = Tracing(f"http://127.0.0.1:{collector.server_port}")
    with pytest.raises(ModelFailed):
        Graph(model, tracing=tracing).say("canary [[fault 400]]")
    tracing.close()
    (span,) = spans(collector)
    assert attributes(span)["error.type"] == "ModelFailed"
    assert span.status.code == 2
    assert (span.status.message, list(span.events)) == ("", [])
    assert b"canary" not in collector.received[0][2]


def test_a_collector_that_is_away_costs_no_turn(model: Model) -> None:
    tracing = Tracing(f"http://127.0.0.1:{free_port()}")
    assert "hello" in Graph(model, tracing=tracing).say("hello").answer
    tracing.close()


def test_off_is_free() -> None:
    tracing = Tracing()
    assert not tracing.enabled
    assert tracing.span("run") is NO_SPAN
    with tracing.span("run") as span:
        assert span is None
    tracing.close()
    # Other packages import parts of the SDK, but only an exporter sends anything.
    program = "import sys, agent.llm.graph; print([name for name in sys.modules if 'opentelemetry.exporter' in name])"
    run = subprocess.run([sys.executable, "-c", program], cwd=AGENT / "src", capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr

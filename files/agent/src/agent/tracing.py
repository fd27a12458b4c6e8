"""OpenTelemetry spans of runs, model calls and tool calls, sent by OTLP over HTTP. They hold no message text."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

SERVICE_NAME = "agent"
NO_SPAN: AbstractContextManager[Any] = nullcontext()

Attributes = Mapping[str, str | int | float | bool]


class Tracing:
    """Without an endpoint nothing is started and nothing measured."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._provider: Any = None
        self._tracer: Any = None
        if endpoint is None:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": SERVICE_NAME})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        # A collector that is away costs a thread of its own some time, and spans; never a request.
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=5)))
        self._tracer = self._provider.get_tracer(SERVICE_NAME)

    @property
    def enabled(self) -> bool:
        return self._tracer is not None

    def span(self, name: str, attributes: Attributes | None = None) -> AbstractContextManager[Any]:
        """A span around the block: a child of the one around it. An exception marks it with its type alone."""
        if self._tracer is None:
            return NO_SPAN
        return _Span(self._tracer, name, attributes or {})

    def close(self) -> None:
        """Send what is left. Blocks for some seconds at most."""
        if self._provider is not None:
            self._provider.shutdown()


class _Span(AbstractContextManager[Any]):
    def __init__(self, tracer: Any, name: str, attributes: Attributes) -> None:
        # The SDK's own record of an exception holds its text and stack.
        self._context = tracer.start_as_current_span(name, attributes=dict(attributes), record_exception=False, set_status_on_exception=False)

    def __enter__(self) -> Any:
        self._span = self._context.__enter__()
        return self._span

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        from opentelemetry.trace import StatusCode

        if kind is not None:
            self._span.set_attribute("error.type", kind.__name__)
            self._span.set_status(StatusCode.ERROR)
        self._context.__exit__(kind, error, trace)

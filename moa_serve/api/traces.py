"""Traces: for each request that generates one OpenTelemetry span, with spans in it for what it waited for: queue, prefill, decode.

Names and attributes are those of the semantic conventions for generative AI (gen_ai.*); what they have no word for is `moa.*`. Never a
prompt, a completion or a key: a span is made of the request's record, when it has ended. Spans are exported by a thread of the SDK, which
drops them where nobody takes them: no request waits for it. Belongs to the event loop.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moa_serve.errors import InvalidRequest
from moa_serve.metrics import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # the standard's variables, which the exporter reads
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}


class Traces:
    """
    Args:
        endpoint: of an OTLP collector, as http://127.0.0.1:4318; None takes the standard's variables.
    Raises:
        InvalidRequest: the packages of the extra `otel` are not there, or what the standard's variables say cannot be.
    """

    def __init__(self, endpoint: str | None, version: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InvalidRequest(
                f"traces need {error.name}, which is not installed; pip install 'moa_serve[otel]', or leave --otlp-endpoint out",
                param="otlp_endpoint",
            ) from error
        exporter = OTLPSpanExporter(None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces")
        resource = Resource.create({"service.version": version})
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):  # the standard's variables name no other
            resource = resource.merge(Resource({"service.name": "moa_serve"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        try:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        except ValueError as error:
            raise InvalidRequest(f"the OTEL_BSP_ variables cannot be used: {error}", param="otlp_endpoint") from None
        self._tracer: Tracer = self._provider.get_tracer("moa_serve", version)

    def add(self, record: RequestRecord, *, response_id: str, error: str | None, headers: Mapping[str, str]) -> None:
        """The spans of a request that has ended; where they cannot be made, the log says so.

        Args:
            error: the code of what the client was told, where it was an error.
            headers: of the request; `traceparent` names the span that it belongs to.
        """
        try:
            self._add(record, response_id, error, headers)
        except Exception:  # who watches a request must not be able to break it
            logger.exception("a request could not be traced")

    def _add(self, record: RequestRecord, response_id: str, error: str | None, headers: Mapping[str, str]) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        offset = time.time_ns() - time.monotonic_ns()

        def at(seconds: float) -> int:
            return int(seconds * 1e9) + offset

        operation = _OPERATIONS.get(record.endpoint, record.endpoint)
        served = record.adapter or (record.model if record.scheduled is not None else None)
        span = self._tracer.start_span(
            operation if served is None else f"{operation} {served}",
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            start_time=at(record.arrived),
        )
        if span.is_recording():
            _describe(span, record, operation, served, response_id)
            if record.finish_reason in ("error", "abort"):
                span.set_attribute("error.type", error or ("client_disconnected" if record.finish_reason == "abort" else "internal_error"))
            if record.finish_reason == "error":
                span.set_status(Status(StatusCode.ERROR))
            inside = set_span_in_context(span)
            moments = (record.arrived, record.scheduled, record.first_token, record.finished)
            for name, begin, end in zip(("queue", "prefill", "decode"), moments, moments[1:], strict=False):
                if begin is not None:
                    reached = record.finished if end is None else end
                    self._tracer.start_span(name, inside, start_time=at(begin)).end(at(max(begin, reached)))
        span.end(at(record.finished))

    def close(self) -> None:
        """Export what is left; takes as long as the collector lets it."""
        self._provider.shutdown()


def open_traces(endpoint: str | None, version: str) -> Traces | None:
    """None where nobody asks for traces, by the setting or by the standard's variables.

    Raises:
        InvalidRequest: somebody does, and it cannot be done.
    """
    if endpoint is None and not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return None
    protocol = next((value for name in _PROTOCOLS if (value := os.environ.get(name))), _HTTP)
    if endpoint is None and protocol != _HTTP:
        raise InvalidRequest(
            f"the environment wants traces by {protocol[:32]!r}, but only {_HTTP} is spoken here; set {_PROTOCOLS[0]}={_HTTP} and an "
            f"endpoint that takes it, or OTEL_TRACES_EXPORTER=none",
            param="otlp_endpoint",
        )
    try:
        return Traces(endpoint, version)
    except InvalidRequest as error:
        if endpoint is not None or not isinstance(error.__cause__, ImportError):
            raise
        logger.warning("the environment names a collector of traces, but none are made: %s", error)  # it may be that of a whole cluster
        return None


def _describe(span: "Span", record: RequestRecord, operation: str, served: str | None, response_id: str) -> None:
    values: dict[str, str | int | float | list[str] | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "moa_serve",
        "gen_ai.request.model": record.model[:128],
        "gen_ai.request.choice.count": record.n,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.response.model": served,
        "gen_ai.response.id": response_id,
        "gen_ai.response.finish_reasons": [record.finish_reason] if record.finish_reason in ("stop", "length") else None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "http.request.method": "POST",
        "http.route": record.endpoint,
        "http.response.status_code": record.status,
        "moa.adapter": record.adapter,
        "moa.revision": record.revision,
        "moa.request_id": record.request_id,
        "moa.threshold_scale": record.threshold_scale,
    }
    span.set_attributes({name: value for name, value in values.items() if value is not None})

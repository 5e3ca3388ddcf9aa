"""Traces of a real server, as a real collector gets them: OTLP over HTTP, decoded with the standard's own messages."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from servers import running, write_adapters, write_talking_base

PARENT_TRACE, PARENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes spans, or takes none and keeps the exporter waiting."""

    def __init__(self, is_silent: bool = False) -> None:
        self.spans: list[tuple[dict[str, Any], Span]] = []  # attributes of its resource, and a span
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if is_silent:
                    time.sleep(60)
                request = ExportTraceServiceRequest()
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                request.ParseFromString(body)
                for group in request.resource_spans:
                    named = {item.key: item.value.string_value for item in group.resource.attributes}
                    collector.spans += [(named, span) for scope in group.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_talking_base(tmp_path / "base")
    write_adapters(tmp_path / "adapters", "soft")
    return tmp_path


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def values_of(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in span.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind or "string_value")
        found[item.key] = [part.string_value for part in value.values] if kind == "array_value" else value
    return found


def test_every_request_is_a_span_with_its_parts_under_the_clients_own(folder: Path, collector: Collector) -> None:
    began = time.time_ns()
    with running(folder, "--otlp-endpoint", collector.url, env={"OTEL_BSP_SCHEDULE_DELAY": "100"}) as server:
        parent = {"traceparent": f"00-{PARENT_TRACE}-{PARENT_SPAN}-01"}
        body = {"model": "soft", "prompt": "a secret prompt", "max_tokens": 5, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=parent)
        answer.raise_for_status()
        chat = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True}
        httpx.post(f"{server.url}/v1/chat/completions", json=chat).raise_for_status()
        assert httpx.post(f"{server.url}/v1/completions", json=body | {"model": "nobody"}).status_code == 404
        ended = time.time_ns()
        assert server.stop() == 0  # what was not sent yet is sent then
    assert {named["service.name"] for named, _ in collector.spans} == {"moa_serve"}
    spans = [span for _, span in collector.spans]
    roots = {span.name: span for span in spans if span.kind == Span.SPAN_KIND_SERVER}
    assert set(roots) == {"text_completion soft", "chat base", "text_completion"}

    own = roots["text_completion soft"]
    assert (own.trace_id.hex(), own.parent_span_id.hex()) == (PARENT_TRACE, PARENT_SPAN)
    told = answer.json()
    values = values_of(own)
    assert {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "moa_serve",
        "gen_ai.request.model": "soft",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.response.model": "soft",
        "gen_ai.response.id": told["id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": told["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "http.response.status_code": 200,
        "moa.adapter": "soft",
        "moa.revision": told["moa"]["revision"],
        "moa.request_id": answer.headers["x-request-id"],
    }.items() <= values.items()
    assert "error.type" not in values
    assert "secret" not in str(own)
    assert began <= own.start_time_unix_nano <= own.end_time_unix_nano <= ended

    parts = {span.name: span for span in spans if span.parent_span_id == own.span_id}
    assert sorted(parts, key=lambda name: parts[name].start_time_unix_nano) == ["queue", "prefill", "decode"]
    assert parts["queue"].start_time_unix_nano == own.start_time_unix_nano
    assert parts["queue"].end_time_unix_nano == parts["prefill"].start_time_unix_nano
    assert parts["prefill"].end_time_unix_nano == parts["decode"].start_time_unix_nano
    assert parts["decode"].end_time_unix_nano == own.end_time_unix_nano
    seconds = (parts["prefill"].end_time_unix_nano - parts["prefill"].start_time_unix_nano) / 1e9
    assert seconds == pytest.approx(told["moa"]["timings"]["prefill"], abs=1e-5)

    refused = roots["text_completion"]
    assert not refused.parent_span_id
    assert values_of(refused)["error.type"] == "model_not_found"
    assert refused.status.code == Status.STATUS_CODE_ERROR
    assert {span.name for span in spans if span.parent_span_id == refused.span_id} == {"queue"}
    assert values_of(roots["chat base"])["gen_ai.operation.name"] == "chat"


def test_the_standards_variables_turn_traces_on_and_name_the_service(folder: Path, collector: Collector) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_SERVICE_NAME": "mine"}
    with running(folder, env=env) as server:
        httpx.post(f"{server.url}/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 1}).raise_for_status()
        assert server.stop() == 0
    assert {named["service.name"] for named, _ in collector.spans} == {"mine"}
    assert len(collector.spans) == 4


@pytest.mark.parametrize("is_there", [True, False])
def test_a_collector_that_takes_nothing_costs_no_request_anything(folder: Path, is_there: bool) -> None:
    silent = Collector(is_silent=True)
    url = silent.url
    if not is_there:
        silent.close()
    env = {"OTEL_BSP_SCHEDULE_DELAY": "10", "OTEL_BSP_MAX_QUEUE_SIZE": "8", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
    with running(folder, "--otlp-endpoint", url, env=env) as server:
        body = {"model": "base", "prompt": "x", "max_tokens": 1}
        with httpx.Client(base_url=server.url, timeout=10) as http:
            for _ in range(50):  # more than the queue holds
                http.post("/v1/completions", json=body).raise_for_status()
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 5, "nobody waits for a collector"
    if is_there:
        silent.close()

"""When traces are made, and what is told where they cannot be."""

import sys

import pytest

from moa_serve.api.traces import _PROTOCOLS, _describe, open_traces
from moa_serve.errors import InvalidRequest
from moa_serve.metrics import RequestRecord


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_SDK_DISABLED",
        "OTEL_TRACES_EXPORTER",
        *_PROTOCOLS,
    ):
        monkeypatch.delenv(name, raising=False)


def test_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_traces(None, "1") is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_traces("http://127.0.0.1:4318", "1") is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert open_traces(None, "1") is None


def test_another_protocol_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP sent to the port of gRPC: every span is lost, and only the collector knows."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(InvalidRequest, match="'grpc'"):
        open_traces(None, "1")


def test_without_the_extra_the_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'moa_serve\[otel\]'") as told:
        open_traces("http://127.0.0.1:4318", "1")
    assert told.value.param == "otlp_endpoint"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")  # of a whole cluster, say
    assert open_traces(None, "1") is None
    assert "pip install 'moa_serve[otel]'" in caplog.text


def test_variables_that_cannot_be_are_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    with pytest.raises(InvalidRequest, match="OTEL_BSP_ variables"):
        open_traces("http://127.0.0.1:4318", "1")


def test_a_span_that_cannot_be_made_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    traces = open_traces("http://127.0.0.1:9", "1")
    assert traces is not None
    traces.add(None, response_id="x", error=None, headers={})  # type: ignore[arg-type]
    traces.close()
    assert "a request could not be traced" in caplog.text


@pytest.mark.parametrize("scale", [None, 1.25])
def test_a_span_has_the_factor_on_thresholds_where_there_was_one(scale: float | None) -> None:
    class Kept(dict[str, object]):
        set_attributes = dict.update

    record = RequestRecord(
        model="math", adapter="math", revision="ab", request_id="r", endpoint="/v1/completions", prompt_tokens=7, completion_tokens=5,
        cached_tokens=0, longest_completion=5, finish_reason="stop", arrived=1.0, scheduled=1.5, first_token=2.0, finished=4.0, n=1,
        max_tokens=16, status=200, threshold_scale=scale,
    )  # fmt: skip
    span = Kept()
    _describe(span, record, "text_completion", "math", "id")  # type: ignore[arg-type]
    assert span.get("moa.threshold_scale") == scale

"""The page of a running server, read as the programs of others read it: Kubernetes' inference gateway, and inference-perf."""

import time
from collections.abc import Iterator

import httpx
import pytest
from metric_readers import (
    CACHE_INFO,
    CACHE_LABELS,
    GATEWAY_GAUGES,
    LORA_INFO,
    LORA_LABELS,
    PERF_COUNTERS,
    PERF_GAUGES,
    PERF_HISTOGRAMS,
    PERF_LEFT_OUT,
    PERF_OF_A_FULL_CACHE,
)
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from servers import running, write_adapters, write_talking_base

ADAPTER = "sparse_fn"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Metric]]:
    """Families by name, after requests to the base and to an adapter."""
    folder = tmp_path_factory.mktemp("readers")
    write_talking_base(folder / "base")
    write_adapters(folder / "adapters", ADAPTER)
    with running(folder) as server:
        for model in ("base", ADAPTER):
            body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
            with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}) as answer:
                assert "[DONE]" in answer.read().decode()
        families = list(text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text))
        yield {family.name: family for family in families}


@pytest.mark.parametrize("name", GATEWAY_GAUGES)
def test_the_gateway_finds_one_series_of_each_gauge(page: dict[str, Metric], name: str) -> None:
    """Of several it takes the first, whatever that is of."""
    assert page[name].type == "gauge"
    (sample,) = page[name].samples
    assert sample.name == name
    assert sample.value >= 0
    assert name != "vllm:kv_cache_usage_perc" or sample.value <= 1


def test_the_gateway_finds_the_adapters(page: dict[str, Metric]) -> None:
    assert page[LORA_INFO].type == "gauge"
    (sample,) = page[LORA_INFO].samples
    assert set(LORA_LABELS) <= set(sample.labels)
    assert int(sample.labels["max_lora"]) > 0
    assert abs(sample.value - time.time()) < 60, "the largest value is the latest"
    for label in ("running_lora_adapters", "waiting_lora_adapters"):
        assert set(sample.labels[label].split(",")) <= {"", ADAPTER}


def test_the_gateway_finds_the_size_of_the_cache(page: dict[str, Metric]) -> None:
    (sample,) = page[CACHE_INFO].samples
    assert all(int(sample.labels[label]) > 0 for label in CACHE_LABELS)
    assert sample.value == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "counter") for name in PERF_COUNTERS),
        *((name, "gauge") for name in PERF_GAUGES),
        *((name, "histogram") for name in PERF_HISTOGRAMS),
    ],
)
def test_inference_perf_finds_every_metric_of_the_model_it_filters_by(page: dict[str, Metric], name: str, kind: str) -> None:
    family = page[name]
    assert family.type == kind
    own = [sample for sample in family.samples if sample.labels.get("model_name") == "base"]
    assert own
    suffixes = {"counter": {"_total"}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}}[kind]
    assert {sample.name.removeprefix(name) for sample in own} == suffixes
    if kind == "histogram":
        assert "+Inf" in {sample.labels.get("le") for sample in own}
        count = sum(sample.value for sample in own if sample.name.endswith("_count"))
        assert count > 0 or name in PERF_OF_A_FULL_CACHE


@pytest.mark.parametrize("name", [name for name in (*PERF_COUNTERS, *PERF_HISTOGRAMS) if "request" in name or "tokens" in name])
def test_inference_perf_finds_an_adapter_where_it_asks_for_one(page: dict[str, Metric], name: str) -> None:
    of_engine = {"vllm:corrupted_requests", "vllm:iteration_tokens_total"}
    models = {sample.labels["model_name"] for sample in page[name].samples}
    assert models == ({"base"} if name in of_engine else {"base", ADAPTER})


@pytest.mark.parametrize("name", PERF_LEFT_OUT)
def test_what_would_say_nothing_is_left_out(page: dict[str, Metric], name: str) -> None:
    """A family that is always 0 would be read as a cache that never hits."""
    assert name not in page

"""The soak in small: a few seconds of its traffic on a tiny base, after which the server's numbers must be its client's."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from agreement import Check, Scrape, reconcile_log
from prometheus_client.parser import text_string_to_metric_families
from servers import Running, running, write_adapters, write_talking_base
from soak import Result, soak
from traffic import Outcome

FAMILIES = ("instance", "mola_layerwise", "sparse_fn")
SECONDS, STREAMS, SEED = 10.0, 8, 7


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("agree")
    write_talking_base(folder / "base")
    write_adapters(folder / "adapters", *FAMILIES)
    with running(folder) as started:
        yield started


@pytest.fixture(scope="module")
def result(server: Running) -> Result:
    return asyncio.run(soak(server.url, seconds=SECONDS, streams=STREAMS, seed=SEED, sample_seconds=0.25))


def shown(checks: list[Check]) -> str:
    return "\n".join(f"{check.name}: {check.detail}" for check in checks)


def test_every_request_is_accounted_for_and_every_counter_agrees_with_the_client(result: Result) -> None:
    """A token or a request that is counted twice, or never, makes every dashboard and bill wrong."""
    wrong = [check for check in result.checks if not check.is_met]
    assert not wrong, shown(wrong)


def test_the_traffic_had_all_that_it_is_meant_to_have(result: Result) -> None:
    """Counters agree easily where nothing happens."""
    assert result.models == ["base", *FAMILIES]
    for model in result.models:
        assert sum(1 for _ in result.ledger.of(Outcome.OK, model)) >= 4
    assert {200, 400, 404, 415} <= set(result.ledger.statuses)
    assert list(result.ledger.of(Outcome.CANCELLED))
    assert max(sample.running for sample in result.samples) >= STREAMS / 2
    finished = list(result.ledger.of(Outcome.OK))
    assert {entry.finish_reason for entry in finished} == {"stop", "length"}
    assert {entry.job.path for entry in finished} == {"/v1/completions", "/v1/chat/completions"}
    assert {entry.job.is_stream for entry in finished} == {False, True}


@pytest.mark.case(89)
def test_metrics_are_read_by_prometheus_parser_under_load(result: Result) -> None:
    """Each sample is a page that was parsed while requests ran; one that cannot be parsed is a wrong check."""
    assert len(result.samples) >= 5
    assert all(sample.rss_bytes > 0 for sample in result.samples)
    assert not [check for check in result.checks if check.name == "/metrics can be read under load"]


def test_no_family_and_no_series_comes_twice(server: Running, result: Result) -> None:
    """Prometheus refuses a whole page for a series that comes twice; its Python parser does not."""
    families = list(text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    series = [(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples]
    assert len(series) == len(set(series))


def test_router_counters_are_there_for_every_adapter_with_routers(server: Running, result: Result) -> None:
    page = Scrape(httpx.get(f"{server.url}/metrics").text)
    assert {adapter for adapter, _ in page.by("moa_router_tokens_total", "adapter", "layer")} == set(FAMILIES)
    assert {layer for _, layer in page.by("moa_router_tokens_total", "adapter", "layer")} == {"0", "1", "2"}
    for family in ("mola_layerwise", "sparse_fn"):
        assert page.total("moa_experts_per_token_sum", adapter=family) > 0
        selected, computed = (page.total(f"moa_expert_{what}_total", adapter=family) for what in ("selected", "computed"))
        assert selected <= computed
        assert selected < page.total("moa_expert_evaluations_total", adapter=family)
    assert page.total("moa_router_threshold_total", adapter="sparse_fn") > 0


def test_the_log_has_one_line_for_each_request_that_says_what_its_client_saw(server: Running, result: Result) -> None:
    checks = reconcile_log(result.ledger, server.log())
    assert all(check.is_met for check in checks), shown(checks)

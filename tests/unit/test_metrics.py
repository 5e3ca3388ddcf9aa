"""What a scrape says: names, numbers, and who gets a series."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from families import write_base, write_family
from prometheus_client.parser import text_string_to_metric_families

from moa_serve import SamplingParams
from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.cache import AdapterCache
from moa_serve.adapter.importers import read_adapter
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.engine import Engine, EngineOptions
from moa_serve.engine.request import Request
from moa_serve.metrics import Metrics, RequestRecord, timings
from moa_serve.metrics.drift import Profile
from moa_serve.metrics.family import Wanted
from moa_serve.metrics.registered import Registered
from moa_serve.metrics.routing import DECIDE_SECONDS, RoutingMetrics
from moa_serve.metrics.vllm import lengths
from moa_serve.model.counters import RoutingTotals
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

Labels = tuple[tuple[str, str], ...]
RECORD = RequestRecord(
    model="math", adapter="math", revision="ab" * 32, request_id="r", endpoint="completions", prompt_tokens=7, completion_tokens=5,
    cached_tokens=2, longest_completion=4, finish_reason="stop", arrived=10.0, scheduled=10.5, first_token=11.0, finished=13.0, n=1,
    max_tokens=16, status=200,
)  # fmt: skip


def scrape(metrics: Metrics) -> dict[tuple[str, Labels], float]:
    """Every sample of a page, which must parse and have none twice."""
    page, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    return parse(page.decode())


def parse(page: str) -> dict[tuple[str, Labels], float]:
    samples: dict[tuple[str, Labels], float] = {}
    families = list(text_string_to_metric_families(page))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(samples: dict[tuple[str, Labels], float], name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


def loaded(metrics: Metrics, *names: str) -> None:
    for name in names:
        metrics.adapter_loaded(name, f"revision of {name}", 0.25, "lazy", "ok")


class TestRequests:
    def test_a_request_is_counted_in_both_families(self) -> None:
        metrics = Metrics("base", max_model_len=512)
        loaded(metrics, "math")
        metrics.observe_request(RECORD)
        metrics.observe_tokens("math", [0.01, 0.02])
        samples = scrape(metrics)
        mine, theirs = {"adapter": "math"}, {"model_name": "math", "engine": "0"}
        assert value(samples, "moa_prompt_tokens_total", **mine) == 7
        assert value(samples, "moa_generated_tokens_total", **mine) == 5
        assert value(samples, "moa_requests_total", finish_reason="stop", **mine) == 1
        assert value(samples, "moa_time_to_first_token_seconds_sum", **mine) == 1.0
        assert value(samples, "moa_queue_seconds_bucket", le="0.5", **mine) == 1
        assert value(samples, "moa_request_seconds_sum", **mine) == 3.0
        assert value(samples, "moa_inter_token_seconds_count", **mine) == 2
        assert value(samples, "vllm:prompt_tokens_total", **theirs) == 7
        assert value(samples, "vllm:generation_tokens_total", **theirs) == 5
        assert value(samples, "vllm:request_success_total", finished_reason="stop", **theirs) == 1
        assert value(samples, "vllm:time_to_first_token_seconds_bucket", le="0.75", **theirs) == 0
        assert value(samples, "vllm:time_to_first_token_seconds_bucket", le="1.0", **theirs) == 1
        assert value(samples, "vllm:request_time_per_output_token_seconds_sum", **theirs) == pytest.approx(2 / 3)
        assert value(samples, "vllm:request_prefill_time_seconds_sum", **theirs) == 0.5
        assert value(samples, "vllm:request_decode_time_seconds_sum", **theirs) == 2.0
        assert value(samples, "vllm:request_inference_time_seconds_sum", **theirs) == 2.5
        assert value(samples, "vllm:request_params_max_tokens_sum", **theirs) == 16
        assert value(samples, "vllm:request_max_num_generation_tokens_sum", **theirs) == 4
        assert value(samples, "vllm:request_prefill_kv_computed_tokens_sum", **theirs) == 5
        assert value(samples, "vllm:prompt_tokens_by_source_total", source="local_compute", **theirs) == 5
        assert value(samples, "vllm:prompt_tokens_by_source_total", source="local_cache_hit", **theirs) == 2
        assert value(samples, "moa_adapter_last_load_seconds", **mine) == 0.25

    @pytest.mark.case(85)
    def test_clients_make_no_series(self) -> None:
        """A label that a client chooses is memory that a client fills."""
        metrics = Metrics("base")
        for number in range(100):
            junk = f"junk{number}"
            metrics.observe_request(replace(RECORD, model=junk, adapter=junk, scheduled=None, finish_reason="error", status=404))
            metrics.observe_request(replace(RECORD, model=junk, adapter=None, scheduled=None, finish_reason="error", status=404))
            metrics.observe_tokens(junk, [0.1])
            metrics.adapter_loaded(junk, None, 0.1, "explicit", "adapter_corrupt")
        samples = scrape(metrics)
        assert not any("junk" in label for _, labels in samples for _, label in labels)
        assert value(samples, "moa_requests_total", adapter="other", finish_reason="error") == 200
        assert value(samples, "moa_adapter_load_seconds_count", source="explicit", result="adapter_corrupt") == 100

    def test_what_was_refused_does_not_make_times_look_short(self) -> None:
        metrics = Metrics("base")
        metrics.observe_request(replace(RECORD, model="base", adapter=None, scheduled=None, first_token=None, finish_reason="error"))
        samples = scrape(metrics)
        assert value(samples, "moa_requests_total", adapter="base", finish_reason="error") == 1
        assert value(samples, "moa_request_seconds_count", adapter="base") is None
        assert value(samples, "vllm:request_success_total", model_name="base", engine="0", finished_reason="error") is None

    @pytest.mark.case(86)
    def test_series_of_an_unloaded_adapter_go(self) -> None:
        """A server that loads a new adapter each minute would grow for ever."""
        metrics = Metrics("base")
        loaded(metrics, "math", "law")
        for name in ("math", "law"):
            metrics.observe_request(replace(RECORD, model=name, adapter=name))
            metrics.observe_tokens(name, [0.1])
        metrics.adapter_unloaded("math")
        metrics.observe_request(RECORD)  # its record comes after its lease was given back
        samples = scrape(metrics)
        assert not any("math" in label for _, labels in samples for _, label in labels)
        assert value(samples, "moa_requests_total", adapter="law", finish_reason="stop") == 1
        assert value(samples, "moa_requests_total", adapter="other", finish_reason="stop") == 1

    @pytest.mark.case(86)
    def test_adapters_that_came_and_went_leave_nothing(self) -> None:
        """A server that lives for a year loads more names than it ever has at once."""
        metrics = Metrics("base")

        def live(number: int) -> None:
            name = f"tenant{number}"
            loaded(metrics, name)
            metrics.observe_request(replace(RECORD, model=name, adapter=name))
            metrics.observe_tokens(name, [0.1])
            metrics.adapter_unloaded(name)

        def held() -> tuple[int, int]:
            gc.collect()
            return len(scrape(metrics)), len(gc.get_objects())

        for number in range(20):
            live(number)
        before = held()
        for number in range(20, 520):
            live(number)
        after = held()
        assert after[0] == before[0]
        assert after[1] - before[1] < 100, "objects; one name has a thousand"

    def test_responses_are_counted_by_status(self) -> None:
        metrics = Metrics("base")
        for status in (200, 200, 503):
            metrics.observe_response(status)
        samples = scrape(metrics)
        assert value(samples, "moa_http_responses_total", status="200") == 2
        assert value(samples, "moa_http_responses_total", status="503") == 1

    def test_http_requests_are_counted_by_route(self) -> None:
        metrics = Metrics("base")
        metrics.observe_http("/v1/models", "GET", 200, 0.2, 0, 100)
        metrics.observe_http("none", "GET", 404, 0.01, 5, 50)
        samples = scrape(metrics)
        assert value(samples, "http_requests_total", handler="/v1/models", method="GET", status="2xx") == 1
        assert value(samples, "http_requests_total", handler="none", method="GET", status="4xx") == 1
        assert value(samples, "http_request_duration_seconds_bucket", handler="/v1/models", method="GET", le="0.5") == 1
        assert value(samples, "http_request_duration_seconds_bucket", handler="/v1/models", method="GET", le="0.1") == 0
        assert value(samples, "http_request_duration_highr_seconds_count") == 2
        assert value(samples, "http_request_size_bytes_sum", handler="none") == 5
        assert value(samples, "http_response_size_bytes_sum", handler="/v1/models") == 100

    @pytest.mark.case(85)
    def test_an_invented_method_makes_no_series(self) -> None:
        metrics = Metrics("base")
        for number in range(50):
            metrics.observe_http("none", f"BREW{number}", 405, 0.01, 0, 0)
        assert value(scrape(metrics), "http_requests_total", handler="none", method="OTHER", status="4xx") == 50

    def test_lengths_are_1_2_5(self) -> None:
        assert lengths(1) == [1]
        assert lengths(512) == [1, 2, 5, 10, 20, 50, 100, 200, 500]
        assert lengths(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]

    def test_timings(self) -> None:
        assert timings(RECORD) == {"queue": 0.5, "prefill": 0.5, "first_token": 1.0, "decode": 2.0, "tokens_per_second": 2.0}
        refused = timings(replace(RECORD, scheduled=None, first_token=None))
        assert set(refused.values()) == {None}
        assert timings(replace(RECORD, completion_tokens=1, finished=11.0))["tokens_per_second"] is None


# -- routers


EXPERTS = (("Q", "PROMPT"), ("Q",))


class FakeEngine:
    """Running totals that a test sets."""

    def __init__(self) -> None:
        self.totals: dict[str, RoutingTotals] = {}
        self.altered: dict[str, RoutingTotals] = {}

    def routing_totals(self, revision: str) -> RoutingTotals | None:
        return self.totals.get(revision)

    def altered_totals(self, revision: str) -> RoutingTotals | None:
        return self.altered.get(revision)


@dataclass
class Grid:
    """Routing metrics with an engine and a clock that a test moves."""

    size: int
    now: float = 0.0

    def __post_init__(self) -> None:
        self.engine = FakeEngine()
        self.metrics = RoutingMetrics(self.size, lambda: self.now)
        self.last: dict[tuple[str, Labels], float] = {}

    def run(
        self, name: str, tokens: int, *, experts: tuple[tuple[str, ...], ...] = EXPERTS, keeps: float = 1.0, is_altered: bool = False
    ) -> None:
        """Tokens with one adapter, each of which keeps every expert with weight 0.5, or so much of one."""
        revision = f"revision of {name}"
        kept = self.engine.altered if is_altered else self.engine.totals
        before = kept.get(revision)
        total = tokens + (before.tokens if before else 0)
        met = np.full((len(experts), max(map(len, experts))), float(total))
        cells = met * keeps
        kept[revision] = RoutingTotals(total, cells, cells / 2, met, np.full(len(experts), 0.25 * total), experts)
        sequence = SimpleNamespace(request=SimpleNamespace(adapter=revision))
        event = cast(Any, SimpleNamespace(sequence=sequence, finish_reason="stop"))
        self.metrics.publish(cast(Engine, self.engine), [event])

    def scrape(self) -> dict[tuple[str, Labels], float]:
        """A page; no counter on it may have fallen since the last one."""
        samples = parse(self.metrics.render())
        for key, before in self.last.items():
            assert samples.get(key, before) >= before, f"{key} fell"
        self.last = samples
        return samples

    def tokens(self, name: str) -> float | None:
        return value(self.scrape(), "moa_router_tokens_total", adapter=name, layer="0")


def test_the_grid_has_a_series_for_each_layer_and_expert() -> None:
    grid = Grid(2)
    grid.metrics.loaded("math", "revision of math")
    grid.run("math", 10)
    samples = grid.scrape()
    cell = {"adapter": "math", "layer": "0", "expert": "PROMPT"}
    assert value(samples, "moa_expert_selected_total", **cell) == 10
    assert value(samples, "moa_expert_computed_total", **cell) == 10
    assert value(samples, "moa_expert_weight_total", **cell) == 5
    assert value(samples, "moa_expert_selected_total", adapter="math", layer="1", expert="PROMPT") is None, "not in that layer"
    assert value(samples, "moa_router_tokens_total", adapter="math", layer="1") == 10
    assert value(samples, "moa_router_threshold_total", adapter="math", layer="1") == 2.5
    assert value(samples, "moa_experts_per_token_sum", adapter="math") == 30
    assert value(samples, "moa_experts_per_token_count", adapter="math") == 20
    assert value(samples, "moa_expert_evaluations_total", adapter="math") == 30
    assert value(samples, "moa_expert_evaluations_skipped_total", adapter="math") == 0


def test_drift_and_dead_experts_are_told_once_there_is_enough_to_tell() -> None:
    """Every token of `run` keeps every expert: as one profile says, and as unlike the other as can be."""
    grid = Grid(5)
    always, never = (Profile(EXPERTS, np.full(3, share), np.full(3, np.nan), is_of_weights=False) for share in (1.0, 0.0))
    weighed = Profile(EXPERTS, np.full(3, np.nan), np.full(3, 0.5), is_of_weights=True)
    for name, profile in (("as-trained", always), ("unlike", never), ("weighed", weighed), ("without", None)):
        grid.metrics.loaded(name, f"revision of {name}", profile)
        grid.run(name, 499)
    assert not [key for key in grid.scrape() if key[0] in ("moa_router_drift", "moa_dead_experts")]
    for name in ("as-trained", "unlike", "weighed", "without"):
        grid.run(name, 501)
    grid.metrics.loaded("dead", "revision of dead")
    grid.run("dead", 1000, keeps=0.0)
    samples = grid.scrape()
    assert value(samples, "moa_router_drift", adapter="as-trained") == 0
    assert value(samples, "moa_router_drift", adapter="weighed") == 0, "where all are kept, weights are compared"
    assert value(samples, "moa_router_drift", adapter="unlike") == 1
    assert value(samples, "moa_router_drift", adapter="without") is None
    assert [value(samples, "moa_dead_experts", adapter=name) for name in ("as-trained", "without", "dead")] == [0, 0, 3]


def test_what_clients_had_routers_do_is_counted_but_says_nothing_of_the_adapter() -> None:
    """A client who switches experts off must not make them look dead, nor one who keeps all of them make a dead one look alive."""
    grid = Grid(1)
    grid.metrics.loaded("a", "revision of a", Profile(EXPERTS, np.full(3, 0.0), np.full(3, np.nan), is_of_weights=False))
    grid.run("a", 1000, keeps=0.0)
    grid.run("a", 5000, is_altered=True)
    samples = grid.scrape()
    assert value(samples, "moa_router_tokens_total", adapter="a", layer="0") == 6000
    assert value(samples, "moa_expert_selected_total", adapter="a", layer="0", expert="Q") == 5000
    assert value(samples, "moa_dead_experts", adapter="a") == 3
    assert value(samples, "moa_router_drift", adapter="a") == 0
    found = grid.metrics.experts("a")
    assert found is not None
    assert found.tokens == 1000


def test_a_second_name_that_goes_takes_nothing_along() -> None:
    """Its totals count for the first name of the revision, also where clients alone made them."""
    grid = Grid(2)
    for name in ("a", "again"):
        grid.metrics.loaded(name, "revision of a", None, EXPERTS)
    grid.run("a", 100, is_altered=True)
    assert grid.tokens("a") == 100
    grid.metrics.unloaded("again")
    assert grid.tokens("a") == 100
    grid.metrics.loaded("again", "revision of a", None, EXPERTS)
    grid.run("a", 7)
    grid.metrics.unloaded("a")
    grid.run("a", 5, is_altered=True)
    assert grid.tokens("again") == 5


def test_no_token_is_lost_or_counted_twice_when_adapters_move() -> None:
    """An adapter that moves between the grid and `other` must not make a rate negative, nor its tokens vanish."""
    grid = Grid(1)
    for name in ("a", "b"):
        grid.metrics.loaded(name, f"revision of {name}")
    grid.run("a", 10)
    grid.run("b", 100)
    assert (grid.tokens("a"), grid.tokens("b"), grid.tokens("other")) == (10, None, 100)
    grid.now += DECIDE_SECONDS
    grid.run("a", 1)
    assert grid.tokens("a") == 11, "who leaves is shown with its last tokens"
    assert (grid.tokens("b"), grid.tokens("other")) == (0, 100), "who comes begins at 0, so that a rate sees its first token"
    grid.run("b", 5)
    grid.run("a", 7)
    assert (grid.tokens("a"), grid.tokens("b"), grid.tokens("other")) == (11, 5, 107)
    grid.now += DECIDE_SECONDS
    assert grid.tokens("a") is None
    grid.run("a", 1000)
    grid.scrape()
    grid.now += DECIDE_SECONDS
    grid.scrape()
    grid.run("a", 3)
    assert (grid.tokens("a"), grid.tokens("other")) == (14, 1107), "it goes on from where it was"


def test_other_adds_up_adapters_with_different_experts() -> None:
    grid = Grid(0)
    grid.metrics.loaded("a", "revision of a")
    grid.metrics.loaded("b", "revision of b")
    grid.run("a", 10)
    grid.run("b", 5, experts=((), ("Q", "DOWN")))
    samples = grid.scrape()
    assert value(samples, "moa_router_tokens_total", adapter="other", layer="0") == 10
    assert value(samples, "moa_router_tokens_total", adapter="other", layer="1") == 15
    assert value(samples, "moa_expert_selected_total", adapter="other", layer="1", expert="Q") == 15
    assert value(samples, "moa_expert_selected_total", adapter="other", layer="1", expert="DOWN") == 5


@pytest.mark.case(86)
def test_an_unloaded_adapter_leaves_no_series_and_other_keeps_its_tokens() -> None:
    grid = Grid(1)
    grid.metrics.loaded("a", "revision of a")
    grid.metrics.loaded("b", "revision of b")
    grid.run("a", 10)
    grid.run("b", 20)
    grid.metrics.unloaded("b")
    assert grid.tokens("other") == 20
    grid.metrics.unloaded("a")
    samples = grid.scrape()
    assert not any(label == "a" for _, labels in samples for _, label in labels)
    assert not grid.metrics._totals
    grid.metrics.loaded("b", "revision of b")
    grid.engine.totals.clear()  # the engine dropped the revision
    grid.run("b", 3)
    assert (grid.tokens("b"), grid.tokens("other")) == (3, 20)


def test_a_self_test_and_a_second_name_count_nothing_twice() -> None:
    grid = Grid(4)
    grid.run("a", 12)  # before it is published
    grid.engine.totals.clear()
    grid.metrics.loaded("a", "revision of a")
    grid.metrics.loaded("copy", "revision of a")
    assert grid.tokens("a") is None
    grid.run("a", 5)
    assert (grid.tokens("a"), grid.tokens("copy")) == (5, None)


def test_a_second_name_goes_on_where_the_first_was() -> None:
    """Beyond the grid, all that the first had counted would be added to `other` once more."""
    grid = Grid(0)
    for name in ("a", "copy"):
        grid.metrics.loaded(name, "revision of a")
    grid.run("a", 10)
    assert grid.tokens("other") == 10
    grid.metrics.unloaded("a")
    grid.run("a", 5)
    assert grid.tokens("other") == 15


def test_a_new_revision_begins_anew() -> None:
    grid = Grid(1)
    grid.metrics.loaded("a", "revision of a")
    grid.run("a", 10)
    grid.scrape()
    grid.metrics.loaded("a", "revision of next")
    grid.last = {}  # the reset of a counter
    grid.run("next", 3)
    assert grid.tokens("a") == 3


def test_a_long_request_is_published_now_and_then_and_at_its_end() -> None:
    """A snapshot waits for a GPU; one a step would slow every token."""
    asked: list[float] = []

    class Counting(FakeEngine):
        def routing_totals(self, revision: str) -> RoutingTotals | None:
            asked.append(grid.now)
            return None

    grid = Grid(1)
    for step in range(100):
        grid.now = step * 0.01
        reason = "stop" if step == 99 else None
        event = SimpleNamespace(sequence=SimpleNamespace(request=SimpleNamespace(adapter="r")), finish_reason=reason)
        grid.metrics.publish(cast(Engine, Counting()), [cast(Any, event)] * 3)
    assert len(asked) <= 7
    assert asked[-1] == 0.99


def test_what_an_adapters_experts_did_is_told_in_the_grid_or_not() -> None:
    """A researcher looks at one of a thousand adapters; the grid has eight."""
    grid = Grid(0)
    profile = Profile(EXPERTS, np.array([1.0, 0.5, 0.25]), np.full(3, np.nan), is_of_weights=False)
    grid.metrics.loaded("math", "revision of math", profile, EXPERTS)
    fresh = grid.metrics.experts("math")
    assert fresh is not None
    assert (fresh.tokens, fresh.skipped, fresh.drift, fresh.dead) == (0, None, None, None)
    assert [[expert.name for expert in layer.experts] for layer in fresh.layers] == [["Q", "PROMPT"], ["Q"]]
    assert {(expert.weight, expert.selected, expert.computed) for layer in fresh.layers for expert in layer.experts} == {(None, None, None)}
    grid.run("math", 1000, keeps=0.5)
    found = grid.metrics.experts("math")
    assert found is not None
    assert (found.adapter, found.revision, found.tokens, found.skipped, found.dead) == ("math", "revision of math", 1000, 0.0, ())
    assert [layer.threshold for layer in found.layers] == [0.25, 0.25]
    prompt = found.layers[0].experts[1]
    assert (prompt.name, prompt.weight, prompt.selected, prompt.computed) == ("PROMPT", 0.25, 0.5, 1.0)
    assert prompt.profile is not None
    assert (prompt.profile.weight, prompt.profile.selected) == (None, 0.5)
    assert found.drift is not None
    assert 0 < found.drift < 1
    assert grid.metrics.experts("unknown") is None


def test_two_names_of_one_revision_tell_the_same_and_a_dead_expert_is_named() -> None:
    grid = Grid(1)
    for name in ("first", "second"):
        grid.metrics.loaded(name, "revision of a", None, EXPERTS)
    grid.run("a", 999, keeps=0.0)
    few = grid.metrics.experts("second")
    assert few is not None
    assert few.dead is None, "that says nothing yet"
    grid.run("a", 1, keeps=0.0)
    for name in ("first", "second"):
        found = grid.metrics.experts(name)
        assert found is not None
        assert (found.adapter, found.tokens) == (name, 1000)
        assert [(dead.layer, dead.expert) for dead in found.dead or ()] == [(0, "Q"), (0, "PROMPT"), (1, "Q")]
        assert found.layers[0].experts[0].profile is None
    grid.metrics.unloaded("first")
    found = grid.metrics.experts("second")
    assert found is not None
    assert found.tokens == 1000


@pytest.mark.case(89)
def test_a_scrape_of_a_full_grid_is_short() -> None:
    """The event loop moves no token meanwhile. Compared with the client library on the same samples, in one run."""
    from prometheus_client import CollectorRegistry, Counter, generate_latest

    experts = (("Q", "K", "V", "PROMPT", "O", "UP", "GATE", "DOWN", "P_ADAPTER"),) * 30
    grid, registry = Grid(8), CollectorRegistry()
    library = Counter("x", "x", ("adapter", "layer", "expert"), registry=registry)
    for number in range(8):
        grid.metrics.loaded(f"a{number}", f"revision of a{number}")
        grid.run(f"a{number}", 1000, experts=experts)
        for layer, names in enumerate(experts):
            for name in names:
                library.labels(f"a{number}", str(layer), name).inc(1000)
    grid.metrics.render()
    ours = min(_seconds(grid.metrics.render) for _ in range(3))
    theirs = min(_seconds(lambda: generate_latest(registry)) for _ in range(3))
    assert ours < theirs, f"{ours:.4f} s for three families, {theirs:.4f} s for one"


@pytest.mark.case(89)
def test_scrapers_at_once_have_their_pages_written_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is a megabyte and more, which glibc keeps for each thread that ever wrote one: for ten minutes that looks like a leak."""
    threads = []

    def text(self: Registered, wanted: Wanted) -> bytes:
        threads.append(threading.get_ident())
        time.sleep(0.01)  # so that another thread, if there were one, would take the next page
        return b""

    monkeypatch.setattr(Registered, "text", text)
    metrics = Metrics("base")

    async def scrape() -> None:
        await asyncio.gather(*(metrics.page() for _ in range(4)))

    asyncio.run(scrape())
    assert len(threads) == 4
    assert len({*threads, threading.get_ident()}) == 2


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# -- with a real engine


@dataclass
class Item:
    name: str
    state: str
    revision: str | None
    variant: str | None = "soft_moa"
    bytes: int = 1000
    leases: int = 0
    is_pinned: bool = False


class Registry:
    def __init__(self, *found: Item) -> None:
        self.found = list(found)

    def items(self) -> list[Item]:
        return self.found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def test_what_a_cancelled_request_computed_is_counted(base: Path, tmp_path: Path) -> None:
    """A stop string, or a client that leaves, ends a request between two snapshots and without an event of a step."""
    found = load_base(base, dtype=torch.float32)
    adapter = read_adapter(AdapterSource(write_family(tmp_path / "a", "sparse_fn")), found.config)

    async def main() -> tuple[float | None, float]:
        options = EngineOptions(kv_cache_bytes=2**21, num_slots=3)
        engine = AsyncEngine(lambda lease: Engine(Transformer(found.config, found.weights), options, lease=lease, base_digest="d"))
        metrics = Metrics("base", max_model_len=engine.engine.max_model_len)
        metrics.attach(engine, Registry(Item("math", "loaded", adapter.revision)))
        metrics.adapter_loaded("math", adapter.revision, 0.1, "lazy", "ok")
        metrics._routing._clock = lambda: 0.0  # no snapshot is due after the first one
        engine.start()
        try:
            request = Request((5, 17, 80), SamplingParams(temperature=0, max_tokens=400, ignore_eos=True), adapter.revision)
            async with engine.open(request, adapter) as stream:
                num_events = 0
                async for events in stream:
                    if (num_events := num_events + len(events)) >= 20:
                        break
            while engine.load.running:
                await asyncio.sleep(0.01)
            totals = engine.engine.routing_totals(adapter.revision)
            assert totals is not None
            return value(scrape(metrics), "moa_router_tokens_total", adapter="math", layer="0"), totals.tokens
        finally:
            await engine.stop()

    counted, computed = asyncio.run(main())
    assert computed >= 22
    assert counted == computed


def test_a_running_engine_is_seen(base: Path, tmp_path: Path) -> None:
    """Numbers of the engine thread reach the page without asking it: load, slots, routers."""
    found = load_base(base, dtype=torch.float32)
    adapter = read_adapter(AdapterSource(write_family(tmp_path / "a", "sparse_fn")), found.config)
    page: dict[tuple[str, Labels], float] = {}
    counted: list[RoutingTotals] = []

    async def main() -> None:
        options = EngineOptions(kv_cache_bytes=2**21, num_slots=3)
        engine = AsyncEngine(lambda lease: Engine(Transformer(found.config, found.weights), options, lease=lease, base_digest="d"))
        metrics = Metrics("base", max_model_len=engine.engine.max_model_len)
        registry = Registry(Item("math", "loaded", adapter.revision), Item("law", "available", None), Item("bad", "broken", None))
        metrics.attach(engine, registry)
        metrics.adapter_loaded("math", adapter.revision, 0.1, "lazy", "ok")
        engine.start()
        try:
            request = Request((5, 17, 80), SamplingParams(temperature=0, max_tokens=4), adapter.revision)
            async with engine.open(request, adapter) as stream:
                async for _ in stream:
                    pass
            page.update(scrape(metrics))
            totals = engine.engine.routing_totals(adapter.revision)
            assert totals is not None
            counted.append(totals)
        finally:
            await engine.stop()

    asyncio.run(main())
    (totals,) = counted
    assert totals.tokens == 6
    for layer, names in enumerate(totals.experts):
        assert value(page, "moa_router_tokens_total", adapter="math", layer=str(layer)) == totals.tokens
        for column, name in enumerate(names):
            cell = {"adapter": "math", "layer": str(layer), "expert": name}
            assert value(page, "moa_expert_selected_total", **cell) == totals.selected[layer, column]
            assert value(page, "moa_expert_weight_total", **cell) == pytest.approx(totals.gate_sum[layer, column])
    vllm = {"model_name": "base", "engine": "0"}
    assert value(page, "moa_engine_steps_total") == 4
    for name, total in (("moa_step_rows", 4), ("moa_step_tokens", 6)):
        assert (value(page, f"{name}_count"), value(page, f"{name}_sum")) == (4, total)
    assert value(page, "moa_step_rows_bucket", le="1.0") == 4
    assert (value(page, "vllm:iteration_tokens_total_count", **vllm), value(page, "vllm:iteration_tokens_total_sum", **vllm)) == (4, 6)
    assert (value(page, "moa_step_seconds_count"), value(page, "moa_step_seconds_bucket", le="+Inf")) == (4, 4)
    assert value(page, "moa_step_part_seconds_total", part="router") == 0, "the torch backend times one step in some dozens"
    assert [value(page, f"moa_adapter_cache_{kind}_total", tier="slot") for kind in ("hits", "misses")] == [0, 1]
    assert value(page, "moa_adapter_evictions_total", tier="slot", reason="capacity") == 0
    assert [value(page, "vllm:engine_sleep_state", sleep_state=state, **vllm) for state in ("awake", "discard_all")] == [1, 0]
    assert value(page, "vllm:corrupted_requests_total", **vllm) == 0
    assert value(page, "moa_adapters", state="available") == 1
    assert value(page, "moa_adapter_state", adapter="bad", state="broken") == 1
    assert value(page, "moa_adapter_state", adapter="law", state="available") is None
    assert value(page, "moa_adapter_info", adapter="math", revision=adapter.revision, variant="soft_moa") == 1
    assert value(page, "moa_adapter_resident_bytes", adapter="math", tier="slot") == 1000
    assert value(page, "vllm:lora_adapter_loaded", engine="0", adapter_name="math", level="gpu", pinned="false") == 1
    assert value(page, "vllm:max_gpu_lora_adapters", engine="0") == 3
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        series = [key for key in page if key[0] == name]
        assert series == [(name, tuple(sorted(vllm.items())))], "load balancers take the first one"
    (info,) = [key for key in page if key[0] == "vllm:lora_requests_info"]
    assert dict(info[1]) == {"max_lora": "3", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert abs(page[info] - time.time()) < 60


@pytest.mark.parametrize("is_on", [True, False])
def test_the_prefix_cache_is_seen_and_is_no_load(base: Path, is_on: bool) -> None:
    """Load balancers go by the share of the KV cache that is held: what is free for anybody must not count."""
    found = load_base(base, dtype=torch.float32)
    page: dict[tuple[str, Labels], float] = {}

    async def main() -> None:
        options = EngineOptions(kv_cache_bytes=2**21, prefix_cache=is_on)
        engine = AsyncEngine(lambda lease: Engine(Transformer(found.config, found.weights), options, lease=lease, base_digest="d"))
        metrics = Metrics("base")
        metrics.attach(engine, Registry())
        engine.start()
        try:
            for _ in range(2):
                async with engine.open(Request([7] * 40, SamplingParams(max_tokens=2))) as stream:
                    async for _ in stream:
                        pass
            page.update(scrape(metrics))
        finally:
            await engine.stop()

    asyncio.run(main())
    vllm = {"model_name": "base", "engine": "0"}
    for name, number in (("prefix_cache_queries_total", 80), ("prefix_cache_hits_total", 32)):
        assert value(page, f"moa_{name}") == value(page, f"vllm:{name}", **vllm) == number * is_on
    (info,) = [dict(labels) for name, labels in page if name == "vllm:cache_config_info"]
    assert info["enable_prefix_caching"] == str(is_on)
    assert value(page, "moa_kv_kept_ratio") == pytest.approx(2 * is_on / int(info["num_gpu_blocks"]))
    assert value(page, "moa_kv_usage_ratio") == value(page, "vllm:kv_cache_usage_perc", **vllm) == 0


def test_a_page_before_there_is_an_engine_is_valid() -> None:
    assert isinstance(scrape(Metrics("base")), dict)


# -- what a scrape asks for


def full(base: Path, registry: Any, **more: Any) -> Metrics:
    """Metrics with an engine that never starts, and a series of most families."""
    found = load_base(base, dtype=torch.float32)
    options = EngineOptions(kv_cache_bytes=2**21)
    engine = AsyncEngine(lambda lease: Engine(Transformer(found.config, found.weights), options, lease=lease, base_digest="d"))
    metrics = Metrics("base", **more)
    metrics.attach(engine, registry, AdapterCache(1000))
    loaded(metrics, "math")
    metrics.observe_request(RECORD)
    metrics.observe_http("/v1/models", "GET", 200, 0.2, 0, 100)
    return metrics


def names_of(page: bytes) -> set[str]:
    return {line.split()[2] for line in page.decode().splitlines() if line.startswith("# TYPE")}


def test_a_page_has_the_families_that_are_told_and_no_other(base: Path) -> None:
    metrics = full(base, Registry())
    families = {family.name: family for family in metrics.families}
    page = metrics.render()[0]
    assert names_of(page) == set(families)
    kinds = {line.split()[2]: line.split()[3] for line in page.decode().splitlines() if line.startswith("# TYPE")}
    assert kinds == {name: family.kind for name, family in families.items()}
    for family in text_string_to_metric_families(page.decode()):
        told = next(families[name] for name in (family.name, f"{family.name}_total") if name in families)
        assert {label for sample in family.samples for label in sample.labels} - {"le"} <= set(told.labels)
        bounds = {sample.labels["le"] for sample in family.samples if "le" in sample.labels} - {"+Inf"}
        assert not bounds or sorted(map(float, bounds)) == [float(bound) for bound in told.buckets]


@pytest.mark.parametrize(
    ("asked", "families"),
    [
        ({"moa_requests_waiting"}, {"moa_requests_waiting"}),
        ({"moa_requests_total", "moa_queue_seconds_bucket"}, {"moa_requests_total", "moa_queue_seconds"}),
        ({"moa_queue_seconds"}, {"moa_queue_seconds"}),
        ({"moa_requests"}, {"moa_requests_total"}),
        ({"vllm:iteration_tokens_total"}, {"vllm:iteration_tokens_total"}),
        ({"vllm:iteration_tokens_total_bucket"}, {"vllm:iteration_tokens_total"}),
        ({"moa_expert_weight_total", "moa_experts_per_token_sum"}, {"moa_expert_weight_total", "moa_experts_per_token"}),
        ({"process_cpu_seconds_total"}, {"process_cpu_seconds_total"}),
        ({"nothing"}, set()),
        ({""}, set()),
    ],
)
def test_a_scrape_may_ask_for_families_by_their_names_or_their_series(base: Path, asked: set[str], families: set[str]) -> None:
    metrics = full(base, Registry())
    page, _ = metrics.render(asked)
    assert names_of(page) == families
    whole = parse(metrics.render()[0].decode())
    for key, number in parse(page.decode()).items():
        assert key in whole
        assert number == whole[key] or key[0].startswith("process_")


def test_what_is_not_asked_for_is_not_looked_at(base: Path) -> None:
    """A load balancer asks for three gauges every 50 ms, and there may be ten thousand adapters."""

    class Unasked:
        def items(self) -> list[Item]:
            raise AssertionError("the adapters were listed")

    metrics = full(base, Unasked())
    metrics._routing._settle = lambda: pytest.fail("the grid was brought up to date")  # type: ignore[method-assign]
    page, _ = metrics.render({"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"})
    assert len(parse(page.decode())) == 3


def test_vllms_names_can_be_left_out(base: Path) -> None:
    metrics = full(base, Registry(), has_vllm=False)
    page = metrics.render()[0].decode()
    assert "vllm:" not in page
    assert not [family for family in metrics.families if family.name.startswith("vllm:")]
    assert "moa_requests_running 0.0" in page

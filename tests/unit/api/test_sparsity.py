"""Sparsity under pressure: how the factor follows the queue, whom it touches, and that nothing of it is there while it is off."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from families import raw_manifest, write_family
from serving import CONFIG, Serving, start_serving

from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import MAX_THRESHOLD_SCALE, RoutingOptions, yields
from moa_serve.api.generation import THRESHOLD_SCALE
from moa_serve.api.sparsity import LEVELS, SparsityPressure
from moa_serve.settings import ServerSettings

HEADER = THRESHOLD_SCALE.decode()
ADAPTERS = ("sparse_fn", "sparse_const", "adamole", "soft", "lora")
FULL = 8


def pressure(most: float = 2.0, of_adapters: dict[str, float] | None = None, first: int = 4, full: int = 16) -> SparsityPressure:
    return SparsityPressure(most, of_adapters or {}, first_waiting=first, max_waiting=full)


# -- the factor


def test_the_factor_rises_with_the_queue_in_few_steps_and_is_whole_when_it_is_full() -> None:
    """Each factor is an identity of keys and values of its own: a smooth one would share nothing."""
    made = pressure()
    scales = [made.scale("any", made.admit(waiting)) for waiting in range(17)]
    assert scales == [1.0] * 4 + [1.25] * 4 + [1.5] * 4 + [1.75] * 4 + [2.0]


@pytest.mark.parametrize(("first", "full"), [(1, 1), (1, 3), (5, 6), (16, 64), (1, 1000)])
@pytest.mark.parametrize("most", [1.0, 1.00001, 1.3, 7 / 3, MAX_THRESHOLD_SCALE])
def test_no_queue_leads_above_the_floor_that_the_operator_declares(most: float, first: int, full: int) -> None:
    """A round number above it would be a promise broken; below the first step, and at 1, there is nothing."""
    made = pressure(most, first=first, full=full)
    queue = [0, first, full, full + 50, first, max(0, first - 1), full, 0, *range(full + 1), *range(full, -1, -1)]
    scales = [made.scale("any", made.admit(waiting)) for waiting in queue]
    assert all(1 <= scale <= most for scale in scales)
    assert scales[0] == scales[7] == scales[-1] == 1
    assert scales[2] == scales[3] == most


def test_a_queue_that_wavers_around_a_step_does_not_change_identities() -> None:
    made = pressure()
    for around in (4, 8, 12):
        levels = {made.admit(around + (1 if turn % 2 else -1)) for turn in range(1, 20)}
        assert len(levels) == 1, around
    assert made.admit(16) == LEVELS
    assert [made.admit(waiting) for waiting in (15, 14, 13, 10, 9, 6, 5, 2, 1, 0)] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]


def test_a_queue_that_is_gone_raises_nothing_whatever_was_before() -> None:
    made = pressure()
    assert made.admit(16) == LEVELS
    assert made.shown(0) == {"other": 1.0}
    assert made.admit(0) == 0


def test_what_is_shown_is_what_the_next_request_gets_and_changes_nothing() -> None:
    """A scrape must not be able to keep a factor up, or to take it down."""
    made = pressure(of_adapters={"fine": 1.0, "coarse": 5.0})
    assert made.shown(8) == {"fine": 1.0, "coarse": 3.0, "other": 1.5}
    assert made.shown(0) == dict.fromkeys(("fine", "coarse", "other"), 1.0)
    level = made.admit(8)
    assert [made.scale(name, level) for name in ("fine", "coarse", "unheard of")] == [1.0, 3.0, 1.5]
    assert pressure(1.0).shown(16) == {}


def test_settings_have_the_bound_of_the_option() -> None:
    """What an operator may do to all is what a client may do to itself."""
    (bound,) = (item.le for item in ServerSettings.model_fields["pressure_threshold_scale"].metadata if hasattr(item, "le"))
    assert bound == MAX_THRESHOLD_SCALE


# -- whom it touches

TOUCHED: list[dict[str, Any]] = [{}, {"mode": "sparse"}, {"top_k": 2}, {"disable": ["Q"]}, {"force": ["V@0"]}]
UNTOUCHED: list[dict[str, Any]] = [{"mode": "soft"}, {"threshold": 0.4}, {"threshold": {"scale": 1}}, {"threshold": {"constant": 0.4}}]


def test_thresholds_that_a_request_sets_are_its_own() -> None:
    manifest = Manifest.parse(raw_manifest("sparse_fn"))
    assert all(yields(RoutingOptions.of(options), manifest) for options in TOUCHED)
    assert not any(yields(RoutingOptions.of(options), manifest) for options in UNTOUCHED)
    assert [name for name in ADAPTERS if yields(None, Manifest.parse(raw_manifest(name)))] == ["sparse_fn", "sparse_const", "adamole"]
    assert not yields(None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pressed")
    for seed, family in enumerate(ADAPTERS, start=1):
        write_family(place / family, family, seed, CONFIG)
    write_family(place / "fine", "sparse_fn", 9, CONFIG)
    return place


@pytest.fixture(scope="module")
def start_one(talker: Path, folder: Path) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def make(**settings: Any) -> Serving:
        started.append(start_serving(talker, folder, max_num_seqs=4, max_waiting=FULL, **settings))
        return started[-1]

    yield make
    for serving in started:
        serving.stop()


@pytest.fixture(scope="module")
def pressed(start_one: Callable[..., Serving]) -> Serving:
    return start_one(pressure_threshold_scale=1.6, pressure_waiting=2, pressure_adapters=["fine=1"])


@pytest.fixture(scope="module")
def plain(start_one: Callable[..., Serving]) -> Serving:
    return start_one()


@contextmanager
def queue(serving: Serving, num_waiting: int) -> Iterator[None]:
    """As many rows wait as the next request will see, itself among them."""
    more = serving.server.engine.engine.options.max_num_seqs + num_waiting - 1
    serving.server.num_preparing += more
    try:
        yield
    finally:
        serving.server.num_preparing -= more


def body(model: str, moa: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    own = {"prompt": list(range(3, 40)), "max_tokens": 8, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    return {"model": model, **own, **({"moa": moa} if moa else {}), **more}


def told(answer: httpx.Response) -> tuple[str | None, float | None, list[float]]:
    """(header, the body's, log-probabilities)."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return answer.headers.get(HEADER), found["moa"].get("threshold_scale"), found["choices"][0]["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("model", ["sparse_fn", "sparse_const", "adamole"])
def test_a_request_that_comes_under_pressure_is_the_one_with_that_factor(pressed: Serving, plain: Serving, model: str) -> None:
    """What the header says is what was computed, and the full factor is the declared one."""
    own = told(plain.post("/v1/completions", **body(model)))
    assert own[:2] == (None, None)
    for num_waiting, scale in ((2, 1.15), (FULL, 1.6)):
        with queue(pressed, num_waiting):
            header, said, logprobs = told(pressed.post("/v1/completions", **body(model)))
        assert (header, said) == (f"{scale:g}", scale)
        assert logprobs == told(plain.post("/v1/completions", **body(model, {"threshold": {"scale": scale}})))[2]
    assert logprobs != own[2], "the factor must matter, or this test shows nothing"
    assert told(pressed.post("/v1/completions", **body(model))) == own, "the queue is gone"


@pytest.mark.parametrize("model", ["tiny", "soft", "lora", "fine"])
def test_what_has_no_threshold_and_who_was_excepted_answer_as_ever(pressed: Serving, plain: Serving, model: str) -> None:
    with queue(pressed, FULL):
        assert told(pressed.post("/v1/completions", **body(model))) == told(plain.post("/v1/completions", **body(model)))


@pytest.mark.parametrize("moa", UNTOUCHED)
def test_a_request_opts_out_by_a_threshold_or_by_soft(pressed: Serving, plain: Serving, moa: dict[str, Any]) -> None:
    with queue(pressed, FULL):
        found = told(pressed.post("/v1/completions", **body("sparse_fn", moa)))
    assert found == told(plain.post("/v1/completions", **body("sparse_fn", moa)))
    assert found[0] is None


@pytest.mark.parametrize("moa", [options for options in TOUCHED if options])
def test_other_options_go_with_it(pressed: Serving, plain: Serving, moa: dict[str, Any]) -> None:
    with queue(pressed, FULL):
        header, said, logprobs = told(pressed.post("/v1/completions", **body("sparse_fn", moa)))
    assert (header, said) == ("1.6", 1.6)
    assert logprobs == told(plain.post("/v1/completions", **body("sparse_fn", moa | {"threshold": {"scale": 1.6}})))[2]


def test_off_is_as_it_was_under_any_queue(plain: Serving) -> None:
    """Not a header, not a field, not a bit of an answer, not a series."""
    free = told(plain.post("/v1/completions", **body("sparse_fn")))
    with queue(plain, FULL):
        assert told(plain.post("/v1/completions", **body("sparse_fn"))) == free
        assert plain.server.threshold_scales() == {}
    assert free[:2] == (None, None)
    assert all(record.threshold_scale is None for record in plain.metrics.records)
    assert "moa_raised_threshold_requests_total{" not in plain.get("/metrics").text


def test_a_stream_says_it_in_its_headers_and_with_its_last_event(pressed: Serving) -> None:
    with queue(pressed, FULL):
        answer = pressed.post("/v1/completions", stream=True, **body("sparse_fn"))
        chat = {"model": "sparse_fn", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        answers = [answer, pressed.post("/v1/chat/completions", stream=True, **chat)]
    for answer in answers:
        assert answer.headers[HEADER] == "1.6"
        assert answer.text.count('"threshold_scale":1.6') == 1


def test_who_was_admitted_before_keeps_what_it_had(pressed: Serving, plain: Serving) -> None:
    """Thresholds that change in the middle would change keys and values under way, and nobody could repeat the answer."""
    long = body("sparse_fn", max_tokens=40)
    alone = told(plain.post("/v1/completions", **long))[2]

    async def work() -> tuple[httpx.Response, httpx.Response]:
        first = asyncio.ensure_future(pressed.send("POST", "/v1/completions", json=long))
        while not pressed.server.engine.load.running:
            await asyncio.sleep(0.001)
        with queue(pressed, FULL - 1):
            second = await pressed.send("POST", "/v1/completions", json=body("sparse_fn"))
        assert not first.done()
        return await first, second

    first, second = pressed.run(work())
    header, said, logprobs = told(first)
    assert (header, said) == (None, None)
    assert logprobs == pytest.approx(alone, abs=1e-4)  # torch computes two rows a little differently than one
    assert second.headers[HEADER] == "1.6"


def test_it_is_counted_by_adapter_and_in_the_record(pressed: Serving) -> None:
    series = 'moa_raised_threshold_requests_total{adapter="sparse_const"} '

    def count() -> float:
        lines = [line for line in pressed.get("/metrics").text.splitlines() if line.startswith(series)]
        return float(lines[0].removeprefix(series)) if lines else 0.0

    before = count()
    with queue(pressed, FULL):
        pressed.ok("/v1/completions", **body("sparse_const"))
        pressed.ok("/v1/completions", **body("soft"))
        assert pressed.post("/v1/completions", **body("sparse_const", {"threshold": 7})).status_code == 400
    pressed.ok("/v1/completions", **body("sparse_const"))
    assert [record.threshold_scale for record in pressed.metrics.records[-4:]] == [1.6, None, None, None]
    assert count() == before + 1

"""The shadow check of a server: what becomes of sampled answers, and that nobody else notices."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import raw_manifest, write_family
from safetensors.torch import load_file
from serving import CONFIG, Serving, start_serving

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.api import shadow
from moa_serve.api.shadow import ShadowCheck

COMPLETIONS = "/v1/completions"
ASK: dict[str, Any] = {"model": "sparse_fn", "prompt": "hello there", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shadowed")
    for family in ("sparse_fn", "mola_layerwise", "soft", "instance"):
        write_family(place / family, family, config=CONFIG)
    return place


@pytest.fixture
def begun(talker: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Serving]]:
    """Starts a server that samples every answer, and takes little time to call it quiet."""
    monkeypatch.setattr(shadow, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(shadow, "LOOK_SECONDS", 0.01)
    started: list[Serving] = []

    def make(**settings: Any) -> Serving:
        started.append(start_serving(talker, folder, **{"shadow_share": 1.0} | settings))
        return started[-1]

    yield make
    for serving in started:
        serving.stop()


def check_of(serving: Serving) -> ShadowCheck:
    assert serving.server.shadow is not None
    return serving.server.shadow


def rest(serving: Serving, meanwhile: Callable[[], Any] | None = None) -> Any:
    """Let it score until nothing is left, and `meanwhile` do its work."""

    async def run() -> Any:
        scoring = asyncio.create_task(check_of(serving).run())
        try:
            async with asyncio.timeout(20):
                done = await meanwhile() if meanwhile else None
                while check_of(serving).num_kept or serving.server.engine._streams or check_of(serving)._is_filled.is_set():
                    await asyncio.sleep(0.01)
            return done
        finally:
            scoring.cancel()

    return serving.run(run())


def page_of(serving: Serving) -> dict[str, float]:
    lines = serving.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def total(serving: Serving, name: str, **labels: str) -> float:
    return sum(
        value
        for key, value in page_of(serving).items()
        if key.partition("{")[0] == f"moa_shadow_{name}_total" and all(f'{label}="{text}"' in key for label, text in labels.items())
    )


def test_an_answer_that_left_experts_out_is_scored_when_it_is_quiet(begun: Callable[..., Serving]) -> None:
    serving = begun()
    serving.ok(COMPLETIONS, **ASK, n=2)
    assert total(serving, "requests") == 0
    assert serving.get("/v1/adapters/sparse_fn/experts").json()["shadow"] is None
    rest(serving)
    assert total(serving, "requests", adapter="sparse_fn") == 2
    assert total(serving, "tokens", adapter="sparse_fn") == 24
    assert total(serving, "skipped") == 0
    told = serving.get("/v1/adapters/sparse_fn/experts").json()["shadow"]
    sums = [total(serving, name, adapter="sparse_fn") for name in ("gap", "kl", "flips")]
    assert told["tokens"] == 24
    assert [told["mean_gap"], told["mean_kl"], told["flip_rate"]] == pytest.approx([value / 24 for value in sums])
    assert sums[0] > 0 < sums[1]
    serving.assert_clean()


NOT_TRAFFIC = (
    "moa_engine_steps",
    "moa_step",
    "moa_shadow",
    "process_",
    "moa_event_loop",
    "http_",
    "moa_http",
    "vllm:iteration",
    "vllm:lora_requests_info",
)


def test_nothing_else_is_counted(begun: Callable[..., Serving]) -> None:
    """But the engine's steps, which are steps. A client's numbers must not depend on whether he was sampled."""
    serving = begun()
    serving.ok(COMPLETIONS, **ASK)
    serving.ok(COMPLETIONS, **ASK | {"model": "mola_layerwise"}, cache_salt="mine")
    before = {key: value for key, value in page_of(serving).items() if not key.startswith(NOT_TRAFFIC)}
    hits, used = serving.server.registry.item("sparse_fn").hits, serving.server.registry.item("sparse_fn").last_used
    rest(serving)
    assert total(serving, "requests") == 2
    assert {key: value for key, value in page_of(serving).items() if not key.startswith(NOT_TRAFFIC)} == before
    assert any("moa_expert_selected_total" in key for key in before)
    item = serving.server.registry.item("sparse_fn")
    assert (item.hits, item.last_used, item.leases) == (hits, used, 0)
    serving.assert_clean()


@pytest.mark.parametrize(
    "body",
    [
        {"model": "tiny"}, {"model": "soft"}, {"model": "instance"}, {"moa": {"mode": "soft"}}, {"prompt": "x" * 2100},
        {"prompt": "x", "max_tokens": 0, "echo": True, "logprobs": 1},
    ],
    ids=str,
)  # fmt: skip
def test_others_are_not_kept(begun: Callable[..., Serving], body: dict[str, Any]) -> None:
    serving = begun(max_batch_tokens=256)
    serving.ok(COMPLETIONS, **ASK | body)
    assert check_of(serving).num_kept == 0
    assert total(serving, "skipped", reason="too_long") == (body.get("prompt") == "x" * 2100)


def test_options_that_select_make_a_soft_adapters_answer_one(begun: Callable[..., Serving]) -> None:
    serving = begun()
    serving.ok(COMPLETIONS, **ASK | {"model": "soft", "moa": {"top_k": 2}})
    rest(serving)
    assert total(serving, "requests", adapter="soft") == 1


def test_a_request_that_ends_badly_is_not_kept(begun: Callable[..., Serving]) -> None:
    serving = begun()
    serving.run(serving.converse(COMPLETIONS, ASK | {"max_tokens": 3000, "stream": True}, lambda message: message["type"] == "sent"))
    assert serving.post(COMPLETIONS, **ASK | {"moa": {"top_k": 99}}).status_code == 400
    assert check_of(serving).num_kept == 0


def test_the_oldest_makes_room(begun: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "MAX_KEPT", 3)
    serving = begun()
    for _ in range(5):
        serving.ok(COMPLETIONS, **ASK)
    assert check_of(serving).num_kept == 3
    assert total(serving, "skipped", adapter="sparse_fn", reason="dropped") == 2
    rest(serving)
    assert total(serving, "requests") == 3


def test_a_share_is_a_share(begun: Callable[..., Serving]) -> None:
    serving = begun(shadow_share=0.25)
    check_of(serving)._draw = iter([0.3, 0.24, 0.25, 0.9]).__next__
    serving.ok(COMPLETIONS, **ASK, n=4)
    assert check_of(serving).num_kept == 1


def test_without_a_share_there_is_nothing(begun: Callable[..., Serving]) -> None:
    serving = begun(shadow_share=0)
    serving.ok(COMPLETIONS, **ASK)
    assert serving.server.shadow is None
    assert not [key for key in page_of(serving) if key.startswith("moa_shadow")]
    assert "text" in serving.ok(COMPLETIONS, **ASK)["choices"][0]


def test_who_comes_ends_it_and_it_is_tried_again(begun: Callable[..., Serving]) -> None:
    """A client must not wait for a question that nobody asked, nor get another answer because of it."""
    serving = begun()
    long = ASK | {"prompt": "a long one " * 70}
    expected = serving.ok(COMPLETIONS, **long)["choices"][0]["text"]
    rest(serving)
    serving.ok(COMPLETIONS, **long)
    engine, ended = serving.server.engine, []
    end = engine.end_background

    def noted() -> None:
        ended.append(len(engine._background))
        end()

    engine.end_background = noted  # type: ignore[method-assign]

    async def come() -> str:
        while not engine._background:
            await asyncio.sleep(0)
        answer = await serving.send("POST", COMPLETIONS, json=long)
        text: str = answer.json()["choices"][0]["text"]
        return text

    assert rest(serving, come) == expected
    assert ended[0] == 2, "both were ended when it was let in, before anything was done for it"
    assert total(serving, "requests") == 3
    assert total(serving, "skipped") == 0
    serving.assert_clean()


def test_an_adapter_that_is_gone_is_not_fetched_back(begun: Callable[..., Serving]) -> None:
    """Nor are its series: who unloads an adapter has freed what it held."""
    serving = begun()
    serving.ok(COMPLETIONS, **ASK)
    assert serving.run(serving.send("DELETE", "/v1/adapters/sparse_fn")).status_code == 200
    rest(serving)
    page = page_of(serving)
    assert not [key for key in page if key.startswith("moa_shadow") and "sparse_fn" in key]
    assert page['moa_shadow_skipped_total{adapter="other",reason="gone"}'] == 1
    assert page['moa_adapter_cache_misses_total{tier="host"}'] == 1
    serving.assert_clean()


def test_an_unload_does_not_wait_for_it(begun: Callable[..., Serving]) -> None:
    serving = begun()
    serving.ok(COMPLETIONS, **ASK | {"prompt": "a long one " * 70})
    num_bytes = serving.server.registry.item("sparse_fn").bytes

    async def unload() -> Any:
        while not serving.server.engine._background:
            await asyncio.sleep(0)
        return (await serving.send("DELETE", "/v1/adapters/sparse_fn")).json()

    assert rest(serving, unload)["freed_bytes"] == num_bytes > 0
    assert total(serving, "requests") == 0
    serving.assert_clean()


def test_one_that_stands_in_no_slot_is_left_where_it_is(begun: Callable[..., Serving]) -> None:
    serving = begun()
    serving.ok(COMPLETIONS, **ASK)
    serving.server.engine.trim()
    serving.ok(COMPLETIONS, model="tiny", prompt=[5], max_tokens=1)
    rest(serving)
    assert total(serving, "skipped", reason="gone") == 1
    assert serving.server.registry.item("sparse_fn").tiers == ("disk", "host")


def test_experts_that_overflow_where_nobody_keeps_them_are_told_and_no_more(
    begun: Callable[..., Serving], folder: Path, tmp_path: Path
) -> None:
    """NaN with every expert kept says that an expert is broken that the adapter never keeps: of its answers it says nothing."""
    raw = raw_manifest("sparse_const", CONFIG)
    raw["router"]["select"]["threshold"] = 1.0
    manifest = Manifest.parse(raw)
    write_family(tmp_path / "plain", "sparse_const", config=CONFIG)
    tensors = load_file(tmp_path / "plain" / "adapter.safetensors")
    write_adapter(folder / "broken", manifest, {name: tensor * (1e30 if ".b" in name.lower() else 1) for name, tensor in tensors.items()})
    serving = begun()
    for _ in range(4):
        serving.ok(COMPLETIONS, **ASK | {"model": "broken"})
    rest(serving)
    assert total(serving, "skipped", adapter="broken", reason="not_finite") == 4
    assert total(serving, "tokens") == 0
    serving.ok(COMPLETIONS, **ASK | {"model": "broken"})


@pytest.mark.filterwarnings("ignore")
def test_a_failure_is_counted_and_the_next_one_is_scored(begun: Callable[..., Serving], inject: Callable[..., None]) -> None:
    serving = begun()
    for _ in range(2):
        serving.ok(COMPLETIONS, **ASK)
    inject({"at": "forward", "raise": "RuntimeError", "times": 2})  # the step, and then the first of its two runs by itself
    rest(serving)
    assert total(serving, "skipped", reason="failed") == 1
    assert total(serving, "requests") == 1
    serving.ok(COMPLETIONS, **ASK)
    serving.assert_clean()


def test_it_waits_while_memory_is_short_or_the_server_leaves(begun: Callable[..., Serving]) -> None:
    serving = begun()
    serving.ok(COMPLETIONS, **ASK)

    async def look() -> bool:
        await asyncio.sleep(0.2)
        return bool(check_of(serving).num_kept)

    serving.server.is_draining = True

    async def run() -> bool:
        scoring = asyncio.create_task(check_of(serving).run())
        try:
            return await look()
        finally:
            scoring.cancel()

    assert serving.run(run())
    serving.server.is_draining, serving.server.memory.share = False, 0.91
    assert serving.run(run())
    serving.server.memory.share = None
    rest(serving)
    assert total(serving, "requests") == 1

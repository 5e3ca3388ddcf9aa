"""The gathered shrink against torch, and the step with slots' rows in buffers of their own against that with them among the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY, raw_manifest, write_base
from kernel_device import DEVICE, MARKS
from support import llama_8b_config, random_tensors
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.gpu.layout import SlotLayout, SlotShape
from moa_serve.gpu.model import FusedTransformer
from moa_serve.gpu.placement import Placement, input_splits
from moa_serve.gpu.shrink import BLOCK, TILE, num_tiles, shrink
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch, PooledRows, PreparedAdapter, RoutingTrace, Segment
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

pytestmark = MARKS
CPU = torch.device("cpu")
NAN = float("nan")
LEFT = 7.0  # stands wherever nothing may be written
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-4}  # sums of a bfloat16's products are float32 as well


@pytest.mark.parametrize(
    ("inputs", "splits", "block", "rows", "router_rows", "slots", "dtype"),
    [
        (24, 1, BLOCK, 21, 9, 1, torch.float32),
        (40, 2, 16, 40, 17, 3, torch.float32),
        (576, 4, BLOCK, 8, 0, 16, torch.float32),
        (40, 4, 32, 24, 16, 2, torch.bfloat16),  # two of the four have nothing to do
    ],
)
def test_every_token_meets_its_own_slots_rows_only(
    inputs: int, splits: int, block: int, rows: int, router_rows: int, slots: int, dtype: torch.dtype
) -> None:
    """A row past the section's end is the next slot's first: read, multiplied by 0 or written, it brings one tenant into another."""
    torch.manual_seed(0)
    counts = [16, 1, 5, 3, 0, 9]
    tokens, last = sum(counts), slots - 1
    of_chunk = [0, last, -1, last, -1, last // 2]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    a, x = (torch.randn(tokens, inputs).to(dtype) for _ in range(2))
    weight = torch.randn(slots, rows, inputs).to(dtype)
    reads_x = torch.arange(slots) % 2 == 0
    expected = torch.full((tokens, rows), LEFT)
    for start, count, slot in zip(starts, counts, of_chunk, strict=True):
        if slot >= 0:
            own = slice(start, start + count)
            expected[own] = a[own].float() @ weight[slot].float().T
            if reads_x[slot]:
                expected[own, :router_rows] = x[own].float() @ weight[slot, :router_rows].float().T
    for slot in set(range(slots)) - set(of_chunk):
        weight[slot] = NAN
    broken = starts[5] + 2  # a token that overflowed; so did all of the base's, which nobody multiplies
    a[broken], x[broken], expected[broken] = NAN, NAN, NAN
    a[starts[2] : starts[3]], x[starts[2] : starts[3]] = NAN, NAN
    chunks = torch.tensor([[start, count, slot, 0, 0, -1, 0, 0] for start, count, slot in zip(starts, counts, of_chunk, strict=True)])
    low = torch.full((splits, tokens + 1, rows), LEFT, device=DEVICE)
    given = chunks.int().to(DEVICE), a.to(DEVICE), x.to(DEVICE), weight.to(DEVICE), reads_x[:, None].int().to(DEVICE)
    shrink[len(chunks), num_tiles(rows, router_rows), splits](
        *given[:4], low, low.stride(0), given[4], 1,
        K=inputs, ROWS=rows, ROUTER_ROWS=router_rows, AT_RESIDUAL=0, C=16, N=TILE, BLOCK=block, SPLITS=splits,
    )  # fmt: skip
    found = low.cpu()
    assert (found[:, starts[2] : starts[3]] == LEFT).all(), "of the base"
    assert (found[:, tokens] == LEFT).all(), "behind the last token"
    of_adapters = torch.cat((torch.arange(starts[2]), torch.arange(starts[3], tokens)))
    tolerance = TOLERANCE[dtype] * inputs**0.5
    torch.testing.assert_close(found.sum(0)[of_adapters], expected[of_adapters], atol=tolerance, rtol=1e-5, equal_nan=True)


class MixedRows:
    """Two adapters and the base in one batch, step after step, each with a page of its own."""

    def __init__(self, model: Any, adapters: list[Adapter]) -> None:
        self.model = model
        self.prepared: list[PreparedAdapter] = [model.prepare(adapter, slot) for slot, adapter in zip((2, 0), adapters, strict=True)]
        self.cache = model.new_cache(4, 16)
        self.cache.zero(range(4))
        self.words: list[Tensor | None] = [None, None]
        self.done = [0, 0, 0]
        self.trace = RoutingTrace()

    def step(self, rows: list[list[int]]) -> Tensor:
        """Logits of these tokens: of the first adapter, of the second, of the base."""
        spans, segments, start = [], [], 0
        for row, ids in enumerate(rows):
            spans.append(CachedSpan(start, len(ids), self.done[row], [row + 1]))
            if row < len(self.prepared):
                segments.append(Segment(start, start + len(ids), self.prepared[row], self._pooled(row, len(ids))))
            start += len(ids)
        positions = torch.cat([torch.arange(span.computed, span.computed + span.count) for span in spans])
        self.trace = RoutingTrace()
        batch = ForwardBatch(torch.tensor([token for ids in rows for token in ids]), positions, tuple(segments), trace=self.trace)
        with torch.inference_mode():
            logits: Tensor = self.model.forward(batch, self.cache.attention(spans))
        for row, segment in enumerate(segments):
            if segment.pooled is not None:
                self.words[row] = segment.pooled.words
        self.done = [done + len(ids) for done, ids in zip(self.done, rows, strict=True)]
        return logits

    def _pooled(self, row: int, count: int) -> PooledRows | None:
        if not self.prepared[row].manifest.is_pooled:
            return None
        pooled = PooledRows.of_whole([count], [count], self.prepared[row], CPU)
        words = self.words[row]
        return pooled if words is None else PooledRows(pooled.row_of_token, (None,), words)


CONFIG = TINY | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), CONFIG)


def adapter_of(family: str, seed: int) -> Adapter:
    """In both layers of the base."""
    raw = raw_manifest(family, CONFIG)
    for expert in raw["experts"]:
        expert["layers"] = [0, 1]
    manifest = Manifest.parse(raw)
    return Adapter(manifest, random_tensors(manifest, seed, scale=0.2), f"{seed}", "moa-adapter/1")


class Launches:
    """Calls kernels, and keeps their names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.names.append(kernel.fn.__name__)
        kernel[grid](*args, **options)


def fused(base: Path, adapters: list[Adapter], gathers: bool, launch: Any) -> FusedTransformer:
    loaded = load_base(base, dtype=torch.float32)
    shape = SlotShape.union(SlotShape.of(adapter.manifest) for adapter in adapters)
    return FusedTransformer(loaded.config, loaded.weights, num_slots=3, shape=shape, max_tokens=16, gathers=gathers, launch=launch)


@pytest.mark.parametrize(
    "families",
    [
        ("soft", "soft_softmax"),  # only the first one's router reads the residual stream
        ("soft_softmax", "soft_softmax"),
        ("sparse_fn", "sparse_fn"),
        ("molora", "hydralora"),
        ("nested_hydra", "nested_hydra"),
        ("instance", "instance"),
    ],
    ids="-".join,
)
def test_rows_apart_give_what_rows_among_the_weights_give(base: Path, families: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads these products must add all parts up, of its own slot, and of the layer router those with the right input."""
    monkeypatch.setattr("moa_serve.gpu.placement._SPLIT", 16)  # 32 inputs in two parts, 48 in three
    monkeypatch.setattr("moa_serve.gpu.model.BLOCK", 16)
    adapters = [adapter_of(family, seed) for seed, family in enumerate(families)]
    launches = Launches()
    apart = fused(base, adapters, True, launches)
    loaded = load_base(base, dtype=torch.float32)
    ours, theirs, defined = (
        MixedRows(model, adapters)
        for model in (apart, fused(base, adapters, False, Launches()), Transformer(loaded.config, loaded.weights))
    )
    steps = [[[5, 17, 80], [44, 9], [3]], [[7], [8], [9]]]
    for rows in steps if "instance" in families else steps[:1]:  # a pooled prompt's mean is taken in the first, and stays
        found = ours.step(rows)
        torch.testing.assert_close(found, theirs.step(rows), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found, defined.step(rows), atol=2e-4, rtol=1e-4)
        _same_choices(ours.trace, defined.trace)
        products = sum(section.rows > 0 for section in apart.layout.sections.values())
        assert launches.names.count("shrink") == 2 * products, "in two layers one of each product that has rows"
        launches.names.clear()


def _same_choices(ours: RoutingTrace, theirs: RoutingTrace) -> None:
    assert ours.records.keys() == theirs.records.keys()
    for segment, layers in theirs.records.items():
        for layer, routers in layers.items():
            for site, routed in routers.items():
                assert torch.equal(ours.records[segment][layer][site].selected, routed.selected), (layer, site)


def test_a_step_of_the_base_alone_shrinks_nothing(base: Path) -> None:
    """What adapters cost is paid by who uses one: their slots' mere existence must not add a launch to others' steps."""
    adapters = [adapter_of("sparse_fn", 1)]
    launches = Launches()
    model = fused(base, adapters, True, launches)
    model.prepare(adapters[0], 1)
    cache = model.new_cache(2, 16)
    with torch.inference_mode():
        model.forward(ForwardBatch(torch.tensor([5]), torch.tensor([0]), ()), cache.attention([CachedSpan(0, 1, 0, [1])]))
    assert "residual" in launches.names
    assert "shrink" not in launches.names


def test_few_rows_stand_among_the_weights_and_many_apart() -> None:
    """The form is a cost, never a result: with 8 usual slots LLaMA-3.1-8B must take the one without further launches."""
    layout = SlotLayout(llama_8b_config(), SlotShape.usual(), is_exact=False)
    assert not Placement(layout, 8, 2).gathers
    assert Placement(layout, 16, 2).gathers
    apart, among = (Placement(layout, 16, 2).step_bytes(1, 1, gathers=gathers) for gathers in (True, False))
    assert 15 < among / apart < 16.5, "of sixteen slots one adapter reads one, or all"


@pytest.mark.parametrize("inputs", [32, 576, 4096, 14336])
def test_parts_have_no_fewer_inputs_than_they_are_worth(inputs: int) -> None:
    """Each reader adds them up again: parts of a few inputs would cost more than they save."""
    assert inputs // input_splits(inputs) >= min(inputs, 1024) or input_splits(inputs) == 16

"""Recorded decode steps, with a tape in the place of CUDA graphs: a replay runs nothing but the recorded operations on their tensors."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import random_adapter, write_base
from kernel_device import DEVICE, MARKS
from tapes import TapeRecorder
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.rules import RoutingOptions, RoutingRules, rules_for
from moa_serve.gpu.layout import SlotShape
from moa_serve.gpu.model import FusedTransformer
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch, PooledRows, RoutingTrace, Segment
from moa_serve.model.counters import RouterCounters
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

pytestmark = MARKS  # where there is a GPU, its graphs take the place of the tape
PAGE, PAGES, MOST = 4, 3, 4


def made(family: str, seed: int) -> Adapter:
    manifest, tensors = random_adapter(family, seed)
    return Adapter(manifest, tensors, f"{family}-{seed}", "test")


class Served:
    """Up to `MOST` sequences on a model, each with its adapter; the same calls on two models are to give the same numbers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = model.new_cache(MOST * PAGES + 1, PAGE)
        self.cache.zero(range(MOST * PAGES + 1))
        self.slots: dict[int, Any] = {}
        self.counters: dict[int, RouterCounters] = {}
        self.done = [0] * MOST
        self.words: dict[int, Tensor] = {}

    def load(self, slot: int, adapter: Adapter) -> None:
        self.slots.pop(slot, None)
        self.slots[slot] = self.model.prepare(adapter, slot)
        self.counters[slot] = RouterCounters(adapter.manifest, DEVICE)

    def step(
        self, rows: Sequence[tuple[int, int | None, RoutingRules | None]], tokens: Sequence[Sequence[int]], *, is_traced: bool = False
    ) -> tuple[Tensor, RoutingTrace | None]:
        """(rows, V): logits of the last of `tokens` of each row, whose sequence, slot and rules are given."""
        ids: list[int] = []
        positions: list[int] = []
        segments, spans, wanted = [], [], []
        for (sequence, slot, rules), own in zip(rows, tokens, strict=True):
            start, done = len(ids), self.done[sequence]
            ids += own
            positions += range(done, done + len(own))
            wanted.append(len(ids) - 1)
            spans.append(CachedSpan(start, len(own), done, [1 + sequence * PAGES + page for page in range(PAGES)]))
            self.done[sequence] += len(own)
            if slot is not None:
                adapter = self.slots[slot]
                pooled = None
                if adapter.manifest.is_pooled:
                    pooled = PooledRows.of_whole([len(own)], [len(own)], adapter, DEVICE)
                    if sequence in self.words:
                        pooled = PooledRows(pooled.row_of_token, (None,), self.words[sequence])
                    self.words[sequence] = pooled.words
                segments.append(Segment(start, len(ids), adapter, pooled, self.counters[slot], rules))
        trace = RoutingTrace() if is_traced else None
        token_ids, places, logit_rows = (torch.tensor(part, device=DEVICE) for part in (ids, positions, wanted))
        batch = ForwardBatch(token_ids, places, tuple(segments), logit_rows, trace)
        with torch.inference_mode():
            return self.model.forward(batch, self.cache.attention(spans)).cpu(), trace


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Served, Served, TapeRecorder]:
    """The fused step with recorded steps of 1, 2 and 4 rows, all of them recorded while no slot had an adapter; and the definition."""
    folder = write_base(tmp_path_factory.mktemp("graphs") / "base")
    recorder = TapeRecorder()
    base = load_base(folder, device=DEVICE, dtype=torch.float32)
    families = ("soft", "nested_hydra", "instance", "mola_layerwise")
    shape = SlotShape.union(SlotShape.of(made(family, 1).manifest) for family in families)
    taped: dict[str, Any] = {} if DEVICE.type == "cuda" else {"launch": recorder.launch, "recorder": recorder}
    fused = FusedTransformer(base.config, base.weights, num_slots=3, shape=shape, max_tokens=MOST, **taped)
    return Served(fused), Served(Transformer(base.config, load_base(folder, device=DEVICE, dtype=torch.float32).weights)), recorder


def both(pair: tuple[Served, Served, TapeRecorder], *args: Any, **more: Any) -> tuple[RoutingTrace | None, RoutingTrace | None]:
    (ours, our_trace), (theirs, their_trace) = (served.step(*args, **more) for served in pair[:2])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    return our_trace, their_trace


def test_replays_are_right_whatever_stands_in_the_slots(pair: tuple[Served, Served, TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay of a step that was recorded with fewer adapters, other lengths or another adapter in the slot would be silently wrong
    (SGLang's issue 28371)."""
    fused, definition, _ = pair
    assert fused.model.num_recorded == 6, "1, 2 and 4 rows, without adapters and with"
    for served in (fused, definition):
        for slot, family in enumerate(("soft", "nested_hydra", "instance")):
            served.load(slot, made(family, slot))
    rows: list[tuple[int, int | None, RoutingRules | None]] = [(0, 0, None), (1, 1, None), (2, 2, None), (3, None, None)]
    for row, prompt in zip(rows, ([5, 9, 30], [7], [11, 12, 13, 14], [90, 2]), strict=True):
        both(pair, [row], [prompt])

    computed = 0

    def counted(*args: Any) -> Any:
        nonlocal computed
        computed += 1
        return original(*args)

    original = fused.model._computed
    monkeypatch.setattr(fused.model, "_computed", counted)
    both(pair, rows, [[3], [4], [5], [6]])  # four kinds in one step, more than when it was recorded
    both(pair, rows[3:], [[8]])  # the base alone
    both(pair, rows[:3], [[8], [9], [10]])  # three rows by the step of four
    for served in (fused, definition):
        served.load(1, made("mola_layerwise", 7))
    rows[1] = (1, 1, None)
    both(pair, rows[1:], [[20], [21], [22]])  # another adapter where one was
    options = RoutingOptions(threshold=0.5, disable=("Q",))
    rows[0] = (0, 0, rules_for(options, fused.slots[0].manifest))
    ours, theirs = both(pair, rows, [[30], [31], [32], [33]], is_traced=True)
    assert computed == 0, "all of these were replays"
    assert ours is not None
    assert theirs is not None
    for number, layers in theirs.records.items():
        for layer, routers in layers.items():
            for site, routed in routers.items():
                assert torch.equal(ours.records[number][layer][site].selected, routed.selected)
    for slot, counters in definition.counters.items():
        for name in ("selected", "gate_sum", "thresholds"):
            torch.testing.assert_close(getattr(fused.counters[slot], name), getattr(counters, name), atol=1e-4, rtol=1e-5)


def test_all_recorded_steps_of_one_kind_are_the_same_operations(pair: tuple[Served, Served, TapeRecorder]) -> None:
    """What a step runs must not depend on how many rows it has, or a bucket would be another computation."""
    tapes = pair[2].tapes
    if not tapes:
        pytest.skip("a CUDA graph does not tell what is in it")
    for kind in (0, 1):
        names = [tape.names for tape in tapes[kind::2]]
        assert all(found == names[0] for found in names)


def test_more_kinds_of_options_than_ever_before_are_recorded_anew(pair: tuple[Served, Served, TapeRecorder]) -> None:
    """The table of rules then stands elsewhere: a replay would read the old one, which nobody writes any more."""
    fused, definition, recorder = pair
    table, before = fused.model._rules, list(recorder.tapes)
    table._known.clear()
    for served in (fused, definition):
        served.load(0, made("soft", 0))
    manifest = fused.slots[0].manifest
    many = [rules_for(RoutingOptions(threshold=number / 999), manifest) for number in range(1, len(table.thresholds) - 1)]
    for rules in many:
        table.row(0, manifest, rules, in_use=set())
    in_use = set(table._known.values())
    last = rules_for(RoutingOptions(top_k=2), manifest)
    table.row(0, manifest, last, in_use)  # all rows are in use
    assert table.generation == 1
    both(pair, [(0, 0, last)], [[40]])
    both(pair, [(0, 0, many[-1])], [[41]])
    if before:
        assert len(recorder.tapes) == 6
        assert not set(map(id, recorder.tapes)) & set(map(id, before))

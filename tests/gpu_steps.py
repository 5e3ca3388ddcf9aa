"""Steps of the fused form beside the definition, on one base: sequences of several adapters, put together as the engine's runner does it.

For tests of moa_serve.gpu. Every step computes one batch in both, each with a cache of its own, and compares all that a forward gives:
logits, what routers said, instance-level weights, and totals.
"""

import copy
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from families import FAMILIES, TINY
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import FORMAT, BaseShape, Manifest
from moa_serve.adapter.rules import RoutingOptions, RoutingRules, rules_for
from moa_serve.config import ModelConfig
from moa_serve.gpu.layout import SlotShape
from moa_serve.gpu.model import FusedTransformer
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch, PooledRows, PreparedAdapter, RoutingTrace, Segment
from moa_serve.model.counters import RouterCounters
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import BaseWeights, allocate, named_tensors

CPU = torch.device("cpu")
PAGE = 16
PAGES = 4  # of each sequence
SMALL = TINY | {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "vocab_size": 20,
}  # fmt: skip
"""Three heads on one, and no size a power of two; its kernels take few programs."""


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> BaseWeights:
    weights = allocate(config, CPU, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in named_tensors(config, weights):
        scale = 1.0 if name.startswith("model.embed") else 0.3 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + ("norm.weight" in name))
    return weights


def manifest_of(family: str, config: dict[str, Any], **changes: Any) -> Manifest:
    """One of `FAMILIES` for a base of fewer layers; `changes` are made to its experts where they have such a field."""
    variant, router, experts = copy.deepcopy(FAMILIES[family])
    layers = config["num_hidden_layers"]
    if isinstance(router.get("hidden"), list):
        router["hidden"] = router["hidden"][:layers]
    kept = []
    for expert in experts:
        expert["layers"] = [layer for layer in expert["layers"] if layer < layers]
        expert.update({name: value for name, value in changes.items() if name in expert})
        if expert["layers"]:
            kept.append(expert)
    return manifest(config, variant, router, kept)


def manifest(config: dict[str, Any], variant: str, router: dict[str, Any], experts: list[dict[str, Any]]) -> Manifest:
    base = BaseShape.of(ModelConfig.from_hf(config)).model_dump(exclude_none=True)
    return Manifest.parse({"format": FORMAT, "base": base, "variant": variant, "router": router, "experts": experts})


_revisions = itertools.count()


def random_tensors(manifest: Manifest, seed: int = 1) -> dict[str, Tensor]:
    """Large enough that every wrong rule shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.7 if name.endswith(("bias", "gate", "rows")) else max(shape[-1], 1) ** -0.5)
        for name, shape in manifest.expected_tensors().items()
    }


def an_adapter(manifest: Manifest, seed: int = 1, tensors: Mapping[str, Tensor] | None = None) -> Adapter:
    return Adapter(manifest, tensors or random_tensors(manifest, seed), f"revision-{next(_revisions)}", "moa-adapter/1")


@dataclass(eq=False)
class Text:
    """A sequence: its tokens, its pages, and how many of its tokens are computed."""

    tokens: list[int]
    name: str | None
    rules: RoutingRules | None
    blocks: list[int]
    num_prompt: int
    branches: tuple[tuple[int, int], ...] = ()
    computed: int = 0
    words: list[Tensor | None] = field(default_factory=lambda: [None, None])  # ours, theirs


@dataclass(eq=False)
class Side:
    """One model of a `Pair`, with what it has of each adapter."""

    model: Any
    cache: Any
    adapters: dict[str, PreparedAdapter] = field(default_factory=dict)
    counters: dict[tuple[str, bool], RouterCounters] = field(default_factory=dict)


class Pair:
    """The fused form and the definition on equal weights.

    Args:
        adapters: each in the slot of its place. num_slots: at least as many.
        shape: of a slot; by default the largest of what the adapters need.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        config: dict[str, Any] = SMALL,
        *,
        num_slots: int | None = None,
        shape: SlotShape | None = None,
        max_tokens: int = 64,
        texts: int = 24,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        parsed = ModelConfig.from_hf(config)
        if shape is None:
            shape = SlotShape.union(SlotShape.of(adapter.manifest) for adapter in adapters.values())
        fused = FusedTransformer(
            parsed, random_weights(parsed, dtype), num_slots=num_slots or len(adapters), shape=shape, max_tokens=max_tokens
        )
        definition = Transformer(parsed, random_weights(parsed, dtype))
        blocks = texts * PAGES + 1
        self.config = config
        self.ours, self.theirs = (Side(model, model.new_cache(blocks, PAGE)) for model in (fused, definition))
        self.fused: FusedTransformer = fused
        self._blocks = itertools.count(1)
        self.evaluations: defaultdict[int, int] = defaultdict(int)  # by the counters that have the same
        for slot, (name, adapter) in enumerate(adapters.items()):
            self.put(name, adapter, slot)

    def put(self, name: str, adapter: Adapter, slot: int) -> None:
        """The adapter into the slot, with totals of its own."""
        for side in (self.ours, self.theirs):
            side.adapters[name] = side.model.prepare(adapter, slot)
            for is_altered in (False, True):
                side.counters[name, is_altered] = counters = RouterCounters(adapter.manifest, CPU)
                self.evaluations[id(counters)] = 0

    def text(self, name: str | None, count: int, *, moa: dict[str, Any] | None = None, seed: int = 0, branches: Sequence[int] = ()) -> Text:
        """A sequence of `count` tokens, and of branches behind them with so many computed tokens each."""
        total = count + sum(branches)
        generator = torch.Generator().manual_seed(seed + 31 * total)
        tokens = torch.randint(self.config["vocab_size"], (max(total, PAGE * PAGES),), generator=generator).tolist()
        blocks = [next(self._blocks) for _ in range(PAGES)]
        for side in (self.ours, self.theirs):
            side.cache.zero(blocks)
        rules = None
        if moa is not None:
            assert name is not None
            rules = rules_for(RoutingOptions.of(moa), self.theirs.adapters[name].manifest)
        ends = list(itertools.accumulate(branches, initial=count))
        return Text(tokens, name, rules, blocks, count, tuple(itertools.pairwise(ends)))

    def step(self, work: Sequence[tuple[Text, int]], *, atol: float = 2e-4, logit_rows: Sequence[int] | None = None) -> Tensor:
        """Compute the next tokens of each text; texts of one adapter and rule stand side by side. (N, V), ours, compared with theirs."""
        results = []
        for number, side in enumerate((self.ours, self.theirs)):
            batch, logits = self.forward(side, number, work, logit_rows)
            for segment, group in zip(batch.segments, self._groups(work), strict=True):
                if segment.pooled is not None:
                    for row, (text, _) in enumerate(group[1]):
                        text.words[number] = segment.pooled.words[row].clone()
            results.append((batch, logits))
        (ours, found), (theirs, expected) = results
        torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4, equal_nan=True)
        self._compare(ours, theirs)
        for text, count in work:
            text.computed += count
        out: Tensor = found
        return out

    def alone(self, work: Sequence[tuple[Text, int]]) -> Tensor:
        """(T, V): the same of ours, compared with nothing: where numbers overflow, both become infinite at other places."""
        return self.forward(self.ours, 0, work)[1]

    def forward(
        self, side: Side, number: int, work: Sequence[tuple[Text, int]], logit_rows: Sequence[int] | None = None
    ) -> tuple[ForwardBatch, Tensor]:
        """The step in one of the two, 0 ours and 1 theirs; nothing is kept of it but keys, values and totals."""
        batch = self._batch(side, number, work)
        if logit_rows is not None:
            batch.logit_rows = torch.tensor(logit_rows, dtype=torch.int64)
        with torch.inference_mode():
            logits: Tensor = side.model.forward(batch, side.cache.attention(_spans(work)))
        return batch, logits

    def _groups(self, work: Sequence[tuple[Text, int]]) -> list[tuple[int, list[tuple[Text, int]]]]:
        """First token and texts of each segment."""
        found, start = [], 0
        for (name, _), run in itertools.groupby(work, key=lambda item: (item[0].name, item[0].rules and item[0].rules.key)):
            group = list(run)
            if name is not None:
                found.append((start, group))
            start += sum(count for _, count in group)
        return found

    def _batch(self, side: Side, number: int, work: Sequence[tuple[Text, int]]) -> ForwardBatch:
        ids = [token for text, count in work for token in text.tokens[text.computed : text.computed + count]]
        positions: list[int] = []
        for text, count in work:
            places = list(range(text.computed, text.computed + count))
            for start, end in text.branches:
                places[start:end] = [place - start + text.num_prompt for place in places[start:end]]
            positions += places
        segments = []
        for start, group in self._groups(work):
            text = group[0][0]
            assert text.name is not None
            adapter = side.adapters[text.name]
            counts = [count for _, count in group]
            pooled = None
            if adapter.manifest.is_pooled:
                pooled = PooledRows.of_whole(counts, [text.num_prompt for text, _ in group], adapter, CPU)
                kept = [text.words[number] for text, _ in group]
                for row, words in enumerate(kept):
                    if words is not None:
                        pooled.words[row] = words
                pooled.spans = tuple(span if words is None else None for span, words in zip(pooled.spans, kept, strict=True))
            counters = side.counters[text.name, text.rules is not None]
            segments.append(Segment(start, start + sum(counts), adapter, pooled, counters, text.rules))
        return ForwardBatch(torch.tensor(ids), torch.tensor(positions), tuple(segments), trace=RoutingTrace() if segments else None)

    def _compare(self, ours: ForwardBatch, theirs: ForwardBatch) -> None:
        assert (ours.trace is None) == (theirs.trace is None)
        if ours.trace is not None and theirs.trace is not None:
            compare_words(ours.trace, theirs.trace)
        for own, other in zip(ours.segments, theirs.segments, strict=True):
            if own.pooled is not None and other.pooled is not None:
                torch.testing.assert_close(own.pooled.words, other.pooled.words, atol=2e-5, rtol=1e-4, equal_nan=True)
        self._compare_evaluations(ours)
        for key, expected in self.theirs.counters.items():
            found = self.ours.counters[key]
            assert torch.equal(found.selected, expected.selected), key
            torch.testing.assert_close(found.gate_sum, expected.gate_sum, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(found.thresholds, expected.thresholds, atol=1e-3, rtol=1e-4)
            assert (found.computed <= expected.computed).all(), "the definition computes all"
            assert (found.computed >= found.selected).all()

    def _compare_evaluations(self, batch: ForwardBatch) -> None:
        """What traces say was computed adds up to what is counted: these totals are of steps in which every token is traced."""
        if batch.trace is None:
            return
        for number, segment in enumerate(batch.segments):
            if (trace := batch.trace.segments.get(number)) is not None and trace.evaluations is not None:
                self.evaluations[id(segment.counters)] += int(trace.evaluations.sum())
        for counters in self.ours.counters.values():
            assert int(counters.computed.sum()) == self.evaluations[id(counters)]


def compare_words(ours: RoutingTrace, theirs: RoutingTrace) -> None:
    assert ours.records.keys() == theirs.records.keys()
    for number, layers in theirs.records.items():
        assert ours.records[number].keys() == layers.keys()
        for layer, routers in layers.items():
            assert ours.records[number][layer].keys() == routers.keys()
            for site, routed in routers.items():
                own = ours.records[number][layer][site]
                assert torch.equal(own.selected, routed.selected), (number, layer, site)
                for name in ("scores", "threshold", "gates"):
                    torch.testing.assert_close(getattr(own, name), getattr(routed, name), atol=3e-5, rtol=1e-4, equal_nan=True)


def _spans(work: Sequence[tuple[Text, int]]) -> list[CachedSpan]:
    spans, start = [], 0
    for text, count in work:
        spans.append(CachedSpan(start, count, text.computed, text.blocks, text.num_prompt, text.branches))
        start += count
    return spans

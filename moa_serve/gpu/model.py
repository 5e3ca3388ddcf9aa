"""The step on a GPU: `FusedTransformer` computes what transformer.py defines, with an adapter's work inside the base's launches.

Per layer nine launches (ten where rows' keys are shared out to several programs), with and without adapters: four products of torch, and
between them the kernels of kernels.py and attention.py. Adapters stand in slots (slots.py), whose rows the products read with the base's,
or, where that would be too many bytes (placement.py), four more launches (shrink.py). An adapter that fits into no slot is computed by the
definition on the same weights and the same cache, apart from the rest of the batch. Owned by the engine thread.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.config import ModelConfig
from moa_serve.gpu import kernels
from moa_serve.gpu.attention import Prompts, SplitResults, decode_attention
from moa_serve.gpu.constants import Constants, Site
from moa_serve.gpu.graphs import RowGraphs, StaticStep
from moa_serve.gpu.kernels import START
from moa_serve.gpu.launch import Launch, launch
from moa_serve.gpu.layout import PRODUCTS, SlotLayout, SlotShape, block
from moa_serve.gpu.parts import Part
from moa_serve.gpu.placement import Placement
from moa_serve.gpu.plan import ROW_BUCKETS, FusedSizes, num_splits, recorded_bytes, step_bytes
from moa_serve.gpu.plan import TILE as TILE_COLUMNS
from moa_serve.gpu.pooled import Pooled, give, pooled_of
from moa_serve.gpu.products import ATTRIBUTES, multiply, placed
from moa_serve.gpu.rules import RuleTable
from moa_serve.gpu.shrink import BLOCK, NUM_STAGES, NUM_WARPS, TILE, num_tiles, shrink
from moa_serve.gpu.slots import Images, SlotBank, SlotImage, SlottedAdapter, image, slotted
from moa_serve.gpu.step import HostNumbers, StepBuffers, host_numbers, runs_of
from moa_serve.gpu.workspace import Low, Views, Workspace, doubled
from moa_serve.model.attention import (
    BranchedChunk,
    CachedSpan,
    Chunk,
    KVCache,
    PagedAttention,
    attend_branches,
    attend_chunk,
)
from moa_serve.model.batch import ForwardBatch, PreparedAdapter, RoutingTrace, Segment, SegmentTrace
from moa_serve.model.build import build
from moa_serve.model.clock import PartClock
from moa_serve.model.graphs import CudaRecorder, Recorder
from moa_serve.model.moa import MoaWeights
from moa_serve.model.ops import inverse_frequencies, on_device
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import BaseWeights, LayerWeights

logger = logging.getLogger(__name__)

_MOST_DOUBLED = 64
"""Tokens of a step whose residual stream takes part in the first product: with so few, weights are read and arithmetic is free. More of
them take a product of their own with the slots' rows alone, and a launch."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedSpans:
    """How the tokens of a step attend: sequences and their pages."""

    spans: Sequence[CachedSpan]


class FusedCache(KVCache):
    """The definition's pages, read by kernels of the own backend."""

    def attention(self, spans: Sequence[CachedSpan]) -> Any:
        return CachedSpans(spans)

    def definition(self, spans: Sequence[CachedSpan]) -> PagedAttention:
        return super().attention(spans)


class FusedTransformer:
    """`forward(batch, attention)` -> logits of the wanted rows.

    Args:
        weights: on the device; taken over: they may move into buffers that have the slots' rows behind the base's.
        num_slots: adapters at once. shape: the largest that a slot takes.
        max_tokens: of a step. max_rows: of one that is recorded.
        gathers: the slots' rows stand in buffers of their own; by default where that is better (placement.py).
        launch: calls a kernel. recorder: of decode steps; by default CUDA graphs on a GPU, and nothing is recorded elsewhere.
    """

    name = "triton"

    def __init__(
        self,
        config: ModelConfig,
        weights: BaseWeights,
        *,
        num_slots: int,
        shape: SlotShape,
        max_tokens: int,
        max_rows: int = ROW_BUCKETS[-1],
        gathers: bool | None = None,
        launch: Launch = launch,
        recorder: Recorder | None = None,
    ) -> None:
        self._launch, self._max_rows = launch, max_rows
        self._num_splits = num_splits(config)
        self._splits: SplitResults | None = None
        self.config, self.device = config, weights.embed.device
        self._dtype = weights.embed.dtype
        self.layout = SlotLayout(config, shape, is_exact=self._dtype == torch.float32)
        self._constants = Constants.of(self.layout)
        self._base_rows = {product: len(getattr(weights.layers[0], name)) for product, name in ATTRIBUTES.items()}
        placement = Placement(self.layout, num_slots, self._dtype.itemsize)
        self._gathers = placement.gathers if gathers is None else gathers
        if num_slots:
            logger.info("%s", placement.told(self._gathers))
        self._buffers, rows = placed(weights, self.layout, num_slots, self._gathers)
        self.weights = weights
        self.bank = SlotBank(self.layout, num_slots, rows, self._dtype, self.device)
        self._rules = RuleTable(self.layout, num_slots, self.device)
        self._images = Images()
        self._too_large: set[str] = set()  # revisions of which that was said
        self._standing: WeakValueDictionary[int, SlottedAdapter] = WeakValueDictionary()
        self._definition = Transformer(config, weights)
        self._workspace = self._new_workspace(max_tokens)
        self._frequencies = inverse_frequencies(config.rope, config.head_dim, self.device)
        self._graphs: RowGraphs | None = None
        if recorder is not None or self.device.type == "cuda":
            self._graphs = RowGraphs(recorder or CudaRecorder(), self._decode)
        self._recorded_rules = 0
        self._cache: FusedCache | None = None
        self._width = 0  # pages of a sequence, at most
        self._clock: PartClock | None = None
        self._layers_done = 0

    # -- what the engine asks

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def base_dtype(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    @property
    def adapter_dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def weight_bytes(self) -> int:
        return self.weights.num_bytes

    @property
    def beside_bytes(self) -> int:
        sizes = FusedSizes(self.config, self.layout.shape, self.bank.num_slots, self._workspace.max_tokens, self._dtype, self.device)
        return sizes.made_bytes

    def slots_bytes(self, num_slots: int) -> int:
        """They were allocated with the model."""
        return 0

    def step_bytes(self, num_tokens: int, context: int) -> int:
        """The workspace was allocated with the model."""
        return step_bytes(self.config, num_tokens, context, self._dtype.itemsize)

    def recorded_bytes(self, num_rows: int, context: int) -> int:
        return recorded_bytes(self.config, num_rows)

    def bytes_per_block(self, block_size: int) -> int:
        return KVCache.bytes_per_block(self.config, block_size, self._dtype)

    def new_cache(self, num_blocks: int, block_size: int) -> FusedCache:
        self._cache = FusedCache(self.config, num_blocks, block_size, self._dtype, self.device)
        self._width = min(num_blocks, -(-self.config.max_position // block_size))
        if self._graphs is not None:
            self._record(self._graphs)
        return self._cache

    def _record(self, graphs: RowGraphs) -> None:
        most = min(self._workspace.max_tokens, next((rows for rows in ROW_BUCKETS if rows >= self._max_rows), ROW_BUCKETS[-1]))
        self._split_results(most)  # recorded steps keep where it stands
        self._recorded_rules = self._rules.generation
        with torch.inference_mode():
            graphs.record(most, self._width, (self.config.num_layers, 2 * self.layout.output_block), self.device)

    def trial_cache(self, num_blocks: int, block_size: int) -> FusedCache:
        """One for a few steps before the one that serves; nothing is recorded for it."""
        self._cache = FusedCache(self.config, num_blocks, block_size, self._dtype, self.device)
        return self._cache

    def _built(self, adapter: Adapter) -> MoaWeights:
        """On the CPU in float32; a prompt's keys and values are made where the base stands."""
        base = BaseWeights(torch.empty(0), self.weights.layers, torch.empty(0), torch.empty(0))
        return build(adapter.manifest, adapter.tensors, base, self.config, torch.float32)

    def prepare(self, adapter: Adapter, slot: int | None = None) -> PreparedAdapter:
        if not self._fits(adapter):
            return self._definition.prepare(adapter, slot)
        if slot is None:
            slot = next((free for free in range(self.bank.num_slots) if free not in self._standing), None)
            assert slot is not None, "more adapters are prepared than there are slots"
        known, packed = self._image(adapter)
        self.bank.fill(slot, packed)
        self._rules.fill(slot, adapter.manifest)
        self._standing[slot] = standing = replace(known, slot=slot)
        return standing

    def warm(self, adapter: Adapter) -> None:
        if self._fits(adapter):
            self._image(adapter)

    def _fits(self, adapter: Adapter) -> bool:
        """Whether a slot takes it; says so once where none does."""
        fits = self.layout.shape.holds(SlotShape.of(adapter.manifest))
        if not fits and adapter.revision not in self._too_large:
            self._too_large.add(adapter.revision)
            logger.warning(
                "adapter revision %s is larger than a slot of the triton backend: its rows are computed by torch, one operation at a time; "
                "slots are as large as the adapters that are known when the server starts, so start it again with this one in its folder",
                adapter.revision[:12],
            )
        return fits

    def _image(self, adapter: Adapter) -> tuple[SlottedAdapter, SlotImage]:
        """Laid out before, or now. Safe in any thread."""
        found = self._images.get(adapter.revision)
        if found is None:
            weights = self._built(adapter)
            packed = image(weights, self.layout, self._dtype)
            found = slotted(weights, self.layout), packed.pinned() if self.device.type == "cuda" else packed
            self._images.put(adapter.revision, *found)
        return found

    def cool(self, revision: str) -> None:
        self._images.drop(revision)

    def forget(self, revision: str) -> None:
        self._images.drop(revision)
        self._definition.forget(revision)

    def trim(self) -> None:
        self._definition.trim()

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()
        self._definition.close()

    @property
    def num_recorded(self) -> int:
        """Decode steps that are recorded: of some numbers of rows, without adapters and with."""
        return 0 if self._graphs is None else self._graphs.num_recorded

    @property
    def layers_done(self) -> int:
        return self._layers_done + self._definition.layers_done

    timing_is_free = False

    def start_timing(self) -> None:
        self._clock = PartClock(self.device)

    def take_timing(self) -> dict[str, float]:
        """Routers and experts are inside the base's launches: their time is not told apart."""
        assert self._clock is not None, "timing was not started"
        clock, self._clock = self._clock, None
        return clock.seconds

    def _part(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._clock is None else self._clock.part(name)

    # -- a step

    def forward(self, batch: ForwardBatch, attention: Any) -> Tensor:
        assert isinstance(attention, CachedSpans), "a step attends through the own cache"
        assert batch.observer is None, "experts are observed in the torch backend"
        if all(isinstance(segment.adapter, SlottedAdapter) for segment in batch.segments):
            return self._fused(batch, attention.spans)
        return self._apart(batch, attention.spans)

    def _apart(self, batch: ForwardBatch, spans: Sequence[CachedSpan]) -> Tensor:
        """The tokens of adapters that stand in no slot by the definition, the others fused; no sequence knows of another."""
        assert self._cache is not None, "a step needs a cache"
        slow = [segment for segment in batch.segments if not isinstance(segment.adapter, SlottedAdapter)]
        is_slow = np.zeros(sum(span.count for span in spans), dtype=np.bool_)
        for segment in slow:
            is_slow[segment.start : segment.end] = True
        wanted = np.arange(len(is_slow)) if batch.logit_rows is None else batch.logit_rows.cpu().numpy()
        out = torch.empty(len(wanted), self.config.vocab_size, device=self.device)
        for chosen, is_own in ((np.flatnonzero(~is_slow), False), (np.flatnonzero(is_slow), True)):
            part = Part.of(batch, spans, chosen, wanted, self.device)
            if not len(chosen):
                continue
            if is_own:
                logits = self._definition.forward(part.batch, self._cache.definition(part.spans))
            else:
                logits = self._fused(part.batch, part.spans)
            out[part.rows] = logits
            if batch.trace is not None and part.batch.trace is not None:
                for number, found in part.batch.trace.segments.items():
                    batch.trace.segments[part.numbers[number]] = found
        return out

    def _fused(self, batch: ForwardBatch, spans: Sequence[CachedSpan]) -> Tensor:
        assert self._cache is not None, "a step needs a cache"
        runs, counted = runs_of(batch, spans, self._rules)
        numbers = host_numbers(runs, counted, spans, self._cache.block_size)
        if (static := self._static_step(numbers)) is not None:
            return self._replayed(static, batch, numbers)
        views = self._space(len(batch.token_ids)).views(len(batch.token_ids))
        step = self._eager(batch, numbers)
        logits = self._computed(step, views, self._longer(numbers), bool(batch.segments), pooled_of(batch.segments, spans))
        self._tell(batch, views, numbers.chunks)
        return logits

    def _static_step(self, numbers: HostNumbers) -> StaticStep | None:
        """Where the numbers of a recorded step go; None where the step is not recorded."""
        if self._graphs is None or not self.num_recorded or numbers.longer or self._clock is not None:
            return None  # a recorded step has no parts that could be timed
        if self._rules.generation != self._recorded_rules:
            self._record(self._graphs)
        return self._graphs.step(len(numbers.rows))

    def _replayed(self, static: StaticStep, batch: ForwardBatch, numbers: HostNumbers) -> Tensor:
        assert self._graphs is not None, "it is one of its steps"
        rows = torch.arange(len(batch.token_ids), device=self.device) if batch.logit_rows is None else batch.logit_rows
        static.fill(batch.token_ids, batch.positions, rows, numbers)
        give(static.buffers.given, batch.segments, self.layout.output_block)
        logits = self._graphs.replay(static, bool(batch.segments))
        self._layers_done += self.config.num_layers
        self._tell(batch, self._workspace.views(static.rows), numbers.chunks)
        return logits[: len(rows)]

    def _decode(self, step: StepBuffers, has_adapter: bool) -> Tensor:
        """A step of rows that decode, at the addresses of its numbers: what is recorded."""
        return self._computed(step, self._workspace.views(len(step.token_ids)), None, has_adapter, ())

    def _computed(self, step: StepBuffers, views: Views, longer: "_Longer | None", has_adapter: bool, pooled: Sequence["Pooled"]) -> Tensor:
        """A step's device part; the logits of the rows that it names."""
        self._compute(step, views, longer, has_adapter, pooled)
        with self._part("head"):
            logits = self._logits(step, views)
        if has_adapter:
            self._count(step, views)
        return logits

    def _longer(self, numbers: HostNumbers) -> "_Longer | None":
        if not numbers.longer:
            return None
        assert self._cache is not None, "a step needs a cache"
        chunks = [self._cache.chunk(span) for span in numbers.longer if not span.branches]
        branched = [self._cache.branched(span) for span in numbers.longer if span.branches]
        return _Longer(chunks, branched, on_device(numbers.their_chunks, self.device))

    def _space(self, tokens: int) -> Workspace:
        """The own one; for a step of more tokens than are planned for (a prompt that must be whole), one that goes with it."""
        return self._workspace if tokens <= self._workspace.max_tokens else self._new_workspace(tokens)

    def _new_workspace(self, tokens: int) -> Workspace:
        rows = {product: len(self._buffers[product][0]) for product in PRODUCTS}
        return Workspace(self.config, self.layout, rows, tokens, self._dtype, self.device, gathers=self._gathers)

    def _eager(self, batch: ForwardBatch, numbers: HostNumbers) -> StepBuffers:
        """A step's numbers, as they come."""
        tokens, layout = len(batch.token_ids), self.layout
        given = torch.zeros(0, device=self.device)
        if any(segment.pooled is not None for segment in batch.segments):
            given = torch.zeros(self.config.num_layers, tokens, 2 * layout.output_block, device=self.device)
            give(given, batch.segments, layout.output_block)
        rows = torch.arange(tokens, device=self.device) if batch.logit_rows is None else batch.logit_rows
        arrays = (numbers.chunks, numbers.places, numbers.lengths, numbers.slots, numbers.tables, numbers.counters)
        chunks, places, lengths, slots, tables, counters = (on_device(array, self.device) for array in arrays)
        decoding = on_device(numbers.rows, self.device) if numbers.longer else None
        return StepBuffers(batch.token_ids, batch.positions, chunks, places, decoding, lengths, slots, tables, counters, given, rows)

    def _compute(self, step: StepBuffers, views: Views, longer: "_Longer | None", has_adapter: bool, pooled: Sequence["Pooled"]) -> None:
        """All layers; what is left in `views` is the last one's output, times the final norm's weight."""
        config, weights = self.config, self.weights
        angles = step.positions.float()[:, None] * self._frequencies
        cos, sin = (part.to(self._dtype).float() for part in (angles.cos(), angles.sin()))
        num_tiles = self._workspace.num_tiles
        grid = (len(step.chunks), num_tiles)
        self._launch(
            kernels.embed, grid,
            step.chunks, step.token_ids, weights.embed, weights.layers[0].attention_norm, views.x, views.a, views.squares,
            config.hidden_size, num_tiles, C=kernels.CHUNK, N=min(TILE_COLUMNS, block(config.hidden_size)),
        )  # fmt: skip
        for index, layer in enumerate(weights.layers):
            is_last = index + 1 == config.num_layers
            next_norm = weights.norm if is_last else weights.layers[index + 1].attention_norm
            self._layer(index, layer, next_norm, step, views, longer, has_adapter, cos, sin, pooled)
            self._layers_done += 1

    def _layer(
        self, index: int, layer: LayerWeights, next_norm: Tensor, step: StepBuffers, views: Views, longer: "_Longer | None",
        has_adapter: bool, cos: Tensor, sin: Tensor, pooled: Sequence["Pooled"],
    ) -> None:  # fmt: skip
        with self._part("base"):
            self._attend_in(index, layer, step, views, has_adapter, cos, sin, pooled)
        with self._part("attention"):
            self._attend(index, step, views, longer, has_adapter)
        with self._part("base"):
            y, low = self._product("O", index, views.mixed.flatten(1), step, views, has_adapter)
            self._residual(index, layer.o_bias, layer.ffn_norm, y, low, None, self._constants.o, step, views, views.m_squares, has_adapter)
            y, m_low = self._product("GATE_UP", index, views.a, step, views, has_adapter)
            self._act(index, layer, y, m_low, step, views, has_adapter)
            y, low = self._product("DOWN", index, views.z, step, views, has_adapter)
            self._residual(index, layer.down_bias, next_norm, y, low, m_low, self._constants.down, step, views, views.squares, has_adapter)

    def _product(self, product: str, index: int, inputs: Tensor, step: StepBuffers, views: Views, has_adapter: bool) -> tuple[Tensor, Low]:
        """(rows of inputs, outputs) float32: the base's, and behind them or apart the slots' rows."""
        weight, base = self._buffers[product][index], self._base_rows[product]
        if not has_adapter:
            weight = weight[:base]
        out = views.wide if product == "GATE_UP" else views.narrow
        y = out[: len(inputs) * len(weight)].view(len(inputs), len(weight))
        multiply(inputs, weight, y)
        rows = self.layout.sections[product].rows
        if self._gathers and has_adapter and rows:
            return y, self._shrink(product, index, inputs, step, views)
        return y, Low(y[None, :, base:], rows)

    def _shrink(self, product: str, index: int, inputs: Tensor, step: StepBuffers, views: Views) -> Low:
        """Products of each token with its own slot's rows, where these stand in buffers of their own."""
        bank, layout = self.bank, self.layout
        rows, low = bank.rows[product][index], Low(views.low[product], 0)
        section = layout.sections[product].rows
        router_rows = layout.parts * layout.gate_rows if product == "QKV" and layout.shape.residual else 0
        self._launch(
            shrink, (len(step.chunks), num_tiles(section, router_rows), low.splits),
            step.chunks, inputs, views.x, rows, low.first, low.split, bank.ints[:, index], bank.ints.stride(0),
            K=inputs.shape[1], ROWS=section, ROUTER_ROWS=router_rows, AT_RESIDUAL=self._constants.at_residual, C=kernels.CHUNK, N=TILE,
            BLOCK=BLOCK, SPLITS=low.splits, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
        return low

    def _slot_arguments(self, index: int, step: StepBuffers, views: Views) -> tuple[Any, ...]:
        """What kernels read of slots and rules in a layer."""
        bank, rules = self.bank, self._rules
        return (
            bank.ints[:, index], bank.ints.stride(0), bank.floats[:, index], bank.floats.stride(0),
            bank.matrices[:, index], bank.matrices.stride(0), rules.ints[:, index], rules.thresholds[:, index], rules.stride,
        )  # fmt: skip

    def _residual_rows(self, index: int, y: Tensor, low: Low, views: Views) -> Low:
        """The slots' rows of the first product, read by the residual stream; behind that product in its space."""
        weight = self._buffers["QKV"][index][self._base_rows["QKV"] :]
        out = views.narrow[y.numel() : y.numel() + len(views.x) * len(weight)].view(len(views.x), len(weight))
        multiply(views.x, weight, out)
        return Low(out[None], low.slot)

    def _attend_in(
        self, index: int, layer: LayerWeights, step: StepBuffers, views: Views, has_adapter: bool, cos: Tensor, sin: Tensor,
        pooled: Sequence["Pooled"],
    ) -> None:  # fmt: skip
        assert self._cache is not None, "a step needs a cache"
        config, tokens = self.config, len(views.a)
        reads_residual = has_adapter and doubled(self.layout, self._gathers) == 2
        is_doubled = reads_residual and tokens <= _MOST_DOUBLED
        y, low = self._product("QKV", index, views.both if is_doubled else views.a, step, views, has_adapter)
        router = low
        if is_doubled:
            router = Low(low.first[:, tokens:], low.slot)
        elif reads_residual:
            router = self._residual_rows(index, y, low, views)
        for part in pooled:
            part.average(router, self.layout)
        given = step.given[index] if len(step.given) else step.given
        self._launch(
            kernels.attend_in, (len(step.chunks), config.num_heads + 2 * config.num_kv_heads),
            step.chunks, y, y.stride(0), views.squares, _or(layer.qkv_bias, y), _or(layer.q_norm, y), _or(layer.k_norm, y), cos, sin,
            step.places, views.q, views.k, views.v, self._cache.keys[index], self._cache.values[index],
            low.first, low.stride, low.slot, low.split, router.first, router.stride, router.slot, router.split,
            *self._slot_arguments(index, step, views), given, 2 * self.layout.output_block, views.words[index], views.words.shape[2],
            config.hidden_size, self._workspace.num_tiles, config.rms_norm_eps,
            L=self._constants, H=config.num_heads, KV=config.num_kv_heads, P=config.head_dim, HALF=block(config.head_dim // 2),
            TILES=block(self._workspace.num_tiles), C=kernels.CHUNK, HAS_BIAS=layer.qkv_bias is not None,
            HAS_QK_NORM=layer.q_norm is not None, HAS_ADAPTER=has_adapter, SPLITS=low.splits, ROUTER_SPLITS=router.splits,
        )  # fmt: skip

    def _attend(self, index: int, step: StepBuffers, views: Views, longer: "_Longer | None", has_adapter: bool) -> None:
        assert self._cache is not None, "a step needs a cache"
        keys, values = self._cache.keys[index], self._cache.values[index]
        has_prompt = has_adapter and self.layout.shape.prompt > 0
        if longer is None:
            prompts = self._prompts(index, step.slots, views.words[index]) if has_prompt else None
            results = self._split_results(len(views.q))
            decode_attention(views.q, keys, values, step.tables, step.lengths, views.mixed, results, prompts, self._launch)
            return
        if step.rows is not None and len(step.rows):
            q, words = views.q.index_select(0, step.rows), views.words[index].index_select(0, step.rows)
            prompts = self._prompts(index, step.slots, words) if has_prompt else None
            out = torch.empty_like(q)
            decode_attention(q, keys, values, step.tables, step.lengths, out, self._split_results(len(q)), prompts, self._launch)
            views.mixed[step.rows] = out
        for chunk in longer.chunks:
            views.mixed[chunk.start : chunk.end] = attend_chunk(chunk, views.q, views.k, views.v, keys, values)
        for whole in longer.branched:
            rows = slice(whole.start, whole.end)
            views.mixed[rows] = attend_branches(whole, views.q[rows], views.k[rows], views.v[rows])
        if has_prompt:
            self._prompt(index, longer.their_chunks, views)

    def _split_results(self, rows: int) -> SplitResults | None:
        """Room for what programs of a row leave for each other; made anew for more rows than ever before."""
        if self._num_splits == 1:
            return None
        if self._splits is None or self._splits.tops.shape[0] < rows:
            self._splits = SplitResults.empty(rows, self.config.num_heads, self.config.head_dim, self._num_splits, self.device)
        return self._splits

    def _prompts(self, index: int, slots: Tensor, words: Tensor) -> Prompts:
        """Of a layer's slots, for rows with these slots (N,) and words of their routers (N, W)."""
        bank, layout, gates = self.bank, self.layout, 2 * self.layout.output_block + 1
        ints, floats = bank.ints[:, index], bank.floats[:, index]
        inner = layout.router("PROMPT") * (3 * layout.output_block + 1) + gates
        return Prompts(
            slots,
            words[:, gates:],
            words[:, inner:],
            bank.prompt[:, index, 0],
            bank.prompt[:, index, 1],
            floats[:, layout.floats["head_gate"]],
            ints[:, layout.ints["prompt.inner"]],
            ints[:, layout.ints.at("prompt.column")],
        )

    def _prompt(self, index: int, chunks: Tensor, views: Views) -> None:
        config, bank = self.config, self.bank
        self._launch(
            kernels.prompt, (len(chunks), config.num_heads),
            chunks, views.q, views.mixed, bank.prompt[:, index], bank.prompt.stride(0), bank.ints[:, index], bank.ints.stride(0),
            bank.floats[:, index], bank.floats.stride(0), views.words[index], views.words.shape[2],
            math.log2(math.e) * config.head_dim**-0.5,
            L=self._constants, H=config.num_heads, KV=config.num_kv_heads, P=config.head_dim, P_BLOCK=max(16, block(config.head_dim)),
            C=kernels.CHUNK,
        )  # fmt: skip

    def _residual(
        self, index: int, bias: Tensor | None, norm: Tensor, y: Tensor, low: Low, m_low: Low | None, site: Site, step: StepBuffers,
        views: Views, squares: Tensor, has_adapter: bool,
    ) -> None:  # fmt: skip
        config = self.config
        parallel = self._constants.parallel if m_low is not None else Site()
        m_low = m_low or low
        self._launch(
            kernels.residual, (len(step.chunks), self._workspace.num_tiles),
            step.chunks, y, y.stride(0), _or(bias, y), norm, views.x, views.a, squares,
            low.first, low.stride, low.slot, low.split, views.m_squares, m_low.first, m_low.stride, m_low.slot, m_low.split,
            *self._slot_arguments(index, step, views), views.words[index], views.words.shape[2],
            config.hidden_size, self._workspace.num_tiles, config.rms_norm_eps,
            L=self._constants, S=site, PA=parallel, TILES=block(self._workspace.num_tiles), C=kernels.CHUNK,
            N=min(TILE_COLUMNS, block(config.hidden_size)), HAS_BIAS=bias is not None, HAS_ADAPTER=has_adapter,
            SPLITS=low.splits, M_SPLITS=m_low.splits,
        )  # fmt: skip

    def _act(self, index: int, layer: LayerWeights, y: Tensor, low: Low, step: StepBuffers, views: Views, has_adapter: bool) -> None:
        config = self.config
        tile = min(TILE_COLUMNS, block(config.intermediate_size))
        self._launch(
            kernels.act, (len(step.chunks), -(-config.intermediate_size // tile)),
            step.chunks, y, y.stride(0), views.m_squares, _or(layer.gate_up_bias, y), views.z,
            low.first, low.stride, low.slot, low.split, *self._slot_arguments(index, step, views),
            views.words[index], views.words.shape[2], config.hidden_size, config.intermediate_size, self._workspace.num_tiles,
            config.rms_norm_eps, L=self._constants, TILES=block(self._workspace.num_tiles), C=kernels.CHUNK, N=tile,
            HAS_BIAS=layer.gate_up_bias is not None, HAS_ADAPTER=has_adapter, SPLITS=low.splits,
        )  # fmt: skip

    def _logits(self, step: StepBuffers, views: Views) -> Tensor:
        """(N, V) float32."""
        rows = views.a.index_select(0, step.logit_rows)
        squares = views.squares.index_select(0, step.logit_rows).sum(1, keepdim=True)
        out = torch.empty(len(rows), len(self.weights.head), device=self.device)
        multiply(rows, self.weights.head, out)
        return out.mul_(torch.rsqrt(squares / self.config.hidden_size + self.config.rms_norm_eps))

    # -- what is to be known of a step

    def _count(self, step: StepBuffers, views: Views) -> None:
        if not self._constants.num_routers:
            return
        bank, words = self.bank, views.words
        self._launch(
            kernels.count, (len(step.chunks), self.config.num_layers, self._constants.num_routers),
            step.chunks, words, words.stride(0), words.shape[2], bank.ints, bank.ints.stride(0), bank.ints.stride(1),
            bank.floats, bank.floats.stride(0), bank.floats.stride(1), step.counters, L=self._constants, C=kernels.CHUNK,
        )  # fmt: skip

    def _tell(self, batch: ForwardBatch, views: Views, chunks: np.ndarray) -> None:
        """Instance-level weights go to their sequences, and routers' words to who asked."""
        for number, segment in enumerate(batch.segments):
            if segment.pooled is not None:
                self._keep_pooled(segment, views.words)
            if batch.trace is not None:
                self._trace(batch.trace, number, segment, views.words, chunks)

    def _keep_pooled(self, segment: Segment, words: Tensor) -> None:
        pooled, width = segment.pooled, self.layout.output_block
        assert pooled is not None, "an instance-level segment has its sequences' weights"
        outputs = pooled.words.shape[3]
        for row, span in enumerate(pooled.spans):
            if span is not None:
                own = words[:, segment.start + span[0]]
                pooled.words[row, :, 0] = own[:, 2 * width + 1 :][:, :outputs]
                pooled.words[row, :, 1] = own[:, :outputs]

    def _trace(self, trace: RoutingTrace, number: int, segment: Segment, words: Tensor, chunks: np.ndarray) -> None:
        adapter, length = segment.adapter, segment.end - segment.start
        assert isinstance(adapter, SlottedAdapter), "the batch has adapters that stand in slots only"
        wanted = trace.wanted(number, length)
        if wanted is None or not adapter.traced:
            return
        own = words[:, segment.start : segment.end]
        told = own[:, wanted.to(self.device)].transpose(0, 1).flatten(1)[:, on_device(adapter.words, self.device)]
        evaluations = None
        if segment.counters is not None:
            evaluations = self._evaluations(adapter, own, chunks[:, START], segment)
        trace.segments[number] = SegmentTrace(told, adapter.traced, evaluations)

    def _evaluations(self, adapter: SlottedAdapter, words: Tensor, starts: np.ndarray, segment: Segment) -> Tensor:
        """(t,) int32, of a segment's words (L, t, W): for each token the experts that one of its chunk kept, as `count` counts them."""
        own = starts[(starts >= segment.start) & (starts < segment.end)]
        chunk_of = on_device(np.searchsorted(own, np.arange(segment.start, segment.end), side="right") - 1, self.device)
        kept = words.transpose(0, 1).flatten(1)[:, on_device(adapter.kept, self.device)]
        counts = kept.new_zeros(len(own), kept.shape[1]).index_add_(0, chunk_of, kept)
        return (counts != 0).sum(1)[chunk_of].int().cpu()


@dataclass(frozen=True, slots=True, eq=False)
class _Longer:
    """Sequences with more than one token in a step, and the (C, 8) chunks of their tokens."""

    chunks: list[Chunk]
    branched: list[BranchedChunk]
    their_chunks: Tensor


def _or(found: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's argument that it does not read where there is none."""
    return other if found is None else found

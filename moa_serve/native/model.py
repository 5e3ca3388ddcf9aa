"""The native backend as the engine sees it: the base's weights packed, the cache in its pages, and one call of the library a step.

What the library reads stays alive here: it holds pointers into these tensors and owns nothing but its buffers and threads. Owned by the
engine thread, but for `prepare`, `warm` and `forget`.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.config import ModelConfig
from moa_serve.errors import EngineError, InvalidRequest, ModelUnsupported, OutOfMemory
from moa_serve.model.attention import CachedSpan
from moa_serve.model.bank import bytes_per_slot
from moa_serve.model.batch import ForwardBatch, Segment, SegmentTrace
from moa_serve.model.build import build
from moa_serve.model.memory import available_bytes
from moa_serve.model.ops import inverse_frequencies
from moa_serve.model.weights import BaseWeights, LayerWeights
from moa_serve.native import library as lib
from moa_serve.native import packing
from moa_serve.native.packed import PackedAdapters
from moa_serve.native.packing import PAGE, padded
from moa_serve.native.program import NativeAdapter, compile_adapter
from moa_serve.native.threads import num_threads

Ints = npt.NDArray[np.int32]
_Unpack = Callable[[slice, int], Tensor]  # rows (from a whole panel on) and their width -> (n, width)


class _PackedBase:
    """All that the library reads of the base. Takes `weights` over layer by layer, so that there is never a second copy of them all."""

    def __init__(self, config: ModelConfig, weights: BaseWeights, *, is_int8: bool) -> None:
        self.dtype = weights.embed.dtype
        self._form: packing.Format = packing.Int8() if is_int8 else packing.Plain(self.dtype)
        self._kept: list[Tensor] = []
        self._memory = packing.HugePages()
        self.projections: list[LayerWeights] = []  # what the prompt's keys and values are made with
        layers = (lib.LayerStruct * config.num_layers)()
        tied = weights.head is weights.embed
        head = self._pack(weights.head)
        embed = head if tied else self._keep(packing.pad_columns(weights.embed).contiguous())
        weights.head = weights.embed = torch.empty(0, dtype=self.dtype)
        for index in range(config.num_layers):
            layers[index] = self._layer(config, weights.layers[index])
        frequencies = self._keep(inverse_frequencies(config.rope, config.head_dim, torch.device("cpu")))
        self._layers = layers
        self.struct = lib.ModelStruct(
            layers=layers,
            norm=self._vector(weights.norm),
            embed=embed.data_ptr(),
            head=head.data_ptr(),
            inverse_frequencies=frequencies.data_ptr(),
            eps=config.rms_norm_eps,
            dtype=lib.BFLOAT16 if self.dtype == torch.bfloat16 else lib.FLOAT32,
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            vocab=config.vocab_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            embed_is_head=tied,
            base_format=lib.BASE_INT8 if is_int8 else lib.BASE_PLAIN,
        )

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor

    def _pack(self, *sections: Tensor) -> Tensor:
        return self._keep(packing.pack_sections(sections, self._form, memory=self._memory))

    def _vector(self, values: Tensor | None) -> int | None:
        return None if values is None else self._keep(packing.vector(values)).data_ptr()

    def _layer(self, config: ModelConfig, layer: LayerWeights) -> lib.LayerStruct:
        sizes = [config.q_size, config.kv_size, config.kv_size]
        fused = self._pack(*torch.split(layer.qkv, sizes))
        bias = None if layer.qkv_bias is None else torch.cat([packing.pad_columns(part) for part in torch.split(layer.qkv_bias, sizes)])
        gate, up = layer.gate_up.chunk(2)
        gate_up = self._keep(packing.pack_pair(gate, up, self._form, memory=self._memory))
        gate_up_bias = None if layer.gate_up_bias is None else packing.interleave(*layer.gate_up_bias.chunk(2))
        struct = lib.LayerStruct(
            attention_norm=self._vector(layer.attention_norm),
            qkv_bias=self._vector(bias),
            q_norm=self._vector(layer.q_norm),
            k_norm=self._vector(layer.k_norm),
            o_bias=self._vector(layer.o_bias),
            ffn_norm=self._vector(layer.ffn_norm),
            gate_up_bias=self._vector(gate_up_bias),
            down_bias=self._vector(layer.down_bias),
            qkv=fused.data_ptr(),
            o=self._pack(layer.o).data_ptr(),
            gate_up=gate_up.data_ptr(),
            down=self._pack(layer.down).data_ptr(),
        )
        self.projections.append(_Projection(config, partial(self._form.unpack, fused), layer.qkv_bias, layer.k_norm))  # type: ignore[arg-type]  # has what is read
        layer.qkv = layer.o = layer.gate_up = layer.down = torch.empty(0, dtype=self.dtype)
        return struct


class _Projection:
    """A layer's Q, K and V rows unpacked again, for the moment in which a prompt's keys and values are made."""

    def __init__(self, config: ModelConfig, unpack: "_Unpack", bias: Tensor | None, k_norm: Tensor | None) -> None:
        self._config, self._unpack = config, unpack
        self.qkv_bias, self.k_norm = bias, k_norm

    @property
    def qkv(self) -> Tensor:
        sizes = (self._config.q_size, self._config.kv_size, self._config.kv_size)
        starts = np.cumsum([0, *(padded(size) for size in sizes)]).tolist()
        parts = [self._unpack(slice(start, start + size), self._config.hidden_size) for start, size in zip(starts, sizes, strict=False)]
        return torch.cat(parts)


@dataclass(frozen=True, slots=True, eq=False)
class _Pages:
    """One step's sequences for the library: which tokens see what of their pages."""

    spans: Sequence[CachedSpan]
    seen_until: Ints  # (T,): a token sees [0, until) and [from, its own place] of its sequence
    seen_from: Ints


class NativeCache:
    """Keys and values of all layers in pages of 16 tokens, in the kernels' layout. Memory is reserved and not touched."""

    def __init__(self, num_blocks: int, bytes_per_layer: tuple[int, int], num_layers: int) -> None:
        self.num_blocks = num_blocks
        self.keys, self.values = (torch.empty(num_layers * num_blocks * size, dtype=torch.uint8) for size in bytes_per_layer)

    def zero(self, blocks: Sequence[int]) -> None:
        """Nothing: the first token of a page clears it."""

    def attention(self, spans: Sequence[CachedSpan]) -> _Pages:
        total = sum(span.count for span in spans)
        until, since = np.zeros(total, dtype=np.int32), np.zeros(total, dtype=np.int32)
        for span in spans:
            for start, end in span.branches:
                rows = slice(span.start + start - span.computed, span.start + end - span.computed)
                until[rows], since[rows] = span.num_prompt, start
        return _Pages(spans, until, since)


class NativeModel:
    """`forward(batch, attention)` as Transformer's, through the library.

    Args:
        weights: of dtype bfloat16 or float32 on the CPU; taken over, and empty afterwards.
        digest: of the base, under which packed adapters are kept on disk; None: they are not.
        instruction_set: one of `library.instruction_sets()`; None for the best.
        threads: None for the physical cores.
        is_int8: keep the base's matrices in eight bits, with a scale and a minimum for each 32 inputs (src/int8.h); needs bfloat16.
    Raises:
        NativeUnavailable: there is no library, or the processor cannot run it.
        ModelUnsupported: memory is short.
        ModelError: a weight does not fit into eight bits.
    """

    name = "native"

    def __init__(
        self,
        config: ModelConfig,
        weights: BaseWeights,
        *,
        digest: str | None = None,
        instruction_set: str | None = None,
        threads: int | None = None,
        is_int8: bool = False,
    ) -> None:
        assert not is_int8 or weights.embed.dtype == torch.bfloat16, "eight bits become bfloat16"
        self._engine: int | None = None
        self._closing = threading.Lock()  # between `close` and whoever looks how far a step has come
        self._cache: NativeCache | None = None
        self._forward_seconds = 0.0
        self.config, self.dtype, self.device = config, weights.embed.dtype, torch.device("cpu")
        self.instruction_set = instruction_set or lib.instruction_sets()[0]
        self.threads = threads or num_threads()
        self._library = lib.library()
        self.adapter_dtype = self.dtype
        self.base_dtype = "int8" if is_int8 else str(self.dtype).removeprefix("torch.")
        _check_room(weights)
        self._base = _PackedBase(config, weights, is_int8=is_int8)
        self._has_tiles = lib.has_tiles(self.instruction_set, self.dtype)
        # A prompt's keys and values are made with the base as it is computed.
        self._packed = PackedAdapters(digest and f"{digest} {self.base_dtype}", self.dtype, has_tiles=self._has_tiles)

    # -- what the engine asks

    def _page_bytes(self) -> tuple[int, int]:
        """Of one layer's page: keys, values."""
        keys, values = ctypes.c_int64(), ctypes.c_int64()
        self._library.moa_page_bytes(self._base.struct, keys, values)
        return keys.value, values.value

    @property
    def weight_bytes(self) -> int:
        return self._base.num_bytes

    @property
    def beside_bytes(self) -> int:
        return 0

    def slots_bytes(self, num_slots: int) -> int:
        return num_slots * bytes_per_slot(self.config, self.adapter_dtype)

    def step_bytes(self, num_tokens: int, context: int) -> int:
        """What `MoaEngine::reserve` of library.cpp takes, and the logits."""
        c, element = self.config, self.dtype.itemsize
        hidden, inner, query, key = (padded(size) for size in (c.hidden_size, c.intermediate_size, c.q_size, c.kv_size))
        head, vocab = padded(c.head_dim, packing.LANES), padded(c.vocab_size)
        floats = 2 * hidden + query + 2 * key + c.num_heads * head + 2 * inner + c.head_dim + vocab
        token = 4 * floats + element * (2 * hidden + query + inner) + 4 * (2 + self.threads)
        queries, longest = c.num_heads // c.num_kv_heads * head, padded(context, PAGE)
        scratch = max(queries + 4 * longest, 32 * head + 16 * longest, 4 * max(hidden, inner, query), num_tokens)
        return num_tokens * token + self.threads * 4 * scratch

    def recorded_bytes(self, num_rows: int, context: int) -> int:
        return 0

    def bytes_per_block(self, block_size: int) -> int:
        if block_size != PAGE:
            raise InvalidRequest(f"block_size is {block_size}, but the native backend has pages of {PAGE} tokens", param="block_size")
        return self.config.num_layers * sum(self._page_bytes())

    def new_cache(self, num_blocks: int, block_size: int) -> NativeCache:
        self.bytes_per_block(block_size)
        assert self._engine is None, "one cache a model"
        self._cache = NativeCache(num_blocks, self._page_bytes(), self.config.num_layers)
        self._engine = self._library.moa_engine_new(
            self._base.struct,
            self.instruction_set.encode(),
            self.threads,
            self._cache.keys.data_ptr(),
            self._cache.values.data_ptr(),
            num_blocks,
        )
        if not self._engine:
            if self.instruction_set not in lib.instruction_sets():
                raise EngineError(f"the native library cannot run {self.instruction_set} on this machine")
            raise EngineError(f"the system does not give the native library {self.threads} threads; raise its limit of processes or memory")
        self._process = os.getpid()
        return self._cache

    def prepare(self, adapter: Adapter, slot: int | None = None) -> NativeAdapter:
        """Packed before, or now. Safe in any thread."""
        return self._packed.get(adapter.revision, adapter.manifest, lambda: self._pack(adapter))

    def warm(self, adapter: Adapter) -> None:
        self.prepare(adapter)

    def _pack(self, adapter: Adapter) -> NativeAdapter:
        base = BaseWeights(torch.empty(0), self._base.projections, torch.empty(0), torch.empty(0))
        weights = build(adapter.manifest, adapter.tensors, base, self.config, torch.float32)
        return compile_adapter(weights, self.dtype, has_tiles=self._has_tiles)

    def cool(self, revision: str) -> None:
        self._packed.cool(revision)

    def forget(self, revision: str) -> None:
        self._packed.forget(revision)

    def trim(self) -> None:
        """Nothing: what steps use is planned for."""

    @property
    def layers_done(self) -> int:
        with self._closing:
            return int(self._library.moa_engine_layers_done(self._engine)) if self._engine else 0

    def close(self) -> None:
        with self._closing:
            if self._engine and os.getpid() == self._process:  # a forked process has none of the threads to wait for
                self._library.moa_engine_delete(self._engine)
            self._engine = self._cache = None

    def __del__(self) -> None:
        self.close()

    def ticks(self) -> dict[str, int]:
        """Ticks of the time stamp counter by part of the step, since the last call."""
        values = (ctypes.c_uint64 * len(lib.PARTS))()
        self._library.moa_engine_ticks(self._engine, values)
        return dict(zip(lib.PARTS, values, strict=True))

    timing_is_free = True  # the library counts in any case

    def start_timing(self) -> None:
        self.ticks()
        self._forward_seconds = 0.0

    def take_timing(self) -> dict[str, float]:
        """The time in the library, shared out by its ticks: what they are in seconds differs from one processor to the next."""
        ticks = self.ticks()
        scale = self._forward_seconds / max(1, sum(ticks.values()))
        return {part: count * scale for part, count in ticks.items()}

    # -- a step

    def forward(self, batch: ForwardBatch, attention: Any) -> Tensor:
        assert self._engine, "a step needs a cache"
        if os.getpid() != self._process:
            raise EngineError("the native backend's threads did not come along when this process was forked; load the model after the fork")
        assert batch.observer is None, "experts are observed in the torch backend"
        ids, positions = batch.token_ids.int(), batch.positions.int()
        rows = torch.arange(len(ids), dtype=torch.int32) if batch.logit_rows is None else batch.logit_rows.int()
        logits = torch.empty((len(rows), padded(self.config.vocab_size)), dtype=torch.float32)
        tables = [np.array(span.blocks, dtype=np.int32) for span in attention.spans]
        spans = (lib.SpanStruct * len(tables))(
            *(
                lib.SpanStruct(table.ctypes.data, span.start, span.count, span.computed)
                for span, table in zip(attention.spans, tables, strict=True)
            )
        )
        trace = batch.trace
        views = [
            _SegmentView(segment, None if trace is None else trace.wanted(number, segment.end - segment.start))
            for number, segment in enumerate(batch.segments)
        ]
        segments = (lib.SegmentStruct * len(views))(*(view.struct for view in views))
        struct = lib.BatchStruct(
            token_ids=ids.data_ptr(),
            positions=positions.data_ptr(),
            seen_until=attention.seen_until.ctypes.data,
            seen_from=attention.seen_from.ctypes.data,
            spans=ctypes.addressof(spans),
            segments=ctypes.addressof(segments),
            logit_rows=rows.data_ptr(),
            logits=logits.data_ptr(),
            num_tokens=len(ids),
            num_spans=len(tables),
            num_segments=len(views),
            num_logits=len(rows),
        )
        started = time.perf_counter()
        has_failed = self._library.moa_engine_step(self._engine, struct)
        self._forward_seconds += time.perf_counter() - started
        if has_failed:
            raise OutOfMemory(f"there is no memory for the buffers of a step of {len(ids)} tokens; lower max_batch_tokens")
        if trace is not None:
            trace.segments |= {number: view.trace for number, view in enumerate(views) if view.trace is not None}
        return logits[:, : self.config.vocab_size]


def _check_room(weights: BaseWeights) -> None:
    """Raises ModelUnsupported: there is no room for the largest tensor beside the weights, which packing takes for a moment."""
    needed, free = weights.head.nbytes, available_bytes(torch.device("cpu"))
    if needed > free:
        raise ModelUnsupported(
            f"packing the base takes {needed} bytes for a moment beside its {weights.num_bytes} bytes of weights, but {free} are free; "
            f"free some, or choose a smaller base",
            param="model",
        )


class _SegmentView:
    """A segment's struct and what it points to; `trace` of the tokens in `traced`, which the step fills."""

    def __init__(self, segment: Segment, traced: Tensor | None) -> None:
        adapter, pooled, counters = segment.adapter, segment.pooled, segment.counters
        assert isinstance(adapter, NativeAdapter), "the native backend computes what it prepared"
        self.struct = lib.SegmentStruct(adapter=adapter.blob.data_ptr(), start=segment.start, end=segment.end)
        if segment.rules is not None:
            self._rules = adapter.rules(segment.rules)  # kept: the adapter may let go of it
            self.struct.rules = ctypes.addressof(self._rules)
        self.trace = None if traced is None else self._traced(segment, adapter, traced)
        if counters is not None:
            self.struct.selected, self.struct.gate_sum = counters.selected.data_ptr(), counters.gate_sum.data_ptr()
            self.struct.computed, self.struct.thresholds = counters.computed.data_ptr(), counters.thresholds.data_ptr()
            self.struct.counters_width = counters.selected.shape[1]
        if pooled is not None:
            self._rows = pooled.row_of_token.int()
            self._spans = np.array([span or (-1, -1) for span in pooled.spans], dtype=np.int32)
            self.struct.pooled_row, self.struct.pooled_spans = self._rows.data_ptr(), self._spans.ctypes.data
            self.struct.pooled_gates = pooled.words.data_ptr()
            self.struct.num_pooled, self.struct.pooled_width = len(self._spans), pooled.words.shape[3]

    def _traced(self, segment: Segment, adapter: NativeAdapter, tokens: Tensor) -> SegmentTrace:
        words = torch.zeros(len(tokens), adapter.trace_width)
        if len(tokens):
            self._trace_rows = np.full(segment.end - segment.start, -1, dtype=np.int32)
            self._trace_rows[tokens.numpy()] = np.arange(len(tokens))
            self.struct.trace, self.struct.trace_row = words.data_ptr(), self._trace_rows.ctypes.data
        evaluations = None
        if segment.counters is not None:
            evaluations = torch.zeros(segment.end - segment.start, dtype=torch.int32)
            self.struct.evaluations = evaluations.data_ptr()
        return SegmentTrace(words, adapter.traced, evaluations)

"""What a fused step would launch, without a GPU and without memory: on the meta device tensors are shapes alone.

Who asks such a tensor for a number, for which a step on a GPU would have to wait, fails. Kernels are recorded, whether they would be
interpreted or compiled.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moa_serve.adapter.manifest import Manifest
from moa_serve.config import ModelConfig
from moa_serve.gpu.layout import SlotShape
from moa_serve.gpu.model import FusedTransformer
from moa_serve.gpu.slots import SlottedAdapter
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch, PooledRows, Segment
from moa_serve.model.counters import RouterCounters
from moa_serve.model.weights import allocate

META = torch.device("meta")
PAGE = 16
_TAKES_MEMORY_ONLY = {"empty", "empty_like", "empty_strided", "new_empty", "resize_"}  # and no launch


@dataclass(frozen=True, eq=False)
class Launched:
    """A kernel of ours, or an operation of torch that starts one."""

    name: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    kernel: Any = None


def place(tensor: Tensor) -> tuple[int, int]:
    """An address on the meta device: whose memory it is, and where in it (numbers)."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


@dataclass(eq=False)
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Everything that is started while it is entered; given to a FusedTransformer as `launch`, its kernels too, which then do not run.

    Args:
        allocated: operations whose result stands in new memory, by that memory.
        kept: tensors, so that no memory is given away twice.
    """

    launched: list[Launched] = field(default_factory=list)
    allocated: dict[int, str] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.kept.append(args)
        self.launched.append(Launched(kernel.__name__, grid, args, options, kernel))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        self.kept.append((given, made))
        known = {place(tensor)[0] for tensor in given}
        self.allocated |= {memory: name for tensor in made if (memory := place(tensor)[0]) not in known}
        if not func.is_view and name not in _TAKES_MEMORY_ONLY:
            self.launched.append(Launched(name, (), tuple(args), dict(kwargs or {})))
        return out

    def facts(self) -> list[tuple[Any, ...]]:
        """What a recorded step fixes: of tensors shape, distances, dtype and where they stand, of everything else the value.

        Memory that the step allocated is numbered, as nobody else knows it.
        """
        numbers = {memory: f"allocated {number}" for number, memory in enumerate(self.allocated)}

        def fact(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            memory, offset = place(value)
            return tuple(value.shape), value.stride(), value.dtype, numbers.get(memory, memory), offset

        return [(one.name, one.grid, *map(fact, tree_leaves((one.args, one.options)))) for one in self.launched]

    @contextmanager
    def step(self) -> Iterator["Recorder"]:
        """Of one step alone."""
        self.launched.clear()
        self.allocated.clear()
        with self:
            yield self


class MetaModel:
    """A FusedTransformer of shapes, its cache, and adapters in its first slots. `gathers`: as of FusedTransformer."""

    def __init__(
        self,
        config: ModelConfig,
        manifests: Sequence[Manifest] = (),
        dtype: torch.dtype = torch.bfloat16,
        num_slots: int = 16,
        *,
        gathers: bool = False,
    ) -> None:
        self.recorder = Recorder()
        shape = SlotShape.union(SlotShape.of(manifest) for manifest in manifests)
        self.model = FusedTransformer(
            config, allocate(config, META, dtype), num_slots=num_slots, shape=shape, max_tokens=512, gathers=gathers, launch=self.recorder
        )
        self.cache = self.model.new_cache(1024, PAGE)
        none = np.zeros(0, dtype=np.int64)
        self.adapters = [SlottedAdapter(manifest, slot, (), none, none) for slot, manifest in enumerate(manifests)]

    def batch(self, counts: Sequence[int], adapters: Sequence[int | None], computed: int = 3) -> tuple[ForwardBatch, list[CachedSpan]]:
        """Sequences with so many tokens in the step, each behind `computed` more ones and with the adapter of a slot or none."""
        spans, segments, start = [], [], 0
        for count, slot in zip(counts, adapters, strict=True):
            spans.append(CachedSpan(start, count, computed, list(range(1, 2 + (computed + count) // PAGE))))
            if slot is not None:
                segments.append(self._segment(start, count, self.adapters[slot]))
            start += count
        ids = torch.zeros(start, dtype=torch.int64, device=META)
        return ForwardBatch(ids, ids, tuple(segments), ids[: len(counts)]), spans

    def _segment(self, start: int, count: int, adapter: SlottedAdapter) -> Segment:
        pooled = None
        if adapter.manifest.is_pooled:
            row = torch.zeros(count, dtype=torch.int64, device=META)
            pooled = PooledRows(row, (None,), torch.zeros(PooledRows.shape(1, adapter), device=META))
        return Segment(start, start + count, adapter, pooled, RouterCounters(adapter.manifest, META))

    def step(self, counts: Sequence[int], adapters: Sequence[int | None], computed: int = 3) -> list[Launched]:
        """All that a step launches, with what it copies before."""
        batch, spans = self.batch(counts, adapters, computed)
        with torch.no_grad(), self.recorder.step():
            self.model.forward(batch, self.cache.attention(spans))
        return list(self.recorder.launched)

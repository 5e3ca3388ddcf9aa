"""What computes a step, as the engine sees it: the torch definition (transformer.py) or the native library. Only shapes of objects here."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.config import ModelConfig
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch, PreparedAdapter

PARTS = ("base", "attention", "router", "experts", "head")  # of a forward, as far as its time is told apart


class Cache(Protocol):
    """Keys and values of all layers in pages; which page is whose, engine.pools.BlockPool knows."""

    def zero(self, blocks: Sequence[int]) -> None:
        """Clean pages that change owner."""
        ...

    def attention(self, spans: Sequence[CachedSpan]) -> Any:
        """What `Backend.forward` of the same backend takes; `spans` cover the batch in its order."""
        ...


class Sizes(Protocol):
    """What the engine plans memory with, of a backend that is there or of one that is still to be made."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def weight_bytes(self) -> int:
        """Of the base, as it is held."""
        ...

    @property
    def beside_bytes(self) -> int:
        """Of slots and buffers that are held beside the base since the model was made; 0 where each comes when it is needed."""
        ...

    def slots_bytes(self, num_slots: int) -> int:
        """Of adapters in so many slots, about, as far as it is not in `beside_bytes`."""
        ...

    def step_bytes(self, num_tokens: int, context: int) -> int:
        """Of a step's buffers, about: `num_tokens` of sequences of up to `context`, all of whose logits are wanted; adapters add little."""
        ...

    def recorded_bytes(self, num_rows: int, context: int) -> int:
        """Of recorded decode steps of up to `num_rows` sequences, about, when all are there that are kept; 0 where none are recorded."""
        ...

    def bytes_per_block(self, block_size: int) -> int:
        """Of the cache: a page of all layers."""
        ...


class Backend(Sizes, Protocol):
    """Owned by the engine thread."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def base_dtype(self) -> str:
        """In what the base's matrices stand: "float32", "bfloat16", or "int8", with which bfloat16 is computed."""
        ...

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Of the matrices of an adapter in its slot."""
        ...

    def new_cache(self, num_blocks: int, block_size: int) -> Cache:
        """The cache that every later `forward` reads and writes; one a backend."""
        ...

    def prepare(self, adapter: Adapter, slot: int | None = None) -> PreparedAdapter:
        """What stands in a slot, of this number or, by default, in a free one: an adapter in the layout that the forward reads."""
        ...

    def warm(self, adapter: Adapter) -> None:
        """Do what can be done of `prepare` ahead of time, so that the step that first needs the adapter is short. In any thread."""
        ...

    def cool(self, revision: str) -> None:
        """The adapter left host memory for want of room: let go of memory that `prepare` can have again without it. In any thread."""
        ...

    def forget(self, revision: str) -> None:
        """The revision is gone for good: free what `prepare` may have kept of it."""
        ...

    def trim(self) -> None:
        """Memory is short: let go of what is only kept so that steps are quicker."""
        ...

    def forward(self, batch: ForwardBatch, attention: Any) -> Tensor:
        """(N, V) float32: logits of `batch.logit_rows`, or of all T tokens.

        Routers' words on the tokens go to `batch.trace` and the segments' counters, instance-level weights to their `pooled.words`.
        """
        ...

    @property
    def timing_is_free(self) -> bool:
        """Whether a forward that is timed by part takes no longer."""
        ...

    def start_timing(self) -> None:
        """Note from now on what each of `PARTS` takes, until `take_timing`. On another device a forward waits for each of them then."""
        ...

    def take_timing(self) -> Mapping[str, float]:
        """Seconds by `PARTS` of the forwards since `start_timing`."""
        ...

    @property
    def layers_done(self) -> int:
        """Layers computed so far: what tells a long step from one that is stuck. Read from any thread, also while `forward` runs."""
        ...

    def close(self) -> None:
        """Give back what is not freed with the object. `new_cache` makes it usable again."""
        ...


__all__ = ["PARTS", "Backend", "Cache", "PreparedAdapter", "Sizes"]

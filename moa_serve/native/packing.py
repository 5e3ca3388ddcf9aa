"""Layouts of weights that the native kernels read: panels of 32 output columns, everything padded to whole panels with zeros.

Tensors in, tensors out; run once when something is loaded.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PANEL, LANES, PAGE = 32, 16, 16
TILE_TOKENS = 16  # kTileTokens of src/step_types.h


class HugePages:
    """Memory for what every step reads, in pages of 2 MiB where the system has them: in pages of 4 KiB a base step takes a tenth longer.

    Lives as long as a tensor in it.
    """

    _CHUNK_BYTES = 64 * 2**20  # of address space; a page is taken when it is first written

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`, at the start of a cache line."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._used + size > len(self._chunk):
            memory = mmap.mmap(-1, max(size, self._CHUNK_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a system without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._chunk, self._used = torch.frombuffer(memory, dtype=torch.uint8), 0
        start = self._used
        self._used = padded(start + size, 64)
        return self._chunk[start : start + size].view(dtype).view(*shape)


def padded(size: int, to: int = PANEL) -> int:
    return -(-size // to) * to


def per_lane(dtype: torch.dtype) -> int:
    """Elements of the reduced dimension that stand beside each other."""
    return 2 if dtype == torch.bfloat16 else 1


def pad_rows(weight: Tensor, to: int = PANEL) -> Tensor:
    """(N, K) -> (N padded, K)."""
    missing = padded(len(weight), to) - len(weight)
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def pad_columns(weight: Tensor, to: int = PANEL) -> Tensor:
    """(..., K) -> (..., K padded)."""
    missing = padded(weight.shape[-1], to) - weight.shape[-1]
    return F.pad(weight, (0, missing)) if missing else weight


def pack(weight: Tensor, dtype: torch.dtype, *, reduce_to: int = PANEL, memory: HugePages | None = None) -> Tensor:
    """(N, K) -> [N / 32][K / per_lane][32][per_lane] of `dtype`, in `memory`; K is padded to a multiple of `reduce_to`."""
    packed = _panels(padded(len(weight)), padded(weight.shape[1], reduce_to), dtype, memory)
    _pack_into(packed, weight)
    return packed


def pack_sections(weights: Sequence[Tensor], dtype: torch.dtype, *, memory: HugePages | None = None) -> Tensor:
    """Linears that read the same input one after the other, each padded to whole panels."""
    packed = _panels(sum(padded(len(weight)) for weight in weights), padded(weights[0].shape[1]), dtype, memory)
    start = 0
    for weight in weights:
        end = start + padded(len(weight)) // PANEL
        _pack_into(packed[start:end], weight)
        start = end
    return packed


def pack_pair(gate: Tensor, up: Tensor, dtype: torch.dtype, *, memory: HugePages | None = None) -> Tensor:
    """`interleave` packed, without its copy."""
    packed = _panels(2 * padded(len(gate)), padded(gate.shape[1]), dtype, memory)
    _pack_into(packed[0::2], gate)
    _pack_into(packed[1::2], up)
    return packed


def _panels(rows: int, columns: int, dtype: torch.dtype, memory: HugePages | None) -> Tensor:
    shape = (rows // PANEL, columns // per_lane(dtype), PANEL, per_lane(dtype))
    return torch.empty(shape, dtype=dtype) if memory is None else memory.empty(shape, dtype)


def _pack_into(packed: Tensor, weight: Tensor) -> None:
    """Elements that stay beside each other move as one number, by numpy: several times faster than torch's `permute`."""
    panels, steps, _, step = packed.shape
    whole = pad_columns(pad_rows(weight.to(packed.dtype)), steps * step).contiguous()
    np.copyto(packed.view(torch.int32).numpy()[..., 0], whole.view(torch.int32).numpy().reshape(panels, PANEL, steps).transpose(0, 2, 1))


def tiles(weight: Tensor) -> Tensor:
    """(N, K) -> bfloat16 for AMX: for each 16 rows, the last ones fewer, [K padded / 2][rows][2]."""
    whole = pad_columns(weight.bfloat16())
    blocks = [block.view(len(block), -1, 2).transpose(0, 1).flatten() for block in torch.split(whole, LANES)]
    return torch.cat(blocks)


def unpack(panels: Tensor, rows: slice, columns: int) -> Tensor:
    """Some rows (whole panels) of what `pack` made, as (n, columns)."""
    part = panels[rows.start // PANEL : padded(rows.stop) // PANEL]
    return part.permute(0, 2, 1, 3).reshape(len(part) * PANEL, -1)[: rows.stop - rows.start, :columns]


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """(N, ...) twice -> (2 * N padded, ...): a panel of the one, then the panel of the other that is multiplied with it."""
    rest = gate.shape[1:]
    whole = [F.pad(part, (0, 0) * len(rest) + (0, padded(len(part)) - len(part))).view(-1, PANEL, *rest) for part in (gate, up)]
    return torch.stack(whole, dim=1).view(-1, *rest)


def vector(values: Tensor) -> Tensor:
    """(N,) -> (N padded,) float32."""
    return pad_columns(values.float()).contiguous()


def key_pages(keys: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(K, n, P) -> [K][pages][P / per_lane][16][per_lane], P padded to a multiple of per_lane."""
    step = per_lane(dtype)
    heads, count, _ = keys.shape
    whole = F.pad(pad_columns(keys.to(dtype), step), (0, 0, 0, padded(count, PAGE) - count))
    return whole.reshape(heads, -1, PAGE, whole.shape[-1] // step, step).transpose(2, 3).contiguous()


def value_pages(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(K, n, P) -> [K][pages][16 / per_lane][P padded to 16][per_lane]."""
    step = per_lane(dtype)
    heads, count, _ = values.shape
    whole = F.pad(pad_columns(values.to(dtype), LANES), (0, 0, 0, padded(count, PAGE) - count))
    return whole.reshape(heads, -1, PAGE // step, step, whole.shape[-1]).transpose(3, 4).contiguous()

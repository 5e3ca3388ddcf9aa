"""Layouts of weights that the native kernels read: panels of 32 output columns, everything padded to whole panels with zeros.

Tensors in, tensors out; run once when something is loaded.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moa_serve.errors import ModelError

PANEL, LANES, PAGE = 32, 16, 16
TILE_TOKENS = 16  # kTileTokens of src/step_types.h
INT8_GROUP, _SCALE_UNITS = 32, 4096  # kInt8Group, 1 / kScaleUnit of src/int8.h
_BYTES_OFFSET = 32768  # kBytesOffset of src/isa.h
# Cutting to bfloat16 takes 0 to 2^-7 of a weight, 2^-8.5 in the (geometric) middle: with that added before, it errs about as rounding does.
_RAISED_BEFORE_CUT = 1 + 2**-8.5
_INT8_PANELS = 32  # that are packed at a time, so that what is in between stays near


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


class Format(Protocol):
    """How a matrix stands in panels: (N, K) of both padded to whole panels, whose first dimension is the panels."""

    def empty(self, rows: int, columns: int, memory: HugePages | None) -> Tensor:
        """Panels to fill, for padded rows and columns."""
        ...

    def fill(self, packed: Tensor, weight: Tensor) -> None:
        """Let `packed`, some panels, be (N, K)."""
        ...

    def unpack(self, packed: Tensor, rows: slice, columns: int) -> Tensor:
        """Some rows (from a whole panel on) as (n, columns): the very numbers that the kernels multiply with."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """[N / 32][K / per_lane][32][per_lane] of `dtype`."""

    dtype: torch.dtype

    def empty(self, rows: int, columns: int, memory: HugePages | None) -> Tensor:
        step = per_lane(self.dtype)
        return _empty((rows // PANEL, columns // step, PANEL, step), self.dtype, memory)

    def fill(self, packed: Tensor, weight: Tensor) -> None:
        """Elements that stay beside each other move as one number, by numpy: several times faster than torch's `permute`."""
        panels, steps, _, step = packed.shape
        whole = pad_columns(pad_rows(weight.to(self.dtype)), steps * step).contiguous()
        np.copyto(
            packed.view(torch.int32).numpy()[..., 0], whole.view(torch.int32).numpy().reshape(panels, PANEL, steps).transpose(0, 2, 1)
        )

    def unpack(self, packed: Tensor, rows: slice, columns: int) -> Tensor:
        part = packed[rows.start // PANEL : padded(rows.stop) // PANEL]
        return part.permute(0, 2, 1, 3).reshape(len(part) * PANEL, -1)[: rows.stop - rows.start, :columns]


@dataclass(frozen=True, slots=True)
class Int8:
    """Eight bits (src/int8.h): w = d q + m cut to bfloat16, with a scale d and a minimum m for each 32 inputs of an output.

    [N / 32][K / 32][bytes of a group] uint8: 4096 d and m of 32 outputs in float16; q by pair of inputs, 16 outputs, which of the pair,
    output.
    """

    def empty(self, rows: int, columns: int, memory: HugePages | None) -> Tensor:
        return _empty((rows // PANEL, columns // INT8_GROUP, (4 + INT8_GROUP) * PANEL), torch.uint8, memory)

    def fill(self, packed: Tensor, weight: Tensor) -> None:
        """
        Raises:
            ModelError: a weight is not finite, or too large for a float16.
        """
        whole = pad_columns(pad_rows(weight))
        for part, rows in zip(torch.split(packed, _INT8_PANELS), torch.split(whole, _INT8_PANELS * PANEL), strict=True):
            self._fill_some(part, rows.float())

    def _fill_some(self, packed: Tensor, weight: Tensor) -> None:
        groups = (weight * _RAISED_BEFORE_CUT).view(len(packed), PANEL, -1, INT8_GROUP).transpose(1, 2)  # panels, groups, outputs, inputs
        low, high = groups.aminmax(dim=-1, keepdim=True)
        minima = low.half()
        scales = ((high - minima).clamp_(min=0) * (_SCALE_UNITS / 255)).half()
        if not bool((minima.isfinite() & scales.isfinite()).all()):
            raise ModelError("a weight of the base is not finite, or too large for eight bits; serve it with base_dtype 'auto'")
        inverse = torch.where(scales > 0, _SCALE_UNITS / scales.float(), 0)
        q = (groups - minima).mul_(inverse).round_().clamp_(0, 255).to(torch.uint8)
        packed[..., : 2 * PANEL] = scales.squeeze(-1).view(torch.uint8)
        packed[..., 2 * PANEL : 4 * PANEL] = minima.squeeze(-1).view(torch.uint8)
        packed[..., 4 * PANEL :] = q.view(len(packed), -1, 2, LANES, INT8_GROUP // 2, 2).permute(0, 1, 4, 2, 5, 3).flatten(2)

    def unpack(self, packed: Tensor, rows: slice, columns: int) -> Tensor:
        part = packed[rows.start // PANEL : padded(rows.stop) // PANEL]
        panels, groups, _ = part.shape
        scales, minima = (part[..., at : at + 2 * PANEL].contiguous().view(torch.float16).double() for at in (0, 2 * PANEL))
        scales /= _SCALE_UNITS
        # float64 holds an offset byte times a scale exactly, so that there is one rounding, as in the kernels' fused operation.
        minima = (minima - _BYTES_OFFSET * scales).float().double()
        q = part[..., 4 * PANEL :].view(panels, groups, INT8_GROUP // 2, 2, 2, LANES).permute(0, 3, 5, 1, 2, 4)
        q = q.reshape(panels, PANEL, groups, INT8_GROUP).double()  # outputs, groups, inputs
        scale, minimum = (factor.transpose(1, 2).unsqueeze(-1) for factor in (scales, minima))
        wide = ((q + _BYTES_OFFSET) * scale + minimum).float()
        cut = (wide.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()
        return cut.view(panels * PANEL, -1)[: rows.stop - rows.start, :columns]


def _empty(shape: tuple[int, ...], dtype: torch.dtype, memory: HugePages | None) -> Tensor:
    return torch.empty(shape, dtype=dtype) if memory is None else memory.empty(shape, dtype)


def pack(weight: Tensor, dtype: torch.dtype, *, reduce_to: int = PANEL) -> Tensor:
    """(N, K) -> panels of `dtype`; K is padded to a multiple of `reduce_to`."""
    form = Plain(dtype)
    packed = form.empty(padded(len(weight)), padded(weight.shape[1], reduce_to), None)
    form.fill(packed, weight)
    return packed


def pack_sections(weights: Sequence[Tensor], form: Format, *, memory: HugePages | None = None) -> Tensor:
    """Linears that read the same input one after the other, each padded to whole panels."""
    packed = form.empty(sum(padded(len(weight)) for weight in weights), padded(weights[0].shape[1]), memory)
    start = 0
    for weight in weights:
        end = start + padded(len(weight)) // PANEL
        form.fill(packed[start:end], weight)
        start = end
    return packed


def pack_pair(gate: Tensor, up: Tensor, form: Format, *, memory: HugePages | None = None) -> Tensor:
    """`interleave` packed, without its copy."""
    packed = form.empty(2 * padded(len(gate)), padded(gate.shape[1]), memory)
    form.fill(packed[0::2], gate)
    form.fill(packed[1::2], up)
    return packed


def tiles(weight: Tensor) -> Tensor:
    """(N, K) -> bfloat16 for AMX: for each 16 rows, the last ones fewer, [K padded / 2][rows][2]."""
    whole = pad_columns(weight.bfloat16())
    blocks = [block.view(len(block), -1, 2).transpose(0, 1).flatten() for block in torch.split(whole, LANES)]
    return torch.cat(blocks)


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

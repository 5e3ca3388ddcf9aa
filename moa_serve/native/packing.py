"""Layouts of weights that the native kernels read: panels of 32 output columns, everything padded to whole panels with zeros.

Tensors in, tensors out; run once when something is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
_INT8_ROWS = 32 * PANEL  # that are packed at a time, so that what is in between stays near


def padded(size: int, to: int = PANEL) -> int:
    return -(-size // to) * to


def per_lane(dtype: torch.dtype) -> int:
    """Elements of the reduced dimension that stand beside each other."""
    return 2 if dtype == torch.bfloat16 else 1


def pad_rows(weight: Tensor, to: int = PANEL) -> Tensor:
    """(N, K) -> (N padded, K)."""
    return F.pad(weight, (0, 0, 0, padded(len(weight), to) - len(weight)))


def pad_columns(weight: Tensor, to: int = PANEL) -> Tensor:
    """(..., K) -> (..., K padded)."""
    return F.pad(weight, (0, padded(weight.shape[-1], to) - weight.shape[-1]))


def pack(weight: Tensor, dtype: torch.dtype, *, reduce_to: int = PANEL) -> Tensor:
    """(N, K) -> [N / 32][K / per_lane][32][per_lane] of `dtype`; K is padded to a multiple of `reduce_to`."""
    whole = pad_columns(pad_rows(weight.to(dtype)), reduce_to)
    rows, columns = whole.shape
    step = per_lane(dtype)
    return whole.view(rows // PANEL, PANEL, columns // step, step).permute(0, 2, 1, 3).contiguous()


def tiles(weight: Tensor) -> Tensor:
    """(N, K) -> bfloat16 for AMX: for each 16 rows, the last ones fewer, [K padded / 2][rows][2]."""
    whole = pad_columns(weight.bfloat16())
    blocks = [block.view(len(block), -1, 2).transpose(0, 1).flatten() for block in torch.split(whole, LANES)]
    return torch.cat(blocks)


def unpack(panels: Tensor, rows: slice, columns: int) -> Tensor:
    """Some rows (whole panels) of what `pack` made, as (n, columns)."""
    part = panels[rows.start // PANEL : padded(rows.stop) // PANEL]
    return part.permute(0, 2, 1, 3).reshape(len(part) * PANEL, -1)[: rows.stop - rows.start, :columns]


@dataclass(frozen=True, slots=True, eq=False)
class Int8Panels:
    """A matrix in eight bits (src/int8.h): w = d q + m, with a scale d and a minimum m for each 32 inputs of an output.

    Args:
        data: (N / 32, K / 32, bytes of a group) uint8: 4096 d and m of 32 outputs in float16; q by pair of inputs, 16 outputs, which of the
            pair, output.
    """

    data: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Panels":
        """
        Args:
            weight: (N, K); both are padded with zeros to multiples of 32.
        Raises:
            ModelError: a weight is not finite, or too large for a float16.
        """
        whole = pad_columns(pad_rows(weight))
        return cls(torch.cat([_int8_panels(part) for part in torch.split(whole, _INT8_ROWS)]))

    def rows(self, rows: slice, columns: int) -> Tensor:
        """Some rows (from a whole panel on) as (n, columns) bfloat16: the very numbers that the kernels multiply with."""
        part = self.data[rows.start // PANEL : padded(rows.stop) // PANEL]
        panels, groups, _ = part.shape
        scales, minima = (part[..., at : at + 2 * PANEL].contiguous().view(torch.float16).double() for at in (0, 2 * PANEL))
        scales /= _SCALE_UNITS
        # float64 holds an offset byte times a scale exactly, so that there is one rounding, as in the kernels' fused operation.
        minima = (minima - _BYTES_OFFSET * scales).float().double()
        q = part[..., 4 * PANEL :].view(panels, groups, INT8_GROUP // 2, 2, 2, LANES).permute(0, 3, 5, 1, 2, 4)
        q = q.reshape(panels, PANEL, groups, INT8_GROUP).double()  # outputs, groups, inputs
        by_output = (factor.transpose(1, 2).unsqueeze(-1) for factor in (scales, minima))
        wide = ((q + _BYTES_OFFSET) * next(by_output) + next(by_output)).float()
        cut = (wide.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()
        return cut.view(panels * PANEL, -1)[: rows.stop - rows.start, :columns]


def _int8_panels(weight: Tensor) -> Tensor:
    """(N, K), whole panels -> as `Int8Panels.data`."""
    panels = len(weight) // PANEL
    raised = weight.float() * _RAISED_BEFORE_CUT
    groups = raised.view(panels, PANEL, -1, INT8_GROUP).transpose(1, 2)  # panels, groups, outputs, inputs
    low, high = groups.aminmax(dim=-1, keepdim=True)
    minima = low.half()
    scales = ((high - minima).clamp_(min=0) * (_SCALE_UNITS / 255)).half()
    if not bool((minima.isfinite() & scales.isfinite()).all()):
        raise ModelError("a weight of the base is not finite, or too large for eight bits; serve it with base_dtype 'auto'")
    inverse = torch.where(scales > 0, _SCALE_UNITS / scales.float(), 0)
    q = (groups - minima).mul_(inverse).round_().clamp_(0, 255).to(torch.uint8)
    ordered = q.view(panels, -1, 2, LANES, INT8_GROUP // 2, 2).permute(0, 1, 4, 2, 5, 3)
    return torch.cat([scales.squeeze(-1).view(torch.uint8), minima.squeeze(-1).view(torch.uint8), ordered.flatten(2)], dim=-1)


def sections(weights: Sequence[Tensor]) -> Tensor:
    """Linears that read the same input one below the other, each padded to whole panels."""
    return torch.cat([pad_rows(weight) for weight in weights])


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

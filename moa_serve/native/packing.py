"""Layouts of weights that the native kernels read: panels of 32 output columns, everything padded to whole panels with zeros.

Tensors in, tensors out; run once when something is loaded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL, LANES, PAGE = 32, 16, 16
TILE_TOKENS = 16  # kTileTokens of src/step_types.h


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


def pack_sections(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Linears that read the same input one after the other, each padded to whole panels."""
    return pack(torch.cat([pad_rows(weight) for weight in weights]), dtype)


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

"""The gathered shrink: products of a chunk's tokens with its own slot's rows only, where slots' rows stand in buffers of their own.

One launch for each of a layer's four products; what it leaves is read where else the product's further columns are (`Low` in model.py).
Whether rows stand so is placement.py's question. The definition is a product in torch.
"""

import triton
import triton.language as tl

from moa_serve.gpu.tiles import dot

TILE = 16
"""Rows of a program: the fewest that tensor cores take, since at small batches the programs are too few to draw all of the bandwidth."""
BLOCK = 128
"""Inputs that a program multiplies at once."""
NUM_WARPS, NUM_STAGES = 4, 4


def num_tiles(rows: int, router_rows: int) -> int:
    """Programs that share a section's rows: no tile has rows of the layer router and others, since these may read different inputs."""
    return -(-router_rows // TILE) - (router_rows - rows) // TILE


@triton.jit
def shrink(
    chunks_ptr, a_ptr, x_ptr, rows_ptr, low_ptr, split_stride, ints_ptr, ints_slot,
    K: tl.constexpr, ROWS: tl.constexpr, ROUTER_ROWS: tl.constexpr, AT_RESIDUAL: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """low[split, token, row] = the sum over a part of the K inputs, in float32. Grid: (chunks, num_tiles(ROWS, ROUTER_ROWS), SPLITS).

    `a` and `x` (T, K), `rows` (S, ROWS, K), `low` (SPLITS, T, ROWS). Chunks as kernels.py has them; those of the base alone, and empty
    ones, write nothing. The first ROUTER_ROWS, the layer router's, read x in place of a where the slot's `residual` is not 0.
    """
    chunk = chunks_ptr + tl.program_id(0) * 8
    start, count, slot = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    if (count > 0) & (slot >= 0):
        tile, split = tl.program_id(1), tl.program_id(2)
        router_tiles: tl.constexpr = (ROUTER_ROWS + N - 1) // N
        is_router = tile < router_tiles
        inputs_ptr = a_ptr
        if is_router & (tl.load(ints_ptr + slot * ints_slot + AT_RESIDUAL) != 0):
            inputs_ptr = x_ptr
        rows = tl.where(is_router, tile * N, ROUTER_ROWS + (tile - router_tiles) * N) + tl.arange(0, N)
        is_row = rows < tl.where(is_router, ROUTER_ROWS, ROWS)
        own = tl.arange(0, C)
        tokens, mask = start + own, own < count
        weight_ptr = rows_ptr + slot.to(tl.int64) * (ROWS * K) + rows[:, None] * K
        inputs_ptr += tokens[:, None] * K
        part = tl.cdiv(tl.cdiv(K, BLOCK), SPLITS) * BLOCK
        acc = tl.zeros((C, N), tl.float32)
        for at in range(split * part, tl.minimum((split + 1) * part, K), BLOCK):
            columns = at + tl.arange(0, BLOCK)
            is_column = (columns < K)[None, :]
            values = tl.load(inputs_ptr + columns[None, :], mask=mask[:, None] & is_column, other=0.0)
            weight = tl.load(weight_ptr + columns[None, :], mask=is_row[:, None] & is_column, other=0.0)
            acc += dot(values, tl.trans(weight))
        out_ptr = low_ptr + split * split_stride + tokens[:, None] * ROWS + rows[None, :]
        tl.store(out_ptr, acc, mask=mask[:, None] & is_row[None, :])

"""Paged attention of rows that decode one token each, with the adapters' prompt experts in the same launches.

It computes what model.attention's DecodeRows and model.moa's PromptExpert define. Not for prefill, and it writes no keys. All tensors are
the caller's and static in size, so that a launch can be part of a CUDA graph: how long a row is, and whether its adapter has a prompt that
counts, is read inside the kernel.

A row's keys are shared out to `num_splits` programs (flash decoding, arXiv:2311.01282), each with a softmax of its own, and the prompt is
one more of them; a second kernel merges. With one split the first kernel does it all. What a row gets depends on itself and on num_splits.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa_serve.gpu.launch import Launch, launch
from moa_serve.gpu.tiles import dot

_LOWEST = tl.constexpr(-3.4e38)  # a maximum of nothing: finite, so that less than it is never inf - inf
_PROMPT_TILE = tl.constexpr(16)  # the least that tl.dot takes; a prompt of the paper has 10 rows
NUM_WARPS = 4
NUM_STAGES = 3  # with 2 a tile waits for its entries of the block table; with 3 those are fetched one tile ahead of their keys


@triton.jit
def _tokens_per_split(length: tl.tensor, NUM_SPLITS: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """Whole tiles, so that short rows leave splits unused rather than tiles half empty."""
    return tl.cdiv(tl.cdiv(length, TILE), NUM_SPLITS) * TILE


@triton.jit
def _online_softmax(
    acc: tl.tensor, total: tl.tensor, top: tl.tensor, scores: tl.tensor, share: tl.tensor, v: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One more tile of keys: scores (G, N) as powers of 2, share (N,) what a value counts after the softmax or None, v (N, P).

    acc (G, P), total (G,) and top (G,), float32: the sums so far, both divided by 2 ** top.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    fade = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    total = total * fade + tl.sum(weights, 1)
    if share is not None:
        weights *= share[None, :]
    acc = acc * fade[:, None] + dot(weights.to(v.dtype), v)
    return acc, total, new_top


@triton.jit
def _prompt(
    query: tl.tensor,  # (GROUP, WIDTH)
    length: tl.tensor,
    slots: tl.tensor,
    gates: tl.tensor,
    inner: tl.tensor,
    prompt_keys: tl.tensor,
    prompt_values: tl.tensor,
    head_gate: tl.tensor,
    prompt_inner: tl.tensor,
    prompt_column: tl.tensor,
    gates_stride: tl.tensor,
    inner_stride: tl.tensor,
    prompt_stride: tl.tensor,
    head_gate_stride: tl.tensor,
    member_stride: tl.tensor,
    column_stride: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
) -> tl.tensor:
    """What the prompt of this row's adapter adds to the heads of this program, (GROUP, WIDTH) float32: zeros where nothing counts."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    group, column = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    slot = tl.load(slots + row).to(tl.int64)
    gate = tl.load(prompt_column + slot * column_stride, mask=(slot >= 0) & (length > 0), other=-2)
    weight = tl.load(gates + row * gates_stride + gate, mask=gate >= 0, other=1.0)
    weight = tl.where(gate == -2, 0.0, weight)
    result = tl.zeros([GROUP, WIDTH], tl.float32)
    if weight != 0.0:
        acc = tl.zeros([GROUP, WIDTH], tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        top = tl.full([GROUP], _LOWEST, tl.float32)
        for start in range(0, N, _PROMPT_TILE):
            place = start + tl.arange(0, _PROMPT_TILE)
            member = tl.load(prompt_inner + slot * member_stride + place)
            is_used = member != -2
            share = tl.load(inner + row * inner_stride + member, mask=member >= 0, other=1.0)
            at = slot * prompt_stride + (kv_head * N + place)[:, None] * P + column[None, :]
            is_column = (column < P)[None, :]
            k = tl.load(prompt_keys + at, mask=is_used[:, None] & is_column, other=0.0)
            v = tl.load(prompt_values + at, mask=(is_used & (share != 0))[:, None] & is_column, other=0.0)
            scores = tl.where(is_used[None, :], dot(query.to(tl.float32), tl.trans(k)) * SCALE, -float("inf"))
            acc, total, top = _online_softmax(acc, total, top, scores, share, v)
        heads = kv_head * (H // K) + group
        gate_of_head = tl.load(head_gate + slot * head_gate_stride + heads, mask=group < H // K, other=0.0)
        result = acc * (weight * gate_of_head / total)[:, None]
    return result


@triton.jit(do_not_specialize=["table_width"])
def attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_table: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    totals: tl.tensor,
    tops: tl.tensor,
    slots: tl.tensor,
    gates: tl.tensor,
    inner: tl.tensor,
    prompt_keys: tl.tensor,
    prompt_values: tl.tensor,
    head_gate: tl.tensor,
    prompt_inner: tl.tensor,
    prompt_column: tl.tensor,
    table_width: tl.tensor,
    gates_stride: tl.tensor,
    inner_stride: tl.tensor,
    prompt_stride: tl.tensor,
    head_gate_stride: tl.tensor,
    member_stride: tl.tensor,
    column_stride: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
) -> None:
    """Program (row, kv head, split): the heads of one group over one part of a row's keys; split NUM_SPLITS is the prompt.

    GROUP and WIDTH are H / K and P, padded to powers of two from 16; SCALE is log2(e) / sqrt(P).
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group, column = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    heads = row * H + kv_head * (H // K) + group
    is_head = group < H // K
    is_column = (column < P)[None, :]
    at = heads[:, None] * P + column[None, :]
    query = tl.load(q + at, mask=is_head[:, None] & is_column, other=0.0)
    length = tl.load(lengths + row)
    count = _tokens_per_split(length, NUM_SPLITS, TILE)
    begin = split * count
    end = tl.minimum(begin + count, length)

    acc = tl.zeros([GROUP, WIDTH], tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    top = tl.full([GROUP], _LOWEST, tl.float32)
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        is_seen = place < end
        block = tl.load(block_table + row * table_width + place // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        token = (block * BLOCK_SIZE + place % BLOCK_SIZE) * K + kv_head
        source = token[:, None] * P + column[None, :]
        k = tl.load(keys + source, mask=is_seen[:, None] & is_column, other=0.0)
        v = tl.load(values + source, mask=is_seen[:, None] & is_column, other=0.0)
        scores = tl.where(is_seen[None, :], dot(query, tl.trans(k)) * SCALE, -float("inf"))
        acc, total, top = _online_softmax(acc, total, top, scores, None, v)

    if NUM_SPLITS == 1:
        result = acc / tl.where(length > 0, total, 1.0)[:, None]  # an empty row has no terms: 0
        if HAS_ADAPTER:
            result += _prompt(
                query, length, slots, gates, inner, prompt_keys, prompt_values, head_gate, prompt_inner, prompt_column,
                gates_stride, inner_stride, prompt_stride, head_gate_stride, member_stride, column_stride, H, K, P, N, GROUP, WIDTH, SCALE,
            )  # fmt: skip
        tl.store(out + at, result.to(out.dtype.element_ty), mask=is_head[:, None] & is_column)
    else:
        kept = heads * (NUM_SPLITS + 1) + split
        kept_at = kept[:, None] * P + column[None, :]
        if begin < end:
            tl.store(partial + kept_at, acc, mask=is_head[:, None] & is_column)
            tl.store(totals + kept, total, mask=is_head)
            tl.store(tops + kept, top, mask=is_head)
        if HAS_ADAPTER and split == NUM_SPLITS:
            added = _prompt(
                query, length, slots, gates, inner, prompt_keys, prompt_values, head_gate, prompt_inner, prompt_column,
                gates_stride, inner_stride, prompt_stride, head_gate_stride, member_stride, column_stride, H, K, P, N, GROUP, WIDTH, SCALE,
            )  # fmt: skip
            tl.store(partial + kept_at, added, mask=is_head[:, None] & is_column)


@triton.jit
def merge(
    lengths: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    totals: tl.tensor,
    tops: tl.tensor,
    H: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
) -> None:
    """Program (row, head): the parts of `attend` in one. SPLITS is NUM_SPLITS padded to a power of two.

    What an unused split left in the workspace is older than this step, so it is not even read.
    """
    row, column, split = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    head = row * H + tl.program_id(1)
    length = tl.load(lengths + row)
    is_used = split * _tokens_per_split(length, NUM_SPLITS, TILE) < length
    is_column = column < P
    kept = head * (NUM_SPLITS + 1) + split
    top = tl.load(tops + kept, mask=is_used, other=_LOWEST)
    fade = tl.where(is_used, tl.exp2(top - tl.max(top, 0)), 0.0)
    total = tl.sum(fade * tl.load(totals + kept, mask=is_used, other=0.0), 0)
    parts = tl.load(partial + kept[:, None] * P + column[None, :], mask=is_used[:, None] & is_column[None, :], other=0.0)
    result = tl.sum(fade[:, None] * parts, 0) / tl.where(length > 0, total, 1.0)
    if HAS_ADAPTER:
        prompt = head * (NUM_SPLITS + 1) + NUM_SPLITS
        result += tl.load(partial + prompt * P + column, mask=is_column, other=0.0)
    tl.store(out + head * P + column, result.to(out.dtype.element_ty), mask=is_column)


@dataclass(frozen=True, slots=True, eq=False)
class SplitResults:
    """Where the splits leave their results for the merge; of one step's layers, one after the other. Needs no clearing.

    Args:
        partial: (T, H, num_splits + 1, P) float32; the last is the prompt's.
        totals, tops: (T, H, num_splits + 1) float32.
    """

    partial: Tensor
    totals: Tensor
    tops: Tensor

    @classmethod
    def empty(cls, max_rows: int, heads: int, head_dim: int, num_splits: int, device: torch.device) -> "SplitResults":
        """For steps of up to `max_rows` rows: 4 * max_rows * heads * (num_splits + 1) * (head_dim + 2) bytes."""
        shape = (max_rows, heads, num_splits + 1)
        return cls(*(torch.empty(size, dtype=torch.float32, device=device) for size in ((*shape, head_dim), shape, shape)))

    @property
    def num_splits(self) -> int:
        return self.tops.shape[2] - 1


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """The prompt experts of one layer, and which row has which.

    Args:
        slots: (T,) int32, the slot of each row's adapter; -1 for the base alone.
        gates: (T, E) float32, the layer router's weights; exactly 0 where an expert is not kept.
        inner: (T, I) float32, the shares of the prompts' inner experts.
        prompt_keys, prompt_values: (S, K, N, P) float32, N a power of two from 16.
        head_gate: (S, H) float32.
        prompt_inner: (S, N) int32, which of `inner` weighs a row of the prompt; -1 where it counts fully, -2 where the row is padding.
        prompt_column: (S,) int32, which of `gates` weighs the prompt; -1 where it counts fully, -2 where the adapter has none here.
    """

    slots: Tensor
    gates: Tensor
    inner: Tensor
    prompt_keys: Tensor
    prompt_values: Tensor
    head_gate: Tensor
    prompt_inner: Tensor
    prompt_column: Tensor


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    out: Tensor,
    results: SplitResults | None = None,
    prompts: Prompts | None = None,
    launch: Launch = launch,
) -> None:
    """out_h = softmax(q_h . K / sqrt(P)) V + w * gate_h * sum_j share_j softmax_j(q_h . Kp / sqrt(P)) Vp, rounded once.

    Where w is 0 nothing is read of the prompt, and of a page nothing behind its row's length: what stands there may be NaN.

    Args:
        q, out: (T, H, P) of the base's dtype, q rotated.
        keys, values: (num_blocks, block_size, K, P), one layer of model.attention.KVCache.
        block_table: (T, M) int32, padded with 0.
        lengths: (T,) int32, keys to attend to, the own one included; a row of length 0 is padding and gets 0.
        results: what is shared out to its num_splits programs a row and kv head; None for one program, and no merge.
        prompts: None where no row has an adapter with a prompt.
    """
    rows, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = keys.shape
    num_splits = results.num_splits if results else 1
    given = {"q": q, "keys": keys, "values": values, "block_table": block_table, "lengths": lengths, "out": out}
    kept = {field.name: getattr(results, field.name, None) for field in fields(SplitResults)}
    of_prompts = {field.name: getattr(prompts, field.name, None) for field in fields(Prompts)}
    for name, tensor in (given | kept).items():
        assert tensor is None or tensor.is_contiguous(), f"{name}: addresses are computed from shapes alone"
    for name, tensor in of_prompts.items():  # rows may stand apart: slots have them among other numbers
        assert tensor is None or tensor.dim() < 2 or tensor[:1].is_contiguous(), f"{name}: addresses are computed from its rows' distance"
    strides = {name: _stride(getattr(prompts, tensor, None)) for name, tensor in STRIDES.items()}
    assert results is None or (results.tops.shape[0] >= rows and results.partial.shape[1:] == (heads, num_splits + 1, head_dim))
    num_prompt_rows = prompts.prompt_keys.shape[2] if prompts else 0
    constants = attend_constants(heads, kv_heads, head_dim, block_size, q.dtype, num_splits, num_prompt_rows)
    launch(
        attend,
        (rows, kv_heads, num_splits + (num_splits > 1 and prompts is not None)),
        **given,
        **kept,
        **of_prompts,
        table_width=block_table.shape[1],
        **strides,
        **constants,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    if num_splits > 1:
        launch(merge, (rows, heads), lengths=lengths, out=out, **kept, **merge_constants(constants), num_warps=NUM_WARPS)


STRIDES = {
    "gates_stride": "gates", "inner_stride": "inner", "prompt_stride": "prompt_keys", "head_gate_stride": "head_gate",
    "member_stride": "prompt_inner", "column_stride": "prompt_column",
}  # fmt: skip


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def attend_constants(
    heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, num_splits: int, num_prompt_rows: int
) -> dict[str, Any]:
    """Constants of `attend`; `num_prompt_rows` 0 leaves out all code for adapters."""
    assert block_size & (block_size - 1) == 0 == heads % kv_heads
    assert num_prompt_rows == 0 or (num_prompt_rows >= 16 and num_prompt_rows & (num_prompt_rows - 1) == 0)
    width = max(16, triton.next_power_of_2(head_dim))
    # 16 KB of keys and of values, so that a multiprocessor has room for several programs. float32 goes without tensor cores, and spills
    # with more: `python -m tests.gpu_kernels`.
    tile_size = 2**13 if dtype.itemsize == 2 else 2**11
    return {
        "H": heads,
        "K": kv_heads,
        "P": head_dim,
        "N": num_prompt_rows,
        "BLOCK_SIZE": block_size,
        "TILE": max(16, min(64, tile_size // width)),
        "GROUP": max(16, triton.next_power_of_2(heads // kv_heads)),
        "WIDTH": width,
        "SCALE": math.log2(math.e) / math.sqrt(head_dim),
        "NUM_SPLITS": num_splits,
        "HAS_ADAPTER": num_prompt_rows > 0,
    }


def merge_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Constants of `merge` after an `attend` with these."""
    shared = {name: constants[name] for name in ("H", "P", "TILE", "WIDTH", "NUM_SPLITS", "HAS_ADAPTER")}
    return shared | {"SPLITS": triton.next_power_of_2(constants["NUM_SPLITS"])}

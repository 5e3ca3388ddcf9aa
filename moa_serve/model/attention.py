"""Attention as an argument of the forward: paged to serve, causal to train and to define.

Both take the layer's rotated queries and keys and its values, flat over the tokens of a batch, and give each head's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moa_serve.config import ModelConfig
from moa_serve.model.ops import on_device


class Attention(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, P), (T, K, P), (T, K, P) -> (T, H, P)."""
        ...


@dataclass(frozen=True, slots=True)
class CausalAttention:
    """Each span of tokens [a, b) is one whole sequence and sees only itself; no cache. This is the definition."""

    spans: Sequence[tuple[int, int]]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([_causal(q[a:b], k[a:b], v[a:b]) for a, b in self.spans])


class PaddedCausalAttention:
    """CausalAttention for training: whole sequences side by side, padded to the longest, in one call instead of one a sequence.

    float32 inside: torch's bfloat16 kernel has a backward on CPU that is 5 times slower (24 sequences of 80 tokens, 9 heads, 2 threads:
    54 ms against 11 ms a layer). A pad stands behind its sequence's tokens, so none of them sees it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        longest = max(lengths)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        place = torch.arange(longest)
        is_token = place < torch.tensor(lengths)[:, None]  # (B, M)
        self._shape = (len(lengths), longest)
        self._is_whole = min(lengths) == longest
        self._tokens = torch.where(is_token, starts[:, None] + place, 0).flatten().to(device)
        self._places = is_token.flatten().nonzero()[:, 0].to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = self._padded(q), self._padded(k), self._padded(v)
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        flat = out.transpose(1, 2).flatten(0, 1)  # (B * M, H, P)
        return (flat if self._is_whole else flat[self._places]).to(q.dtype)

    def _padded(self, x: Tensor) -> Tensor:
        """(T, H, P) -> (B, H, M, P) float32."""
        wide = x.float() if self._is_whole else x.float()[self._tokens]
        return wide.view(*self._shape, *x.shape[1:]).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One sequence: queries are the last positions of the keys. `mask` (Tq, Tk) is needed where there are fewer of them."""
    if mask is not None and q.device.type != "cpu":
        return _causal_grouped(q, k, v, mask)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _causal_grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same with the heads of a group as queries of one: a GPU's kernels take a mask or groups, and without them all scores are kept."""
    length, heads, size = q.shape
    kv_heads = k.shape[1]
    grouped = q.view(length, kv_heads, -1, size).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, size)  # (1, K, H/K * Tq, P)
    out = F.scaled_dot_product_attention(
        grouped, k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=mask.repeat(heads // kv_heads, 1)
    )
    return out.view(kv_heads, -1, length, size).permute(2, 0, 1, 3).reshape(length, heads, size)


@dataclass(frozen=True, slots=True, eq=False)
class CachedSpan:
    """One sequence's part in a step: tokens [start, start + count) of the batch, behind the `computed` ones that its pages hold already.

    Args:
        blocks: pages of the sequence, in order; they have room for the new tokens.
        num_prompt: tokens of the prompt; counts where there are branches.
        branches: [start, end) in the sequence of each branch; none sees another. All are computed together with their prompt.
    """

    start: int
    count: int
    computed: int
    blocks: Sequence[int]
    num_prompt: int = 0
    branches: tuple[tuple[int, int], ...] = ()


_LEAST_BUCKET, _LEAST_WIDTH = 6, 16  # 64 pages, and 16: so many cost a GPU less than another group, or another recording


class KVCache:
    """Keys and values of all layers in pages of `block_size` tokens; which page is whose, engine.pools.BlockPool knows.

    Memory is reserved and not touched: on a CPU a page becomes real when it is first zeroed. Page 0 is padding and stays zero.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.block_size, self.device = block_size, device
        self.zero([0])

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize

    def zero(self, blocks: Sequence[int]) -> None:
        """Clean pages that change owner: a masked place still meets a softmax weight of 0, and 0 * NaN would be NaN."""
        if self.device.type != "cpu" and blocks:  # a call costs more there than a page
            found = self._tensor(np.array(blocks))
            self.keys.index_fill_(1, found, 0)
            self.values.index_fill_(1, found, 0)
            return
        for block in blocks:
            self.keys[:, block].zero_()
            self.values[:, block].zero_()

    def attention(self, spans: Sequence[CachedSpan]) -> "PagedAttention":
        """How the tokens of one step attend: `spans` cover the batch in its order."""
        size, places, chunks, branched = self.block_size, [], [], []
        decode: dict[int, list[CachedSpan]] = {}  # by bucket: nobody pays for the longest
        for span in spans:
            table = np.array(span.blocks)
            index = np.arange(span.computed, span.computed + span.count)
            places.append(table[index // size] * size + index % size)
            if span.count == 1:
                decode.setdefault(self._bucket(-(-(span.computed + 1) // size)), []).append(span)
            elif span.branches:
                branched.append(self.branched(span))
            else:
                chunks.append(self.chunk(span))
        is_all = not chunks and not branched and len(decode) == 1
        rows = [self._decode_rows(group, is_all) for group in decode.values()]
        return PagedAttention(self, self._tensor(np.concatenate(places)), rows, chunks, branched)

    def chunk(self, span: CachedSpan) -> "Chunk":
        return Chunk(span.start, span.start + span.count, span.computed, self._tensor(np.array(span.blocks)))

    def branched(self, span: CachedSpan) -> "BranchedChunk":
        return BranchedChunk(span.start, span.start + span.count, span.num_prompt, self._seen_by_branches(span))

    def _bucket(self, pages: int) -> int:
        """Rows of so many pages attend together: up to the next power of two, and on a GPU all shorter ones, where calls cost more."""
        bucket = (pages - 1).bit_length()
        return bucket if self.device.type == "cpu" else max(bucket, _LEAST_BUCKET)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return on_device(array, self.device)

    def _seen_by_branches(self, span: CachedSpan) -> Tensor:
        length, prompt = span.count, span.num_prompt
        assert span.computed == 0, "branches are computed together with their prompt"
        seen = np.zeros((length - prompt, length), dtype=np.bool_)
        seen[:, :prompt] = True
        for start, end in span.branches:
            seen[start - prompt : end - prompt, start:end] = np.tri(end - start, dtype=np.bool_)
        return self._tensor(seen)

    def _decode_rows(self, rows: list[CachedSpan], is_all: bool) -> "DecodeRows":
        size = self.block_size
        lengths = [row.computed + 1 for row in rows]
        width = max(-(-length // size) for length in lengths)
        if self.device.type != "cpu":
            width = max(1 << (width - 1).bit_length(), _LEAST_WIDTH)  # a step has few shapes, so that it can be recorded (graphs.py)
        blocks = np.zeros((len(rows), width), dtype=np.int64)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            used = -(-length // size)
            blocks[place, :used] = row.blocks[:used]
        seen = np.arange(blocks.shape[1] * size) < np.array(lengths)[:, None]
        starts = None if is_all else self._tensor(np.array([row.start for row in rows]))
        is_seen = self._tensor(seen)[:, None, None, :]
        # What is added to scores, once: torch would make it of booleans again in every layer.
        mask = torch.zeros(is_seen.shape, dtype=_decode_dtype(self.keys), device=self.device).masked_fill_(~is_seen, -torch.inf)
        return DecodeRows(starts, self._tensor(blocks), mask)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Tokens [start, end) of the batch that continue one sequence: the first stands at `position`; `blocks` (n,) int64 hold it all."""

    start: int
    end: int
    position: int
    blocks: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BranchedChunk:
    """Tokens [start, end) of the batch that are one whole sequence: a prompt of `num_prompt` tokens, then branches that continue it.

    Args:
        seen: (N, num_prompt + N) bool, the tokens that each of the N branch tokens attends to: the prompt, and its own branch up to itself.
    """

    start: int
    end: int
    num_prompt: int
    seen: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """Tokens that are alone in their sequence's step, of sequences of similar length.

    Args:
        rows: (N,) int64, their places in the batch; None where they are the whole batch in its order.
        blocks: (N, M) int64, their pages, padded with page 0.
        mask: (N, 1, 1, M * block_size), what is added to scores: 0 for the tokens to attend to, the own one included, else -inf.
    """

    rows: Tensor | None
    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PagedAttention:
    """Writes the step's keys and values into pages, then attends: rows of one token together, longer chunks one by one.

    Args:
        places: (T,) int64, block * block_size + offset of each token.
        decode, chunks, branched: every token of the batch is in one of them.
    """

    cache: KVCache
    places: Tensor
    decode: Sequence[DecodeRows] = ()
    chunks: Sequence[Chunk] = ()
    branched: Sequence[BranchedChunk] = ()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.view(-1, *k.shape[1:])[self.places] = k.to(keys.dtype)
        values.view(-1, *v.shape[1:])[self.places] = v.to(values.dtype)
        if len(self.decode) == 1 and self.decode[0].rows is None:
            return _attend_rows(q, self.decode[0], keys, values)
        out = torch.empty_like(q)
        for group in self.decode:
            assert group.rows is not None, "only a group that is the whole batch has no rows"
            out[group.rows] = _attend_rows(q[group.rows], group, keys, values)
        for chunk in self.chunks:
            out[chunk.start : chunk.end] = attend_chunk(chunk, q, k, v, keys, values)
        for whole in self.branched:
            rows = slice(whole.start, whole.end)
            out[rows] = attend_branches(whole, q[rows], k[rows], v[rows])
        return out


def attend_chunk(chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(n, H, P) of a chunk's tokens among a batch's q, k and v, which stand in the layer's pages already."""
    q, k, v = (x[chunk.start : chunk.end] for x in (q, k, v))
    if chunk.position == 0:
        return _causal(q, k, v)
    length = chunk.position + len(q)
    k = keys[chunk.blocks].flatten(0, 1)[:length]
    v = values[chunk.blocks].flatten(0, 1)[:length]
    seen = torch.arange(length, device=q.device) <= torch.arange(chunk.position, length, device=q.device)[:, None]
    return _causal(q, k, v, seen)


def attend_branches(whole: BranchedChunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The prompt as if it were alone, so that no branch can touch it, then all branches at once."""
    n = whole.num_prompt
    return torch.cat((_causal(q[:n], k[:n], v[:n]), _causal(q[n:], k, v, whole.seen)))


def _decode_dtype(keys: Tensor) -> torch.dtype:
    """What rows of one token attend in: torch's bfloat16 kernel for one query is 5 to 6 times slower on CPU than its float32 one."""
    return torch.float32 if keys.device.type == "cpu" else keys.dtype


def _attend_rows(q: Tensor, group: DecodeRows, keys: Tensor, values: Tensor) -> Tensor:
    rows, heads, size = q.shape
    kv_heads = keys.shape[2]
    dtype = group.mask.dtype
    # index_select moves whole pages, and is 4 times faster than indexing; pages are widened as they lie, before anything is a view of them.
    k, v = (
        part.index_select(0, group.blocks.flatten()).to(dtype).view(rows, -1, kv_heads, size).transpose(1, 2) for part in (keys, values)
    )  # (N, K, M * block_size, P)
    grouped = q.view(rows, kv_heads, heads // kv_heads, size)  # the heads of a group share keys: no copies of them
    out = F.scaled_dot_product_attention(grouped.to(dtype), k, v, attn_mask=group.mask)
    return out.to(q.dtype).reshape(rows, heads, size)

"""Paged decode attention with the prompt expert, against model.attention and model.moa: on a GPU, else in Triton's interpreter.

Wherever nothing may be read from stands NaN: pages of nobody, places behind a row's length, workspaces, padding rows of prompts, prompts
that do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import pytest
import torch
from kernel_device import DEVICE, MARKS
from support import tiny_config
from torch import Tensor

from moa_serve.gpu.attention import Prompts, SplitResults, decode_attention
from moa_serve.model.attention import CachedSpan, KVCache
from moa_serve.model.moa import Mixture, PromptExpert, Routed

pytestmark = MARKS
NAN = float("nan")
LENGTHS = (1, 16, 17, 0, 70, 150)  # one token, a page, one more, a padding row, more than a tile, more than two
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass
class Step:
    """Rows of one token each: what the kernel gets, and what the base alone makes of each row (T, H, P) float32."""

    q: Tensor
    keys: Tensor
    values: Tensor
    block_table: Tensor
    lengths: Tensor
    base: Tensor

    def run(self, num_splits: int = 1, prompts: Prompts | None = None) -> Tensor:
        rows, heads, size = self.q.shape
        results = None
        if num_splits > 1:
            results = SplitResults.empty(rows + 1, heads, size, num_splits, torch.device(DEVICE))
            for left in (results.partial, results.totals, results.tops):
                left.fill_(NAN)
        if prompts is not None:
            prompts = Prompts(*(getattr(prompts, field.name).to(DEVICE) for field in fields(Prompts)))
        out = torch.full_like(self.q, NAN, device=DEVICE)
        q, keys, values, table, lengths = (x.to(DEVICE) for x in (self.q, self.keys, self.values, self.block_table, self.lengths))
        decode_attention(q, keys, values, table, lengths, out, results, prompts)
        return out.cpu()


def make_step(
    lengths: Sequence[int] = LENGTHS,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """The definition computes in float32 what `dtype` holds exactly; the kernel gets the same pages, in `dtype` and with NaN around."""
    torch.manual_seed(0)
    pages = [-(-length // block_size) for length in lengths]
    free = (1 + torch.randperm(sum(pages))).tolist()
    blocks = [[free.pop() for _ in range(count)] for count in pages]
    shape = tiny_config(num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=size)
    cache = KVCache(shape, 1 + sum(pages), block_size, torch.float32, torch.device("cpu"))
    for part in (cache.keys, cache.values):
        part[:, 1:] = torch.randn(part[:, 1:].shape).to(dtype).float()
    q, k, v = (torch.randn(len(lengths), count, size).to(dtype).float() for count in (heads, kv_heads, kv_heads))
    real = [row for row, length in enumerate(lengths) if length]
    spans = [CachedSpan(place, 1, lengths[row] - 1, blocks[row]) for place, row in enumerate(real)]
    base = torch.zeros_like(q)
    base[real] = cache.attention(spans)(0, q[real], k[real], v[real])

    table = torch.zeros(len(lengths), 1 + max(pages), dtype=torch.int32)
    is_anyones = torch.zeros(cache.keys.shape[1:3], dtype=torch.bool)
    for row, length in enumerate(lengths):
        table[row, : pages[row]] = torch.tensor(blocks[row])
        for place in range(length):
            is_anyones[blocks[row][place // block_size], place % block_size] = True
    keys, values = (torch.where(is_anyones[..., None, None], part[0], NAN).to(dtype) for part in (cache.keys, cache.values))
    return Step(q.to(dtype), keys, values, table, torch.tensor(lengths, dtype=torch.int32), base)


def make_prompts(
    step: Step, slots: Sequence[int], used: Sequence[int], columns: Sequence[int], is_nested: Sequence[bool], padded: int = 16
) -> Prompts:
    """Slot s has a prompt of used[s] rows, weighed by columns[s]; a nested one has inner experts 1 and 2 by turns."""
    _, heads, size = step.q.shape
    keys, values = torch.randn(2, len(used), step.keys.shape[2], padded, size)
    inner = torch.full((len(used), padded), -2, dtype=torch.int32)
    for slot, count in enumerate(used):
        inner[slot, :count] = torch.arange(count) % 2 + 1 if is_nested[slot] else -1
        keys[slot, :, count:], values[slot, :, count:] = NAN, NAN
    return Prompts(
        torch.tensor(slots, dtype=torch.int32),
        torch.rand(len(slots), 3),
        torch.rand(len(slots), 4),
        keys,
        values,
        torch.randn(len(used), heads),
        inner,
        torch.tensor(columns, dtype=torch.int32),
    )


def expected(step: Step, prompts: Prompts) -> Tensor:
    """(T, H, P) float32, row by row from the definitions."""
    out = step.base.clone()
    for row, slot in enumerate(prompts.slots.tolist()):
        column = int(prompts.prompt_column[slot])
        if slot < 0 or column == -2 or step.lengths[row] == 0 or (column >= 0 and prompts.gates[row, column] == 0):
            continue
        member = prompts.prompt_inner[slot]
        member = member[member != -2].long()
        is_nested = bool((member >= 0).any())
        mixture = Mixture(None if column < 0 else column, None, member if is_nested else None)
        keys, values = (part[slot, :, : len(member)] for part in (prompts.prompt_keys, prompts.prompt_values))
        expert = PromptExpert(torch.empty(0), prompts.head_gate[slot], mixture, keys, values)
        shares = prompts.inner[row : row + 1]
        routed = Routed(shares, None, shares != 0, shares) if is_nested else None
        out[row] += expert(step.q[row : row + 1].float(), prompts.gates[row : row + 1], routed)[0]
    return out


def assert_close(found: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "num_splits"), [(torch.float32, 3), (torch.float32, 8), (torch.bfloat16, 1), (torch.bfloat16, 2)])
def test_base_alone(dtype: torch.dtype, num_splits: int) -> None:
    """Of pages in any order each row sees its own tokens and nothing behind them, however its keys are shared out."""
    step = make_step(dtype=dtype)
    assert_close(step.run(num_splits), step.base)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block_size"),
    [(2, 2, 24, 16), (6, 2, 64, 4), (3, 1, 8, 1), (4, 2, 64, 128)],
)
@pytest.mark.parametrize("num_splits", [1, 2])
def test_shapes(heads: int, kv_heads: int, size: int, block_size: int, num_splits: int) -> None:
    """Groups and heads that are no power of two are padded: a pad that counts, or that is written, spoils its neighbour."""
    step = make_step((5, 4, 80), heads, kv_heads, size, block_size)
    prompts = make_prompts(step, (0, -1, 1), (10, 3), (0, 1), (False, True))
    assert_close(step.run(num_splits), step.base)
    assert_close(step.run(num_splits, prompts), expected(step, prompts))


@pytest.mark.parametrize(("dtype", "num_splits"), [(torch.float32, 1), (torch.float32, 8), (torch.bfloat16, 1), (torch.bfloat16, 2)])
def test_every_kind_of_prompt(dtype: torch.dtype, num_splits: int) -> None:
    """Weighed, unweighed, nested, of one row, absent, of the base and of padding in one launch: a wrong column is another expert's gate."""
    step = make_step(dtype=dtype)
    prompts = make_prompts(step, (4, 0, 1, 2, 2, -1), (10, 5, 16, 7, 1), (2, -1, 0, -2, -1), (False, False, True, False, False))
    prompts.inner[4, 1] = 0
    assert_close(step.run(num_splits, prompts), expected(step, prompts))
    prompts = make_prompts(step, (3, 3, 4, -1, 2, 0), (20, 5, 27, 7, 32), (2, -1, 0, -2, -1), (False, True, True, False, False), 32)
    assert_close(step.run(num_splits, prompts), expected(step, prompts))


@pytest.mark.parametrize("num_slots", [1, 16])
def test_slots(num_slots: int) -> None:
    """A row reads the slot that it names, the last one too."""
    step = make_step((3, 20, 9))
    slots = (num_slots - 1, 0, num_slots // 2)
    prompts = make_prompts(step, slots, range(1, num_slots + 1), [slot % 3 for slot in range(num_slots)], [False] * num_slots)
    assert_close(step.run(2, prompts), expected(step, prompts))


@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_prompt_that_does_not_count_is_not_read(num_splits: int) -> None:
    """0 * NaN is NaN: a broken prompt must not reach a row whose gate is 0, whose adapter has none, or that has no adapter."""
    step = make_step((3, 20, 0, 80))
    prompts = make_prompts(step, (0, 1, 0, -1), (10, 5), (1, -2), (False, False))
    prompts.gates[0, 1] = 0.0
    for broken in (prompts.prompt_keys, prompts.prompt_values, prompts.head_gate):
        broken.fill_(NAN)
    torch.testing.assert_close(step.run(num_splits, prompts), step.run(num_splits), atol=0, rtol=0)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_an_inner_expert_that_does_not_count_is_not_read(num_splits: int) -> None:
    """A share of 0 selects away its rows' values; their keys stay in the one softmax."""
    step = make_step((3, 20))
    prompts = make_prompts(step, (0, 0), (6,), (1,), (True,))
    prompts.inner[:, 1] = 0.0
    wanted = expected(step, prompts)
    prompts.prompt_values[0, :, 0:6:2] = NAN
    assert_close(step.run(num_splits, prompts), wanted)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_not_a_number_stays_in_its_row(num_splits: int) -> None:
    """A sequence whose pages, query, gate or prompt is broken fails, visibly, and its neighbours get the same bits as before."""
    step = make_step((40, 5, 7, 70))
    prompts = make_prompts(step, (0, 1, 1, 1), (10, 4), (0, 0), (False, False))
    before = step.run(num_splits, prompts)
    step.keys[step.block_table[0, 0].long(), 3] = NAN
    step.q[1] = NAN
    prompts.gates[2, 0] = NAN
    after = step.run(num_splits, prompts)
    assert after[:3].isnan().all()
    assert after[3].equal(before[3])
    prompts.prompt_values[1] = NAN
    assert step.run(num_splits, prompts)[3].isnan().all()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """The same bits alone and in a batch, wherever in the workspace: a batch is no reason for another answer."""
    step = make_step()
    prompts = make_prompts(step, (0, 1, 0, -1, 1, 0), (10, 4), (0, -1), (False, False))
    whole = step.run(2, prompts)
    for row in (2, 5):
        rows = slice(row, row + 1)
        alone = Step(step.q[rows], step.keys, step.values, step.block_table[rows], step.lengths[rows], step.base[rows])
        its = Prompts(
            prompts.slots[rows],
            prompts.gates[rows],
            prompts.inner[rows],
            prompts.prompt_keys,
            prompts.prompt_values,
            prompts.head_gate,
            prompts.prompt_inner,
            prompts.prompt_column,
        )
        assert alone.run(2, its)[0].equal(whole[row])

"""From encoded examples to batches: which examples make up each step of a run, and their tokens side by side without padding.

The whole plan of a run follows from lengths and a seed before its first step: so a learning-rate schedule knows its end, and a run that
was interrupted goes on with exactly the batches that it would have had.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_serve.train.prompts import Encoded

IGNORED = -100  # torch's own
_BUCKET = 16  # batches whose examples are sorted by length together


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Examples side by side. T tokens in all, filling included; an example's last token is never an input.

    Args:
        token_ids, positions: (T,) int64.
        lengths: tokens of each example, and of each piece of filling behind them.
        prompts: how many tokens of each stand before the first that is learned; all of a piece of filling.
        rows: (N,) int64, the tokens whose next one is learned; `targets` (N,) int64 are those, IGNORED for filling.
        num_tokens: those of the examples alone.
        num_targets: the same.
    """

    token_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    rows: Tensor
    targets: Tensor
    num_tokens: int
    num_targets: int

    @classmethod
    def of(cls, examples: Sequence[Encoded], device: torch.device, *, fill: int = 1) -> "TokenBatch":
        """Args: fill: T and N are filled up to a multiple of this, with beginnings of the same examples that are not learned."""
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        targets: list[int] = []
        for example in examples:
            start, count = len(ids), num_inputs(example)
            rows += [start + place for place in range(count) if example.is_target[place + 1]]
            targets += [example.token_ids[place + 1] for place in range(count) if example.is_target[place + 1]]
            ids += example.token_ids[:-1]
            positions += range(count)
        lengths = list(map(num_inputs, examples))
        prompts = [example.is_target.index(True) for example in examples]
        num_tokens, num_targets = len(ids), len(targets)
        for example in itertools.cycle(examples):
            if not (missing := -len(ids) % fill):
                break
            count = min(missing, num_inputs(example))
            ids += example.token_ids[:count]
            positions += range(count)
            lengths.append(count)
            prompts.append(count)
        missing = -len(rows) % fill
        rows += rows[:1] * missing
        targets += [IGNORED] * missing
        ids_at, places, wanted, learned = (torch.tensor(values, device=device) for values in (ids, positions, rows, targets))
        return cls(ids_at, places, tuple(lengths), tuple(prompts), wanted, learned, num_tokens, num_targets)


def num_inputs(example: Encoded) -> int:
    return len(example.token_ids) - 1


def plan_steps(lengths: Sequence[int], *, batch_size: int, epochs: int, max_tokens: int | None, seed: int) -> list[list[int]]:
    """The examples (by index) of each step of a run: every example once an epoch, those of similar length together.

    Args:
        lengths: tokens of each example.
        max_tokens: end after the step that reaches this many; None is all epochs.
    """
    steps: list[list[int]] = []
    seen = 0
    for epoch in range(epochs):
        draw = random.Random(f"{seed}/{epoch}")
        order = list(range(len(lengths)))
        draw.shuffle(order)
        size = batch_size * _BUCKET
        buckets = [sorted(order[start : start + size], key=lambda index: lengths[index]) for start in range(0, len(order), size)]
        batches = [bucket[start : start + batch_size] for bucket in buckets for start in range(0, len(bucket), batch_size)]
        draw.shuffle(batches)
        for batch in batches:
            if max_tokens is not None and seen >= max_tokens:
                return steps
            steps.append(batch)
            seen += sum(lengths[index] for index in batch)
    return steps


def split_by_tokens(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Pieces of a batch for one forward each, of at most `max_tokens` tokens with pads; a longer example is a piece of its own."""
    piece: list[int] = []
    for index in sorted(indices, key=lambda index: lengths[index]):  # ascending, so that the last one is the widest
        if piece and (len(piece) + 1) * lengths[index] > max_tokens:
            yield piece
            piece = []
        piece.append(index)
    if piece:
        yield piece

"""The plan of a run: every example once an epoch, the same whenever it is asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa_serve.train.batches import IGNORED, TokenBatch, plan_steps, split_by_tokens
from moa_serve.train.prompts import Encoded


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 40), st.integers(1, 3), st.integers(0, 5))
def test_a_plan_has_every_example_once_an_epoch(lengths: list[int], batch_size: int, epochs: int, seed: int) -> None:
    plan = plan_steps(lengths, batch_size=batch_size, epochs=epochs, max_tokens=None, seed=seed)
    assert plan == plan_steps(lengths, batch_size=batch_size, epochs=epochs, max_tokens=None, seed=seed)
    assert sorted(index for step in plan for index in step) == sorted(list(range(len(lengths))) * epochs)
    assert all(len(step) <= batch_size for step in plan)


def test_a_token_budget_ends_the_plan_after_the_step_that_reaches_it() -> None:
    plan = plan_steps([10] * 100, batch_size=5, epochs=9, max_tokens=120, seed=0)
    assert len(plan) == 3
    assert len(plan_steps([10] * 100, batch_size=5, epochs=9, max_tokens=150, seed=0)) == 3


def test_examples_of_one_step_are_of_similar_length() -> None:
    """Padding in attention is the price of a mixed step."""
    lengths = torch.randint(10, 300, (1600,), generator=torch.Generator().manual_seed(0)).tolist()
    spread = [
        max(lengths[i] for i in step) - min(lengths[i] for i in step)
        for step in plan_steps(lengths, batch_size=10, epochs=1, max_tokens=None, seed=0)
    ]
    assert sum(spread) / len(spread) < 30


def test_another_epoch_and_another_seed_have_another_order() -> None:
    def plan(seed: int, epochs: int) -> list[list[int]]:
        return plan_steps([7] * 64, batch_size=8, epochs=epochs, max_tokens=None, seed=seed)

    assert plan(0, 2)[:8] != plan(0, 2)[8:]
    assert plan(0, 1) != plan(1, 1)
    assert plan(0, 1) == plan(0, 2)[:8]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 1000))
def test_pieces_hold_every_example_and_keep_to_the_limit(lengths: list[int], limit: int) -> None:
    pieces = list(split_by_tokens(range(len(lengths)), lengths, limit))
    assert sorted(index for piece in pieces for index in piece) == list(range(len(lengths)))
    assert all(len(piece) == 1 or len(piece) * max(lengths[i] for i in piece) <= limit for piece in pieces)


def test_a_batch_learns_the_response_and_nothing_else() -> None:
    first = Encoded([5, 6, 7, 8], [False, False, True, True])
    second = Encoded([9, 10, 11], [False, True, True])
    batch = TokenBatch.of([first, second], torch.device("cpu"))
    assert batch.token_ids.tolist() == [5, 6, 7, 9, 10]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.rows.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [7, 8, 10, 11]
    assert batch.lengths == (3, 2)
    assert batch.prompts == (2, 1)


def test_filling_teaches_nothing_and_makes_the_sizes_round() -> None:
    """Beginnings of the same examples, whose next tokens do not count."""
    rows = [Encoded([5, 6, 7, 8], [False, False, True, True]), Encoded([9, 10, 11], [False, True, True])]
    batch = TokenBatch.of(rows, torch.device("cpu"), fill=8)
    assert batch.token_ids.tolist() == [5, 6, 7, 9, 10, 5, 6, 7]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert (batch.lengths, batch.prompts) == ((3, 2, 3), (2, 1, 3))
    assert batch.targets.tolist() == [7, 8, 10, 11, *[IGNORED] * 4]
    assert (batch.num_tokens, batch.num_targets) == (5, 4)
    large = TokenBatch.of(rows, torch.device("cpu"), fill=64)
    assert len(large.token_ids) == len(large.rows) == 64
    assert sum(large.lengths) == 64
    assert max(large.lengths) == 3


def test_turns_of_a_chat_are_learned_apart() -> None:
    chat = Encoded([1, 2, 3, 4, 5, 6], [False, True, True, False, False, True])
    batch = TokenBatch.of([chat], torch.device("cpu"))
    assert batch.rows.tolist() == [0, 1, 4]
    assert batch.targets.tolist() == [2, 3, 6]
    assert batch.prompts == (1,)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_plan_does_not_hang_on_the_process(seed: int) -> None:
    """Python's own hash is salted; a plan that used it could not be resumed. So these were written down by another process."""
    wanted = {0: [[1, 2], [3], [0, 4]], 1: [[3], [1, 2], [0, 4]]}
    assert plan_steps([3, 1, 2, 5, 4], batch_size=2, epochs=1, max_tokens=None, seed=seed) == wanted[seed]

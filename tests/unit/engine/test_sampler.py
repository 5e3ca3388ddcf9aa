"""The sampler against one row computed naively, token by token, in float64."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moa_serve.engine.request import Request, SamplingParams, Sequence, TokenLogprob
from moa_serve.engine.sampler import MIN_LOGPROB, Sampler, logprobs_at, token_logprobs, uniform

NAN, INF = float("nan"), float("inf")
V = 50
PROMPT = [3, 3, 4, 9]
GENERATED = [5, 5, 3, 7]
EOS = (2,)
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")])]


def make_sequence(generated: list[int] = GENERATED, **params: Any) -> Sequence:
    params.setdefault("seed", 1)
    request = Request(PROMPT, SamplingParams(max_tokens=None, **params))
    return Sequence(request, [*PROMPT, *generated], b"", eos_token_ids=EOS)


def make_logits(rows: int, *, seed: int = 0, size: int = V, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def naive_edit(logits: list[float], sequence: Sequence) -> list[float]:
    """Bias, mask, penalties: one token after the other."""
    params, generated = sequence.request.params, sequence.token_ids[sequence.num_prompt :]
    out = list(logits)
    for token, bias in params.logit_bias.items():
        out[token] += bias
    if len(generated) < params.min_tokens:
        for token in sequence.stop_ids:
            out[token] = -INF
    for token in range(len(out)):
        if token in sequence.token_ids:
            out[token] = out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
        if token in generated:
            out[token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
    return out


def naive_kept(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Token to probability, best first, after temperature, top_k, top_p and min_p."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    best = logits[order[0]]
    weight = {token: math.exp((logits[token] - best) / params.temperature) for token in order}
    if params.top_k > 0:
        order = order[: params.top_k]
    total, reached, kept = sum(weight[token] for token in order), 0.0, []
    for token in order:
        if reached >= params.top_p * total:
            break
        kept.append(token)
        reached += weight[token]
    kept = [token for token in kept if weight[token] >= params.min_p]
    total = sum(weight[token] for token in kept)
    return {token: weight[token] / total for token in kept}


def naive_sample(logits: list[float], sequence: Sequence) -> int:
    params = sequence.request.params
    edited = naive_edit(logits, sequence)
    if params.temperature < 1e-5:
        return min(range(len(edited)), key=lambda token: (-edited[token], token))
    kept = naive_kept(edited, params)
    # Filters that sort draw from the best down, the others in the order of ids.
    is_sorted = 0 < params.top_k < len(logits) or params.top_p < 1
    order = list(kept) if is_sorted else sorted(kept)
    draw, reached = uniform([sequence.seed], [sequence.num_generated])[0], 0.0
    for token in order:
        reached += kept[token]
        if reached > draw:
            return token
    return order[-1]


EDITS: list[dict[str, Any]] = [
    {},
    {"logit_bias": {5: 3.5, 0: -100, 49: 100}},
    {"min_tokens": 5, "stop_token_ids": [7, 9], "logit_bias": {2: 100.0, 7: 90.0}},
    {"min_tokens": 5, "ignore_eos": True, "logit_bias": {2: 100.0}},
    {"min_tokens": 4, "logit_bias": {2: 100.0}},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2},
    {"frequency_penalty": 1.1},
    {"frequency_penalty": 2, "presence_penalty": 0.3, "repetition_penalty": 1.3, "logit_bias": {5: 9.0, 3: -4.0}, "min_tokens": 9},
]
FILTERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 1e-4},
    {"top_k": 1},
    {"top_k": 7, "temperature": 1.5},
    {"top_k": -1},
    {"top_k": V},
    {"top_k": V + 9, "top_p": 0.8},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.3, "temperature": 1.7},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.2, "temperature": 1.2},
    {"top_p": 0.95, "min_p": 0.3},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("edits", EDITS, ids=str)
def test_every_setting_equals_the_naive_row(edits: dict[str, Any], device: str) -> None:
    """All settings in one batch: a feature of one row must not leak into the next."""
    sequences = [make_sequence(seed=seed, **edits, **filters) for filters, seed in itertools.product(FILTERS, range(8))]
    logits = make_logits(len(sequences))
    expected = [naive_sample(row, sequence) for row, sequence in zip(logits.tolist(), sequences, strict=True)]
    before = logits.clone()
    sampled = Sampler(V, device).sample(logits.to(device), sequences)
    assert sampled.ids == expected
    assert all(sampled.is_finite)
    assert sampled.logprobs is None
    assert torch.equal(logits, before), "the caller's logits were changed"


def test_edits_change_the_token_that_is_chosen() -> None:
    """The comparison above would pass if both sides did nothing."""
    logits = torch.zeros(1, V)
    logits[0, 5] = 2.0  # generated twice
    logits[0, 8] = 1.0
    strong: list[dict[str, Any]] = [
        {"logit_bias": {5: -5.0}},
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"min_tokens": 5, "stop_token_ids": [5]},
    ]
    plain: dict[str, Any] = {}
    for edits in (plain, *strong):
        sampled = Sampler(V, "cpu").sample(logits, [make_sequence(temperature=0, **edits)])
        assert sampled.ids == [8 if edits else 5], edits


def test_a_wide_nucleus_is_found_beyond_the_first_candidates() -> None:
    """The candidates that are tried first are a short cut; a nucleus that they cut off would change the text."""
    size = 6000
    flat, steep = make_logits(1, size=size, scale=0.01), make_logits(1, size=size, scale=6.0)
    logits = torch.cat((flat, steep, flat))
    for top_p, seed in itertools.product((0.5, 0.999), range(4)):
        sequences = [make_sequence(seed=seed, top_p=top_p) for _ in range(3)]
        expected = [naive_sample(row, sequence) for row, sequence in zip(logits.tolist(), sequences, strict=True)]
        assert Sampler(size, "cpu").sample(logits, sequences).ids == expected


MIX: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.3, "logprobs": 3},
    {"top_k": 40},
    {"top_p": 0.9, "repetition_penalty": 1.2},
    {"min_p": 0.02, "logit_bias": {5: 1.0}},
    {"top_k": 20, "top_p": 0.9, "frequency_penalty": 0.5},
    {"presence_penalty": 0.5, "min_tokens": 9, "logprobs": 0},
]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_tokens_do_not_depend_on_batch_mates(num_threads: int) -> None:
    """Alone, in a batch of 7 settings, and in a batch of 29 rows: same tokens, same log-probabilities to the last bit."""
    size, before = 20_001, torch.get_num_threads()
    logits = make_logits(len(MIX), size=size, scale=1.5)
    torch.set_num_threads(num_threads)
    try:
        sampler = Sampler(size, "cpu")
        for turn in range(2):
            generated = [*GENERATED, *range(turn)]

            def row(i: int, generated: list[int] = generated) -> Sequence:
                return make_sequence(generated, **MIX[i])

            alone = [sampler.sample(logits[i : i + 1], [row(i)]) for i in range(len(MIX))]
            mixed = sampler.sample(logits, [row(i) for i in range(len(MIX))])
            order = [i % len(MIX) for i in range(4 * len(MIX), -1, -1)]
            large = sampler.sample(logits[order], [row(i) for i in order])
            assert mixed.logprobs is not None
            assert large.logprobs is not None
            assert [one.ids[0] for one in alone] == mixed.ids
            assert [one.logprobs[0] if one.logprobs else None for one in alone] == mixed.logprobs
            assert large.ids == [mixed.ids[i] for i in order]
            assert large.logprobs == [mixed.logprobs[i] for i in order]
    finally:
        torch.set_num_threads(before)


def test_a_seed_gives_the_same_text_again_and_others_another() -> None:
    """A seed that only works for the first token, or not at all, is worse than a refused one."""
    logits = make_logits(1, scale=0.1)

    def text(seed: int | None) -> list[int]:
        sequence = make_sequence([], seed=seed)
        for _ in range(20):
            sequence.append(Sampler(V, "cpu").sample(logits, [sequence]).ids[0])
        return sequence.token_ids

    assert text(5) == text(5)
    texts = [text(seed) for seed in (5, 6, -5, 2**63, None, None)]
    assert len({tuple(ids) for ids in texts}) == len(texts)


@pytest.mark.case(56)
def test_preemption_changes_no_token() -> None:
    """A preempted sequence comes back with the same tokens and nothing computed; its draws and counts must go on as before."""
    logits = make_logits(24, scale=0.5)

    def text(preempted_at: int) -> list[int]:
        sequence = make_sequence([], repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.2)
        for step, row in enumerate(logits):
            sequence.num_computed = 0 if step == preempted_at else len(sequence.token_ids)
            sequence.append(Sampler(V, "cpu").sample(row[None], [sequence]).ids[0])
        return sequence.token_ids

    assert text(12) == text(-1)


def test_penalties_follow_a_long_text() -> None:
    """Counts are kept from step to step; a slip shows only after many tokens, when their room has grown."""
    size, sampler = 300, Sampler(300, "cpu")
    sequence = make_sequence([], repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.3)
    logits = make_logits(120, size=size, scale=1.0)
    for row in logits:
        expected = naive_sample(row.tolist(), sequence)
        assert sampler.sample(row[None], [sequence]).ids == [expected]
        sequence.append(expected)
    assert len(set(sequence.token_ids)) > 70


@pytest.mark.parametrize("params", [{}, {"min_p": 0.05}, {"top_k": 6, "temperature": 1.4}, {"top_p": 0.8}], ids=str)
def test_draws_follow_the_probabilities(params: dict[str, Any]) -> None:
    """Chi-square over 20,000 seeds, at the far tail (p about 1e-6): a shifted or skewed draw fails, chance does not."""
    size, num_draws = 12, 20_000
    logits = make_logits(1, size=size, scale=1.0)
    kept = naive_kept(logits[0].tolist(), SamplingParams(**params))
    sampler, seen = Sampler(size, "cpu"), np.zeros(size)
    for start in range(0, num_draws, 1000):
        sequences = [make_sequence([], seed=seed, **params) for seed in range(start, start + 1000)]
        np.add.at(seen, sampler.sample(logits.expand(1000, -1), sequences).ids, 1)
    assert set(np.flatnonzero(seen)) <= set(kept)
    expected = np.array([kept[token] * num_draws for token in kept])
    statistic = float((((seen[list(kept)] - expected) ** 2) / expected).sum())
    degrees = len(kept) - 1
    assert statistic < degrees + 5 * math.sqrt(2 * degrees) + 15


def test_uniform_numbers_are_uniform_along_seeds_and_counters() -> None:
    """Seeds 0, 1, 2 ... are what people use, and every text counts from 0: neither may give neighbouring numbers."""
    for seeds, counters in (([0] * 4096, range(4096)), (range(4096), [0] * 4096), (range(4096), range(4096))):
        numbers = uniform(list(seeds), list(counters))
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = np.histogram(numbers, bins=16, range=(0, 1))[0]
        assert ((counts - 256) ** 2 / 256).sum() < 45  # 15 degrees of freedom, p about 1e-4; fixed numbers, so never flaky
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06
    assert uniform([-1], [0])[0] == uniform([2**64 - 1], [0])[0]


def naive_logprobs(row: list[float]) -> list[float]:
    best = max(row)
    total = math.log(sum(math.exp(value - best) for value in row))
    return [max(value - best - total, MIN_LOGPROB) if value > -INF else MIN_LOGPROB for value in row]


def test_log_probabilities_are_of_the_raw_logits() -> None:
    """Bias, penalties and temperature change what is chosen, never what the model said of it."""
    logits = make_logits(4)
    logits[3, :40] = -INF
    edits: dict[str, Any] = {"logit_bias": {1: 100.0}, "repetition_penalty": 1.5, "temperature": 0.3}
    sequences = [make_sequence(logprobs=n, **edits) for n in (0, 3, 20)] + [make_sequence(logprobs=15, **edits)]
    sampled = Sampler(V, "cpu").sample(logits, sequences)
    assert sampled.ids[:3] == [1, 1, 1]
    assert sampled.logprobs is not None
    for row, token, found, sequence in zip(logits.tolist(), sampled.ids, sampled.logprobs, sequences, strict=True):
        assert found is not None
        wanted = naive_logprobs(row)
        order = sorted(range(V), key=lambda token: (-row[token], token))
        assert found.token_id == token
        assert found.logprob == pytest.approx(wanted[token], abs=2e-6)
        assert found.rank == 1 + sum(value > row[token] for value in row)
        assert [token for token, _ in found.top] == order[: sequence.request.params.logprobs]
        assert [value for _, value in found.top] == pytest.approx([wanted[token] for token, _ in found.top], abs=2e-6)
        assert all(MIN_LOGPROB <= value <= 0 for _, value in found.top)


def test_only_rows_that_ask_get_log_probabilities() -> None:
    """Reported to one request, they must not cost or reach another."""
    logits = make_logits(3)
    sampled = Sampler(V, "cpu").sample(logits, [make_sequence(), make_sequence(logprobs=0), make_sequence(temperature=0)])
    assert sampled.logprobs is not None
    assert [found is None for found in sampled.logprobs] == [True, False, True]


def test_log_probabilities_of_given_tokens_serve_an_echoed_prompt() -> None:
    """An echoed prompt asks for tokens that nobody sampled, some of them impossible."""
    logits = torch.tensor([[0.0, 0.0, -INF]])
    impossible, likely = token_logprobs(logits.expand(2, -1), [2, 1], [1, 0])
    assert (impossible.token_id, impossible.logprob, impossible.rank) == (2, MIN_LOGPROB, 3)
    assert [token for token, _ in impossible.top] == [0]
    assert (likely.token_id, likely.rank, likely.top) == (1, 1, ())
    assert [impossible.top[0][1], likely.logprob] == pytest.approx([math.log(0.5)] * 2)


def test_logprobs_at_places_are_those_of_whole_rows() -> None:
    """More rows than are summed at a time, one row asked about many tokens, and a token that is impossible."""
    logits = make_logits(150)
    logits[149, 7] = -INF
    places = [(0, token) for token in range(V)] + [(149, 7), (63, 1), (64, 2), (149, 0), (10, 10)]
    found = logprobs_at(logits, places)
    expected = logits.log_softmax(-1)
    assert found == pytest.approx([max(MIN_LOGPROB, float(expected[place])) for place in places], abs=1e-5)
    assert found == [one.logprob for one in token_logprobs(logits[[row for row, _ in places]], [token for _, token in places], [0] * 55)]


@pytest.mark.case(11, 66)
@pytest.mark.parametrize("bad", [[NAN], [INF], [-INF] * V, [NAN, INF, -INF]], ids=["nan", "inf", "all -inf", "mixed"])
@pytest.mark.parametrize("params", [*FILTERS, {"repetition_penalty": 1.5, "logprobs": 2}], ids=str)
def test_a_row_that_is_not_finite_hurts_only_itself(bad: list[float], params: dict[str, Any]) -> None:
    """One tenant's overflow: flagged, no exception, a valid id, and the neighbours' results bit for bit the same."""
    clean = make_logits(3)
    broken = clean.clone()
    broken[1, : len(bad)] = torch.tensor(bad)

    def sample(logits: Tensor) -> tuple[list[int], list[TokenLogprob | None] | None, list[bool]]:
        sampled = Sampler(V, "cpu").sample(logits, [make_sequence(**params) for _ in range(3)])
        return sampled.ids, sampled.logprobs, sampled.is_finite

    (ids, logprobs, finite), (want, want_logprobs, _) = sample(broken), sample(clean)
    assert finite == [True, False, True]
    assert 0 <= ids[1] < V
    assert (ids[0], ids[2]) == (want[0], want[2])
    if logprobs is not None and want_logprobs is not None:
        assert logprobs == [want_logprobs[0], None, want_logprobs[2]]


def test_some_impossible_tokens_are_no_fault() -> None:
    """Grammars and masks put -inf into logits; that is not an overflow."""
    logits = torch.full((len(FILTERS), V), -INF)
    logits[:, [7, 11]] = torch.tensor([1.0, 0.5])
    sampled = Sampler(V, "cpu").sample(logits, [make_sequence(**params) for params in FILTERS])
    assert all(sampled.is_finite)
    assert set(sampled.ids) <= {7, 11}


def test_a_row_whose_every_token_is_masked_is_flagged() -> None:
    """`min_tokens` over a vocabulary that only stops leaves nothing to choose; that must not look like a choice."""
    sequences = [make_sequence([], min_tokens=1, stop_token_ids=[0, 1, 3], temperature=t) for t in (0, 1)]
    assert Sampler(4, "cpu").sample(torch.zeros(2, 4), sequences).is_finite == [False, False]


@pytest.mark.parametrize("params", [{"temperature": 1e-4}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}], ids=str)
def test_the_sharpest_settings_are_greedy(params: dict[str, Any]) -> None:
    """Dividing by a tiny temperature must not overflow, and at least one token always survives a filter."""
    logits = make_logits(16) * torch.logspace(0, 36, 16)[:, None]
    sampled = Sampler(V, "cpu").sample(logits, [make_sequence(seed=seed, **params) for seed in range(16)])
    assert sampled.ids == logits.argmax(-1).tolist()
    assert all(sampled.is_finite)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    """One token more than asked for, and top_p 0.5 of two equal ones still flips a coin."""
    sequences = [make_sequence([], seed=seed, top_p=0.5) for seed in range(30)]
    assert set(Sampler(2, "cpu").sample(torch.zeros(30, 2), sequences).ids) == {0}


def test_of_equal_logits_the_lower_id_comes_first() -> None:
    """bfloat16 logits are often equal: top_k=1 must be the greedy token, and the order must not be the sort's mood."""
    logits = torch.zeros(3, V, dtype=torch.bfloat16)
    logits[:, 20:30] = 1.0
    logits[:, 0] = -0.0
    sequences = [make_sequence(temperature=0), make_sequence(top_k=1), make_sequence(temperature=0, logprobs=12)]
    sampled = Sampler(V, "cpu").sample(logits, sequences)
    assert sampled.ids == [20, 20, 20]
    assert sampled.logprobs is not None
    assert sampled.logprobs[2] is not None
    assert [token for token, _ in sampled.logprobs[2].top] == [*range(20, 30), 0, 1]

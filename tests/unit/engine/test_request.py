"""SamplingParams and Request refuse what the engine could not serve; kv_root keeps apart what must never share keys and values."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_serve.engine.request import Request, SamplingParams, Sequence, kv_root
from moa_serve.errors import InvalidRequest

NAN, INF = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "max_tokens": [-1, 1.0, True, "16"],
    "temperature": [-0.1, 2.1, NAN, INF, "1", None, True],
    "top_p": [0, 0.0, -0.1, 1.1, NAN, None],
    "top_k": [-2, 1.5, None, True],
    "min_p": [-0.1, 1.1, NAN],
    "presence_penalty": [-2.1, 2.1, NAN],
    "frequency_penalty": [-2.1, 2.1, INF],
    "repetition_penalty": [0, -1.0, 10.1, NAN],
    "logit_bias": [{-1: 1.0}, {"5": 1.0}, {5: 100.1}, {5: NAN}, {5: None}, {True: 1.0}, [1], None, dict.fromkeys(range(1025), 1.0)],
    "seed": [1.5, "1", True, 2**64, -(2**63) - 1],
    "stop": ["", ["a", ""], [1], None, ["x"] * 17, {"a": 1}],
    "stop_token_ids": [[-1], [1.0], 5, "5", list(range(1025))],
    "min_tokens": [-1, 17, 1.0],
    "ignore_eos": [1, None, "yes"],
    "logprobs": [-1, 21, True, 1.0],
}
GOOD: dict[str, list[Any]] = {
    "max_tokens": [None, 1, 10**9],
    "temperature": [0, 2, 1e-9],
    "top_p": [1, 1e-9],
    "top_k": [-1, 0, 10**9],
    "min_p": [0, 1],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "repetition_penalty": [0.01, 10],
    "logit_bias": [{}, {0: -100, 7: 100}],
    "seed": [None, 0, -(2**63), 2**64 - 1],
    "min_tokens": [16],
    "logprobs": [None, 0, 20],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_parameter_out_of_bounds_is_refused_by_name(name: str, value: object) -> None:
    """A NaN temperature or a string seed would otherwise end the engine thread, and with it every other request."""
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
    assert name in str(caught.value)


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_the_bounds_themselves_are_legal(name: str, value: object) -> None:
    """An off-by-one here refuses requests that every other server takes."""
    assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]


def test_lists_are_taken_and_kept_as_what_cannot_change() -> None:
    """The caller's list may change while the request waits."""
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias, stop_token_ids=[3])
    stop.append("b")
    bias[9] = 9.0
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (("a",), {1: 2.0}, (3,))
    assert SamplingParams(stop="a") == SamplingParams(stop=("a",))
    assert hash(SamplingParams(stop="a")) == hash(SamplingParams(stop=["a"]))


@pytest.mark.parametrize("prompt", [[], [-1], [1.0], ["a"], [True], "text"])
def test_a_prompt_that_is_no_list_of_ids_is_refused(prompt: Any) -> None:
    """An empty prompt has no last position to take logits from; a negative id reads the embedding from its end."""
    with pytest.raises(InvalidRequest) as caught:
        Request(prompt)
    assert caught.value.param == "prompt"


def test_no_tokens_are_legal_only_where_something_is_collected() -> None:
    """Otherwise a request would hold blocks, compute its prompt, and answer nothing."""
    scoring = SamplingParams(max_tokens=0)
    with pytest.raises(InvalidRequest) as caught:
        Request([1], scoring)
    assert caught.value.param == "max_tokens"
    assert Request([1], scoring, collect_logits=True).prompt_ids == (1,)
    assert Request([1], scoring, collect_routing=True).prompt_ids == (1,)


def test_branches_stand_behind_the_prompt_without_their_last_tokens() -> None:
    """Nothing is asked behind a last token: computing it would cost a row of a short choice its half."""
    request = Request([1, 2], SamplingParams(max_tokens=0), branches=((3, 4, 5), (6,), (7, 8)))
    assert request.given_ids == [1, 2, 3, 4, 7]
    sequence = Sequence(request, request.given_ids, b"")
    assert (sequence.num_prompt, sequence.num_generated, sequence.num_pending, sequence.is_whole) == (2, 0, 5, True)
    assert Request([1, 2]).given_ids == [1, 2]


@pytest.mark.parametrize("branch", [[], [-1], [1.0], ["a"], [True], "text", 5])
def test_a_branch_that_is_no_list_of_ids_is_refused(branch: Any) -> None:
    """An empty one has no log-probability; its sum of nothing, 0, would be the best of all."""
    with pytest.raises(InvalidRequest) as caught:
        Request([1], SamplingParams(max_tokens=0), branches=((1,), branch))
    assert caught.value.param == "choices"


def test_prefill_recomputation_and_decode_are_told_by_what_is_pending() -> None:
    """A prompt of one token is prefill although one token is pending; so is the recomputation after preemption."""
    sequence = Sequence(Request([5]), [5], b"")
    assert (sequence.num_pending, sequence.is_prefill) == (1, True)
    sequence.num_computed = 1
    sequence.append(6)
    assert (sequence.num_prompt, sequence.num_generated, sequence.num_pending, sequence.is_prefill) == (1, 1, 1, False)
    sequence.num_computed = 0
    assert (sequence.num_pending, sequence.is_prefill) == (2, True)


def test_every_unseeded_sequence_has_a_seed_of_its_own() -> None:
    """One default seed would give all users the same text."""
    request = Request([1])
    assert len({Sequence(request, [1], b"").seed for _ in range(20)}) == 20
    assert Sequence(Request([1], SamplingParams(seed=-7)), [1], b"").seed == -7


def test_stop_ids_are_the_models_own_and_the_requests() -> None:
    """`ignore_eos` must not switch off the ids that the request itself named."""
    params = {flag: SamplingParams(stop_token_ids=[8], ignore_eos=flag) for flag in (True, False)}
    stops = {flag: Sequence(Request([1], given), [1], b"", eos_token_ids=(2, 3)).stop_ids for flag, given in params.items()}
    assert stops == {False: {2, 3, 8}, True: {8}}


@pytest.mark.case(79)
def test_kv_root_tells_every_field_apart() -> None:
    """Two roots that collide serve one tenant the keys and values of another adapter."""
    fields: list[list[Any]] = [
        ["b", "bf", ""],
        ["f", "float32"],
        ["torch", ""],
        [None, "None", "null", ""],
        [{}, {"a": 1}, {"a": None}],
        ["", "b"],
    ]
    roots = [kv_root(*values) for values in itertools.product(*fields)]
    assert len(set(roots)) == len(roots)
    assert {len(root) for root in roots} == {32}


@given(st.lists(st.text(), min_size=4, max_size=4), st.lists(st.text(), min_size=4, max_size=4))
def test_kv_root_does_not_let_fields_run_into_each_other(one: list[str], other: list[str]) -> None:
    """("ab", "c") and ("a", "bc") are equal to a hash over bare concatenation; a salt is the client's to choose."""

    def root(texts: list[str]) -> bytes:
        return kv_root(texts[0], texts[1], "torch", texts[2], {}, texts[3])

    assert (root(one) == root(other)) == (one == other)


def test_kv_root_does_not_depend_on_the_order_of_options() -> None:
    """Else equal requests would miss each other's prefix."""
    one = kv_root("b", "f", "t", None, {"x": 1, "y": {"p": 1, "q": 2}}, "s")
    assert one == kv_root("b", "f", "t", None, {"y": {"q": 2, "p": 1}, "x": 1}, "s")
    assert one != kv_root("b", "f", "t", None, {"x": 1, "y": {"p": 1, "q": 3}}, "s")

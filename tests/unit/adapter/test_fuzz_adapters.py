"""Some hundred damaged adapters in every run; `python -m tests.fuzz_adapters` tries as many as are asked for."""

from collections.abc import Iterator

import pytest
import torch
from fuzz_adapters import Fuzzer, Subject, fuzz, fuzzing, judge

from moa_serve import AdapterSource

EXAMPLES = 200


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    with fuzzing() as started:
        yield started


def test_every_damaged_adapter_is_refused_or_whole(fuzzer: Fuzzer) -> None:
    """A reader that lets another error through, or half an adapter, does it to the whole server."""
    fuzz(fuzzer, EXAMPLES, is_new=False)
    assert fuzzer.score.files >= EXAMPLES
    assert fuzzer.score.accepted > EXAMPLES / 50, "nothing is damaged so little that it is still whole"
    assert len(fuzzer.score.refused) >= 5, "too few kinds of damage"


def subject(fuzzer: Fuzzer, name: str) -> Subject:
    return next(one for one in fuzzer.subjects if one.name == name)


def test_the_judge_sees_what_a_reader_might_miss(fuzzer: Fuzzer) -> None:
    """Else it would agree with anything."""
    soft = subject(fuzzer, "soft")
    fuzzer.write(soft.files)
    adapter = fuzzer.stores["tiny"].read("bad", AdapterSource("bad"))
    weights, config = soft.files["adapter.safetensors"], soft.files["adapter.json"]
    assert judge(soft, soft.files, adapter) == []
    for files in (
        {"adapter.safetensors": weights + b"x"},
        {"adapter.safetensors": weights[:-1]},
        {"adapter.safetensors": weights.replace(b"[4,32]", b"[4,33]", 1)},
        {"adapter.json": b"{"},
        {"adapter.json": config.replace(b'"variant"', b'"format"')},
        {"adapter.json": b"[]"},
    ):
        assert judge(soft, soft.files | files, adapter) != []
    next(iter(adapter.tensors.values())).view(-1)[-1] = torch.nan
    assert judge(soft, soft.files, adapter) != []

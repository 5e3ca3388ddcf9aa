"""Fingerprints of training prompts: what they cost a prompt, and files of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moa_serve.adapter.fingerprint import BUCKETS, PREFIX, Fingerprint, buckets_of, read_fingerprints, write_fingerprints
from moa_serve.errors import InvalidRequest

BASE = "ab" * 32


def test_a_prompts_cost_is_that_of_counting_by_hand() -> None:
    """The formula, with tokens that share no bucket."""
    found = Fingerprint.of([[1, 2, 2], [2]])
    shares = [0.9 * 3 / 4 + 0.1 / BUCKETS, 0.9 * 1 / 4 + 0.1 / BUCKETS, 0.1 / BUCKETS]
    assert found.cost([2, 1, 9]) == pytest.approx(-sum(map(math.log, shares)) / 3)
    assert found.cost([2] * PREFIX + [9] * PREFIX) == pytest.approx(found.cost([2]))


def test_how_much_an_adapter_was_trained_on_does_not_matter() -> None:
    """One that has seen little is not to lose every prompt to one that has seen much."""
    little, much = Fingerprint.of([[1, 2, 3]]), Fingerprint.of([[1, 2, 3]] * 1000)
    assert little.cost([1, 2, 9]) == pytest.approx(much.cost([1, 2, 9]))


def test_tokens_are_spread_over_all_buckets() -> None:
    counts = np.bincount(buckets_of(np.arange(50_000), BUCKETS), minlength=BUCKETS)
    assert (counts.min() > 0, counts.max() < 30) == (True, True)


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    made = {"b": Fingerprint.of([[1, 2, 3]]), "a": Fingerprint.of([[7] * 1000])}
    write_fingerprints(tmp_path / "auto.json", BASE, made)
    found = read_fingerprints(tmp_path / "auto.json", BASE)
    assert list(found) == ["a", "b"]
    assert all((found[name].counts == made[name].counts).all() for name in made)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "no file of fingerprints"),
        (json.dumps({"format": "moa-prompts/1", "base": "cd" * 32, "adapters": {}}), "another base"),
        (json.dumps({"format": "moa-prompts/1", "base": BASE, "adapters": {"x": [1]}}), "'x'"),
        (json.dumps({"format": "moa-prompts/1", "base": BASE, "adapters": {"x": [-1] * BUCKETS}}), "'x'"),
    ],
)
def test_a_bad_file_is_told_before_anything_is_served(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "auto.json").write_text(text)
    with pytest.raises(InvalidRequest, match="moa-serve fingerprint") as refused:
        read_fingerprints(tmp_path / "auto.json", BASE)
    assert says in str(refused.value)

"""Shares of an alias: by weight, and the same for the same client."""

from collections import Counter

import pytest

from moa_serve.api.aliases import MAX_TARGETS, MAX_WEIGHT, check_targets, choose, split_target
from moa_serve.errors import AliasInvalid

KEYS = [f"user-{number}" for number in range(4000)]


def test_shares_follow_the_weights_and_a_key_keeps_its_target() -> None:
    targets = {"v1": 90, "v2": 10}
    chosen = {key: choose("math", targets, key) for key in KEYS}
    counts = Counter(chosen.values())
    assert 0.07 < counts["v2"] / len(KEYS) < 0.13
    assert all(choose("math", targets, key) == target for key, target in chosen.items())
    assert any(choose("code", targets, key) != target for key, target in chosen.items()), "another alias deals anew"


def test_a_change_of_weights_moves_only_those_who_must_move() -> None:
    before = {key: choose("math", {"v1": 90, "v2": 10}, key) for key in KEYS}
    after = {key: choose("math", {"v1": 50, "v2": 50}, key) for key in KEYS}
    assert not any(before[key] == "v2" and after[key] == "v1" for key in KEYS)
    assert 0.45 < Counter(after.values())["v2"] / len(KEYS) < 0.55


def test_who_is_not_known_is_dealt_by_chance() -> None:
    counts = Counter(choose("math", {"v1": 1, "v2": 1, "v3": 0}, None) for _ in range(2000))
    assert counts["v3"] == 0
    assert 0.4 < counts["v1"] / 2000 < 0.6


def test_a_target_may_name_a_revision() -> None:
    assert split_target("math") == ("math", None)
    assert split_target("math@0123abcd") == ("math", "0123abcd")
    for bad in ("math@", "math@123", "math@0123ABCD", "math@" + "0" * 65, "math@01234567@1"):
        with pytest.raises(AliasInvalid):
            split_target(bad)


@pytest.mark.parametrize(
    "targets", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": MAX_WEIGHT + 1}, {f"a{n}": 1 for n in range(MAX_TARGETS + 1)}], ids=repr
)
def test_targets_that_cannot_be_are_refused(targets: dict[str, int]) -> None:
    with pytest.raises(AliasInvalid):
        check_targets(targets)

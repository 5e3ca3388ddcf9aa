"""How far routing is from training: the divergence, the window, and profiles as their authors write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import TINY, random_adapter

from moa_serve.adapter.manifest import Manifest
from moa_serve.metrics.drift import HALF_LIFE_SECONDS, MIN_TOKENS, Profile, Recent, Shares, divergence

ADAPTERS = Path(__file__).parents[2] / "adapters"
EXPERTS = (("Q", "K"), ("Q",))


def listed(shares: Shares | None) -> list[float]:
    assert shares is not None
    return [float(share) for share in shares]


@pytest.mark.parametrize(
    ("p", "q", "bits"),
    [([0.3], [0.3], 0.0), ([0.0], [1.0], 1.0), ([0.5], [1.0], 0.311278), ([0.0, 0.2], [1.0, 0.2], 0.5), ([], [], 0.0)],
)
def test_divergence(p: list[float], q: list[float], bits: float) -> None:
    assert divergence(np.array(p), np.array(q)) == pytest.approx(bits, abs=1e-6)
    assert divergence(np.array(q), np.array(p)) == pytest.approx(bits, abs=1e-6)


def test_a_token_counts_for_half_after_the_half_life() -> None:
    recent = Recent()
    recent.add(1000, np.array([1000.0, 0.0, 500.0]), 50.0)
    assert listed(recent.shares(50.0)) == pytest.approx([1.0, 0.0, 0.5])
    recent.add(500, np.array([0.0, 500.0, 0.0]), 50.0 + HALF_LIFE_SECONDS)
    assert recent.tokens == 1000
    assert listed(recent.shares(50.0 + HALF_LIFE_SECONDS)) == pytest.approx([0.5, 0.5, 0.25])


def test_few_tokens_say_nothing() -> None:
    recent = Recent()
    recent.add(int(MIN_TOKENS) - 1, np.zeros(3), 0.0)
    assert recent.shares(0.0) is None


def test_what_is_long_ago_says_nothing() -> None:
    """Without traffic there is no drift: its alert would fire for ever."""
    recent = Recent()
    recent.add(2 * int(MIN_TOKENS), np.zeros(3), 0.0)
    assert recent.shares(0.9 * HALF_LIFE_SECONDS) is not None
    assert recent.shares(1.1 * HALF_LIFE_SECONDS) is None


def manifest(profile: Any, family: str = "sparse_fn") -> Manifest:
    raw, _ = random_adapter(family, 1, TINY)
    return raw.model_copy(update={"profile": profile})


def test_a_profile_is_read_by_layer_and_name() -> None:
    use = {"weight": 0.25, "selected": 0.5}
    layers = [{"Q": use, "K": use}, {"Q": use}, {}]
    sparse, soft = Profile.of(manifest({"layers": layers})), Profile.of(manifest({"layers": layers}, "soft"))
    assert sparse is not None
    assert soft is not None
    experts = (*EXPERTS, ())
    assert listed(sparse.aligned(experts)) == pytest.approx([0.5] * 3)
    assert listed(soft.aligned(experts)) == pytest.approx([0.25] * 3)
    assert listed(sparse.aligned((("K", "Q"), ("Q",), ()))) == pytest.approx([0.5] * 3)
    assert sparse.uses(experts) is not None
    assert [listed(values) for values in sparse.uses(experts) or ()] == [[0.25] * 3, [0.5] * 3], "weight, selected"
    assert sparse.aligned(EXPERTS) is None
    assert sparse.aligned((("Q", "V"), ("Q",), ())) is None


@pytest.mark.parametrize(
    "profile",
    [
        None,
        {},
        {"layers": 3},
        {"layers": [{}]},
        {"layers": [{"Q": 1}, {}, {}]},
        {"layers": [{"Q": {"selected": "0.5"}}, {}, {}]},
        {"layers": [{"Q": {"weight": 0.5}}, {}, {}]},
        {"layers": [{"Q": {"selected": 1.5}}, {}, {}]},
        {"layers": [{"Q": {"selected": float("nan")}}, {}, {}]},
        {"layers": [[], {}, {}]},
    ],
)
def test_what_is_no_profile_is_none(profile: Any) -> None:
    """The object is its author's to write: nothing in it may break a page of metrics."""
    assert Profile.of(manifest(profile)) is None


@pytest.mark.parametrize("name", ["math-sparse", "math-soft"])
def test_shipped_profiles_can_be_read(name: str) -> None:
    found = Manifest.parse(json.loads((ADAPTERS / name / "adapter.json").read_text()))
    profile = Profile.of(found)
    assert profile is not None
    experts = tuple(tuple(expert.name for expert in found.layer(layer).experts) for layer in range(found.base.num_layers))
    shares = profile.aligned(experts)
    assert shares is not None
    assert divergence(shares, shares) == pytest.approx(0.0, abs=1e-12)

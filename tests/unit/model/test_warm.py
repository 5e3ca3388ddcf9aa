"""Adapters of the torch backend that are laid out before a step needs them."""

from pathlib import Path

import pytest
import torch
from families import random_adapter, write_base

from moa_serve.adapter.adapter import Adapter
from moa_serve.model.moa import MoaWeights
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base


@pytest.fixture
def model(tmp_path: Path) -> Transformer:
    base = load_base(write_base(tmp_path), dtype=torch.float32)
    return Transformer(base.config, base.weights)


def adapter(number: int) -> Adapter:
    manifest, tensors = random_adapter("soft", number)
    return Adapter(manifest, tensors, f"revision {number}", "test")


def test_what_was_laid_out_ahead_is_taken_once(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in a step, a layout stops all rows; kept beside the slot that took it, it takes its memory twice."""
    model.warm(adapter(1))
    model.warm(adapter(1))
    prepare, made = model._prepare, []

    def making(given: Adapter) -> MoaWeights:
        made.append(given.revision)
        return prepare(given)

    monkeypatch.setattr(model, "_prepare", making)
    first = model.prepare(adapter(1))
    assert not made
    assert model.prepare(adapter(1)) is not first
    assert made == ["revision 1"]


def test_what_nobody_takes_does_not_pile_up(model: Transformer) -> None:
    """Requests that left before their turn, and adapters that were unloaded."""
    for number in range(12):
        model.warm(adapter(number))
    assert list(model._warmed) == [f"revision {number}" for number in range(4, 12)]
    model.forget("revision 11")
    assert "revision 11" not in model._warmed

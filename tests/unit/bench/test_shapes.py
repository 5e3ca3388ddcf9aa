"""A made-up base is one that computes: ordinary numbers in, finite and different logits out."""

import pytest
import torch
from families import TINY

from moa_serve.bench import shapes
from moa_serve.bench.shapes import SHAPES, made_up_base, shapes_of
from moa_serve.config import ModelConfig
from moa_serve.errors import InvalidRequest
from moa_serve.model.attention import CausalAttention
from moa_serve.model.batch import ForwardBatch
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import allocate, named_tensors


def test_logits_are_finite_and_depend_on_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that begin again inside of a tensor, as they do in a large base."""
    monkeypatch.setattr(shapes, "_DRAWN", 997)
    base = made_up_base("tiny", ModelConfig.from_hf(TINY), torch.bfloat16)
    for _, tensor in named_tensors(base.config, base.weights):
        assert 1e-3 < tensor.float().std() < 1 or (tensor == 1).all()
    rows = base.weights.embed
    assert len(torch.unique(rows, dim=0)) == len(rows)
    with torch.inference_mode():
        batch = ForwardBatch(torch.arange(20), torch.arange(20))
        logits = Transformer(base.config, base.weights).forward(batch, CausalAttention([(0, 20)]))
    assert logits.isfinite().all()
    assert logits.std(0).min() > 1e-3
    assert (base.name, base.folder) == ("made-up tiny", None)


@pytest.mark.parametrize(("name", "count"), [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248)])
def test_shapes_are_those_of_the_real_base(name: str, count: int) -> None:
    """As many parameters as the model's card says; the smaller one's head is its embedding."""
    config = shapes_of(name)
    weights = allocate(config, torch.device("meta"), torch.bfloat16)
    assert sum(tensor.numel() for _, tensor in named_tensors(config, weights)) == count


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=f"shapes is 'llama', but must be one of {', '.join(SHAPES)}"):
        shapes_of("llama")

"""Base products in the forms that are fast to serve with, against the plain one."""

import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import write_base

from moa_serve.model import ops
from moa_serve.model.attention import CausalAttention
from moa_serve.model.batch import ForwardBatch
from moa_serve.model.ops import linear, plain, prepacked
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

needs_packing = pytest.mark.skipif(not ops._has_packed_linear(), reason="this torch or processor packs no bfloat16 weights")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).bfloat16()


@pytest.mark.parametrize("form", [pytest.param("packed", marks=needs_packing), "turned"])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 32, 33, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_form_is_the_same_product(form: str, rows: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, so that a form which pads shows it."""
    monkeypatch.setattr(ops, "_has_amx", lambda: True)
    weight, bias = random(131, 71), random(131) if has_bias else None
    x = random(max(rows, 1), 71)[:rows]
    out = linear(x, prepacked(weight) if form == "packed" else weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (out.shape, out.dtype, out.is_contiguous()) == ((rows, 131), torch.bfloat16, True)
    torch.testing.assert_close(out.double(), exact, atol=0.13, rtol=2**-7)  # two roundings: of the product, and of the sum


@needs_packing
def test_a_packed_weight_is_not_lost() -> None:
    weight = random(131, 71)
    packed = prepacked(weight)
    assert packed.is_mkldnn
    assert torch.equal(plain(packed), weight)
    assert plain(weight) is weight


def test_what_cannot_be_packed_or_gains_nothing_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = random(8, 8).float()
    assert prepacked(wide) is wide
    monkeypatch.setattr(ops, "_has_packed_linear", lambda: False)
    narrow = random(8, 8)
    assert prepacked(narrow) is narrow
    assert torch.equal(linear(narrow, prepacked(narrow)), linear(narrow, narrow))


def test_a_torch_without_the_private_products_is_served_by_the_public_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may go in any release; the server must not."""
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not ops._has_packed_linear.__wrapped__()
    assert not ops._has_amx.__wrapped__()


def test_gradients_flow_beside_a_plain_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_has_amx", lambda: True)
    weight, x = random(13, 7), random(3, 7).requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, weight).sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand(3, -1), atol=0.05, rtol=0.02)


@needs_packing
@pytest.mark.parametrize("is_tied", [True, False])
def test_packing_takes_the_weights_over(is_tied: bool, tmp_path: Path) -> None:
    """No unpacked copy may stay beside a packed one: the base is most of the memory."""
    folder = write_base(tmp_path)
    ids = torch.arange(3, 12)
    batch = ForwardBatch(ids, torch.arange(len(ids)))
    kept = load_base(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = Transformer(kept.config, kept.weights).forward(batch, CausalAttention([(0, len(ids))]))
    base = load_base(folder, dtype=torch.bfloat16)
    unpacked = [weakref.ref(weight) for layer in base.weights.layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    if not is_tied:
        base.weights.head = base.weights.embed.clone()
        unpacked.append(weakref.ref(base.weights.head))
    model = Transformer.packed(base.config, base.weights)
    assert not any(weight() is not None for weight in unpacked)
    assert (model.weights.head is model.weights.embed) == is_tied
    assert model.weights.head.is_mkldnn != is_tied
    with torch.inference_mode():
        torch.testing.assert_close(model.forward(batch, CausalAttention([(0, len(ids))])), expected, atol=0.05, rtol=0.05)

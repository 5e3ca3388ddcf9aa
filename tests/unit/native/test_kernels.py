"""Every operation of the native library against its torch definition, for each instruction set that this processor has."""

import math

import pytest
import torch
import torch.nn.functional as F
from families import TINY, random_adapter, write_base
from native_tools import SETS, element, experts, routers
from torch import Tensor

from moa_serve.adapter.rules import RouterRule, RoutingRules
from moa_serve.model.build import build
from moa_serve.model.moa import Router
from moa_serve.model.ops import rms_norm
from moa_serve.model.weights import load_base
from moa_serve.native import library as lib
from moa_serve.native import packing
from moa_serve.native.program import compile_adapter

pytestmark = pytest.mark.skipif(not SETS, reason="the native library is not built")
DTYPES = [torch.bfloat16, torch.float32]
with_sets = pytest.mark.parametrize("isa", SETS)
with_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])


def product(isa: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, K padded) W^T through the library, without the padding."""
    packed, out = packing.pack(weight, x.dtype), torch.empty(len(x), packing.padded(len(weight)))
    wide = None if bias is None else packing.vector(bias)
    done = lib.library().moa_op_product(
        isa.encode(), element(x.dtype), x.data_ptr(), len(x), x.shape[1], packed.data_ptr(), None if wide is None else wide.data_ptr(),
        out.shape[1], out.data_ptr(),
    )  # fmt: skip
    assert done == 0
    assert not out[:, len(weight) :].any(), "what stands behind the outputs is zero"
    return out[:, : len(weight)]


@with_sets
def test_exp_is_exact_to_two_units(isa: str) -> None:
    x = torch.cat([torch.linspace(-87, 88, 16 * 4096), torch.tensor([0.0, -0.0, 1e-30, -1e-30] * 4)])
    y = torch.empty_like(x)
    lib.library().moa_op_exp(isa.encode(), x.data_ptr(), y.data_ptr(), len(x))
    exact = x.double().exp()
    unit = torch.exp2(exact.log2().floor() - 23)
    assert float(((y.double() - exact).abs() / unit).max()) < 2
    assert y[-16:].tolist() == [1.0] * 16


@with_sets
def test_exp_at_its_ends(isa: str) -> None:
    x = torch.tensor([-math.inf, -200.0, -87.4, math.nan, 89.0, math.inf, 1.0, 0.0] * 2)
    y = torch.empty_like(x)
    lib.library().moa_op_exp(isa.encode(), x.data_ptr(), y.data_ptr(), len(x))
    assert y[:3].tolist() == [0.0, 0.0, 0.0]
    assert math.isnan(y[3])
    assert float(y[4]) > 1e38
    assert float(y[5]) > 1e38


@with_sets
@with_dtypes
@pytest.mark.parametrize(("rows", "size", "out"), [(1, 32, 32), (2, 40, 7), (3, 64, 100), (12, 96, 33), (13, 33, 64), (30, 128, 50)])
def test_product(isa: str, dtype: torch.dtype, rows: int, size: int, out: int) -> None:
    generator = torch.Generator().manual_seed(rows * size)
    x, weight = torch.randn(rows, size, generator=generator).to(dtype), torch.randn(out, size, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator)
    found = product(isa, packing.pad_columns(x), weight, bias)
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 2e-3)


@with_sets
@with_dtypes
def test_a_row_does_not_depend_on_its_neighbours(isa: str, dtype: torch.dtype) -> None:
    """Bitwise, at every number of rows: the mixed batch equals each request alone because of this."""
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(40, 160, generator=generator).to(dtype), torch.randn(96, 160, generator=generator)
    alone = torch.cat([product(isa, x[row : row + 1], weight) for row in range(40)])
    for rows in (2, 3, 4, 5, 11, 12, 13, 24, 25, 40):
        assert torch.equal(product(isa, x[:rows].contiguous(), weight), alone[:rows]), rows


@with_sets
@with_dtypes
def test_norm(isa: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 50), torch.rand(50) + 0.5
    wide, out = packing.pad_columns(x).contiguous(), torch.empty(5, 64, dtype=dtype)
    scale = packing.vector(weight)
    lib.library().moa_op_norm(isa.encode(), element(dtype), wide.data_ptr(), scale.data_ptr(), 5, 50, 1e-5, out.data_ptr())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out[:, :50].float(), rms_norm(x, weight, 1e-5), rtol=tolerance, atol=tolerance)
    assert not out[:, 50:].any()


def site_router(layer: object, site: str) -> Router:
    found = layer.router if site == "layer" else layer.linears[site].mixture.router  # type: ignore[attr-defined]
    assert isinstance(found, Router)
    return found


@with_sets
@pytest.mark.parametrize("is_exact", [True, False], ids=["bfloat16 weights", "float32 weights"])
@pytest.mark.parametrize("family", ["soft", "soft_softmax", "sparse_fn", "sparse_const", "molora", "mola_layerwise", "adamole"])
def test_route(isa: str, family: str, is_exact: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Scores, threshold, selection and gates of every kind of router, in float32 however its weights are kept."""
    base = load_base(write_base(tmp_path_factory.mktemp("base")), dtype=torch.float32)
    manifest, tensors = random_adapter(family)
    if is_exact:
        tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    weights = build(manifest, tensors, base.weights, base.config, torch.float32)
    adapter = compile_adapter(weights, torch.bfloat16)
    seen = 0
    for (layer, place, struct), traced in zip(routers(adapter), sorted(adapter.traced, key=lambda found: found.layer), strict=True):
        assert struct.row_format == (lib.ROWS_BFLOAT16 if is_exact else lib.ROWS_FLOAT32)
        width = TINY["intermediate_size"] if traced.site == "DOWN" else TINY["hidden_size"]
        x = torch.randn(7, width, generator=torch.Generator().manual_seed(layer))
        wide = packing.pad_columns(x).contiguous()
        gates, trace = torch.empty(7, struct.outputs), torch.empty(7, 3 * struct.outputs + 1)
        lib.library().moa_op_route(
            isa.encode(), adapter.blob.data_ptr(), place, None, wide.data_ptr(), 7, wide.shape[1], gates.data_ptr(), trace.data_ptr()
        )
        found = weights.layers[layer]
        assert found is not None
        expected = site_router(found, traced.site)(x)
        torch.testing.assert_close(trace[:, : struct.outputs], expected.scores, rtol=1e-5, atol=2e-6)
        if expected.threshold is not None:
            torch.testing.assert_close(trace[:, struct.outputs], expected.threshold[:, 0], rtol=1e-5, atol=2e-6)
        assert torch.equal(trace[:, struct.outputs + 1 : 2 * struct.outputs + 1] != 0, expected.selected)
        torch.testing.assert_close(gates, expected.gates, rtol=1e-5, atol=2e-6)
        assert torch.equal(gates == 0, expected.gates == 0), "what is not kept is exactly 0"
        assert torch.equal(trace[:, 2 * struct.outputs + 1 :], gates)
        seen += 1
    assert seen


@with_sets
@pytest.mark.parametrize("rule", [RouterRule(top_k=2), RouterRule(top_k=2, forced=0b10), RouterRule(threshold=0.5, top_k=3, disabled=0b1)])
def test_route_by_another_rule_where_scores_are_not_numbers(isa: str, rule: RouterRule, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A NaN that is kept comes out, so that its row fails on every backend; none is kept that must reach a threshold."""
    base = load_base(write_base(tmp_path_factory.mktemp("base")), dtype=torch.float32)
    manifest, tensors = random_adapter("soft")
    for name in ("layers.0.router.w2.weight", "layers.0.router.w2.bias"):
        tensors[name][[2, 5]] = torch.nan
    weights = build(manifest, tensors, base.weights, base.config, torch.float32)
    adapter = compile_adapter(weights, torch.float32)
    (layer, place, struct), *_ = routers(adapter)
    x = torch.randn(7, TINY["hidden_size"], generator=torch.Generator().manual_seed(layer))
    wide = packing.pad_columns(x).contiguous()
    gates, trace = torch.empty(7, struct.outputs), torch.empty(7, 3 * struct.outputs + 1)
    table = adapter.rules(RoutingRules({(layer, "layer"): rule}))
    lib.library().moa_op_route(
        isa.encode(), adapter.blob.data_ptr(), place, table, wide.data_ptr(), 7, wide.shape[1], gates.data_ptr(), trace.data_ptr()
    )
    found = weights.layers[layer]
    assert found is not None
    expected = site_router(found, "layer")(x, rule)
    assert torch.equal(trace[:, struct.outputs + 1 : 2 * struct.outputs + 1] != 0, expected.selected)
    torch.testing.assert_close(gates, expected.gates, rtol=1e-5, atol=2e-6, equal_nan=True)
    assert bool(expected.gates.isnan().any()) == (rule.threshold is None)


@with_sets
@with_dtypes
@pytest.mark.parametrize("family", ["soft", "molora", "lora"])
def test_expert(isa: str, dtype: torch.dtype, family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """y += w * scale * B (A u) for tokens in tiles and alone; a weight of 0 leaves its row as it is, even where u is not finite."""
    base = load_base(write_base(tmp_path_factory.mktemp("base")), dtype=torch.float32)
    manifest, tensors = random_adapter(family)
    weights = build(manifest, tensors, base.weights, base.config, torch.float32)
    adapter = compile_adapter(weights, dtype, has_tiles=lib.has_tiles(isa, dtype))
    sizes = {0: 32, 1: 32, 2: 32, 3: 32, 4: 48, 5: 48, 6: 32}  # outputs by target
    for layer, place, group, struct in experts(adapter):
        if group.shrink != lib.SHRINK_LINEAR:
            continue
        target = {number: name for name, number in lib.TARGETS.items()}[group.target]
        out = {"K": 16, "V": 16}.get(target, sizes[group.target])
        width = packing.padded(TINY["intermediate_size"] if target == "DOWN" else 32)
        x = packing.pad_columns(torch.randn(9, TINY["intermediate_size"] if target == "DOWN" else 32)).to(dtype).contiguous()
        w = torch.rand(9)
        w[3] = 0
        x[3] = math.nan
        y = torch.randn(9, packing.padded(out))
        before = y.clone()
        lib.library().moa_op_expert(
            isa.encode(), element(dtype), adapter.blob.data_ptr(), place, x.data_ptr(), 9, width, w.data_ptr(), y.shape[1], y.data_ptr()
        )
        found = manifest.layer(layer).at(target)
        names = [f"layers.{layer}.{expert.name}" for expert in found]
        a, b = (tensors[f"{names[0]}.lora_{factor}"] for factor in "AB")
        if struct.coefficients_at != 0 and len(found) > 1:
            continue  # the first expert of a group stands for the others
        low = F.linear(x[:, : a.shape[1]].float(), a.to(dtype).float()) * (w * struct.scale)[:, None]
        expected = before[:, :out] + F.linear(low.to(dtype).float(), b.to(dtype).float())
        expected[3] = before[3, :out]
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y[:, :out], expected, rtol=tolerance, atol=tolerance)
        return

"""A base in eight bits: what it stands for, that the kernels compute with just that, and that nothing else takes it."""

import json
import math
from pathlib import Path

import pytest
import torch
from families import TINY, base_tensors, write_base, write_family
from native_tools import SETS
from safetensors.torch import save_file
from torch import Tensor

from moa_serve import LLM, SamplingParams
from moa_serve.bench.quality import Setting
from moa_serve.engine.request import Request
from moa_serve.errors import InvalidRequest, ModelError
from moa_serve.model.weights import Base, load_base
from moa_serve.native import library as lib
from moa_serve.native import packing
from moa_serve.native.model import NativeModel
from moa_serve.native.packing import Int8

SHAPES = [(32, 32), (7, 5), (100, 33), (64, 300), (33, 544)]
with_library = pytest.mark.skipif(not SETS, reason="the native library is not built")


def packed(weight: Tensor) -> Tensor:
    return packing.pack_sections([weight], Int8())


def stands_for(weight: Tensor) -> Tensor:
    """What a matrix is after eight bits."""
    return Int8().unpack(packed(weight), slice(0, len(weight)), weight.shape[1])


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_weight_errs_by_half_a_step_of_its_group(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    weight[rows // 2, columns // 2] = 40.0  # an outlier makes its own group coarse, and no other
    found = stands_for(weight).float()
    assert found.shape == weight.shape
    groups = packing.pad_columns(weight).view(rows, -1, 32)
    step = ((groups.amax(-1) - groups.amin(-1)) / 255).repeat_interleave(32, dim=1)[:, :columns]
    assert bool(((found - weight).abs() <= 0.55 * step + weight.abs() * 2**-7).all()), "half a step, and what bfloat16 has no bits for"
    assert float((found - weight).norm() / weight.norm()) < 0.01


def test_cutting_does_not_make_weights_smaller() -> None:
    weight = torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) + 0.5
    assert float((stands_for(weight).float() / weight).mean()) == pytest.approx(1, abs=3e-4)


def test_few_levels_are_kept() -> None:
    """Four bits with a scale and a minimum for 32 weights, as GGUF's Q4_1 has them, lose no more than bfloat16 takes."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (32, 8, 32), generator=generator)
    q[..., :2] = torch.tensor([0, 15])
    weight = (q * 0.0078125 - 0.0625).view(32, 256).bfloat16()
    found = stands_for(weight)
    assert bool(((found.float() - weight.float()).abs() <= weight.float().abs() * 2**-7 + 1e-4).all())


def test_a_constant_and_zeros_are_kept() -> None:
    weight = torch.zeros(40, 64)
    weight[:, :32] = 0.75
    found = stands_for(weight)
    assert bool((found[:, :32] == 0.75).all())
    assert not found[:, 32:].any()
    assert not packed(weight)[1, :, 8 * 2 : 32 * 2].any(), "outputs that pad a panel have no scale"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e6])
def test_what_eight_bits_cannot_hold_is_refused(bad: float) -> None:
    weight = torch.ones(32, 64)
    weight[3, 40] = bad
    with pytest.raises(ModelError, match=r"not finite, or too large for eight bits; serve it with base_dtype 'auto'"):
        packed(weight)


@with_library
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("rows", [1, 3, 12, 16, 17, 33, 70])
@pytest.mark.parametrize(("out", "size"), SHAPES)
def test_a_product_is_bitwise_that_of_the_same_weights_in_bfloat16(isa: str, rows: int, out: int, size: int) -> None:
    generator = torch.Generator().manual_seed(rows + out)
    weight = torch.randn(out, size, generator=generator)
    bias, x = torch.randn(packing.padded(out), generator=generator), torch.randn(rows, size, generator=generator).bfloat16()
    x = packing.pad_columns(x).contiguous()
    panels, plain = packed(weight), packing.pack(stands_for(weight), torch.bfloat16)
    found, expected = torch.empty(2, rows, packing.padded(out))
    shape = (bias.data_ptr(), packing.padded(out))
    library, name = lib.library(), isa.encode()
    assert library.moa_op_int8_product(name, x.data_ptr(), rows, x.shape[1], panels.data_ptr(), *shape, found.data_ptr()) == 0
    assert library.moa_op_product(name, lib.BFLOAT16, x.data_ptr(), rows, x.shape[1], plain.data_ptr(), *shape, expected.data_ptr()) == 0
    assert torch.equal(found, expected)
    assert bool(found[:, :out].any())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("int8")
    families = {family: write_family(root / family, family) for family in ("soft", "nested_hydra", "sparse_fn")}
    (root / "untied").mkdir()
    (root / "untied" / "config.json").write_text(json.dumps(TINY | {"tie_word_embeddings": False}))
    head = torch.randn(TINY["vocab_size"], TINY["hidden_size"], generator=torch.Generator().manual_seed(5))
    save_file(base_tensors(TINY) | {"lm_head.weight": head}, root / "untied" / "model.safetensors")
    return {"tied": write_base(root / "tied"), "untied": root / "untied"} | families


def quantized(base: Base) -> Base:
    """The base with what eight bits make of it, in bfloat16."""
    weights = base.weights
    is_tied = weights.head is weights.embed
    weights.head = stands_for(weights.head)
    if is_tied:
        weights.embed = weights.head
    for layer in weights.layers:
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(layer, name, stands_for(getattr(layer, name)))
    return base


@with_library
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_base_is_bitwise_that_of_the_same_weights_in_bfloat16(
    kind: str, isa: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters as well: a prompt's keys and values are made with the base that is served."""
    monkeypatch.setattr(lib, "instruction_sets", lambda: [isa])
    adapters = {name: folders[name] for name in ("soft", "nested_hydra", "sparse_fn")}
    prompts = [[(7 * place + row) % 96 for place in range(3 + 17 * row)] for row in range(4)]
    names = [None, *adapters]
    found = []
    for base_dtype in ("int8", "auto"):
        if base_dtype == "auto":
            monkeypatch.setattr("moa_serve.llm.load_base", lambda *args, **more: quantized(load_base(*args, **more)))
            # Packed adapters are kept by the base's digest, and this base is not what its files say.
            monkeypatch.setenv("MOA_CACHE_DIR", str(folders["tied"].parent / f"other-{kind}-{isa}"))
        with LLM(
            folders[kind], adapters=adapters, backend="native", device="cpu", dtype="bfloat16", base_dtype=base_dtype, kv_cache_bytes=2**22
        ) as llm:
            assert llm.base_dtype == ("int8" if base_dtype == "int8" else "bfloat16")
            logits = [llm.logits(prompt, adapter=name) for prompt, name in zip(prompts, names, strict=True)]
            together = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5, logprobs=1), adapter=names)
            tokens = [[(one.token_id, one.logprob) for one in completion.logprobs or []] for completion in together]
            found.append((logits, tokens))
    (ours, our_tokens), (theirs, their_tokens) = found
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert our_tokens == their_tokens


@with_library
def test_it_takes_little_more_than_half_the_memory(folders: dict[str, Path]) -> None:
    sizes = []
    for is_int8 in (True, False):
        base = load_base(folders["tied"], dtype=torch.bfloat16)
        model = NativeModel(base.config, base.weights, is_int8=is_int8)
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in model._base._kept if tensor.dim() > 1))
        model.close()
    assert sizes[0] == sizes[1] * 9 / 16  # a byte, and 4 for a scale and a minimum of 32


@with_library
def test_a_base_in_eight_bits_has_its_own_kv_identity_and_packed_adapters(folders: dict[str, Path]) -> None:
    roots, packed = set(), set()
    for base_dtype in ("int8", "auto"):
        with LLM(folders["tied"], backend="native", dtype="bfloat16", base_dtype=base_dtype, kv_cache_bytes=2**22) as llm:
            model = llm._engine.model
            assert isinstance(model, NativeModel)
            packed.add(model._packed._folder)
            roots.add(llm._engine.add(Request((1, 2, 3), SamplingParams(max_tokens=1))).kv_root)
    assert len(packed) == len(roots) == 2


@with_library
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "torch"}, "computed by the native backend in bfloat16, and here the torch backend computes in float32"),
        ({"backend": "native", "dtype": "float32"}, "and here the native backend computes in float32"),
        ({"backend": "native", "base_dtype": "int4"}, "base_dtype 'int4' is unknown; use 'auto' or 'int8'"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, str], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        LLM(folders["tied"], device="cpu", **({"base_dtype": "int8"} | options))  # type: ignore[arg-type]
    assert refused.value.param == "base_dtype"


def test_where_auto_falls_back_to_torch_it_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> list[str]:
        raise lib.NativeUnavailable("there is no compiler")

    monkeypatch.setattr("moa_serve.llm.instruction_sets", missing)
    with pytest.raises(InvalidRequest, match="use backend 'native' with dtype 'bfloat16', or base_dtype 'auto'"):
        LLM(folders["tied"], device="cpu", base_dtype="int8")


def test_a_weight_that_does_not_fit_refuses_the_base(tmp_path: Path) -> None:
    if not SETS:
        pytest.skip("the native library is not built")
    folder = write_base(tmp_path / "large", TINY)
    base = load_base(folder, dtype=torch.bfloat16)
    base.weights.layers[1].down[0, 0] = 1e30
    with pytest.raises(ModelError, match="too large for eight bits"):
        NativeModel(base.config, base.weights, is_int8=True)


def test_a_setting_of_quality_may_be_int8() -> None:
    setting = Setting.parse("native:int8", "other")
    assert str(setting) == "native:int8"
    assert setting.options == {"backend": "native", "dtype": "bfloat16", "base_dtype": "int8"}
    assert Setting.parse("torch:float32", "other").options == {"backend": "torch", "dtype": "float32", "base_dtype": "auto"}
    with pytest.raises(InvalidRequest, match="computed by the native backend"):
        Setting.parse("torch:int8", "other").check("cpu")

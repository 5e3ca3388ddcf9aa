"""The authors' Hugging Face line, from made-up folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import tiny_config
from torch import Tensor

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.importers import read_adapter
from moa_serve.errors import AdapterConfigInvalid, AdapterMismatch, AdapterUnsupported

_JSON: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": "x/y", "bias": "none", "inference_mode": True, "init_lora_weights": True,
    "lora_alpha": 8, "lora_dropout": 0, "lora_rank": 2, "peft_type": "SOFTMOA", "revision": None, "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}  # fmt: skip


def _tensors(ranks: tuple[int, ...] = (2, 2)) -> dict[str, Tensor]:
    """LoRA on Q and DOWN in each layer, with a SwiGLU router."""
    tensors: dict[str, Tensor] = {}
    for layer, rank in enumerate(ranks):
        prefix = f"base_model.model.model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.lora_Q.lora_A.weight": torch.randn(rank, 16),
            f"{prefix}.self_attn.lora_Q.lora_B.weight": torch.randn(16, rank),
            f"{prefix}.mlp.lora_down.lora_A.weight": torch.randn(2, 24),
            f"{prefix}.mlp.lora_down.lora_B.weight": torch.randn(16, 2),
        }
        for name, shape in (("w1", (8, 16)), ("w2", (2, 8)), ("w3", (8, 16))):
            tensors |= {f"{prefix}.adapter_type_router.{name}.weight": torch.randn(shape)}
            tensors |= {f"{prefix}.adapter_type_router.{name}.bias": torch.randn(shape[0])}
    return tensors


def _load(folder: Path, tensors: dict[str, Tensor], variant: str | None = None, **change: Any) -> Adapter:
    (folder / "adapter_config.json").write_text(json.dumps(_JSON | change))
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
    return read_adapter(AdapterSource(folder, variant), tiny_config())


def test_sizes_come_from_the_tensors_and_the_scale_is_one(tmp_path: Path) -> None:
    """The authors' code ignores the JSON's rank and alpha; taking them would scale every LoRA wrongly."""
    tensors = _tensors()
    adapter = _load(tmp_path, tensors, lora_rank=32)
    assert adapter.manifest.router.input == "normed"
    assert adapter.manifest.router.hidden == 8
    assert [(expert.name, expert.rank, expert.scale) for expert in adapter.manifest.experts] == [("Q", 2, 1.0), ("DOWN", 2, 1.0)]
    assert any("lora_rank 32" in warning for warning in adapter.warnings)
    source = tensors["base_model.model.model.layers.1.self_attn.lora_Q.lora_B.weight"]
    assert torch.equal(adapter.tensors["layers.1.Q.lora_B"], source)  # half-split already: nothing is reordered


def test_layers_may_differ_in_rank(tmp_path: Path) -> None:
    """Ranks are per tensor there; the manifest then has two experts of one name on different layers."""
    adapter = _load(tmp_path, _tensors((2, 3)))
    assert [(e.name, e.rank, e.layers) for e in adapter.manifest.experts if e.name == "Q"] == [("Q", 2, [0]), ("Q", 3, [1])]


def test_threshold_tensors_make_it_sparse(tmp_path: Path) -> None:
    """The JSON says SOFTMOA for both."""
    prefix = "base_model.model.model.layers."
    extra = {
        f"{prefix}{i}.adapter_threshold_fn.{part}": torch.zeros(shape)
        for i in range(2)
        for part, shape in (("weight", (1, 16)), ("bias", (1,)))
    }
    adapter = _load(tmp_path, _tensors() | extra, "sparse_moa")
    assert adapter.manifest.router.select.model_dump() == {"kind": "threshold_fn", "max_threshold": 0.5}
    with pytest.raises(AdapterConfigInvalid):
        _load(tmp_path, _tensors(), "sparse_moa")


def test_a_missing_or_foreign_tensor_is_named(tmp_path: Path) -> None:
    """The authors' own loader checks neither: missing ones keep random numbers."""
    tensors = _tensors()
    del tensors["base_model.model.model.layers.0.mlp.lora_down.lora_B.weight"]
    with pytest.raises(AdapterMismatch, match=r"layers\.0\.mlp\.lora_down\.lora_B\.weight: missing"):
        _load(tmp_path, tensors)
    with pytest.raises(AdapterMismatch, match=r"embed_tokens"):
        _load(tmp_path, _tensors() | {"base_model.model.model.embed_tokens.weight": torch.zeros(32, 16)})


def test_fields_of_something_else_are_refused(tmp_path: Path) -> None:
    """A field that we would ignore may change what the adapter is."""
    with pytest.raises(AdapterUnsupported, match="use_dora"):
        _load(tmp_path, _tensors(), use_dora=True)
    with pytest.raises(AdapterUnsupported, match="bias"):
        _load(tmp_path, _tensors(), bias="all")

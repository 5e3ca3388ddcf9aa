"""PEFT LoRA folders, with the field and tensor names that PEFT writes."""

import json
import math
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
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": "x/y",
    "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.18.0", "qalora_group_size": 16,
    "r": 4, "rank_pattern": {}, "revision": None, "target_modules": ["v_proj", "q_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def _pair(layer: int, module: str, out: int, rank: int = 4) -> dict[str, Tensor]:
    name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
    return {f"{name}.lora_A.weight": torch.randn(rank, 16), f"{name}.lora_B.weight": torch.randn(out, rank)}


def _tensors(rank_of_first_q: int = 4) -> dict[str, Tensor]:
    return _pair(0, "q_proj", 16, rank_of_first_q) | _pair(0, "v_proj", 8) | _pair(1, "q_proj", 16) | _pair(1, "v_proj", 8)


def _load(folder: Path, tensors: dict[str, Tensor], **change: Any) -> Adapter:
    (folder / "adapter_config.json").write_text(json.dumps(_JSON | change))
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
    return read_adapter(AdapterSource(folder), tiny_config())


def test_plain_lora_loads_as_it_is(tmp_path: Path) -> None:
    tensors = _tensors()
    adapter = _load(tmp_path, tensors)
    assert (adapter.source_format, adapter.manifest.variant) == ("peft", "lora")
    assert {expert.name: expert.scale for expert in adapter.manifest.experts} == {"Q": 2.0, "V": 2.0}
    assert torch.equal(adapter.tensors["layers.1.V.lora_B"], tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"])


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    """alpha / rank of the manifest is the scale, so alpha is stored accordingly."""
    adapter = _load(tmp_path, _tensors(), use_rslora=True)
    assert adapter.manifest.experts[0].scale == pytest.approx(8 / math.sqrt(4))


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj", "^model.layers.0.self_attn.q_proj"])
def test_patterns_count_for_the_modules_that_they_end(tmp_path: Path, key: str) -> None:
    """One rank for all would read half a matrix; one alpha for all would scale it wrongly."""
    adapter = _load(tmp_path, _tensors(2), rank_pattern={key: 2}, alpha_pattern={key: 1})
    query = [(expert.rank, expert.alpha, expert.layers) for expert in adapter.manifest.experts if expert.name == "Q"]
    assert query == [(2, 1.0, [0]), (4, 8.0, [1])]


def test_layers_to_transform_and_expressions_choose_modules(tmp_path: Path) -> None:
    """A list says exactly what must be there; an expression from a file is never run, the tensors say."""
    one = _pair(1, "q_proj", 16) | _pair(1, "v_proj", 8)
    assert _load(tmp_path, one, layers_to_transform=[1]).manifest.experts[0].layers == [1]
    assert _load(tmp_path, one, target_modules=r"(a+)+\.q_proj").manifest.experts[0].layers == [1]
    with pytest.raises(AdapterMismatch, match=r"layers\.0\.self_attn\.q_proj\.lora_A\.weight: missing"):
        _load(tmp_path, one)
    with pytest.raises(AdapterMismatch, match="does not belong"):
        _load(tmp_path, _tensors(), layers_to_transform=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("task_type", "SEQ_CLS"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("fan_in_fan_out", True),
        ("megatron_config", {"a": 1}),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["x"]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("exclude_modules", ["q_proj"]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("rank_pattern", {"(a+)+$": 4}),
        ("target_modules", ["q_proj", "v_proj", "lm_head"]),
        ("a_field_of_the_future", 1),
    ],
)
def test_other_things_that_peft_can_do_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    """A field that is accepted and ignored serves another adapter than the one that was trained."""
    with pytest.raises(AdapterUnsupported, match=field) as caught:
        _load(tmp_path, _tensors(), **{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
        ("base_model.model.lm_head.lora_A.weight", "output layer"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", "DoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "bias"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path: Path, name: str, what: str) -> None:
    """Some are in files whose config does not tell."""
    with pytest.raises(AdapterUnsupported, match=what):
        _load(tmp_path, _tensors() | {name: torch.ones(4)})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 513),
        ("r", None),
        ("lora_alpha", 1e4),
        ("lora_alpha", "8"),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": True}),
        ("layers_to_transform", [2]),
        ("layers_to_transform", "all"),
        ("use_rslora", "yes"),
        ("target_modules", None),
    ],
)
def test_bad_numbers_are_refused_with_their_field(tmp_path: Path, field: str, value: Any) -> None:
    """Sizes are judged before a tensor is read."""
    with pytest.raises(AdapterConfigInvalid) as caught:
        _load(tmp_path, _tensors(), **{field: value})
    assert caught.value.param == field

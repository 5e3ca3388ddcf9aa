"""The authors' Meta line, from made-up folders with the names that their scripts write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_config
from torch import Tensor

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.importers import read_adapter
from moa_serve.errors import AdapterConfigInvalid, AdapterMismatch, AdapterTooLarge, AdapterUnsupported

_CONFIG = tiny_config()  # D 16, F 24, 2 layers, 2 heads of 8, 1 kv head
_SOFT: dict[str, Any] = {
    "w_bias": False, "lora_layers": "0-2", "lora_rank": 2, "lora_targets": "Q,K", "lora_alpha": 4, "expert_num": 1, "swi_x": 0,
    "hydra_moe": True, "p_adapter_layers": "0-0", "p_adapter_size": 3, "p_adapter_hydra": True, "prompt_layers": "0-0", "prompt_len": 5,
    "expert_weight": False, "max_seq_len": 64, "flash_attention2": False, "bf16": True,
}  # fmt: skip
_MOE = {name: value for name, value in _SOFT.items() if name != "swi_x"}
_SPARSE = {name: value for name, value in _SOFT.items() if name not in ("expert_num", "hydra_moe", "expert_weight")} | {
    "max_threshold": 0.5, "bool_weights": False, "adapter_noisy": False, "const_threshold": False,
}  # fmt: skip
_TOP_K = {name: value for name, value in _MOE.items() if name != "hydra_moe"} | {
    "expert_num": 2, "noisy_router": False, "top_k": 1, "adamole": False, "lb_loss_coeff": 0.001,
}  # fmt: skip


def _lora(layer: int, target: str, out: int) -> dict[str, Tensor]:
    name = f"llama.layers.{layer}.attention.lora_{target}"
    return {f"{name}.lora_A.weight": torch.randn(2, 16), f"{name}.lora_B.weight": torch.randn(out, 2)}


def _soft_tensors(columns: int = 2) -> dict[str, Tensor]:
    """Q and K in both layers and a linear router."""
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        tensors |= _lora(layer, "Q", 16) | _lora(layer, "K", 8)
        tensors[f"llama.layers.{layer}.adapter_type_router.weight"] = torch.randn(columns, 16)
        tensors[f"llama.layers.{layer}.adapter_type_router.bias"] = torch.randn(columns)
    return tensors


def _load(folder: Path, params: Mapping[str, Any], tensors: Mapping[str, Tensor], variant: str | None = None) -> Adapter:
    (folder / "adapter_params.json").write_text(json.dumps(params))
    torch.save(dict(tensors), folder / "adapter.pth")
    return read_adapter(AdapterSource(folder, variant), _CONFIG)


def test_soft_moa_is_token_level_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    """The files of both are equal: a silent guess would answer with the wrong mathematics."""
    tensors = _soft_tensors()
    adapter = _load(tmp_path, _SOFT, tensors)
    assert adapter.manifest.variant == "soft_moa"
    assert adapter.manifest.router.input == "residual"
    assert any("soft_moa_instance" in warning for warning in adapter.warnings)
    pooled = _load(tmp_path, _SOFT, tensors, "soft_moa_instance")
    assert pooled.manifest.is_pooled
    assert pooled.warnings == ()
    assert pooled.revision != adapter.revision


def test_only_second_factors_of_q_and_k_are_reordered(tmp_path: Path) -> None:
    """Interleaved rotary pairs on a half-split base give fluent nonsense."""
    tensors = _soft_tensors()
    adapter = _load(tmp_path, _SOFT, tensors)
    order = torch.tensor([2 * j if j < 4 else 2 * j - 7 for j in range(8)])  # of one head of 8
    old_q, old_k = tensors["llama.layers.1.attention.lora_Q.lora_B.weight"], tensors["llama.layers.1.attention.lora_K.lora_B.weight"]
    assert torch.equal(adapter.tensors["layers.1.Q.lora_B"], old_q[torch.cat([order, order + 8])])
    assert torch.equal(adapter.tensors["layers.1.K.lora_B"], old_k[order])
    assert torch.equal(adapter.tensors["layers.1.Q.lora_A"], tensors["llama.layers.1.attention.lora_Q.lora_A.weight"])
    assert torch.equal(adapter.tensors["layers.1.router.bias"], tensors["llama.layers.1.adapter_type_router.bias"])


def test_unused_router_outputs_are_dropped_from_the_end(tmp_path: Path) -> None:
    """ "Q, K" counts two targets and makes one LoRA: the used outputs are the first ones."""
    tensors = {name: tensor for name, tensor in _soft_tensors(columns=2).items() if ".lora_K." not in name}
    adapter = _load(tmp_path, _SOFT | {"lora_targets": "Q, K"}, tensors)
    assert [expert.name for expert in adapter.manifest.experts] == ["Q"]
    assert torch.equal(adapter.tensors["layers.0.router.weight"], tensors["llama.layers.0.adapter_type_router.weight"][:1])
    assert any("lora_targets" in warning for warning in adapter.warnings)
    assert any("unused router outputs" in warning for warning in adapter.warnings)


def test_instance_level_counts_a_gate_target_that_it_does_not_have(tmp_path: Path) -> None:
    """Only that script sizes its router by FFN_GATE and makes no LoRA for it."""
    params = _SOFT | {"lora_targets": "Q,K,FFN_GATE"}
    adapter = _load(tmp_path, params, _soft_tensors(columns=3), "soft_moa_instance")
    assert adapter.tensors["layers.0.router.weight"].shape == (2, 16)
    with pytest.raises(AdapterMismatch, match="lora_GATE"):
        _load(tmp_path, params, _soft_tensors(columns=3))


def test_a_constant_threshold_comes_from_the_json(tmp_path: Path) -> None:
    """It is nowhere else; and a threshold function left over means that the JSON is another adapter's."""
    adapter = _load(tmp_path, _SPARSE | {"const_threshold": True, "max_threshold": 0.25}, _soft_tensors())
    assert adapter.manifest.router.select.model_dump() == {"kind": "constant", "threshold": 0.25}
    function = {
        f"llama.layers.{i}.adapter_threshold_fn.{part}": torch.zeros(1, *width)
        for i in range(2)
        for part, width in (("weight", [16]), ("bias", []))
    }
    assert _load(tmp_path, _SPARSE, _soft_tensors() | function).manifest.router.has_threshold_fn
    with pytest.raises(AdapterMismatch, match="does not belong"):
        _load(tmp_path, _SPARSE | {"const_threshold": True}, _soft_tensors() | function)


def test_what_has_no_effect_is_dropped_with_a_warning(tmp_path: Path) -> None:
    """Noise belongs to training; but only where the JSON says that there is some."""
    noise = {f"llama.layers.{layer}.adapter_noise_linear.bias": torch.zeros(2) for layer in range(2)}
    params = _SPARSE | {"const_threshold": True}
    adapter = _load(tmp_path, params | {"adapter_noisy": True, "bool_weights": True}, _soft_tensors() | noise)
    assert [warning.partition(" ")[0] for warning in adapter.warnings] == ["bool_weights", "adapter_noise_linear"]
    with pytest.raises(AdapterMismatch):
        _load(tmp_path, params, _soft_tensors() | noise)


def _experts(second: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for target, out in (("Q", 16), ("K", 8)):
            name = f"llama.layers.{layer}.attention.lora_{target}"
            for expert in range(2):
                tensors[f"{name}.experts.{expert}.lora_A.weight"] = torch.randn(2, 16)
                tensors[f"{name}.experts.{expert}.lora_B.weight"] = torch.randn(out, 2)
            tensors |= {f"{name}.router.{second}weight": torch.randn(2, 16), f"{name}.router.{second}bias": torch.randn(2)}
            if not second:
                tensors |= {f"{name}.threshold_fn.weight": torch.randn(1, 16), f"{name}.threshold_fn.bias": torch.randn(1)}
    return tensors


def test_top_k_or_adamole_is_told_by_the_tensors(tmp_path: Path) -> None:
    """The script reads "--adamole False" as true, so the flag cannot be trusted."""
    top_k = _experts("topkroute_linear.")
    assert _load(tmp_path, _TOP_K, top_k).warnings == ()
    adapter = _load(tmp_path, _TOP_K | {"adamole": True}, top_k)
    assert adapter.manifest.variant == "mola"
    assert any("adamole" in warning for warning in adapter.warnings)
    adapter = _load(tmp_path, _TOP_K | {"adamole": True}, _experts(""))
    assert adapter.manifest.variant == "adamole"
    assert adapter.manifest.router.has_threshold_fn


def test_composition_with_inner_experts_keeps_separate_down_projections(tmp_path: Path) -> None:
    """The plain script has p_adapter_hydra false: then each inner parallel adapter has both its linears."""
    tensors: dict[str, Tensor] = {}
    name = "llama.layers.0.p_adapter"
    for expert in range(2):
        tensors |= {f"{name}.down_proj_l.{expert}.weight": torch.randn(3, 16), f"{name}.down_proj_l.{expert}.bias": torch.randn(3)}
        tensors |= {f"{name}.up_proj_l.{expert}.weight": torch.randn(16, 3), f"{name}.up_proj_l.{expert}.bias": torch.randn(16)}
    tensors |= {f"{name}.router.weight": torch.randn(2, 16), f"{name}.router.bias": torch.randn(2)}
    params = _MOE | {"expert_num": 2, "lora_layers": "0-0", "p_adapter_layers": "0-1", "p_adapter_hydra": False}
    adapter = _load(tmp_path, params, tensors)
    assert adapter.manifest.variant == "composition"
    assert torch.equal(adapter.tensors["layers.0.P_ADAPTER.1.down.weight"], tensors[f"{name}.down_proj_l.1.weight"])
    alone = _load(tmp_path, params | {"expert_num": 1}, {key.replace("_l.0", ""): t for key, t in tensors.items() if "_l.0" in key})
    assert alone.manifest.variant == "parallel_adapter"


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("w_bias", _SOFT | {"w_bias": True}),
        ("p_adapter_hydra", _SOFT | {"expert_num": 2, "p_adapter_layers": "0-2", "p_adapter_hydra": False}),
        ("prompt_layers", _TOP_K | {"prompt_layers": "0-1"}),
        ("p_adapter_layers", _TOP_K | {"p_adapter_layers": "0-1"}),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path, field: str, params: dict[str, Any]) -> None:
    """Loading the rest and leaving this out would be another adapter."""
    with pytest.raises(AdapterUnsupported, match=field) as caught:
        _load(tmp_path, params, {})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("lora_layers", {"lora_layers": "0-3"}),
        ("lora_layers", {"lora_layers": "2-1"}),
        ("lora_layers", {"lora_layers": "0-2000000000"}),
        ("lora_layers", {"lora_layers": "-1-2"}),
        ("lora_layers", {"lora_layers": "0-1,"}),
        ("lora_layers", {"lora_layers": "0-0"}),
        ("prompt_layers", {"prompt_layers": "all"}),
        ("lora_rank", {"lora_rank": 0}),
        ("lora_rank", {"lora_rank": 513}),
        ("lora_rank", {"lora_rank": "8"}),
        ("lora_alpha", {"lora_alpha": 1e4}),
        ("expert_num", {"expert_num": 65}),
        ("expert_num", {"expert_num": 0}),
        ("swi_x", {"swi_x": -1}),
        ("swi_x", {"swi_x": 10**9}),
        ("lora_targets", {"lora_targets": "q_proj"}),
        ("p_adapter_size", {"p_adapter_layers": "0-2", "p_adapter_size": 10**9}),
        ("prompt_len", {"prompt_layers": "0-2", "prompt_len": 10**9}),
        ("surprise", {"surprise": 1}),
    ],
)
def test_numbers_are_judged_before_anything_is_built(tmp_path: Path, field: str, change: dict[str, Any]) -> None:
    """ "0-2000000000" through `range` is the machine's memory."""
    with pytest.raises(AdapterConfigInvalid) as caught:
        _load(tmp_path, _SOFT | change, _soft_tensors())
    assert caught.value.param == field


def test_all_wrong_fields_are_told_at_once(tmp_path: Path) -> None:
    """One finding for each try would cost an afternoon."""
    with pytest.raises(AdapterConfigInvalid) as caught:
        _load(tmp_path, _SOFT | {"lora_rank": 0, "lora_alpha": 1e5, "lora_layers": "0-2", "swi_x": -1}, {})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["lora_rank", "lora_alpha", "swi_x"]


@pytest.mark.parametrize("variant", ["sparse_moa", "unipeft", "lora", "nonsense"])
def test_a_variant_that_the_files_are_not_is_refused(tmp_path: Path, variant: str) -> None:
    """An override that is quietly ignored would serve what was not asked for."""
    with pytest.raises(AdapterConfigInvalid) as caught:
        _load(tmp_path, _SOFT, _soft_tensors(), variant)
    assert caught.value.param == "variant"


def test_a_file_far_above_the_expected_size_is_not_read(tmp_path: Path) -> None:
    """The JSON says how much there can be: 40 MB of anything else is not this adapter."""
    with pytest.raises(AdapterTooLarge):
        _load(tmp_path, _SOFT, _soft_tensors() | {"big": torch.zeros(10 * 2**20)})


def test_the_line_is_for_llama_only(tmp_path: Path) -> None:
    """Its scripts have no other base, and a fitting shape proves nothing."""
    _load(tmp_path, _SOFT, _soft_tensors())
    with pytest.raises(AdapterMismatch, match="qwen3"):
        read_adapter(AdapterSource(tmp_path), tiny_config(architecture="qwen3", qk_norm=True))

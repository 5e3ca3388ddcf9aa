"""A config.json becomes a ModelConfig, or a refusal that names the field."""

from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from moa_serve.config import ModelConfig, RopeConfig
from moa_serve.errors import ModelUnsupported

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def test_absent_fields_take_the_values_that_transformers_gives_them() -> None:
    """Old configs name neither kv heads nor a head size; a wrong default would load and compute nonsense."""
    raw = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    config, reference = ModelConfig.from_hf(raw), LlamaConfig(**raw)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 16, reference.rms_norm_eps)
    assert (config.q_size, config.kv_size) == (64, 64)
    assert (config.tie_word_embeddings, config.rope) == (False, RopeConfig(10000.0))


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        (LlamaConfig, ("llama", False, False, False)),
        (MistralConfig, ("mistral", False, False, False)),
        (Qwen2Config, ("qwen2", True, False, False)),
        (Qwen3Config, ("qwen3", False, False, True)),
    ],
)
def test_architectures_differ_in_biases_and_norms(kind: Any, facts: tuple[str, bool, bool, bool]) -> None:
    """Qwen2's biases are in no field of its config: they follow from its name."""
    sizes = {key: value for key, value in LLAMA.items() if key != "architectures"}
    raw = {**kind(**sizes).to_dict(), "architectures": [kind.__name__.replace("Config", "ForCausalLM")]}
    config = ModelConfig.from_hf(raw)
    assert (config.architecture, config.qkv_bias, config.o_bias, config.qk_norm) == facts


def test_biases_come_from_the_config() -> None:
    config = ModelConfig.from_hf({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


@pytest.mark.parametrize("kind_key", ["rope_type", "type"])
def test_both_spellings_of_rope_are_one(kind_key: str) -> None:
    """transformers 5 moved theta into rope_parameters; losing the scaling costs accuracy silently."""
    old = ModelConfig.from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": {kind_key: "llama3", **SCALING}})
    new = ModelConfig.from_hf({**LLAMA, "rope_parameters": {kind_key: "llama3", "rope_theta": 5e5, **SCALING}})
    assert old.rope == new.rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)


def test_linear_scaling_and_none() -> None:
    assert ModelConfig.from_hf({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}).rope == RopeConfig(1e4, "linear", 2.0)
    assert ModelConfig.from_hf({**LLAMA, "rope_scaling": None, "rope_theta": 1e5}).rope == RopeConfig(1e5)


def test_a_sliding_window_limits_the_context_where_it_is_used() -> None:
    """Inside the window full attention is the same; beyond it the model was trained on something else."""
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 32}
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "use_sliding_window": False}
    assert ModelConfig.from_hf(mistral).max_position == 32
    assert ModelConfig.from_hf(qwen).max_position == 256


def test_end_of_sequence_may_be_one_several_or_none() -> None:
    for given, ids in ((2, (2,)), ([2, 5], (2, 5)), (None, ()), (0, (0,))):
        assert ModelConfig.from_hf({**LLAMA, "eos_token_id": given}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_local_experts": 8}, "num_experts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": 1.5}, "bos_token_id"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": "all"}, "sliding_window"),
    ],
)
def test_what_is_not_served_names_its_field(change: dict[str, Any], field: str) -> None:
    """A base that loads and computes something else is worse than one that does not load."""
    with pytest.raises(ModelUnsupported, match=field):
        ModelConfig.from_hf({**LLAMA, **change})

"""What a base model is: its shape and the few facts that its forward needs, read from a Hugging Face `config.json`.

Not for weights (model/weights.py) and not for settings of the server. Immutable, shared by every layer above.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moa_serve.errors import ModelUnsupported

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Shape(Protocol):
    """What a base and the manifest of an adapter for it have in common."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def linear_shape(base: Shape, target: str) -> tuple[int, int]:
    """(out, in) of the base linear `target`: Q K V O UP GATE DOWN."""
    hidden, inner = base.hidden_size, base.intermediate_size
    query, key = base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    shapes = {
        "Q": (query, hidden),
        "K": (key, hidden),
        "V": (key, hidden),
        "O": (hidden, query),
        "UP": (inner, hidden),
        "GATE": (inner, hidden),
        "DOWN": (hidden, inner),
    }
    return shapes[target]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: `kind` is default, linear or llama3 (Llama-3.1's scaling by wavelength)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of one base. `max_position` is the longest context that the weights were made for, in tokens."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # of the checkpoint, not of the computation

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read the fields of a `config.json`.

        Raises:
            ModelUnsupported: names the field that is the reason; nothing is guessed.
        """
        architecture = _architecture(raw)
        hidden, heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
        kv_heads = _positive(raw, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelUnsupported(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}", param="num_key_value_heads"
            )
        if raw.get("head_dim") is None and hidden % heads:
            raise ModelUnsupported(f"config.json: hidden_size {hidden} / num_attention_heads {heads} is not whole and head_dim is missing")
        head_dim = _positive(raw, "head_dim", hidden // heads)
        if head_dim % 2:
            raise ModelUnsupported(f"config.json: head_dim {head_dim} is odd; rotary embeddings need pairs", param="head_dim")
        _refuse_unserved(raw)
        max_position = _positive(raw, "max_position_embeddings", 2048)
        window = raw.get("sliding_window")
        if window is not None and raw.get("use_sliding_window", architecture == "mistral"):
            max_position = min(max_position, _positive(raw, "sliding_window"))  # inside the window full attention is the same thing
        attention_bias = bool(raw.get("attention_bias", False))
        return cls(
            architecture=architecture,
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=_positive(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_positive(raw, "vocab_size"),
            max_position=max_position,
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope=_rope(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "qwen2" or attention_bias,
            o_bias=architecture != "qwen2" and attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=architecture == "qwen3",
            bos_token_id=next(iter(token_ids(raw.get("bos_token_id"), "bos_token_id")), None),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        )


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    known = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if known:
        return known[0]
    if not names and raw.get("model_type") in ARCHITECTURES.values():
        return str(raw["model_type"])
    raise ModelUnsupported(
        f"config.json: architectures {names or raw.get('model_type')!r} is not served; served are {', '.join(ARCHITECTURES)}",
        param="architectures",
    )


def _refuse_unserved(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelUnsupported(f"config.json: hidden_act {activation!r} is not served; only 'silu' is", param="hidden_act")
    if raw.get("quantization_config"):
        raise ModelUnsupported(
            "config.json: quantization_config is not served; use the unquantised weights or a GGUF file", param="quantization_config"
        )
    if raw.get("num_experts") or raw.get("num_local_experts"):
        raise ModelUnsupported("config.json: num_experts: a mixture-of-experts base is not served", param="num_experts")


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """`rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (transformers 5)."""
    spec = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(spec, Mapping):
        raise ModelUnsupported(f"config.json: rope_scaling is {spec!r}, but must be an object", param="rope_scaling")
    if _number(spec if spec.get("partial_rotary_factor") else raw, "partial_rotary_factor", 1.0) != 1.0:
        raise ModelUnsupported("config.json: partial_rotary_factor other than 1 is not served", param="partial_rotary_factor")
    theta = _number(spec if spec.get("rope_theta") else raw, "rope_theta", 10000.0)
    kind = str(spec.get("rope_type") or spec.get("type") or "default")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, factor=_number(spec, "factor"))
    if kind == "llama3":
        factor, low, high, original = (_number(spec, key) for key in _LLAMA3_KEYS)
        return RopeConfig(theta, kind, factor, low, high, int(original))
    raise ModelUnsupported(
        f"config.json: rope_scaling type {kind!r} is not served; served are default, linear and llama3", param="rope_scaling"
    )


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelUnsupported(f"config.json: {key} is {value!r}, but must be a positive whole number", param=key)
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ModelUnsupported(f"config.json: {key} is {value!r}, but must be a positive number", param=key)
    return float(value)


def token_ids(value: Any, key: str = "eos_token_id") -> tuple[int, ...]:
    """A token id, a list of them or nothing, as configs write it."""
    items = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
        raise ModelUnsupported(f"config.json: {key} is {value!r}, but must be a token id or a list of them", param=key)
    return tuple(items)

"""A GGUF file as a Hugging Face folder: metadata becomes `config.json`, tensors are dequantised one by one, the tokenizer is rebuilt.

Converted once into the cache, so that there is one way to load, whatever the source. llama.cpp keeps the rows of Q and K of LLaMA
in interleaved order (its RoPE turns neighbours); they are put back into the half-split order that the forward here expects.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from moa_serve.config import ModelConfig
from moa_serve.errors import ModelCorrupt, ModelUnsupported
from moa_serve.model.cache import CONVERSION, build_once, file_sha256
from moa_serve.model.gguf_tokenizer import build_tokenizer, tokenizer_config
from moa_serve.model.safetensors_file import write_safetensors
from moa_serve.model.weights import first, misfits

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # Mistral calls itself llama
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_UNSERVED = ("expert_count", "logit_scale", "embedding_scale", "residual_scale", "attention.scale", "attention.clamp_kqv")
_STORED = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}  # what is quantised becomes bfloat16: finer than any of the quantisations


def converted(path: Path, console: Console) -> Path:
    """The cached folder of the GGUF file `path`, by its content."""
    name = f"{path.stem}-{file_sha256(path)[:12]}-v{CONVERSION}"
    return build_once(name, lambda folder: convert(path, folder, console))


def convert(path: Path, folder: Path, console: Console) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files into the empty `folder`.

    Raises:
        ModelCorrupt: not a whole GGUF file, or its tensors do not fit its metadata.
        ModelUnsupported: names the metadata key or the tensor that is the reason.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise ModelCorrupt(f"{path}: cannot be read as GGUF ({error}); fetch it again") from None
    metadata = _Metadata(path, reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    raw = _config(metadata, tensors)
    config = ModelConfig.from_hf(raw)
    names = {name: target for name in tensors if (target := _target(name)) is not None}
    strangers = [name for name in tensors if name not in names and name != _ROPE_FACTORS]
    problems = misfits(config, {names[name]: _shape(tensors[name]) for name in names}) + [f"{name} is left over" for name in strangers]
    if problems:
        raise ModelCorrupt(f"{path}: its tensors do not fit its metadata: {first(problems)}", problems=problems)
    _write_json(folder / "config.json", raw)
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw[key] is not None}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    if metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab"):
        build_tokenizer(metadata.get, path).save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", tokenizer_config(metadata.get))

    entries = {names[name]: (_STORED.get(tensors[name].tensor_type, torch.bfloat16), _shape(tensors[name])) for name in names}
    total = sum(math.prod(shape) for _, shape in entries.values())
    with progress(console, f"Converting {path.name}", total) as advance:

        def dequantised() -> Iterator[tuple[str, Tensor]]:
            done = 0
            for name in names:
                yield names[name], _dequantise(path, tensors[name], config, metadata.architecture)
                done += math.prod(_shape(tensors[name]))
                advance(done)

        write_safetensors(folder / "model.safetensors", entries, dequantised())


@contextmanager
def progress(console: Console, text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes how much is done, and draws a bar; one line where nobody watches."""
    if not console.is_terminal:
        console.print(text, highlight=False)
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


class _Metadata:
    """The key-value part; values are decoded when asked for, as the token lists are long."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self.path, self._fields = path, reader.fields
        self.architecture = str(self.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise ModelUnsupported(
                f"{path}: general.architecture {self.architecture!r} is not served; served are {', '.join(_ARCHITECTURES)}",
                param="general.architecture",
            )
        if int(self.get("split.count") or 1) > 1:
            raise ModelUnsupported(
                f"{path}: split.count: the model is in several files; merge them with llama-gguf-split", param="split.count"
            )

    def get(self, key: str) -> Any:
        field = self._fields.get(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError:
            raise ModelCorrupt(f"{self.path}: metadata {key} is not UTF-8; fetch the file again", param=key) from None

    def own(self, key: str) -> Any:
        """A key of the architecture's own, or None."""
        return self.get(f"{self.architecture}.{key}")

    def need(self, key: str) -> Any:
        value = self.own(key)
        if value is None:
            raise ModelCorrupt(f"{self.path}: metadata {self.architecture}.{key} is missing", param=f"{self.architecture}.{key}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; without a default the key is needed."""
        value = self.need(key) if default is None else self.own(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or value <= 0:
            key = f"{self.architecture}.{key}"
            raise ModelUnsupported(f"{self.path}: {key} is {value!r}, but must be one positive whole number", param=key)
        return value


def _config(metadata: _Metadata, tensors: dict[str, Any]) -> dict[str, Any]:
    for key in _UNSERVED:
        if metadata.own(key):
            key = f"{metadata.architecture}.{key}"
            raise ModelUnsupported(f"{metadata.path}: {key} {metadata.get(key)} is not served", param=key)
    heads, hidden = metadata.size("attention.head_count"), metadata.size("embedding_length")
    head_dim = metadata.size("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.size(key, head_dim) != head_dim:
            raise ModelUnsupported(f"{metadata.path}: {key} {metadata.own(key)} is not the head size {head_dim}", param=key)
    context = metadata.size("context_length")
    matrix = tensors.get("blk.0.attn_q.weight")
    return {
        "architectures": [_ARCHITECTURES[metadata.architecture]],
        "model_type": metadata.architecture,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.size("feed_forward_length"),
        "num_hidden_layers": metadata.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": _shape(tensors["token_embd.weight"])[0] if "token_embd.weight" in tensors else 0,
        "max_position_embeddings": min(context, metadata.size("attention.sliding_window", context)),
        "rms_norm_eps": _shortest(metadata.need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(metadata, tensors.get(_ROPE_FACTORS), head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": metadata.architecture != "qwen2" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "dtype": str(_STORED.get(matrix.tensor_type if matrix else None, torch.bfloat16)).removeprefix("torch."),
    }


def _rope(metadata: _Metadata, factors: Any, head_dim: int) -> dict[str, Any]:
    theta = _shortest(metadata.own("rope.freq_base") or 10000.0)
    kind = metadata.own("rope.scaling.type") or "none"
    if factors is not None:
        return _llama3(metadata.path, np.asarray(factors.data, dtype=np.float32), theta, head_dim)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _shortest(metadata.need("rope.scaling.factor"))}
    raise ModelUnsupported(
        f"{metadata.path}: rope.scaling.type {kind!r} is not served; served are none and linear", param="rope.scaling.type"
    )


def _llama3(path: Path, factors: np.ndarray[Any, Any], theta: float, head_dim: int) -> dict[str, Any]:
    """GGUF keeps what Llama-3.1's scaling divides each frequency by, not its parameters: they are recognised and checked.

    Every released Llama 3.1 to 3.3 has low 1, high 4 and 8192 original positions; the factor (8 or 32) is the greatest divisor.
    """
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    if factors.shape != smooth.shape or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise ModelUnsupported(f"{path}: {_ROPE_FACTORS} is not Llama 3.1's scaling, the only one served", param=_ROPE_FACTORS)
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _target(name: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _BLOCK:
        return None
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts the fastest dimension first


def _dequantise(path: Path, tensor: Any, config: ModelConfig, architecture: str) -> Tensor:
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ModelUnsupported(f"{path}: tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be dequantised here") from None
    result = torch.from_numpy(np.array(values, dtype=np.float32)).view(_shape(tensor))
    if architecture == "llama" and (match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)):
        heads = config.num_heads if match[1] == "q" else config.num_kv_heads
        pairs = result.view(heads, config.head_dim // 2, 2, -1)  # rows 2j and 2j + 1 turn together ...
        result = pairs.transpose(1, 2).reshape(result.shape)  # ... and become rows j and j + P/2
    return result


def _shortest(value: Any) -> float:
    """A float32 of the metadata as the decimal that it was written as: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

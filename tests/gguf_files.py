"""Small GGUF files, written with the format's own library as llama.cpp's converter lays them out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
ALPHABET = [chr(byte) for byte in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]  # GPT-2's
TOKENS = ["<|end|>", "<|user|>", *ALPHABET, "Ġt", "he", "Ġthe", "Ð°"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ð °"]


def byte_level(pre: str, **more: Any) -> dict[str, Any]:
    """The metadata of a tiny byte-level tokenizer with two control tokens."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        **more,
    }


def write_gguf(
    path: Path,
    model: Any,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    tokenizer: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    change: dict[str, Any] | None = None,
) -> Path:
    """Write a transformers model. Matrices are stored as `kind`, vectors as F32; Q and K of LLaMA interleaved, as llama.cpp has them.

    Args:
        tokenizer: metadata of a tokenizer.
        extra: tensors beside the model's, by their GGUF names.
        change: metadata to overwrite, by the key without its architecture; None leaves one out.
    """
    config = model.config
    architecture = {"llama": "llama", "mistral": "llama"}.get(config.model_type, config.model_type)
    metadata: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": config.head_dim,
        **(change or {}),
    }
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is not None:
            _add(writer, f"{architecture}.{key}", value)
    for key, value in (tokenizer or {}).items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), config.num_hidden_layers
    )
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name, tensor in state.items():
        values = _interleaved(name, tensor, config).numpy() if architecture == "llama" else tensor.numpy()
        stored = kind if values.ndim > 1 else GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(values), stored)
        given = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert given is not None, name
        writer.add_tensor(given, data, raw_dtype=stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _interleaved(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Rows j and j + P/2 of a head become neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    order = [
        head * config.head_dim + half * config.head_dim // 2 + j
        for head in range(heads)
        for j in range(config.head_dim // 2)
        for half in (0, 1)
    ]
    return tensor[order]

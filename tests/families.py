"""Tiny bases and one manifest for each family of adapters, with random weights: what the golden folders do not cover is covered here."""

import copy
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import FORMAT, BaseShape, Manifest
from moa_serve.config import ModelConfig

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": None,
}
LAYERS = list(range(TINY["num_hidden_layers"]))


def base_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights by their Hugging Face names, for a LLaMA config without biases."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query, key = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]

    def normal(*shape: int) -> Tensor:
        out: Tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return out

    tensors = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator),
        "model.norm.weight": 1 + normal(hidden),
    }
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = 1 + normal(hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = 1 + normal(hidden)
        for name, shape in (("q", (query, hidden)), ("k", (key, hidden)), ("v", (key, hidden)), ("o", (hidden, query))):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = normal(*shape)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            tensors[f"{prefix}.mlp.{name}_proj.weight"] = normal(*shape)
    return tensors


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: ids 1 and 2 are `<s>` and `</s>`, 3 to 258 the bytes. Needs a vocabulary of 259."""
    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))


def write_base(folder: Path, config: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """A loadable base folder without a tokenizer."""
    config = config or TINY
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(base_tensors(config, seed), folder / "model.safetensors")
    return folder


def lora(name: str, *, rank: int = 4, layers: list[int] | None = None, **more: Any) -> dict[str, Any]:
    target = name.split("/")[0]
    return {"name": name, "kind": "lora", "target": target, "layers": layers or LAYERS, "rank": rank, "alpha": 6.0, **more}


def prompt(**more: Any) -> dict[str, Any]:
    return {"name": "PROMPT", "kind": "prompt", "layers": LAYERS, "length": 3, **more}


def parallel(**more: Any) -> dict[str, Any]:
    return {"name": "P_ADAPTER", "kind": "parallel_adapter", "layers": LAYERS, "size": 5, **more}


LINEAR = {"site": "linear", "input": "linear", "activation": "softmax"}
ALL_LORA = [lora(target) for target in ("Q", "K", "V", "O", "UP", "GATE", "DOWN")]
EVERYTHING = [*ALL_LORA, prompt(), parallel()]


def four(target: str, **more: Any) -> list[dict[str, Any]]:
    return [lora(f"{target}/{index}", **more) for index in range(4)]


def layer_router(**more: Any) -> dict[str, Any]:
    return {"site": "layer", "input": "residual", **more}


THRESHOLD_FN = {"kind": "threshold_fn", "max_threshold": 0.9}
TWO, THREE = ({"variant": "molora", "num_experts": count} for count in (2, 3))
TWO_HYDRA = {"variant": "hydralora", "num_experts": 2}
BIAS = {"bias": True}  # the routers inside a prompt or a parallel adapter have one in the authors' files

FAMILIES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "soft": ("soft_moa", layer_router(net="swiglu", hidden=36), EVERYTHING),
    "soft_softmax": ("soft_moa", layer_router(activation="softmax", input="normed"), EVERYTHING),
    "sparse_fn": ("sparse_moa", layer_router(select=THRESHOLD_FN), EVERYTHING),
    "sparse_const": (
        "sparse_moa",
        layer_router(input="normed", net="swiglu", hidden=[8, 16, 24], select={"kind": "constant", "threshold": 0.5}),
        EVERYTHING,
    ),
    "instance": ("soft_moa_instance", layer_router(input="pooled"), EVERYTHING),
    "unipeft": (
        "unipeft",
        layer_router(input="pooled"),
        [lora(target, column=0) for target in ("Q", "V", "DOWN")] + [prompt(column=1), parallel(column=1)],
    ),
    "molora": ("molora", {**LINEAR, "bias": False}, four("Q") + four("V") + four("DOWN")),
    "hydralora": ("hydralora", {**LINEAR, "bias": False}, four("K") + four("O") + four("UP")),
    "mola_layerwise": (
        "mola",
        {**LINEAR, "select": {"kind": "top_k", "k": 2}, "finalise": "renormalise"},
        [lora(f"{t}/{i}", layers=[x for x in LAYERS if i < 2 + x], rank=2 + i) for t in ("Q", "GATE", "DOWN") for i in range(4)],
    ),
    "adamole": (
        "adamole",
        {**LINEAR, "select": {"kind": "adamole"}, "finalise": "subtract_renormalise"},
        four("Q") + four("GATE") + four("O"),
    ),
    "lora": ("lora", {"site": "none"}, [lora("Q", layers=[0]), lora("Q", layers=[2], rank=8), lora("V"), lora("DOWN")]),
    "prompt": ("prompt", {"site": "none"}, [prompt()]),
    "parallel_adapter": ("parallel_adapter", {"site": "none"}, [parallel()]),
    "composition": ("composition", {"site": "none"}, EVERYTHING),
    "nested_molora": (
        "soft_moa",
        layer_router(net="swiglu", hidden=20),
        [lora(t, inner=THREE) for t in ("Q", "V", "O", "DOWN")] + [parallel(inner=THREE | BIAS)],
    ),
    "nested_hydra": (
        "sparse_moa",
        layer_router(select=THRESHOLD_FN),
        [lora(t, inner=TWO_HYDRA) for t in ("K", "UP", "DOWN")] + [prompt(inner=TWO | BIAS), parallel(inner=TWO_HYDRA | BIAS)],
    ),
    "composition_nested": (
        "composition",
        {"site": "none"},
        [lora("Q", inner=TWO), prompt(inner=TWO | BIAS), parallel(inner=TWO | BIAS)],
    ),
    "partial": (
        "sparse_moa",
        layer_router(select={"kind": "constant", "threshold": 0.4}),
        [lora("Q", layers=[0]), lora("DOWN", layers=[0, 2]), prompt(layers=[2])],
    ),
}


def raw_manifest(family: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """To be changed at will: nobody else has it."""
    variant, router, experts = copy.deepcopy(FAMILIES[family])
    base = BaseShape.of(ModelConfig.from_hf(config or TINY)).model_dump(exclude_none=True)
    return {"format": FORMAT, "base": base, "variant": variant, "router": router, "experts": experts}


def write_family(folder: Path, family: str, seed: int = 1, config: dict[str, Any] | None = None) -> Path:
    """A random adapter as a folder of our own format."""
    write_adapter(folder, *random_adapter(family, seed, config))
    return folder


def random_adapter(family: str, seed: int = 1, config: dict[str, Any] | None = None) -> tuple[Manifest, dict[str, Tensor]]:
    """A manifest and weights large enough that every wrong rule shows in the logits."""
    manifest = Manifest.parse(raw_manifest(family, config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in manifest.expected_tensors().items():
        scale = 0.7 if name.endswith(("bias", "gate", "rows")) else shape[-1] ** -0.5
        tensors[name] = torch.randn(shape, generator=generator) * scale
    return manifest, tensors


def write_overflowing(folder: Path, config: dict[str, Any], *, token: int) -> None:
    """An adapter of finite weights that overflows after one token only: its A sees what no other token's embedding has."""
    tensors = base_tensors(config)
    embed = tensors["model.embed_tokens.weight"].double()
    normed = embed / embed.square().mean(-1, keepdim=True).sqrt() * tensors["model.layers.0.input_layernorm.weight"].double()
    others = torch.cat([normed[:token], normed[token + 1 :]])
    own = normed[token] - others.T @ torch.linalg.lstsq(others.T, normed[token]).solution
    manifest = Manifest.parse(raw_manifest("lora", config) | {"experts": [lora("Q", layers=[0])]})
    a, b = ((name, shape) for name, shape in manifest.expected_tensors().items())
    write_adapter(folder, manifest, {a[0]: own.float().expand(a[1]).clone(), b[0]: torch.full(b[1], 3e38)})

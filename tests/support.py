"""Made-up bases and adapters for tests: shapes as the code wants them, numbers from a seed.

Nothing here is a fixture and nothing reads files, so any test (and any script beside the tests) can call it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moa_serve.adapter.manifest import FORMAT, BaseShape, Manifest
from moa_serve.config import ModelConfig, RopeConfig

PAPER_TARGETS = ("Q", "K", "V", "O", "DOWN")


def tiny_config(**changes: Any) -> ModelConfig:
    """A LLaMA base of 2 layers and width 16; any field of ModelConfig can be changed."""
    fields: dict[str, Any] = {
        "architecture": "llama", "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 8, "vocab_size": 32, "max_position": 128, "rms_norm_eps": 1e-5, "rope": RopeConfig(10000.0),
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def llama_8b_config() -> ModelConfig:
    """The shape of LLaMA-3.1-8B, for counting parameters."""
    return tiny_config(
        hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128256
    )


def tiny_manifest(
    config: ModelConfig,
    variant: str,
    *,
    targets: Sequence[str] = PAPER_TARGETS,
    rank: int = 4,
    alpha: float = 8,
    num_experts: int = 3,
    prompt_length: int = 0,
    parallel_size: int = 0,
    inner: str | None = None,
    layers: Sequence[int] | None = None,
    router: dict[str, Any] | None = None,
) -> Manifest:
    """A manifest of any variant, with LoRA experts on `targets` and, where a length or size is given, a prompt or parallel adapter.

    Args:
        num_experts: at each linear (per-linear variants) or inside each expert (`inner`).
        router: fields that replace the variant's usual ones, `select` and `finalise` included.
    """
    where = list(range(config.num_layers) if layers is None else layers)
    per_linear = variant in ("molora", "hydralora", "mola", "adamole")
    lora = {"kind": "lora", "layers": where, "rank": rank, "alpha": alpha}
    names = [(f"{target}/{e}", target) for target in targets for e in range(num_experts)] if per_linear else [(t, t) for t in targets]
    experts: list[dict[str, Any]] = [{"name": name, "target": target, **lora} for name, target in names]
    if prompt_length:
        experts.append({"name": "PROMPT", "kind": "prompt", "layers": where, "length": prompt_length})
    if parallel_size:
        experts.append({"name": "P_ADAPTER", "kind": "parallel_adapter", "layers": where, "size": parallel_size})
    for expert in experts:
        if inner:
            expert["inner"] = {"variant": inner, "num_experts": num_experts, "bias": expert["kind"] != "lora"}
        if variant == "unipeft":
            expert["column"] = 0 if expert["kind"] == "lora" else 1
    base = BaseShape.of(config).model_dump()
    raw = {"format": FORMAT, "base": base, "variant": variant, "router": _router(variant) | (router or {}), "experts": experts}
    return Manifest.parse(raw)


def _router(variant: str) -> dict[str, Any]:
    linear: dict[str, Any] = {"site": "linear", "input": "linear", "activation": "softmax"}
    routers: dict[str, dict[str, Any]] = {
        "soft_moa": {"site": "layer", "input": "residual"},
        "sparse_moa": {"site": "layer", "input": "residual", "select": {"kind": "threshold_fn", "max_threshold": 0.5}},
        "soft_moa_instance": {"site": "layer", "input": "pooled"},
        "unipeft": {"site": "layer", "input": "pooled"},
        "molora": linear | {"bias": False},
        "hydralora": linear | {"bias": False},
        "mola": linear | {"select": {"kind": "top_k", "k": 2}, "finalise": "renormalise"},
        "adamole": linear | {"select": {"kind": "adamole"}, "finalise": "subtract_renormalise"},
    }
    return routers.get(variant, {"site": "none"})


def random_tensors(manifest: Manifest, seed: int = 0, scale: float = 0.1) -> dict[str, Tensor]:
    """Float32 tensors for every name of the manifest, normally distributed with standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in manifest.expected_tensors().items()}

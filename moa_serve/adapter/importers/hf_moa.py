"""Importer for the authors' Hugging Face line: `adapter_config.json` (SOFTMOA) with `adapter_model.safetensors` or `.bin`.

The JSON's rank, alpha, targets and type are not what the authors' code uses: it has them as constants. So everything is taken from
the tensors (the full account is in docs/adapter-format.md), and the constants are below. The router reads the normed input.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor

from moa_serve.adapter.checkpoint import check_tensors, match_tensors, read_json
from moa_serve.adapter.importers.build import (
    Imported,
    ReadOptions,
    build_manifest,
    flatten_gates,
    hidden_widths,
    read_weights,
    refuse_fields,
    refuse_variant,
)
from moa_serve.config import ModelConfig
from moa_serve.errors import AdapterMismatch

CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PEFT_TYPES = ("SOFTMOA", "SPARSEMOA")
MAX_THRESHOLD = 0.5  # a constant of the authors' modeling files; a LoRA's alpha there equals its rank, so its scale is 1
_MODULES = {"Q": "self_attn.lora_Q", "K": "self_attn.lora_K", "V": "self_attn.lora_V", "O": "self_attn.lora_O", "DOWN": "mlp.lora_down"}
_READ = frozenset({"peft_type", "lora_rank"})
_IGNORED = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout", "revision",
        "target_modules", "task_type",
    }
)  # fmt: skip
_LAYER = re.compile(r"base_model\.model\.model\.layers\.(0|[1-9][0-9]{0,3})\.(.+)")


def read(folder: Path, variant: str | None, config: ModelConfig, options: ReadOptions) -> Imported:
    """Raises: AdapterUnsupported, AdapterMismatch, AdapterConfigInvalid, and what the readers of checkpoint.py raise."""
    raw = read_json(folder / CONFIG_FILE)
    refuse_fields(raw, _READ | _IGNORED, CONFIG_FILE)
    if config.architecture not in ("llama", "qwen3"):
        raise AdapterMismatch(f"the authors' Hugging Face adapters are for llama and qwen3 bases, not {config.architecture}")
    tensors = read_weights(folder, SAFETENSORS_FILE, PICKLE_FILE, options)
    flatten_gates(tensors)
    layers = _by_layer(tensors, config.num_layers)
    is_sparse = any("adapter_threshold_fn.weight" in names for names in layers.values())
    kind = "sparse_moa" if is_sparse else "soft_moa"
    refuse_variant(variant, (kind,), CONFIG_FILE)
    router: dict[str, Any] = {"site": "layer", "input": "normed"}
    if any("adapter_type_router.w1.weight" in names for names in layers.values()):
        sources = {layer: _prefix(layer) + "adapter_type_router.w1.weight" for layer in layers}
        router |= {"net": "swiglu", "hidden": hidden_widths(tensors, sources, config.num_layers)}
    if is_sparse:
        router["select"] = {"kind": "threshold_fn", "max_threshold": MAX_THRESHOLD}
    experts = _experts(layers)
    manifest = build_manifest(config, kind, router, experts, CONFIG_FILE)
    match = match_tensors(manifest.expected_tensors(), tensors, _source)
    check_tensors(match.problems, match.leftover)
    return Imported(manifest, match.tensors, _warnings(raw, experts))


def _by_layer(tensors: dict[str, Tensor], num_layers: int) -> dict[int, dict[str, Tensor]]:
    """layer -> name below the layer -> tensor. Names of another form stay out, and are found as left over."""
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = _LAYER.fullmatch(name)
        if found and int(found[1]) < num_layers:
            layers[int(found[1])][found[2]] = tensor
    return dict(layers)


def _experts(layers: dict[int, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """One expert for each site and size, with the layers where it stands."""
    places: dict[tuple[str, int], list[int]] = defaultdict(list)
    for layer, names in sorted(layers.items()):
        sized = {site: f"{module}.lora_A.weight" for site, module in _MODULES.items()}
        sized |= {"PROMPT": "self_attn.prompt.weight", "P_ADAPTER": "p_adapter.down_proj.weight"}
        for site, name in sized.items():
            if name in names and names[name].ndim == 2:
                places[site, names[name].shape[0]].append(layer)
    return [_expert(site, size, where) for (site, size), where in places.items()]


def _expert(site: str, size: int, layers: list[int]) -> dict[str, Any]:
    if site == "PROMPT":
        return {"name": site, "kind": "prompt", "layers": layers, "length": size}
    if site == "P_ADAPTER":
        return {"name": site, "kind": "parallel_adapter", "layers": layers, "size": size}
    return {"name": site, "kind": "lora", "target": site, "layers": layers, "rank": size, "alpha": size}


def _prefix(layer: int | str) -> str:
    return f"base_model.model.model.layers.{layer}."


def _source(name: str) -> tuple[str, ...]:
    """Our name of a tensor -> theirs."""
    _, layer, site, rest = name.split(".", 3)
    if site == "router":
        rest = f"adapter_threshold_fn.{rest.removeprefix('threshold.')}" if rest.startswith("threshold.") else f"adapter_type_router.{rest}"
    elif site == "PROMPT":
        rest = {"rows": "self_attn.prompt.weight", "gate": "self_attn.prompt_gate"}[rest]
    elif site == "P_ADAPTER":
        linear, part = rest.split(".")
        rest = f"p_adapter.{linear}_proj.{part}"
    else:
        rest = f"{_MODULES[site]}.{rest}.weight"
    return (_prefix(layer) + rest,)


def _warnings(raw: dict[str, Any], experts: list[dict[str, Any]]) -> tuple[str, ...]:
    ranks = sorted({expert["rank"] for expert in experts if expert["kind"] == "lora"})
    if not ranks or [raw.get("lora_rank", ranks[0])] == ranks:
        return ()
    return (f"{CONFIG_FILE} says lora_rank {raw['lora_rank']}, the tensors have {ranks}: the tensors are right",)

"""Importer for PEFT LoRA folders: `adapter_config.json` (LORA) with `adapter_model.safetensors` or `.bin`.

Plain LoRA on the seven linears of a layer, with rank and alpha patterns and rslora. Whatever else PEFT can do is refused by name:
a field that we do not know refuses the folder unless it says nothing (null, false, empty).
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moa_serve.adapter.checkpoint import check_tensors, match_tensors, read_json
from moa_serve.adapter.importers.build import (
    Imported,
    ReadOptions,
    build_manifest,
    config_error,
    read_weights,
    refuse_fields,
    refuse_variant,
)
from moa_serve.adapter.manifest import MAX_ALPHA, MAX_LAYERS, MAX_RANK
from moa_serve.config import ModelConfig
from moa_serve.errors import AdapterUnsupported

CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_MODULES = {
    "Q": "self_attn.q_proj",
    "K": "self_attn.k_proj",
    "V": "self_attn.v_proj",
    "O": "self_attn.o_proj",
    "UP": "mlp.up_proj",
    "GATE": "mlp.gate_proj",
    "DOWN": "mlp.down_proj",
}
_READ = frozenset(
    {
        "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "layers_to_transform",
        "init_lora_weights",
    }
)  # fmt: skip
_IGNORED = frozenset(  # names, versions, and what mattered while training
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision", "megatron_core",
        "layers_pattern", "loftq_config", "eva_config", "qalora_group_size",
    }
)  # fmt: skip
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others (PiSSA, OLoRA, LoftQ, CorDA) change the base's weights
_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9_.]+")
_UNSERVED = (
    ("lora_embedding_", "LoRA on the embedding"),
    ("lora_magnitude_vector", "DoRA"),
    ("modules_to_save", "a trained copy of a base module"),
    ("embed_tokens", "LoRA on the embedding"),
    ("lm_head", "LoRA on the output layer"),
    (".lora_B.bias", "a LoRA bias"),
)


def read(folder: Path, variant: str | None, config: ModelConfig, options: ReadOptions) -> Imported:
    """Raises: AdapterUnsupported, AdapterMismatch, AdapterConfigInvalid, and what the readers of checkpoint.py raise."""
    raw: dict[str, Any] = read_json(folder / CONFIG_FILE)
    _refuse_unserved(raw)
    refuse_variant(variant, ("lora",), CONFIG_FILE)
    ranks, alphas = _sizes(raw, config)
    tensors = read_weights(folder, SAFETENSORS_FILE, PICKLE_FILE, options)
    unserved = [f"{name}: {what} is not served" for name in tensors for part, what in _UNSERVED if part in name]
    if unserved:
        raise AdapterUnsupported(f"{'; '.join(unserved[:5])}", problems=unserved)
    places: dict[tuple[str, int, float], list[int]] = defaultdict(list)
    for layer, target in _adapted(raw, tensors, config):
        rank, alpha = ranks[layer, target], alphas[layer, target]
        places[target, rank, alpha].append(layer)
    experts = [
        {"name": target, "kind": "lora", "target": target, "layers": layers, "rank": rank, "alpha": alpha}
        for (target, rank, alpha), layers in places.items()
    ]
    manifest = build_manifest(config, "lora", {"site": "none"}, experts, CONFIG_FILE)
    match = match_tensors(manifest.expected_tensors(), tensors, _source)
    check_tensors(match.problems, match.leftover)
    return Imported(manifest, match.tensors)


def _refuse_unserved(raw: Mapping[str, Any]) -> None:
    """Every field that makes the adapter something other than plain LoRA, all in one error."""
    problems: dict[str, str] = {}
    if raw.get("peft_type") != "LORA":
        problems["peft_type"] = f"{raw.get('peft_type')!r} is not served; LORA is"
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        problems["task_type"] = f"{raw['task_type']!r} is not served; CAUSAL_LM is"
    init = raw.get("init_lora_weights")
    if not any(init is plain or (isinstance(init, str) and init == plain) for plain in _PLAIN_INITS):
        problems["init_lora_weights"] = f"{init!r} changes the base's weights; convert the adapter to plain LoRA with PEFT"
    if problems:
        lines = [f"{field}: {problem}" for field, problem in problems.items()]
        raise AdapterUnsupported(f"{CONFIG_FILE}: {'; '.join(lines)}", param=next(iter(problems)), problems=lines)
    refuse_fields(raw, _READ | _IGNORED, CONFIG_FILE)


def _sizes(raw: Mapping[str, Any], config: ModelConfig) -> tuple[dict[tuple[int, str], int], dict[tuple[int, str], float]]:
    """Rank and alpha of every linear of the base, patterns applied; with rslora alpha is such that alpha / rank is the scale."""
    problems: dict[str, str] = {}

    def pattern(field: str) -> dict[str, Any]:
        value = raw.get(field) or {}
        if not isinstance(value, dict) or len(value) > MAX_LAYERS * len(_MODULES):
            problems[field] = "must be an object of module names and numbers"
            return {}
        for key in value:
            if not _PATTERN_KEY.fullmatch(key):  # PEFT takes regular expressions; one from a file could run for ever
                raise AdapterUnsupported(f"{CONFIG_FILE}: {field}: the regular expression {key!a} is not served", param=field)
        return value

    rank_pattern, alpha_pattern = pattern("rank_pattern"), pattern("alpha_pattern")
    if not isinstance(raw.get("use_rslora", False), bool):
        problems["use_rslora"] = "must be true or false"
    ranks: dict[tuple[int, str], int] = {}
    alphas: dict[tuple[int, str], float] = {}
    for layer in range(config.num_layers):
        for target, module in _MODULES.items():
            rank_field, rank = _matched(f"model.layers.{layer}.{module}", rank_pattern, "rank_pattern", raw.get("r"), "r")
            alpha_field, alpha = _matched(
                f"model.layers.{layer}.{module}", alpha_pattern, "alpha_pattern", raw.get("lora_alpha"), "lora_alpha"
            )
            if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
                problems[rank_field] = f"{rank!r} is not a whole number in 1..{MAX_RANK}"
                continue
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < MAX_ALPHA:
                problems[alpha_field] = f"{alpha!r} is not a number between -{MAX_ALPHA:g} and {MAX_ALPHA:g}"
                continue
            ranks[layer, target] = rank
            alphas[layer, target] = float(alpha) * math.sqrt(rank) if raw.get("use_rslora") else float(alpha)
    if problems:
        raise config_error(CONFIG_FILE, problems)
    return ranks, alphas


def _matched(module: str, patterns: Mapping[str, Any], field: str, default: Any, default_field: str) -> tuple[str, Any]:
    """As PEFT does: the first key that is the module's name or ends it at a dot counts; "^" ties it to the start."""
    for key, value in patterns.items():
        if module == key.removeprefix("^") or (not key.startswith("^") and module.endswith(f".{key}")):
            return field, value
    return default_field, default


def _adapted(raw: Mapping[str, Any], tensors: Mapping[str, Tensor], config: ModelConfig) -> list[tuple[int, str]]:
    """(layer, target) of every adapted linear: from target_modules where it is a list, else from the tensors' names."""
    everywhere = [(layer, target) for layer in range(config.num_layers) for target in _MODULES]
    named = raw.get("target_modules")
    if isinstance(named, str) and named != "all-linear":  # a regular expression: never run one from a file
        return [place for place in everywhere if f"{_prefix(*place)}.lora_A.weight" in tensors]
    layers = raw.get("layers_to_transform")
    chosen = [layers] if isinstance(layers, int) else layers
    if chosen is not None and (not isinstance(chosen, list) or not all(isinstance(layer, int) for layer in chosen)):
        raise config_error(CONFIG_FILE, {"layers_to_transform": "must be a layer or a list of layers"})
    outside = [layer for layer in chosen or () if not 0 <= layer < config.num_layers]
    if outside:
        raise config_error(CONFIG_FILE, {"layers_to_transform": f"{outside[0]} is not one of the {config.num_layers} layers of the base"})
    modules = {place: f"model.layers.{place[0]}.{_MODULES[place[1]]}" for place in everywhere}
    endings = list(_MODULES.values()) if named == "all-linear" else named
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        raise config_error(CONFIG_FILE, {"target_modules": "must be a list of module names, a regular expression or 'all-linear'"})
    strange = [ending for ending in endings if not any(_ends(module, ending) for module in modules.values())]
    if strange:
        raise AdapterUnsupported(f"{CONFIG_FILE}: target_modules: LoRA on {strange[0]!a} is not served", param="target_modules")
    return [
        place
        for place, module in modules.items()
        if (chosen is None or place[0] in chosen) and any(_ends(module, ending) for ending in endings)
    ]


def _ends(module: str, ending: str) -> bool:
    return module == ending or module.endswith(f".{ending}")


def _prefix(layer: int | str, target: str) -> str:
    return f"base_model.model.model.layers.{layer}.{_MODULES[target]}"


def _source(name: str) -> tuple[str, ...]:
    """Our name of a tensor -> PEFT's."""
    _, layer, target, factor = name.split(".")
    return (f"{_prefix(layer, target)}.{factor}.weight",)

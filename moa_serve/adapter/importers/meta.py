"""Importer for the authors' Meta line: `adapter_params.json` with `adapter.pth` (or the same tensors as `adapter.safetensors`).

Six research scripts write these two files, each with its own fields: which variant it is follows from the fields, then from the
tensors. Three things are not in the files and are known from the code that wrote them: the router reads the raw residual, base
and adapter use interleaved rotary pairs (ours are half-split, so the rows of lora_B of Q and K move), and UniPEFT weighs its
parallel adapter with the prompt's gate. The full account is in docs/adapter-format.md.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from moa_serve.adapter.checkpoint import check_tensors, match_tensors, read_json
from moa_serve.adapter.importers.build import (
    Imported,
    ReadOptions,
    build_manifest,
    config_error,
    flatten_gates,
    hidden_widths,
    read_weights,
    refuse_variant,
)
from moa_serve.adapter.manifest import MAX_ALPHA, MAX_EXPERTS, MAX_RANK, MAX_WIDTH, Manifest
from moa_serve.config import ModelConfig
from moa_serve.errors import AdapterConfigInvalid, AdapterMismatch, AdapterUnsupported

CONFIG_FILE, SAFETENSORS_FILE, PICKLE_FILE = "adapter_params.json", "adapter.safetensors", "adapter.pth"
_TARGETS = {"Q": "Q", "K": "K", "V": "V", "O": "O", "FFN_UP": "UP", "FFN_GATE": "GATE", "FFN_DOWN": "DOWN"}
_FEED_FORWARD = ("UP", "GATE", "DOWN")
_MAX_PROMPT = 4096
_SLACK_BYTES = 16 * 2**20  # of a file, for what is in it besides the tensors' float32 values
_SPAN = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")


class _Params(BaseModel):
    """Fields that all six scripts write. The last four say how a run was made, not what the adapter is."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    w_bias: bool = False
    lora_layers: str = Field(max_length=4096)
    lora_rank: int
    lora_targets: str = Field(max_length=4096)
    lora_alpha: float
    p_adapter_layers: str = Field(max_length=4096)
    p_adapter_size: int
    p_adapter_hydra: bool = False
    prompt_layers: str = Field(max_length=4096)
    prompt_len: int
    expert_weight: bool = False
    max_seq_len: int | None = None
    flash_attention2: bool = False
    bf16: bool = False

    @property
    def num_inner(self) -> int:
        """Experts inside each expert; 1 is none."""
        return 1


class _MoeParams(_Params):
    """LoRA, MoLoRA, HydraLoRA, each with prompt and parallel adapter or without."""

    expert_num: int
    hydra_moe: bool

    @property
    def num_inner(self) -> int:
        return self.expert_num


class _SoftParams(_MoeParams):
    """Soft MoA, instance-level Soft MoA, UniPEFT."""

    swi_x: int


class _SparseParams(_Params):
    """Sparse MoA."""

    swi_x: int
    max_threshold: float
    const_threshold: bool
    bool_weights: bool = False
    adapter_noisy: bool = False


class _SparseMoeParams(_Params):
    """MoLA's top-k and AdaMoLE."""

    expert_num: int
    top_k: int
    adamole: bool
    noisy_router: bool = False
    lb_loss_coeff: float | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    """`adapter_params.json`, resolved against the base: layers of each kind, LoRA targets, and what the router was sized for."""

    params: _Params
    lora: list[int]
    prompt: list[int]
    parallel: list[int]
    targets: list[str]
    num_named: int  # names in lora_targets, useless ones included: upstream counts them all
    num_layers: int
    warnings: list[str] = field(default_factory=list)

    def written_columns(self, layer: int) -> int:
        """Outputs that upstream gave the router of this layer."""
        return self.num_named * (layer in self.lora) + (layer in self.prompt) + (layer in self.parallel)

    def used_columns(self, layer: int) -> int:
        return len(self.targets) * (layer in self.lora) + (layer in self.prompt) + (layer in self.parallel)

    @property
    def routed_layers(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if self.used_columns(layer)]


def read(folder: Path, variant: str | None, config: ModelConfig, options: ReadOptions) -> Imported:
    """Raises: AdapterConfigInvalid, AdapterUnsupported, AdapterMismatch, and what the readers of checkpoint.py raise."""
    layout = _resolve(_parse(read_json(folder / CONFIG_FILE)), config)
    if config.architecture != "llama":
        raise AdapterMismatch(f"adapters of the authors' Meta line are for llama bases, not {config.architecture}")
    # How wide a SwiGLU router is and which of two variants it is, only the tensors tell; how large the file may be is known now.
    draft = _manifest(layout, _fitting(layout, {})[0], config, {})
    limit = min(options.max_file_bytes, 2 * 4 * draft.num_parameters + _SLACK_BYTES)
    tensors = read_weights(folder, SAFETENSORS_FILE, PICKLE_FILE, replace(options, max_file_bytes=limit))
    flatten_gates(tensors)
    fitting = _fitting(layout, tensors)
    refuse_variant(variant, fitting, CONFIG_FILE)
    kind = variant or fitting[0]
    if kind in ("soft_moa_instance", "unipeft"):
        _drop_target(layout, "GATE")
    if isinstance(layout.params, _SparseMoeParams) and layout.params.adamole != (kind == "adamole"):
        layout.warnings.append(f"adamole is {layout.params.adamole}, but the tensors are those of {kind}: these count")
    manifest = _manifest(layout, kind, config, tensors)
    warnings = [*layout.warnings, *_drop_unused_columns(layout, kind, tensors)]
    if variant is None and len(fitting) > 1:
        warnings.append(f"the files fit {' and '.join(fitting)}; loaded as {kind}: give variant='{fitting[1]}' if it was trained so")
    match = match_tensors(manifest.expected_tensors(), tensors, _sources(kind))
    dead = {name: reason for name in match.leftover if (reason := _dead(name, layout, kind)) is not None}
    check_tensors(match.problems, [name for name in match.leftover if name not in dead])
    warnings += sorted({reason for reason in dead.values() if reason})
    ours = {name: _half_split(name, tensor, config) for name, tensor in match.tensors.items()}
    return Imported(manifest, ours, tuple(warnings))


def _parse(raw: Any) -> _Params:
    """Which script wrote the file is told by the fields that only it has."""
    if not isinstance(raw, dict):
        raise AdapterConfigInvalid(f"{CONFIG_FILE}: must be a JSON object")
    if "max_threshold" in raw or "const_threshold" in raw:
        model: type[_Params] = _SparseParams
    elif "top_k" in raw or "adamole" in raw:
        model = _SparseMoeParams
    else:
        model = _SoftParams if "swi_x" in raw else _MoeParams
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        findings = error.errors(include_url=False, include_input=False, include_context=False)
        raise config_error(CONFIG_FILE, {str(item["loc"][0]): str(item["msg"]) for item in findings}) from None


def _resolve(params: _Params, config: ModelConfig) -> _Layout:
    """Check every number before anything is built from it."""
    problems: dict[str, str] = {}
    spans = {name: _layers(name, getattr(params, name), config, problems) for name in ("lora_layers", "prompt_layers", "p_adapter_layers")}
    lora, prompt, parallel = spans.values()

    def bound(name: str, low: int, high: int) -> None:
        if not low <= getattr(params, name) <= high:
            problems[name] = f"{getattr(params, name)} is out of range {low}..{high}"

    if lora:
        bound("lora_rank", 1, MAX_RANK)
        if not abs(params.lora_alpha) < MAX_ALPHA:
            problems["lora_alpha"] = f"{params.lora_alpha} is not between -{MAX_ALPHA:g} and {MAX_ALPHA:g}"
    if prompt:
        bound("prompt_len", 1, _MAX_PROMPT)
    if parallel:
        bound("p_adapter_size", 1, MAX_WIDTH)
    if isinstance(params, _MoeParams | _SparseMoeParams):
        bound("expert_num", 1, MAX_EXPERTS)
    if isinstance(params, _SparseMoeParams):
        bound("top_k", 1, max(params.expert_num, 1))
    if isinstance(params, _SoftParams | _SparseParams):
        bound("swi_x", 0, MAX_WIDTH // MAX_EXPERTS)
    if isinstance(params, _SparseParams) and not 0 <= params.max_threshold <= 1:
        problems["max_threshold"] = f"{params.max_threshold} is out of range 0..1"
    names = params.lora_targets.split(",")  # exactly as upstream: "Q, K" names " K", which is no target
    targets = [target for name, target in _TARGETS.items() if name in names]
    if lora and (not targets or len(names) > MAX_EXPERTS):
        problems["lora_targets"] = f"must name some of {', '.join(_TARGETS)}, without spaces"
    if not (lora or prompt or parallel):
        problems.setdefault("lora_layers", "no layer has any expert")
    if problems:
        raise config_error(CONFIG_FILE, problems)
    layout = _Layout(params, lora, prompt, parallel, targets, len(names), config.num_layers)
    if lora and len(targets) < len(names):
        layout.warnings.append(
            f"lora_targets {params.lora_targets!r} has unknown or repeated names; they add nothing, as in the code that wrote it"
        )
    if not isinstance(params, _SoftParams | _SparseParams):
        _drop_target(layout, "GATE")  # the other scripts know no LoRA beside the gate projection
    _refuse_unserved(params, layout)
    return layout


def _layers(name: str, text: str, config: ModelConfig, problems: dict[str, str]) -> list[int]:
    """Layers of "0-2,3-4": half-open spans, "0-0" is none. Judged before a range is made of it."""
    layers: set[int] = set()
    for part in text.split(","):
        found = _SPAN.fullmatch(part)
        if not found or int(found[1]) > int(found[2]):
            problems[name] = "must be spans such as '0-2,3-4' (ascending, the end not included)"
            return []
        if int(found[2]) > config.num_layers:
            problems[name] = f"{part} reaches beyond the {config.num_layers} layers of the base"
            return []
        layers.update(range(int(found[1]), int(found[2])))
    return sorted(layers)


def _drop_target(layout: _Layout, target: str) -> None:
    if target in layout.targets:
        layout.targets.remove(target)
        layout.warnings.append(f"lora_targets names FFN_{target}, which this variant does not have; ignored, as in the code that wrote it")


def _refuse_unserved(params: _Params, layout: _Layout) -> None:
    if params.w_bias:
        raise AdapterUnsupported(
            f"{CONFIG_FILE}: w_bias: the trained biases and norms of the base are not in the file, so the adapter is not whole",
            param="w_bias",
        )
    if isinstance(params, _SparseMoeParams) and (layout.prompt or layout.parallel):
        name = "prompt_layers" if layout.prompt else "p_adapter_layers"
        raise AdapterUnsupported(f"{CONFIG_FILE}: {name}: a prompt or parallel adapter beside MoLA or AdaMoLE is not served", param=name)
    if isinstance(params, _SoftParams) and params.expert_num > 1 and layout.parallel and not params.p_adapter_hydra:
        raise AdapterUnsupported(
            f"{CONFIG_FILE}: p_adapter_hydra: false with expert_num {params.expert_num} never ran in the code that writes these files",
            param="p_adapter_hydra",
        )
    for name in ("bool_weights", "noisy_router", "expert_weight"):
        if getattr(params, name, False):
            layout.warnings.append(f"{name} is ignored: {'noise belongs to training' if name == 'noisy_router' else 'nothing reads it'}")


def _fitting(layout: _Layout, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Variants that the files can be, the one to take first."""
    params = layout.params
    if isinstance(params, _SparseParams):
        return ("sparse_moa",)
    if isinstance(params, _SparseMoeParams):
        # told by the tensors, not by the flag: upstream reads "--adamole False" as true
        is_top_k = any(".topkroute_linear." in name for name in tensors)
        return ("mola",) if is_top_k else ("adamole",)
    if isinstance(params, _SoftParams):
        if any(".lora_gate." in name for name in tensors):
            return ("unipeft",)
        return ("soft_moa",) if any(".lora_GATE." in name for name in tensors) else ("soft_moa", "soft_moa_instance")
    kinds = [kind for kind, layers in (("lora", layout.lora), ("prompt", layout.prompt), ("parallel_adapter", layout.parallel)) if layers]
    if kinds == ["lora"] and isinstance(params, _MoeParams) and params.expert_num > 1:
        return ("hydralora",) if params.hydra_moe else ("molora",)
    return ("composition",) if len(kinds) > 1 or params.num_inner > 1 else (kinds[0],)


def _manifest(layout: _Layout, kind: str, config: ModelConfig, tensors: Mapping[str, Tensor]) -> Manifest:
    if kind == "unipeft" and not set(layout.lora) == set(layout.prompt) == set(range(config.num_layers)):
        raise AdapterConfigInvalid(f"{CONFIG_FILE}: UniPEFT has LoRA and a prompt in every layer", param="prompt_layers")
    return build_manifest(config, kind, _router(layout, kind, tensors), _experts(layout, kind), CONFIG_FILE)


def _router(layout: _Layout, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    params = layout.params
    if kind in ("molora", "hydralora"):
        return {"site": "linear", "input": "linear", "activation": "softmax", "bias": False}
    if kind in ("mola", "adamole") and isinstance(params, _SparseMoeParams):
        top_k = {"select": {"kind": "top_k", "k": params.top_k}, "finalise": "renormalise"}
        adamole = {"select": {"kind": "adamole"}, "finalise": "subtract_renormalise"}
        return {"site": "linear", "input": "linear", "activation": "softmax", **(top_k if kind == "mola" else adamole)}
    if kind == "unipeft":
        return {"site": "layer", "input": "pooled"}
    if not isinstance(params, _SoftParams | _SparseParams):
        return {"site": "none"}
    router: dict[str, Any] = {"site": "layer", "input": "pooled" if kind == "soft_moa_instance" else "residual"}
    if params.swi_x:
        names = {layer: f"llama.layers.{layer}.adapter_type_router.w1.weight" for layer in layout.routed_layers}
        written = [params.swi_x * layout.written_columns(layer) for layer in range(layout.num_layers)]
        router |= {"net": "swiglu", "hidden": hidden_widths(tensors, names, layout.num_layers) if tensors else written}
    if isinstance(params, _SparseParams):
        constant = {"kind": "constant", "threshold": params.max_threshold}
        router["select"] = constant if params.const_threshold else {"kind": "threshold_fn", "max_threshold": params.max_threshold}
    return router


def _experts(layout: _Layout, kind: str) -> list[dict[str, Any]]:
    params, per_linear = layout.params, kind in ("molora", "hydralora", "mola", "adamole")
    inner: dict[str, Any] = {}
    if params.num_inner > 1 and not per_linear and isinstance(params, _MoeParams):
        inner = {"variant": "hydralora" if params.hydra_moe else "molora", "num_experts": params.num_inner}
    lora = {"kind": "lora", "layers": layout.lora, "rank": params.lora_rank, "alpha": params.lora_alpha}
    experts: list[dict[str, Any]] = []
    if per_linear and isinstance(params, _MoeParams | _SparseMoeParams):
        experts = [{"name": f"{t}/{e}", "target": t, **lora} for t in layout.targets for e in range(params.expert_num)]
    elif layout.lora:
        experts = [{"name": target, "target": target, **lora, **({"inner": inner} if inner else {})} for target in layout.targets]
    if layout.prompt:
        # one prompt has no shared factor; its inner router and the parallel adapter's have biases, those of LoRAs have none
        nested = {"inner": inner | {"variant": "molora", "bias": True}} if inner else {}
        experts.append({"name": "PROMPT", "kind": "prompt", "layers": layout.prompt, "length": params.prompt_len, **nested})
    if layout.parallel:
        shared = "hydralora" if params.p_adapter_hydra else "molora"
        nested = {"inner": inner | {"variant": shared, "bias": True}} if inner else {}
        experts.append(
            {"name": "P_ADAPTER", "kind": "parallel_adapter", "layers": layout.parallel, "size": params.p_adapter_size, **nested}
        )
    if kind == "unipeft":  # upstream weighs the parallel adapter with the prompt's gate; adapters were trained so
        experts = [{**expert, "column": 0 if expert["kind"] == "lora" else 1} for expert in experts]
    return experts


def _drop_unused_columns(layout: _Layout, kind: str, tensors: dict[str, Tensor]) -> list[str]:
    """Outputs of a layer router beyond the experts that exist are the last ones, and nothing reads them."""
    if kind not in ("soft_moa", "soft_moa_instance", "sparse_moa"):
        return []
    dropped = False
    for layer in layout.routed_layers:
        used, written = layout.used_columns(layer), layout.written_columns(layer)
        for name in ("weight", "bias", "w2.weight", "w2.bias"):
            key = f"llama.layers.{layer}.adapter_type_router.{name}"
            if used < written and key in tensors and tensors[key].ndim and tensors[key].shape[0] == written:
                tensors[key], dropped = tensors[key][:used].clone(), True
    return ["unused router outputs were dropped"] if dropped else []


def _sources(kind: str) -> Callable[[str], tuple[str, ...]]:
    """Our name of a tensor -> theirs (two for UniPEFT's router: a gate each for LoRA and prompt)."""

    def sources(name: str) -> tuple[str, ...]:
        _, layer, site, *rest = name.split(".")
        block, part = f"llama.layers.{layer}", rest[-1]
        if site == "router":
            if kind == "unipeft":
                return f"{block}.lora_gate.{part}", f"{block}.prompt_gate.{part}"
            return (f"{block}.adapter_threshold_fn.{part}" if rest[0] == "threshold" else f"{block}.adapter_type_router.{'.'.join(rest)}",)
        if site == "PROMPT":
            return (f"{block}.attention." + {"rows": "prompt.weight", "gate": "prompt_gate"}.get(rest[0], f"prompt_router.{part}"),)
        if site == "P_ADAPTER":
            module = "router" if rest[0] == "router" else f"{rest[-2]}_proj" + (f"_l.{rest[0]}" if rest[0].isdecimal() else "")
            return (f"{block}.p_adapter.{module}.{part}",)
        return (_lora_source(block, site, rest, kind),)

    return sources


def _lora_source(block: str, site: str, rest: list[str], kind: str) -> str:
    target, _, index = site.partition("/")
    module = f"{block}.{'feed_forward' if target in _FEED_FORWARD else 'attention'}.lora_{target}"
    part = rest[-1]
    if rest[0] == "router":
        if rest[1] == "threshold":
            return f"{module}.threshold_fn.{part}"
        return f"{module}.router.{'topkroute_linear.' if kind == 'mola' else ''}{part}"
    index = index or (rest[0] if rest[0].isdecimal() else "")
    if not index:
        return f"{module}.{part}.weight"
    return f"{module}.experts.{index}.{part}.weight" if kind in ("mola", "adamole") else f"{module}.{part}_l.{index}.weight"


def _dead(name: str, layout: _Layout, kind: str) -> str | None:
    """Why a left-over tensor has no effect ("" where that needs no telling); None if it is not known to have none."""
    found = re.fullmatch(r"llama\.layers\.(0|[1-9][0-9]{0,3})\.(.+)\.(weight|bias)", name)
    if not found or int(found[1]) >= layout.num_layers:
        return None
    layer, module = int(found[1]), found[2]
    params = layout.params
    if module == "adapter_noise_linear" and isinstance(params, _SparseParams) and params.adapter_noisy:
        return "adapter_noise_linear was dropped: noise belongs to training"
    if module.endswith(".noise_linear") and isinstance(params, _SparseMoeParams) and params.noisy_router:
        return "noise_linear was dropped: noise belongs to training"
    if module == "p_adapter_gate" and kind == "unipeft":
        return "p_adapter_gate was dropped: the parallel adapter follows the prompt's gate, as it was trained"
    if isinstance(params, _SoftParams | _SparseParams) and layer not in layout.routed_layers:
        is_router = module.partition(".")[0] == "adapter_type_router"
        if is_router or (module == "adapter_threshold_fn" and isinstance(params, _SparseParams) and not params.const_threshold):
            return ""  # a layer without experts has a router of size 0
    return None


def _half_split(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows of lora_B of Q and K from interleaved rotary pairs to half-split ones: row j of a head is old row 2j, or 2j - P + 1 above P / 2.

    Every other tensor reads or writes spaces that are not rotated (prompt rows too: the permuted base projects them).
    """
    site = name.split(".")[2].partition("/")[0]
    if site not in ("Q", "K") or not name.endswith("lora_B"):
        return tensor
    heads = config.num_heads if site == "Q" else config.num_kv_heads
    pairs = tensor.view(heads, config.head_dim // 2, 2, tensor.shape[1])  # (H, P/2, 2, R)
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()

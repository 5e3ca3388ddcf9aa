"""What to train: a family with its sizes, as a manifest, and the tensors to begin with.

The defaults are the paper's (arXiv:2506.05928, section 4 and the authors' scripts): rank 8, alpha 8, bottleneck 16, prompt 10, a SwiGLU
router of 4 hidden units for each expert, thresholds up to 0.5. A fresh adapter is the identity: every output factor starts at zero.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moa_serve.adapter.manifest import FORMAT, OUTPUT_FACTORS, TARGETS, VARIANTS, BaseShape, Manifest
from moa_serve.errors import InvalidRequest

PAPER_TARGETS = ("Q", "K", "V", "O", "DOWN")
_HAS_LORA = {name for name, rule in VARIANTS.items() if "lora" in rule.kinds}
_HAS_PARALLEL = {name for name, rule in VARIANTS.items() if "parallel_adapter" in rule.kinds}
_HAS_PROMPT = {name for name, rule in VARIANTS.items() if "prompt" in rule.kinds} - {
    "sparse_moa"
}  # sparse may have one, the paper's has none
_COMMON = ("variant", "bottleneck", "prompt_length", "activation", "inner")  # judged by rules of their own
_MIXTURES = ("soft_moa", "sparse_moa", "soft_moa_instance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A family and its sizes. What a family does not have is refused, never ignored.

    Args:
        variant: a row of the manifest's table.
        targets: base linears with a LoRA expert.
        rank, alpha: of each LoRA expert; alpha is the rank where None, so that the scale is the paper's 1.
        num_experts: at each linear (per-linear families) or inside each expert (`inner`). For `mola` several numbers share out the layers
            from the first to the last, as its paper does.
        top_k: experts that `mola` keeps.
        bottleneck: hidden units of the parallel adapter, 0 for none; None is 16 where the family has one.
        prompt_length: rows of the prompt, 0 for none; None is 10 where the family has one (a Sparse MoA has none by default, as in the
            paper).
        router_input: what a layer router reads: residual (the authors' Meta code) or normed (their Hugging Face code).
        router_net, router_hidden: linear, or swiglu with this many hidden units for each expert.
        activation: sigmoid or, of Soft MoA only, softmax (the paper's table 5).
        threshold: constant or function, of Sparse MoA.
        max_threshold: the constant, or the function's upper bound.
        inner: molora or hydralora: every expert of a layer router is itself such a mixture.
    """

    variant: str = "soft_moa"
    targets: tuple[str, ...] = PAPER_TARGETS
    rank: int = 8
    alpha: float | None = None
    num_experts: tuple[int, ...] = (8,)
    top_k: int = 2
    bottleneck: int | None = None
    prompt_length: int | None = None
    router_input: str = "normed"
    router_net: str = "swiglu"
    router_hidden: int = 4
    activation: str = "sigmoid"
    threshold: str = "function"
    max_threshold: float = 0.5
    inner: str | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, what: str) -> None:
            if not ok:
                raise InvalidRequest(f"{field.replace('_', '-')} is {getattr(self, field)!r}, but {what}", param=field)

        need(self.variant in VARIANTS, "variant", f"must be one of {', '.join(VARIANTS)}")
        is_known = bool(self.targets) and set(self.targets) <= set(TARGETS) and len(set(self.targets)) == len(self.targets)
        need(is_known, "targets", f"must be different ones of {', '.join(TARGETS)}")
        has_router = self.variant in _MIXTURES
        need(not self.bottleneck or self.variant in _HAS_PARALLEL, "bottleneck", f"{self.variant} has no parallel adapter")
        need(not self.prompt_length or "prompt" in VARIANTS[self.variant].kinds, "prompt_length", f"{self.variant} has no prompt")
        need(self.activation in ("sigmoid", "softmax"), "activation", "must be sigmoid or softmax")
        need(self.activation == "sigmoid" or self.variant == "soft_moa", "activation", "softmax over a layer's experts is of soft_moa only")
        need(self.threshold in ("constant", "function"), "threshold", "must be constant or function")
        need(self.router_net in ("linear", "swiglu"), "router_net", "must be linear or swiglu")
        need(self.router_input in ("residual", "normed"), "router_input", "must be residual or normed")
        need(self.inner in (None, "molora", "hydralora"), "inner", "must be molora or hydralora")
        need(self.inner is None or has_router or self.variant == "composition", "inner", f"{self.variant} has no nested experts")
        need(bool(self.num_experts), "num_experts", "must be a number")
        need(len(self.num_experts) == 1 or self.variant == "mola", "num_experts", "only mola has several numbers of experts")
        for item in fields(self):  # what has a value of its own and no use is a mistake
            is_given = getattr(self, item.name) != item.default
            need(not is_given or item.name in _COMMON or self._uses(item.name), item.name, f"{self.variant} has no use for it")

    def _uses(self, field: str) -> bool:
        rule = VARIANTS[self.variant]
        uses: dict[str, bool] = {
            "targets": "lora" in rule.kinds,
            "rank": "lora" in rule.kinds,
            "alpha": "lora" in rule.kinds,
            "num_experts": self.is_per_linear or self.inner is not None,
            "top_k": self.variant == "mola",
            "router_input": self.variant in ("soft_moa", "sparse_moa"),
            "router_net": self.variant in _MIXTURES,
            "router_hidden": self.variant in _MIXTURES and self.router_net == "swiglu",
            "threshold": self.variant == "sparse_moa",
            "max_threshold": self.variant == "sparse_moa",
        }
        return uses[field]

    def used(self) -> dict[str, Any]:
        """What the family has a use for and is not left to its default of None; as JSON."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value for name, value in known.items() if name in _COMMON or self._uses(name)}

    @property
    def is_per_linear(self) -> bool:
        return VARIANTS[self.variant].site == "linear"


def manifest_of(recipe: Recipe, base: BaseShape) -> Manifest:
    """The manifest of a recipe on a base. Raises AdapterConfigInvalid or InvalidRequest where sizes are out of range."""
    layers = list(range(base.num_layers))
    if len(recipe.num_experts) > len(layers):
        raise InvalidRequest(
            f"num-experts has {len(recipe.num_experts)} numbers, but the base has {len(layers)} layers to share out among them",
            param="num_experts",
        )
    experts = _lora_experts(recipe, layers) if recipe.variant in _HAS_LORA else []
    for name, kind, field, size in (
        ("PROMPT", "prompt", "length", _size(recipe.prompt_length, 10, recipe.variant in _HAS_PROMPT)),
        ("P_ADAPTER", "parallel_adapter", "size", _size(recipe.bottleneck, 16, recipe.variant in _HAS_PARALLEL)),
    ):
        if size:
            experts.append({"name": name, "kind": kind, "layers": layers, field: size})
    if recipe.inner:
        for expert in experts:  # the authors' inner routers have a bias in the prompt and the parallel adapter only
            inner = {"variant": recipe.inner, "num_experts": recipe.num_experts[0], "bias": expert["kind"] != "lora"}
            expert["inner"] = inner if expert["kind"] != "prompt" else inner | {"variant": "molora"}
    if recipe.variant == "unipeft":
        kinds = list(dict.fromkeys(expert["kind"] for expert in experts))
        for expert in experts:
            expert["column"] = kinds.index(expert["kind"])
    raw = {"format": FORMAT, "base": base.model_dump(exclude_none=True), "variant": recipe.variant, "router": _router(recipe, experts)}
    return Manifest.parse(raw | {"experts": experts})


def _size(given: int | None, default: int, is_usual: bool) -> int:
    return (default if is_usual else 0) if given is None else given


def _lora_experts(recipe: Recipe, layers: list[int]) -> list[dict[str, Any]]:
    lora = {"kind": "lora", "rank": recipe.rank, "alpha": float(recipe.rank if recipe.alpha is None else recipe.alpha)}
    if not recipe.is_per_linear:
        return [{"name": target, "target": target, "layers": layers} | lora for target in recipe.targets]
    groups = len(recipe.num_experts)
    count = {layer: recipe.num_experts[layer * groups // len(layers)] for layer in layers}
    return [
        {"name": f"{target}/{index}", "target": target, "layers": where} | lora
        for target in recipe.targets
        for index in range(max(recipe.num_experts))
        if (where := [layer for layer in layers if index < count[layer]])
    ]


def _router(recipe: Recipe, experts: list[dict[str, Any]]) -> dict[str, Any]:
    if VARIANTS[recipe.variant].site == "none":
        return {"site": "none"}
    if recipe.is_per_linear:
        router: dict[str, Any] = {"site": "linear", "input": "linear", "activation": "softmax"}
        own: dict[str, dict[str, Any]] = {
            "mola": {"select": {"kind": "top_k", "k": recipe.top_k}, "finalise": "renormalise"},
            "adamole": {"select": {"kind": "adamole"}, "finalise": "subtract_renormalise"},
        }
        return router | own.get(recipe.variant, {"bias": False})
    router = {"site": "layer", "input": recipe.router_input if recipe.variant in ("soft_moa", "sparse_moa") else "pooled"}
    if recipe.variant == "unipeft":  # linear gates, one for each kind
        return router
    if recipe.router_net == "swiglu":
        router |= {"net": "swiglu", "hidden": recipe.router_hidden * len(experts)}
    if recipe.variant == "soft_moa":
        router["activation"] = recipe.activation
    if recipe.variant == "sparse_moa":
        is_constant = recipe.threshold == "constant"
        name = "threshold" if is_constant else "max_threshold"
        router["select"] = {"kind": "constant" if is_constant else "threshold_fn", name: recipe.max_threshold}
    return router


def fresh_tensors(manifest: Manifest, seed: int) -> dict[str, Tensor]:
    """Float32 tensors to begin with: output factors zero, prompt rows N(0, 1) as an embedding's, all else uniform in +- 1 / sqrt(inputs).

    The last is what torch gives a fresh linear, and what the authors begin with.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    inputs = 1
    for name, shape in manifest.expected_tensors().items():
        if name.endswith(OUTPUT_FACTORS):
            tensors[name] = torch.zeros(shape)
        elif name.endswith("PROMPT.rows"):
            tensors[name] = torch.randn(shape, generator=generator)
        else:  # a bias follows its weight, and takes its bound
            inputs = inputs if name.endswith("bias") else shape[-1]
            tensors[name] = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs)
    return tensors

"""The manifest of an adapter (`adapter.json`, format version 1): which experts it has, where, and how they are routed.

One model for every family of the paper: the table `VARIANTS` says what they are. From the manifest alone follow the name and
the shape of every tensor (`expected_tensors`), so a file can be checked before anything is built, and the number of parameters.
Not for reading files (checkpoint.py), not for tensors. Immutable; shared freely between threads.
"""

import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moa_serve.config import ModelConfig, linear_shape
from moa_serve.errors import AdapterConfigInvalid, AdapterMismatch

FORMAT = "moa-adapter/1"
KINDS = ("Q", "K", "V", "PROMPT", "O", "UP", "GATE", "DOWN", "P_ADAPTER")  # canonical order of experts, everywhere
OUTPUT_FACTORS = ("lora_B", "up.weight", "up.bias", "PROMPT.gate")  # endings of the tensors without which an expert adds nothing
TARGETS = ("Q", "K", "V", "O", "UP", "GATE", "DOWN")  # base linears that a LoRA expert can stand beside
MAX_EXPERTS, MAX_RANK, MAX_WIDTH, MAX_ALPHA, MAX_LAYERS = 64, 512, 65536, 1e4, 1024

Target = Literal["Q", "K", "V", "O", "UP", "GATE", "DOWN"]
Shape = tuple[int, ...]
Size = Annotated[int, Field(ge=1, le=2**20)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BaseShape(_Strict):
    """The base that the adapter was made for; everything but `digest` must equal the served base."""

    architecture: str
    hidden_size: Size
    intermediate_size: Size
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    vocab_size: int = Field(ge=1, le=2**31 - 1)
    digest: str | None = None

    @classmethod
    def of(cls, config: ModelConfig, digest: str | None = None) -> "BaseShape":
        fields = {name: getattr(config, name) for name in cls.model_fields if name != "digest"}
        return cls(**fields, digest=digest)


class SelectAll(_Strict):
    kind: Literal["all"] = "all"


class SelectConstant(_Strict):
    """Keep an expert where its weight >= `threshold` (Sparse MoA, constant threshold)."""

    kind: Literal["constant"] = "constant"
    threshold: float = Field(ge=0, le=1)


class SelectThresholdFn(_Strict):
    """Keep an expert where its weight >= `max_threshold` * sigmoid(w.x + b) (Sparse MoA, threshold function)."""

    kind: Literal["threshold_fn"] = "threshold_fn"
    max_threshold: float = Field(gt=0, le=1)


class SelectTopK(_Strict):
    kind: Literal["top_k"] = "top_k"
    k: int = Field(ge=1, le=MAX_EXPERTS)


class SelectAdaMole(_Strict):
    """Subtract sigmoid(w.x + b) / E; what is left below zero is not kept (AdaMoLE)."""

    kind: Literal["adamole"] = "adamole"


Select = Annotated[SelectAll | SelectConstant | SelectThresholdFn | SelectTopK | SelectAdaMole, Field(discriminator="kind")]


class RouterSpec(_Strict):
    """How experts get their weights. `hidden` is the width of a SwiGLU router: one number, or one for each layer of the base."""

    site: Literal["layer", "linear", "none"]
    input: Literal["residual", "normed", "linear", "pooled"] | None = None
    net: Literal["linear", "swiglu"] = "linear"
    hidden: int | list[int] | None = None
    bias: bool = True
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    select: Select = SelectAll()
    finalise: Literal["keep", "renormalise", "subtract_renormalise"] = "keep"

    @model_validator(mode="after")
    def _consistent(self) -> "RouterSpec":
        if self.site == "none":
            if self != RouterSpec.model_construct(site="none"):
                raise ValueError("router: site 'none' takes no other field")
            return self
        layer_inputs = ("residual", "normed", "pooled")
        if (self.site == "linear") != (self.input == "linear") or (self.site == "layer" and self.input not in layer_inputs):
            raise ValueError(f"router.input: {self.input!r} does not go with site {self.site!r}")
        if (self.net == "swiglu") != (self.hidden is not None):
            raise ValueError("router.hidden: goes with net 'swiglu', and only with it")
        if self.net == "swiglu" and self.site == "linear":
            raise ValueError("router.net: a router at each linear is linear")
        for width in self.hidden if isinstance(self.hidden, list) else [self.hidden or 0]:
            if not 0 <= width <= MAX_WIDTH:
                raise ValueError(f"router.hidden: {width} is out of range 0..{MAX_WIDTH}")
        finals = {"top_k": "renormalise", "adamole": "subtract_renormalise"}
        if self.finalise != finals.get(self.select.kind, "keep"):
            raise ValueError(f"router.finalise: {self.finalise!r} does not go with select {self.select.kind!r}")
        return self

    def hidden_at(self, layer: int) -> int:
        if isinstance(self.hidden, list):
            return self.hidden[layer]
        return self.hidden or 0

    @property
    def has_threshold_fn(self) -> bool:
        return self.select.kind in ("threshold_fn", "adamole")


class InnerSpec(_Strict):
    """A nested expert: a softmax mixture of `num_experts` of its kind, `hydralora` with one shared first factor."""

    variant: Literal["molora", "hydralora"]
    num_experts: int = Field(ge=2, le=MAX_EXPERTS)
    bias: bool = False


class ExpertSpec(_Strict):
    """One expert in the layers where it stands.

    `rank` and `alpha` for LoRA (its scale is alpha / rank), `length` rows for a prompt, `size` hidden units for a parallel adapter.
    With `inner`, these count for each inner expert. `column` is the router's output that weighs it, its own by default.
    """

    name: str
    kind: Literal["lora", "prompt", "parallel_adapter"]
    target: Target | None = None
    layers: list[int]
    rank: int | None = Field(None, ge=1, le=MAX_RANK)
    size: int | None = Field(None, ge=1, le=MAX_WIDTH)
    length: int | None = Field(None, ge=1, le=4096)
    alpha: float | None = Field(None, gt=-MAX_ALPHA, lt=MAX_ALPHA)
    column: int | None = Field(None, ge=0, lt=MAX_EXPERTS)
    inner: InnerSpec | None = None

    @field_validator("alpha", mode="before")
    @classmethod
    def _whole_alpha(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_ALPHA else value

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: list[int]) -> list[int]:
        if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= MAX_LAYERS:
            raise ValueError(f"layers: must be ascending layer indices in 0..{MAX_LAYERS - 1}, without repeats")
        return layers

    @model_validator(mode="after")
    def _fields_of_kind(self) -> "ExpertSpec":
        needs = {"lora": {"target", "rank", "alpha"}, "prompt": {"length"}, "parallel_adapter": {"size"}}[self.kind]
        for field in ("target", "rank", "alpha", "length", "size"):
            if (getattr(self, field) is not None) != (field in needs):
                raise ValueError(
                    f"{field}: {'needed by' if field in needs else 'does not belong to'} expert {self.name!r} of kind {self.kind}"
                )
        site = {"lora": self.target, "prompt": "PROMPT", "parallel_adapter": "P_ADAPTER"}[self.kind]
        prefix, _, index = self.name.partition("/")
        if prefix != site or (index and (self.kind != "lora" or not index.isdecimal() or str(int(index)) != index)):
            raise ValueError(f"name: {self.name!r} must be {site!r}" + (f" or '{site}/NUMBER'" if self.kind == "lora" else ""))
        if index and self.inner:
            raise ValueError(f"inner: expert {self.name!r} of a per-linear router cannot be nested")
        return self

    @property
    def site(self) -> str:
        """The place in the block: a target, PROMPT or P_ADAPTER."""
        return self.name.partition("/")[0]

    @property
    def index(self) -> int:
        return int(self.name.partition("/")[2] or 0)

    @property
    def scale(self) -> float:
        """alpha / rank of a LoRA expert."""
        return (self.alpha or 0.0) / (self.rank or 1)


@dataclass(frozen=True, slots=True)
class VariantRule:
    """What makes one variant; an empty tuple of activations means: no router."""

    site: str
    inputs: tuple[str | None, ...]
    activations: tuple[str, ...]
    selects: tuple[str, ...]
    kinds: tuple[str, ...]


_ALL_KINDS = ("lora", "prompt", "parallel_adapter")
VARIANTS: Mapping[str, VariantRule] = {
    "soft_moa": VariantRule("layer", ("residual", "normed"), ("sigmoid", "softmax"), ("all",), _ALL_KINDS),
    "sparse_moa": VariantRule("layer", ("residual", "normed"), ("sigmoid",), ("constant", "threshold_fn"), _ALL_KINDS),
    "soft_moa_instance": VariantRule("layer", ("pooled",), ("sigmoid",), ("all",), _ALL_KINDS),
    "unipeft": VariantRule("layer", ("pooled",), ("sigmoid",), ("all",), _ALL_KINDS),
    "molora": VariantRule("linear", ("linear",), ("softmax",), ("all",), ("lora",)),
    "hydralora": VariantRule("linear", ("linear",), ("softmax",), ("all",), ("lora",)),
    "mola": VariantRule("linear", ("linear",), ("softmax",), ("top_k",), ("lora",)),
    "adamole": VariantRule("linear", ("linear",), ("softmax",), ("adamole",), ("lora",)),
    "lora": VariantRule("none", (None,), (), (), ("lora",)),
    "prompt": VariantRule("none", (None,), (), (), ("prompt",)),
    "parallel_adapter": VariantRule("none", (None,), (), (), ("parallel_adapter",)),
    "composition": VariantRule("none", (None,), (), (), _ALL_KINDS),
}
Variant = Literal[
    "soft_moa", "sparse_moa", "soft_moa_instance", "unipeft", "molora", "hydralora", "mola", "adamole",
    "lora", "prompt", "parallel_adapter", "composition",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The experts of one layer in canonical order, and for a layer router the output that weighs each (`columns`)."""

    experts: tuple[ExpertSpec, ...]
    columns: tuple[int, ...]

    @property
    def num_outputs(self) -> int:
        """Outputs of the layer's router: unused ones exist only below a used one."""
        return max(self.columns, default=-1) + 1

    def at(self, site: str) -> list[ExpertSpec]:
        return [expert for expert in self.experts if expert.site == site]


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """A router that weighs experts: where it stands, and which of its outputs weighs which expert.

    `site` is "layer" or a target. `bits` are outputs: of each expert by name, and of all of a linear's experts by the linear's name.
    """

    layer: int
    site: str
    num_outputs: int
    experts: Mapping[str, int]
    bits: Mapping[str, int]

    @classmethod
    def of(cls, layer: int, site: str, num_outputs: int, experts: Iterable[tuple[str, int]]) -> "RouterPlan":
        own = {name: 1 << output for name, output in experts}
        bits = dict(own)
        for name, bit in own.items():
            target = name.partition("/")[0]
            bits[target] = bits.get(target, 0) | bit
        return cls(layer, site, num_outputs, own, bits)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The output that weighs each expert, in their order."""
        return tuple(bit.bit_length() - 1 for bit in self.experts.values())

    @property
    def used(self) -> int:
        """The outputs that weigh an expert."""
        return functools.reduce(operator.or_, self.experts.values(), 0)

    @property
    def all_outputs(self) -> int:
        return (1 << self.num_outputs) - 1

    @property
    def shares(self) -> bool:
        """An output weighs several experts."""
        return len(set(self.experts.values())) < len(self.experts)


class RequestDefaults(_Strict):
    """What a request gets where it leaves the field of this name out; bounds are those of the API."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    stop: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(None, max_length=16)
    stop_token_ids: list[Annotated[int, Field(ge=0, le=2**31)]] | None = Field(None, max_length=1024)
    chat_template: str | None = Field(None, min_length=1, max_length=2**16)  # Jinja; used only where the operator lets it


class Manifest(_Strict):
    """`adapter.json`, whole. Field by field: docs/adapter-format.md."""

    format: Literal["moa-adapter/1"]
    base: BaseShape
    variant: Variant
    router: RouterSpec
    experts: list[ExpertSpec] = Field(min_length=1, max_length=MAX_LAYERS * MAX_EXPERTS)
    defaults: RequestDefaults | None = None
    profile: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    description: str | None = None
    license: str | None = None

    @classmethod
    def parse(cls, raw: Any) -> "Manifest":
        """Validate a decoded `adapter.json`.

        Raises:
            AdapterConfigInvalid: `problems` has one line for each field that is wrong.
        """
        if not isinstance(raw, dict):
            raise AdapterConfigInvalid("adapter.json: must be a JSON object")
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = [_line(item) for item in error.errors(include_url=False, include_input=False)]
            # A finding about several fields together has no place; its text begins with the field.
            field = ".".join(str(part) for part in error.errors()[0]["loc"]) or problems[0].partition(":")[0]
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise AdapterConfigInvalid(f"adapter.json: {problems[0]}{more}", param=field, problems=problems) from None

    @model_validator(mode="after")
    def _fits_variant(self) -> "Manifest":
        rule, router = VARIANTS[self.variant], self.router
        if router.site != rule.site or router.input not in rule.inputs:
            raise ValueError(f"router: variant {self.variant!r} has site {rule.site!r} and input {' or '.join(map(str, rule.inputs))}")
        if router.site != "none" and (router.activation not in rule.activations or router.select.kind not in rule.selects):
            raise ValueError(
                f"router: variant {self.variant!r} has activation {' or '.join(rule.activations)} and select {' or '.join(rule.selects)}"
            )
        if isinstance(router.hidden, list) and len(router.hidden) != self.base.num_layers:
            raise ValueError(f"router.hidden: has {len(router.hidden)} numbers, but the base has {self.base.num_layers} layers")
        ids = (self.defaults.stop_token_ids if self.defaults else None) or []
        if max(ids, default=0) >= self.base.vocab_size:
            raise ValueError(f"defaults: stop_token_ids has {max(ids)}, but the vocabulary ends at {self.base.vocab_size - 1}")
        for expert in self.experts:
            self._check_expert(expert, rule)
        taken: set[tuple[str, int]] = set()
        for name, layer in ((expert.name, layer) for expert in self.experts for layer in expert.layers):
            if (name, layer) in taken:
                raise ValueError(f"experts: {name!r} is given twice for layer {layer}")
            taken.add((name, layer))
        self._check_layers()
        return self

    def _check_expert(self, expert: ExpertSpec, rule: VariantRule) -> None:
        if expert.kind not in rule.kinds:
            raise ValueError(f"experts: {expert.name!r} is a {expert.kind}, which variant {self.variant!r} does not have")
        if expert.layers[-1] >= self.base.num_layers:
            raise ValueError(
                f"experts: {expert.name!r} stands in layer {expert.layers[-1]}, but the base has {self.base.num_layers} layers"
            )
        if ("/" in expert.name) != (self.router.site == "linear"):
            raise ValueError(f"experts: {expert.name!r}: names have a number ('Q/0') exactly where the router is at each linear")
        if expert.column is not None and self.router.site != "layer":
            raise ValueError(f"experts: {expert.name!r}: column needs a layer router")

    def _check_layers(self) -> None:
        for layer in range(self.base.num_layers):
            plan = self.layer(layer)
            if len(plan.experts) > MAX_EXPERTS * len(TARGETS) or plan.num_outputs > MAX_EXPERTS:
                raise ValueError(f"experts: layer {layer} has more than {MAX_EXPERTS} experts at one router")
            if self.router.site != "linear":
                continue
            for target in TARGETS:
                group = plan.at(target)
                if [expert.index for expert in group] != list(range(len(group))):
                    raise ValueError(f"experts: {target} in layer {layer} is numbered {[e.index for e in group]}, not 0, 1, 2 ...")
                if len(group) > MAX_EXPERTS:
                    raise ValueError(f"experts: layer {layer} has more than {MAX_EXPERTS} experts at {target}")
                if self.variant == "hydralora" and len({expert.rank for expert in group}) > 1:
                    raise ValueError(f"experts: {target} in layer {layer}: HydraLoRA's experts share one A, so they have one rank")
                select = self.router.select
                if group and isinstance(select, SelectTopK) and select.k > len(group):
                    raise ValueError(f"router.select.k: {select.k}, but {target} in layer {layer} has {len(group)} experts")

    @cached_property
    def plans(self) -> tuple[LayerPlan, ...]:
        layers: list[list[ExpertSpec]] = [[] for _ in range(self.base.num_layers)]
        for expert in self.experts:
            for layer in expert.layers:
                if layer < len(layers):
                    layers[layer].append(expert)
        plans = []
        for experts in layers:
            experts.sort(key=lambda expert: (KINDS.index(expert.site), expert.index))
            columns: tuple[int, ...] = ()
            if self.router.site == "layer":
                columns = tuple(i if expert.column is None else expert.column for i, expert in enumerate(experts))
            plans.append(LayerPlan(tuple(experts), columns))
        return tuple(plans)

    @cached_property
    def routers(self) -> tuple[RouterPlan, ...]:
        """Every router that weighs experts, layer by layer; those inside nested experts are none of them."""
        found = []
        for layer, plan in enumerate(self.plans):
            if self.router.site == "layer" and plan.experts:
                names = [expert.name for expert in plan.experts]
                found.append(RouterPlan.of(layer, "layer", plan.num_outputs, zip(names, plan.columns, strict=True)))
            elif self.router.site == "linear":
                for site in dict.fromkeys(expert.site for expert in plan.experts):
                    group = plan.at(site)
                    found.append(RouterPlan.of(layer, site, len(group), ((expert.name, expert.index) for expert in group)))
        return tuple(found)

    def layer(self, index: int) -> LayerPlan:
        return self.plans[index]

    @property
    def is_pooled(self) -> bool:
        """Instance level: weights come from the mean over the whole prompt, once for each sequence."""
        return self.router.input == "pooled"

    def check_base(self, config: ModelConfig) -> None:
        """Raises AdapterMismatch with every field of `base` in which the served base differs."""
        served = BaseShape.of(config)
        problems = [
            f"base.{field}: the adapter is for {mine}, the served base has {theirs}"
            for field in BaseShape.model_fields
            if field != "digest" and (mine := getattr(self.base, field)) != (theirs := getattr(served, field))
        ]
        if problems:
            raise AdapterMismatch(f"this adapter was made for another base: {'; '.join(problems)}", problems=problems)

    def expected_tensors(self) -> dict[str, Shape]:
        """Name and shape of every tensor in `adapter.safetensors`: nothing may be missing, nothing left over."""
        return dict(self._tensors())

    def owners(self) -> dict[str, tuple[str | None, int]]:
        """Of every tensor the expert that it belongs to, and the layer. None: routers, thresholds, HydraLoRA's shared first factor."""
        names = [{expert.name for expert in plan.experts} for plan in self.plans]
        found = {}
        for tensor in self.expected_tensors():
            _, layer, owner, *_ = tensor.split(".")  # layers.N.OWNER...
            found[tensor] = (owner if owner in names[int(layer)] else None, int(layer))
        return found

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.expected_tensors().values())

    def _tensors(self) -> Iterator[tuple[str, Shape]]:
        for layer in range(self.base.num_layers):
            plan = self.layer(layer)
            if self.router.site == "layer" and plan.experts:
                yield from self._layer_router(f"layers.{layer}.router", layer, plan.num_outputs)
            for site in KINDS:
                group = plan.at(site)
                if not group:
                    continue
                prefix = f"layers.{layer}.{site}"
                if site == "PROMPT":
                    yield from self._prompt(prefix, group[0])
                elif site == "P_ADAPTER":
                    yield from self._parallel_adapter(prefix, group[0])
                else:
                    yield from self._lora(prefix, site, group)

    def _layer_router(self, prefix: str, layer: int, outputs: int) -> Iterator[tuple[str, Shape]]:
        width, hidden = self.base.hidden_size, self.router.hidden_at(layer)
        if self.router.net == "swiglu":
            for name, shape in (("w1", (hidden, width)), ("w2", (outputs, hidden)), ("w3", (hidden, width))):
                yield from _affine(f"{prefix}.{name}", shape, self.router.bias)
        else:
            yield from _affine(prefix, (outputs, width), self.router.bias)
        if self.router.has_threshold_fn:
            yield from _affine(f"{prefix}.threshold", (1, width), True)

    def _lora(self, prefix: str, target: str, group: list[ExpertSpec]) -> Iterator[tuple[str, Shape]]:
        out, width = linear_shape(self.base, target)
        if self.router.site == "linear":
            yield from _affine(f"{prefix}.router", (len(group), width), self.router.bias)
            if self.router.has_threshold_fn:
                yield from _affine(f"{prefix}.router.threshold", (1, width), True)
            names, shared, rank = [f"{prefix}/{e.index}" for e in group], self.variant == "hydralora", group[0].rank or 0
            ranks = [expert.rank or 0 for expert in group]
        else:
            inner, rank = group[0].inner, group[0].rank or 0
            names, shared, ranks = [prefix], False, [rank]
            if inner:
                yield from _affine(f"{prefix}.router", (inner.num_experts, width), inner.bias)
                names, shared = [f"{prefix}.{e}" for e in range(inner.num_experts)], inner.variant == "hydralora"
                ranks = [rank] * inner.num_experts
        if shared:
            yield f"{prefix}.lora_A", (rank, width)
        for name, own in zip(names, ranks, strict=True):
            if not shared:
                yield f"{name}.lora_A", (own, width)
            yield f"{name}.lora_B", (out, own)

    def _prompt(self, prefix: str, expert: ExpertSpec) -> Iterator[tuple[str, Shape]]:
        count = expert.inner.num_experts if expert.inner else 1
        yield f"{prefix}.rows", (count * (expert.length or 0), self.base.hidden_size)
        yield f"{prefix}.gate", (self.base.num_heads,)
        if expert.inner:
            yield from _affine(f"{prefix}.router", (count, self.base.hidden_size), expert.inner.bias)

    def _parallel_adapter(self, prefix: str, expert: ExpertSpec) -> Iterator[tuple[str, Shape]]:
        width, size, inner = self.base.hidden_size, expert.size or 0, expert.inner
        if not inner:
            yield from _affine(f"{prefix}.down", (size, width), True)
            yield from _affine(f"{prefix}.up", (width, size), True)
            return
        yield from _affine(f"{prefix}.router", (inner.num_experts, width), inner.bias)
        if inner.variant == "hydralora":
            yield from _affine(f"{prefix}.down", (size, width), True)
        for index in range(inner.num_experts):
            if inner.variant == "molora":
                yield from _affine(f"{prefix}.{index}.down", (size, width), True)
            yield from _affine(f"{prefix}.{index}.up", (width, size), True)


def _affine(prefix: str, shape: Shape, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.weight", shape
    if bias:
        yield f"{prefix}.bias", shape[:1]


def _line(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{path}: {message}" if path else message

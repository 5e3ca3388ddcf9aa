"""How an adapter lies in a slot of the GPU: which of its numbers stand where. Sizes and offsets only; no tensors.

A slot is the same for every adapter, so that a recorded step finds each at fixed addresses: matrices are padded with zeros to the largest
that a slot takes (`SlotShape`). What reads the same tensor as one of the base's four products of a layer stands as further rows in that
product's weights, or in buffers of their own (placement.py): routers, thresholds, first factors of LoRA, and the parallel adapter's.
`Section` says which rows those are.

    QKV      layer router | routers of Q, K, V and of a nested prompt | first factors of Q, K, V
    O        router of O | first factor of O
    GATE_UP  routers of UP, GATE and of a nested parallel adapter | first factors of UP, GATE | the parallel adapter's
    DOWN     router of DOWN | first factor of DOWN

Rows of routers stand twice where the base is bfloat16: rounded, and what the rounding lost. Their products are added in float32, so a
router is as exact as with float32 weights, whose error would be 2^-24 of a weight, and is 2^-17 here (bfloat16 alone: 2^-9).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from moa_serve.adapter.manifest import ExpertSpec, Manifest
from moa_serve.config import ModelConfig, linear_shape

LORA = ("Q", "K", "V", "O", "UP", "GATE", "DOWN")
INNER = ("Q", "K", "V", "PROMPT", "O", "UP", "GATE", "P_ADAPTER", "DOWN")
"""Sites of routers that read the input of their expert: per-linear ones, and those inside nested experts."""

COLUMNS = (*LORA, "P_ADAPTER")
"""Second factors: of each a block of columns, weighed one by one."""

PRODUCTS = ("QKV", "O", "GATE_UP", "DOWN")
LORA_OF = {"QKV": ("Q", "K", "V"), "O": ("O",), "GATE_UP": ("UP", "GATE"), "DOWN": ("DOWN",)}
INNER_OF = {"QKV": ("Q", "K", "V", "PROMPT"), "O": ("O",), "GATE_UP": ("UP", "GATE", "P_ADAPTER"), "DOWN": ("DOWN",)}
LEAST = 16  # of every side of a product on tensor cores
ABSENT, CONSTANT = -2, -1
"""In a slot's indices: nothing stands here; and: what would be read is 1."""


@dataclass(frozen=True, slots=True)
class SlotShape:
    """The largest adapter that a slot takes, in numbers of a layer; 0: none of it.

    Args:
        outputs: of a layer's router, or the experts that they weigh where those are more. hidden: of a SwiGLU one, each of its two halves.
        inner: outputs of a router that reads its expert's input; inner_sites: where there are such.
        targets: linears with LoRA. rank: rows of a first factor; columns: of a second one (HydraLoRA: several to a row).
        parallel: rows of a parallel adapter's first factor; parallel_columns: of its second one, and one for each bias.
        prompt: rows of a prompt.
        residual: a layer router reads the residual stream, and not its norm.
    """

    outputs: int = 0
    hidden: int = 0
    inner: int = 0
    inner_sites: frozenset[str] = frozenset()
    targets: frozenset[str] = frozenset()
    rank: int = 0
    columns: int = 0
    parallel: int = 0
    parallel_columns: int = 0
    prompt: int = 0
    residual: bool = False

    @classmethod
    def of(cls, manifest: Manifest) -> "SlotShape":
        """What an adapter needs."""
        return cls.union(shape for layer in range(manifest.base.num_layers) for shape in _of_layer(manifest, layer))

    @classmethod
    def union(cls, shapes: Iterable["SlotShape"]) -> "SlotShape":
        """What holds each of them."""
        found = cls()
        for shape in shapes:
            found = cls(*(_larger(getattr(found, item.name), getattr(shape, item.name)) for item in fields(cls)))
        return found

    def holds(self, other: "SlotShape") -> bool:
        return SlotShape.union((self, other)) == self

    @classmethod
    def usual(cls) -> "SlotShape":
        """What a slot takes where no adapter is known when the server starts: Soft and Sparse MoA of the paper's sizes."""
        return cls(
            outputs=9, hidden=36, targets=frozenset(LORA), rank=8, columns=8, parallel=16, parallel_columns=17, prompt=16, residual=True
        )


def _larger(one: Any, other: Any) -> Any:
    return one | other if isinstance(one, frozenset | bool) else max(one, other)


def _of_layer(manifest: Manifest, layer: int) -> Iterator[SlotShape]:
    plan, router = manifest.layer(layer), manifest.router
    if router.site == "layer" and plan.experts:
        outputs = max(plan.num_outputs, len(plan.experts))
        yield SlotShape(outputs=outputs, hidden=router.hidden_at(layer), residual=router.input in ("residual", "pooled"))
    for site in dict.fromkeys(expert.site for expert in plan.experts):
        yield _of_site(manifest, site, plan.at(site))


def _of_site(manifest: Manifest, site: str, group: list[ExpertSpec]) -> SlotShape:
    """What the experts at one site need."""
    first, is_linear = group[0], manifest.router.site == "linear"
    count = first.inner.num_experts if first.inner else len(group)
    shares = manifest.variant == "hydralora" or (first.inner is not None and first.inner.variant == "hydralora")
    inner = count if is_linear or first.inner else 0
    sites = frozenset((site,)) if inner else frozenset()
    if site == "PROMPT":
        return SlotShape(inner=inner, inner_sites=sites, prompt=(first.length or 0) * count)
    if site == "P_ADAPTER":
        size = first.size or 0
        rows = size if shares else size * count
        return SlotShape(inner=inner, inner_sites=sites, parallel=rows, parallel_columns=(size + 1) * count)
    ranks = [first.rank or 0] * count if first.inner else [expert.rank or 0 for expert in group]
    rows = ranks[0] if shares else sum(ranks)
    return SlotShape(inner=inner, inner_sites=sites, targets=frozenset((site,)), rank=rows, columns=sum(ranks))


def aligned(size: int) -> int:
    """The least multiple of 4 that holds so many: a layer's numbers then begin at 16 bytes, and a kernel is compiled for one case only."""
    return -(-size // 4) * 4


def block(size: int) -> int:
    """The least power of two that holds so many."""
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Section:
    """Of one product: a slot's rows among the further rows of the base's weights, counted from the slot's first.

    Args:
        gate: the layer router's first row; its threshold's is its last.
        inner: of each site's own router the first row; its threshold's is its last.
        a: of each target's first factor. parallel: of the parallel adapter's.
        rows: in all, a multiple of 8, so that every slot's rows are aligned for any product.
    """

    gate: int
    inner: dict[str, int]
    a: dict[str, int]
    parallel: int
    rows: int


@dataclass(frozen=True)
class SlotLayout:
    """Where everything of a slot stands.

    Args:
        is_exact: the base is float32: rows of routers stand once.
    """

    config: ModelConfig
    shape: SlotShape
    is_exact: bool

    @property
    def parts(self) -> int:
        """How often a router's row stands."""
        return 1 if self.is_exact else 2

    @cached_property
    def gate_rows(self) -> int:
        """Rows of a layer's router and its threshold: both halves of a SwiGLU one, or the logits."""
        return max(2 * self.shape.hidden, self.shape.outputs) + 1 if self.shape.outputs else 0

    @property
    def inner_rows(self) -> int:
        return self.shape.inner + 1

    @cached_property
    def sections(self) -> dict[str, Section]:
        return {product: self._section(product) for product in PRODUCTS}

    def _section(self, product: str) -> Section:
        shape, place = self.shape, 0
        if product == "QKV":
            place += self.parts * self.gate_rows
        inner, a = {}, {}
        for site in INNER_OF[product]:
            if site in shape.inner_sites:
                inner[site] = place
                place += self.parts * self.inner_rows
        for target in LORA_OF[product]:
            if target in shape.targets:
                a[target] = place
                place += shape.rank
        parallel = place
        if product == "GATE_UP":
            place += shape.parallel
        return Section(0, inner, a, parallel, -(-place // 8) * 8)

    # -- the numbers beside the matrices, of one layer

    @property
    def output_block(self) -> int:
        """E of the kernels, for every router."""
        return block(max(self.shape.outputs, self.shape.inner, 2))

    @cached_property
    def routers(self) -> tuple[str, ...]:
        """The layer's first, then those of sites, in the order of INNER."""
        return (("layer",) if self.shape.outputs else ()) + tuple(site for site in INNER if site in self.shape.inner_sites)

    def router(self, site: str) -> int:
        """Its number; that of a router that no adapter has is never looked at."""
        return self.routers.index(site) if site in self.routers else 0

    @cached_property
    def word_width(self) -> int:
        """Of what all routers of a layer say of a token: of each the scores, the threshold, what is selected, and the weights."""
        return aligned(len(self.routers) * (3 * self.output_block + 1))

    @cached_property
    def column_sites(self) -> tuple[str, ...]:
        """Blocks of columns that there are."""
        return tuple(site for site in COLUMNS if site in self.shape.targets or (site == "P_ADAPTER" and self.shape.parallel))

    def column_block(self, site: str) -> int:
        """K of the kernels: columns of a second factor."""
        count = self.shape.parallel_columns if site == "P_ADAPTER" else self.shape.columns
        return max(block(count), LEAST)

    @cached_property
    def prompt_block(self) -> int:
        return max(block(self.shape.prompt), LEAST) if self.shape.prompt else 0

    @cached_property
    def ints(self) -> "Fields":
        """Numbers of outputs, kinds, places, and where the counters' cells are."""
        found = Fields()
        count = len(self.routers)
        found.add("outputs", count)
        found.add("softmax", count)
        found.add("hidden", 1)
        found.add("residual", 1)
        for site in self.column_sites:
            for name in ("row", "gate", "inner"):
                found.add(f"{site}.{name}", self.column_block(site))
        found.add("prompt.column", 1)
        found.add("prompt.inner", self.prompt_block)
        found.add("counted", count * self.output_block)  # of each counter of a router, the output that it counts
        found.add("cells", count)  # and where a router's counters begin
        return found.aligned()

    @cached_property
    def floats(self) -> "Fields":
        """Biases, second factors of routers, scales, gates of heads."""
        shape, found = self.shape, Fields()
        found.add("gate.bias", self.gate_rows)
        found.add("w2", shape.outputs * shape.hidden)
        found.add("w2.bias", shape.outputs)
        for site in self.routers:
            if site != "layer":
                found.add(f"{site}.bias", self.inner_rows)
        for site in self.column_sites:
            found.add(f"{site}.scale", self.column_block(site))
        found.add("parallel.bias", shape.parallel)
        found.add("head_gate", self.config.num_heads if shape.prompt else 0)
        found.add("shares", len(self.routers))
        return found.aligned()

    @cached_property
    def matrices(self) -> "Fields":
        """Second factors, columns first: (K, out) of each block."""
        found = Fields()
        for site in self.column_sites:
            out = self.config.hidden_size if site == "P_ADAPTER" else linear_shape(self.config, site)[0]
            found.add(site, self.column_block(site) * out)
        return found

    @property
    def prompt_numbers(self) -> int:
        """Of a prompt's keys and values, float32: (2, K, N, P)."""
        return 2 * self.config.num_kv_heads * self.prompt_block * self.config.head_dim

    def inputs(self, product: str) -> int:
        """Numbers in a row of a product's weights."""
        return linear_shape(self.config, {"QKV": "Q", "O": "O", "GATE_UP": "UP", "DOWN": "DOWN"}[product])[1]

    def row_bytes(self, itemsize: int) -> int:
        """Of one slot in all layers, what stands among the base's weights; `itemsize`: of a number of the base."""
        return self.config.num_layers * sum(section.rows * self.inputs(product) for product, section in self.sections.items()) * itemsize

    def slot_bytes(self, itemsize: int) -> int:
        """Of one slot in all layers, with what stands beside the weights."""
        beside = self.matrices.size * itemsize + 4 * (self.ints.size + self.floats.size + self.prompt_numbers)
        return self.row_bytes(itemsize) + self.config.num_layers * beside


class Fields:
    """Named runs of numbers, one behind the other."""

    def __init__(self) -> None:
        self._places: dict[str, slice] = {}
        self.size = 0

    def add(self, name: str, count: int) -> None:
        self._places[name] = slice(self.size, self.size + count)
        self.size += count

    def aligned(self) -> "Fields":
        self.size = aligned(self.size)
        return self

    def at(self, name: str) -> int:
        """Where it begins; 0 where there is none of it, and nobody looks."""
        return self._places[name].start if name in self._places else 0

    def __getitem__(self, name: str) -> slice:
        return self._places[name]

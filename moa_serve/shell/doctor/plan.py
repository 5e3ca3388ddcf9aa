"""`moa-serve doctor --plan`: what fits on a GPU that need not be there, and what adapters' slots cost; by arithmetic, with gpu/plan.py.

Reads a config.json and adapters' headers at most. It says nothing of time: no number here was measured.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.manifest import BaseShape
from moa_serve.adapter.store import AdapterStore
from moa_serve.bench.shapes import shapes_of
from moa_serve.config import ModelConfig
from moa_serve.engine.engine import GPU_MEMORY_UTILIZATION, EngineOptions
from moa_serve.errors import ModelNotFound, ModelUnsupported, sized
from moa_serve.gpu.layout import SlotLayout, SlotShape
from moa_serve.gpu.placement import Placement
from moa_serve.gpu.plan import CUDA_BYTES, MemoryPlan, plan
from moa_serve.llm import slot_shape
from moa_serve.model.weights import allocate, read_config
from moa_serve.shell import terminal
from moa_serve.shell.doctor.installation import base_folder
from moa_serve.train.recipe import Recipe, manifest_of

SCHEMA = "moa-plan/1"
MEMORY = (24, 48, 80)
DTYPE = torch.bfloat16  # what a GPU computes in by default
_SEEN = 2**30 // 200  # bytes of a part that is not 0.00 GiB
SHORT_CONTEXT = 2048
CARDS = {24: 24_564, 48: 46_068, 80: 81_559}
"""By the GB that a card is sold with the MiB that it reports, an RTX 4090, an L40S and an H100. Any other number is taken as GiB."""

FAMILIES = {
    "Soft MoA r8, prompt": Recipe(variant="soft_moa"),
    "Sparse MoA r8": Recipe(variant="sparse_moa"),
    "LoRA r16": Recipe(variant="lora", rank=16),
    "MoLoRA 8 x r8": Recipe(variant="molora"),
    "HydraLoRA 8 x r8": Recipe(variant="hydralora"),
    "MoLA 8 x r8": Recipe(variant="mola"),
    "AdaMoLE 8 x r8": Recipe(variant="adamole"),
}
"""The paper's adapters, LoRA at Q, K, V, O and DOWN."""

_PARTS = {
    "embedding": "embedding",
    "layers": "layers",
    "head": "norm and head",
    "slot_rows": "slots, rows of products",
    "slot_bank": "slots, all else",
    "workspace": "workspace of a step",
    "step": "logits and long prompts",
    "recorded": "recorded steps",
    "held": "CUDA itself (assumed)",
    "reserve": "left free",
    "unused": "more than all rows can use",
    "kv_cache": "KV cache",
}


@dataclass(frozen=True, slots=True)
class SlotCost:
    """Of one family on a base. The shares are of the bytes of the base that a decode step reads.

    Args:
        slot_bytes: of one slot, of which `row_bytes` are rows of products.
        is_apart: so many slots' rows stand in buffers of their own, and each layer has four more launches.
        share_of_one: what a step reads more with `num_slots` slots and one adapter at work: the rows of all of them, where they stand among
            the base's weights, or its own; and what else is its.
        share_of_all: with a different adapter of each slot at work.
    """

    family: str
    num_parameters: int
    slot_bytes: int
    row_bytes: int
    is_apart: bool
    share_of_one: float
    share_of_all: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """
    Args:
        base: its name. slots: whose shape they have, in words.
        plans: by the GB that were asked for.
    """

    base: str
    is_public: bool
    slots: str
    options: EngineOptions
    plans: dict[int, MemoryPlan]
    costs: list[SlotCost]

    @property
    def fits(self) -> bool:
        return any(not found.short for found in self.plans.values())


def outlook(
    model: str | None,
    shapes: str | None,
    memory: Sequence[int],
    *,
    num_slots: int | None = None,
    max_model_len: int | None = None,
    adapters_dir: Path | None = None,
) -> Outlook:
    """What the command shows.

    Raises:
        MoaError: there is no such base here, it has no such context, or the folder of adapters cannot be read.
    """
    name, config = _base(model, shapes)
    options = EngineOptions() if num_slots is None else EngineOptions(num_slots=num_slots)
    shape, slots = SlotShape.usual(), "of the usual shape, for Soft and Sparse MoA of the paper's sizes"
    if adapters_dir is not None:
        names = AdapterStore(config, base_name=name, adapters_dir=adapters_dir).scan()
        shape = slot_shape([AdapterSource(adapters_dir / found) for found in names], config)
        slots = f"as the adapters of the folder need them ({len(names)} found)" if names else f"{slots}: the folder holds no adapter"
    plans = {
        size: plan(
            config,
            shape,
            num_slots=options.num_slots,
            max_num_seqs=options.max_num_seqs,
            max_batch_tokens=options.max_batch_tokens,
            block_size=options.block_size,
            dtype=DTYPE,
            total_bytes=card_bytes(size),
            utilization=GPU_MEMORY_UTILIZATION,
            max_model_len=max_model_len,
        )
        for size in memory
    }
    costs = [slot_cost(family, recipe, config, options.num_slots) for family, recipe in FAMILIES.items()]
    return Outlook(name, shapes is not None, slots, options, plans, costs)


def card_bytes(size: int) -> int:
    """Of a card that is sold with so many GB."""
    return CARDS.get(size, size * 1024) * 2**20


def slot_cost(family: str, recipe: Recipe, config: ModelConfig, num_slots: int) -> SlotCost:
    manifest = manifest_of(recipe, BaseShape.of(config))
    layout = SlotLayout(config, SlotShape.of(manifest), is_exact=False)
    slot, rows = layout.slot_bytes(DTYPE.itemsize), layout.row_bytes(DTYPE.itemsize)
    weights = allocate(config, torch.device("meta"), DTYPE)
    read = weights.num_bytes - (0 if config.tie_word_embeddings else weights.embed.nbytes)  # of the embedding some rows
    is_apart = Placement(layout, num_slots, DTYPE.itemsize).gathers
    one = (1 if is_apart else num_slots) * rows + slot - rows
    return SlotCost(family, manifest.num_parameters, slot, rows, is_apart, one / read, num_slots * slot / read)


def _base(model: str | None, shapes: str | None) -> tuple[str, ModelConfig]:
    if shapes is not None:
        return shapes, shapes_of(shapes)
    folder = base_folder(model)
    name = "the default base" if model is None else Path(model).name
    if folder is None:
        raise ModelNotFound(
            f"{name} is not on this machine, and a plan fetches nothing; give --shapes, or a folder with config.json", param="model"
        )
    if folder.is_file():
        raise ModelUnsupported(f"{name} is a file, and a plan is made of a config.json; give its folder, or --shapes", param="model")
    return name, read_config(folder)


def show(console: Console, found: Outlook) -> None:
    """The cards side by side, and the families of adapters below."""
    options = found.options
    console.print(
        f"{found.base} on the triton backend, bfloat16: {options.num_slots} slots {found.slots}; steps of {options.max_num_seqs} rows and "
        f"{options.max_batch_tokens} tokens",
        soft_wrap=True,
    )
    terminal.print_table(console, _cards(found))
    for size, one in found.plans.items():
        if one.short:
            console.print(f"{size} GB: {sized(one.short)} are missing; {one.remedy}", soft_wrap=True)
    console.print()
    terminal.print_table(console, _costs(found))


def _cards(found: Outlook) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("GiB, and percent of the card")
    for size in found.plans:
        table.add_column(f"{size} GB", justify="right")
    plans = list(found.plans.values())
    table.add_row("the card, as it reports it", *(f"{one.total / 2**30:.2f} 100.0%" for one in plans))
    for name, label in _PARTS.items():
        parts = [getattr(one, name) for one in plans]
        if max(parts) >= _SEEN:
            cells = (f"{part / 2**30:.2f} {100 * part / one.total:5.1f}%" for part, one in zip(parts, plans, strict=True))
            table.add_row(label, *cells)
    counted = {"tokens in the KV cache": [one.num_tokens for one in plans], "context that is served": [one.served_context for one in plans]}
    full = plans[0].max_context
    counted |= {f"sequences of {size:,} tokens": [one.num_sequences(size) for one in plans] for size in _contexts(full)}
    for label, counts in counted.items():
        table.add_row(label, *(f"{count:,}" for count in counts))
    return table


def _contexts(full: int) -> list[int]:
    return [full, SHORT_CONTEXT] if full > SHORT_CONTEXT else [full]


def _costs(found: Outlook) -> Table:
    slots = found.options.num_slots
    title = f"a slot for each family, and what a decode step reads beside the base's bytes with {slots} of them"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("family", "parameters", "MiB a slot", "rows", "they stand", "1 adapter at work", f"{slots} at work"):
        table.add_column(name, justify="left" if name == "family" else "right")
    for one in found.costs:
        mib = (f"{size / 2**20:.1f}" for size in (one.slot_bytes, one.row_bytes))
        shares = (f"{100 * share:.2f}%" for share in (one.share_of_one, one.share_of_all))
        table.add_row(one.family, f"{one.num_parameters:,}", *mib, "apart" if one.is_apart else "among weights", *shares)
    return table


def to_json(found: Outlook) -> dict[str, Any]:
    """Schema `moa-plan/1`. Without paths and the name of a base of one's own."""
    options = found.options
    cards = []
    for size, one in found.plans.items():
        parts = asdict(one)
        counts = {name: parts.pop(name) for name in ("fitting_context", "num_pages", "block_size", "max_context")}
        sequences = {str(context): one.num_sequences(context) for context in _contexts(one.max_context)}
        cards.append(
            {"memory_gb": size, "fits": not one.short, "remedy": one.remedy, "bytes": parts}
            | counts
            | {"num_tokens": one.num_tokens, "served_context": one.served_context, "sequences": sequences}
        )
    return {
        "schema": SCHEMA,
        "moa_serve": version("moa_serve"),
        "base": found.base if found.is_public else "a base of one's own",
        "dtype": str(DTYPE).removeprefix("torch."),
        "options": {name: getattr(options, name) for name in ("num_slots", "max_num_seqs", "max_batch_tokens", "block_size")},
        "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
        "assumed_cuda_bytes": CUDA_BYTES,
        "slots": found.slots,
        "cards": cards,
        "families": [asdict(cost) for cost in found.costs],
    }

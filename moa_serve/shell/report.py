"""What `moa-serve check` says of an adapter: a table for people, an object for programs."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import KINDS, ExpertSpec, Manifest, SelectConstant, SelectThresholdFn, SelectTopK
from moa_serve.errors import MoaError
from moa_serve.native.library import status
from moa_serve.shell.terminal import is_terminal, print_table, visible

ROUTERS = "routers"  # what belongs to no expert alone: routers, thresholds, HydraLoRA's shared first factor

_FULL_WIDTH = 72  # columns of the table of experts with its frame


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """Equal experts beside one linear stand in one row: `Q/0-7`."""

    name: str
    kind: str
    layers: str
    size: str
    scale: float | None
    num_parameters: int


def expert_rows(manifest: Manifest) -> list[ExpertRow]:
    counts = _parameters(manifest)
    rows = []
    for _, group in itertools.groupby(sorted(manifest.experts, key=_place), key=_shape_of):
        experts = list(group)
        first = experts[0]
        numbers = ranges([expert.index for expert in experts])
        name = f"{first.site}/{numbers}" if "/" in first.name else first.name
        kind = first.kind.replace("_", " ")
        if first.inner is not None:
            kind += f", {first.inner.variant} of {first.inner.num_experts}"
        size = f"rank {first.rank}" if first.rank else f"length {first.length}" if first.length else f"size {first.size}"
        total = sum(counts.get((expert.name, layer), 0) for expert in experts for layer in expert.layers)
        rows.append(ExpertRow(name, kind, ranges(first.layers), size, first.scale if first.kind == "lora" else None, total))
    return rows


def _place(expert: ExpertSpec) -> tuple[int, int, list[int]]:
    return KINDS.index(expert.site), expert.index, expert.layers


def _shape_of(expert: ExpertSpec) -> tuple[Any, ...]:
    """Equal for experts that one row can tell of: numbered ones of one linear, all else the same."""
    own = None if "/" in expert.name else expert.name
    return expert.site, own, expert.kind, tuple(expert.layers), expert.rank, expert.length, expert.size, expert.alpha, expert.inner


def _parameters(manifest: Manifest) -> dict[tuple[str, int], int]:
    """(owner, layer) -> number of parameters, where the owner is an expert or ROUTERS."""
    shapes = manifest.expected_tensors()
    counts: dict[tuple[str, int], int] = {}
    for name, (owner, layer) in manifest.owners().items():
        key = (owner or ROUTERS, layer)
        counts[key] = counts.get(key, 0) + math.prod(shapes[name])
    return counts


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, short: 0-3,7,9-10."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def router_text(manifest: Manifest) -> str:
    router = manifest.router
    if router.site == "none":
        return "none: every expert always counts fully"
    where = {"layer": "one in each layer", "linear": "one at each linear"}[router.site]
    reads = {
        "residual": "the residual stream",
        "normed": "the normed input",
        "pooled": "the mean over the prompt",
        "linear": "the linear's input",
    }[router.input or "linear"]
    hidden = router.hidden
    width = "" if hidden is None else f" of {hidden}" if isinstance(hidden, int) else f" of {min(hidden)} to {max(hidden)}"
    net = f"{router.net}{width}{'' if router.bias else ' without bias'}"
    return f"{where}, reads {reads}; {net}, {router.activation}, keeps {_selection(manifest)}"


def _selection(manifest: Manifest) -> str:
    select = manifest.router.select
    if isinstance(select, SelectConstant):
        return f"weights >= {select.threshold:g}"
    if isinstance(select, SelectThresholdFn):
        return f"weights >= a learned threshold, at most {select.max_threshold:g}"
    if isinstance(select, SelectTopK):
        return f"the {select.k} best, renormalised"
    return "all" if select.kind == "all" else "what is above a learned threshold, subtracted and renormalised"


def to_json(name: str, adapter: Adapter, base: str, is_tried: bool) -> dict[str, Any]:
    manifest = adapter.manifest
    return {
        "ok": True,
        "name": name,
        "base": base,
        "variant": manifest.variant,
        "source_format": adapter.source_format,
        "router": manifest.router.model_dump(mode="json"),
        "experts": [expert.model_dump(mode="json", exclude_none=True) for expert in manifest.experts],
        "parameters": manifest.num_parameters,
        "bytes": adapter.num_bytes,
        "revision": adapter.revision,
        "self_test": is_tried,
        "warnings": list(adapter.warnings),
    }


def failure_json(name: str, error: MoaError) -> dict[str, Any]:
    return {"ok": False, "name": name, "code": error.code, "error": str(error), "problems": list(error.problems)}


def show(console: Console, name: str, adapter: Adapter, base: str, *, is_tried: bool) -> None:
    manifest = adapter.manifest
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for key, value in _facts(adapter, is_tried):
        facts.add_row(key, Text(visible(value)))
    is_narrow = is_terminal() and console.width < _FULL_WIDTH
    frame: dict[str, Any] = {"box": None, "padding": (0, 1, 0, 0)} if is_narrow else {"box": box.SIMPLE_HEAD}
    experts = Table(**frame, pad_edge=False, header_style="bold", show_footer=True, footer_style="bold")
    experts.add_column("expert", "total", overflow="fold")
    for title in ("kind", "layers", "size"):
        experts.add_column(title, overflow="fold")
    experts.add_column("scale", justify="right", overflow="fold")
    experts.add_column("parameters", f"{manifest.num_parameters:,}", justify="right", overflow="fold")
    for row in expert_rows(manifest):
        scale = "" if row.scale is None else f"{row.scale:g}"
        experts.add_row(row.name, row.kind, row.layers, row.size, scale, f"{row.num_parameters:,}")
    shared = sum(count for (owner, _), count in _parameters(manifest).items() if owner == ROUTERS)
    if shared:
        experts.add_row(_shared_name(manifest), "", "", "", "", f"{shared:,}")
    console.print(Text.assemble(("✓ ", "bold green"), (visible(name), "bold"), f" can be served on {visible(base)}"), soft_wrap=True)
    print_table(console, facts)
    print_table(console, experts)
    for warning in adapter.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), visible(warning)))


def _shared_name(manifest: Manifest) -> str:
    return "routers, shared A" if manifest.variant == "hydralora" else ROUTERS


def _facts(adapter: Adapter, is_tried: bool) -> list[tuple[str, str]]:
    manifest = adapter.manifest
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in adapter.tensors.values()})
    facts = [
        ("variant", manifest.variant),
        ("format", adapter.source_format),
        ("router", router_text(manifest)),
        ("parameters", f"{manifest.num_parameters:,}"),
        ("memory", f"{adapter.num_bytes:,} bytes, {' and '.join(dtypes)}"),
        ("revision", adapter.revision),
        ("self-test", "passed" if is_tried else "not run"),
        ("native step", status()),
    ]
    if manifest.description:
        facts.append(("description", manifest.description))
    return facts

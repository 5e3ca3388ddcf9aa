"""What `moa-serve inspect` finds in an adapter: who is weighed how in which layer, token by token, and how alike the experts are.

Three views, after the paper's figures 3 to 5 (weight and activation by layer), 6 and 7 (weights token by token) and what it says of
representation collapse (similarity of the experts' outputs). Here the numbers are made, shown on a terminal and written as JSON; plots.py
draws them. Adapters without a router have the third view only.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.engine.activity import Activity
from moa_serve.engine.routing import Routing, expert_names
from moa_serve.errors import InvalidRequest
from moa_serve.llm import LLM
from moa_serve.model.similarity import ACROSS, GOOD_TOKENS, MIN_TOKENS, Collapse, Similarity, mean_over_layers
from moa_serve.shell.activity import activity_table, cost
from moa_serve.shell.drawing import drawing_module
from moa_serve.shell.heat import Cell, HeatTable, Row, show_lines, width_of
from moa_serve.shell.prompts import PromptLine
from moa_serve.shell.terminal import counted, one_line, visible, warn

FORMATS = ("png", "svg")
JSON_NAME = "inspect.json"
DEFAULT_TEXTS = (  # of several kinds, so that experts have something to tell apart; together more than GOOD_TOKENS
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Tom has 3 apples and buys 4 more; then he gives 2 of them away. How many apples does he have now?",
    "def mean(numbers):\n    return sum(numbers) / len(numbers)  # fails where there are none",
    "To make pancakes, mix two eggs with flour and milk, and let the batter stand for ten minutes.",
    "Is it true that whales are mammals? Yes: they breathe air and feed milk to their young.",
    "Dear Sir or Madam, I am writing to complain about the late delivery of my order.",
    "Light travels faster than sound, so we see the lightning before we hear the thunder.",
)

_MOST_ROWS = 24  # tokens of a text that a terminal shows; the figure shows more, the JSON all
_TOKEN_WIDTH = 14  # columns of a terminal for the text of one token
_NOTHING = "–"


@dataclass(frozen=True, slots=True, eq=False)
class TokenRouting:
    """One text under the routers. `labels` has a text fit to be shown for each of its tokens, `layers` are those that were asked for."""

    token_ids: list[int]
    labels: list[str]
    routing: Routing
    layers: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """
    Args:
        base: name of the base, fit to be shown; so is `name`.
        texts: what was read, fit to be shown.
        activity, tokens: None where the adapter has no router.
        is_profile: `activity` was counted in training and comes with the adapter.
        similarity: by layer, None where no expert stands; `num_compared` tokens of the texts.
    """

    name: str
    base: str
    adapter: Adapter
    texts: list[str]
    num_tokens: int
    activity: Activity | None
    is_profile: bool
    tokens: TokenRouting | None
    similarity: list[Similarity | None]
    num_compared: int

    @property
    def mean(self) -> Similarity:
        return mean_over_layers(self.similarity)

    @property
    def collapse(self) -> dict[str, list[Collapse | None]]:
        """By place, then by layer; None where fewer than two experts of the layer stand there."""
        layers = [{} if layer is None else layer.collapse for layer in self.similarity]
        places = [*self.mean.places, ACROSS]
        found = {place: [layer.get(place) for layer in layers] for place in places}
        return {place: values for place, values in found.items() if any(values)}

    @property
    def title(self) -> str:
        return f"{self.name} ({self.adapter.manifest.variant}) on {self.base}"


# -- finding out


def inspect_adapter(llm: LLM, name: str, adapter: Adapter, lines: Sequence[PromptLine], layers: str | None) -> Inspection:
    """Look into a loaded adapter.

    Args:
        lines: texts to read; none means the training's profile, where the adapter brings one, and DEFAULT_TEXTS for the rest.
        layers: to show token by token, as `0,15,29`; None for the first, the middle and the last.
    """
    manifest = adapter.manifest
    wanted = chosen_layers(layers, manifest)
    prompts = [_encode(llm, line) for line in lines or [PromptLine(text, "the default texts") for text in DEFAULT_TEXTS]]
    compared, num_compared = llm.similarity(prompts, adapter=name)
    activity, tokens, is_profile = None, None, False
    if manifest.router.site != "none":
        routings = [llm.route(prompt, adapter=name) for prompt in prompts]
        activity = None if lines else _profile(manifest)
        is_profile = activity is not None
        activity = activity or _counted(routings)
        tokens = TokenRouting(prompts[0], [token_label(llm, token) for token in prompts[0]], routings[0], wanted)
    texts = [visible(llm.tokenizer.decode(prompt)) if llm.tokenizer else " ".join(map(str, prompt)) for prompt in prompts]
    return Inspection(
        one_line(name), one_line(llm.name), adapter, texts, sum(map(len, prompts)), activity, is_profile, tokens, compared, num_compared
    )


def _encode(llm: LLM, line: PromptLine) -> list[int]:
    if line.has_adapter:
        raise InvalidRequest(f"{line.where}: names an adapter; inspect looks into one, so leave it out", param="file")
    if not isinstance(line.prompt, str):
        return line.prompt
    if llm.tokenizer is None:
        raise InvalidRequest(
            f'{llm.name} has no tokenizer; give token ids with --file FILE.jsonl, a line {{"prompt": [1, 2]}}', param="file"
        )
    return llm.tokenizer.encode(line.prompt, parse_special=True)


def _counted(routings: Sequence[Routing]) -> Activity:
    activity = Activity()
    for routing in routings:
        activity.add(routing, routing.weights.shape[1])
    return activity


def _profile(manifest: Manifest) -> Activity | None:
    if manifest.profile is None:
        return None
    activity = Activity.from_profile(manifest.profile, expert_names(manifest))
    if activity is None:
        warn("the adapter's profile has an unknown form; the default texts are used instead")
    return activity


def chosen_layers(text: str | None, manifest: Manifest) -> list[int]:
    """Layers to show token by token. Raises InvalidRequest where one does not exist, or has no expert."""
    own = [index for index in range(manifest.base.num_layers) if manifest.layer(index).experts]
    if text is None:
        return sorted({own[0], own[len(own) // 2], own[-1]})
    try:
        chosen = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InvalidRequest(f"--layers {text}: must be numbers of layers, as 0,15,29", param="layers") from None
    for layer in chosen:
        if layer not in own:
            raise InvalidRequest(f"--layers: the adapter has no expert in layer {layer}, only in {own[0]} to {own[-1]}", param="layers")
    return chosen


def token_label(llm: LLM, token: int) -> str:
    """A token as one short word: spaces as ␣, bytes that are no character as \\xe4, its number where it has no text."""
    data = llm.tokenizer.token_bytes(token) if llm.tokenizer else b""
    text = data.decode("utf-8", "backslashreplace").replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t")
    return visible(text) or f"#{token}"


# -- as JSON


def to_json(inspection: Inspection) -> dict[str, Any]:
    mean = inspection.mean
    collapse = {
        place: {"cka": _number(_mean(c.cka for c in found if c)), "cosine": _number(_mean(c.cosine for c in found if c))}
        for place, found in inspection.collapse.items()
    }
    return {
        "adapter": inspection.name,
        "variant": inspection.adapter.manifest.variant,
        "revision": inspection.adapter.revision,
        "base": inspection.base,
        "texts": inspection.texts,
        "num_tokens": inspection.num_tokens,
        "activity": _activity_json(inspection),
        "tokens": None if inspection.tokens is None else _tokens_json(inspection.tokens),
        "similarity": {
            "num_tokens": inspection.num_compared,
            "mean": _similarity_json(mean) | {"collapse": collapse},
            "layers": [None if layer is None else _similarity_json(layer) for layer in inspection.similarity],
        },
    }


def _activity_json(inspection: Inspection) -> dict[str, Any] | None:
    activity = inspection.activity
    if activity is None:
        return None
    source = "profile" if inspection.is_profile else "texts"
    by_layer = [_number(count) for count in activity.experts_by_layer]
    return {"source": source, **activity.to_json(), "experts_by_layer": by_layer}


def _tokens_json(tokens: TokenRouting) -> dict[str, Any]:
    routing = tokens.routing
    layers = {}
    for layer in tokens.layers:
        width = len(routing.experts[layer])
        layers[str(layer)] = {
            "experts": routing.experts[layer],
            "weights": _numbers(routing.weights[layer, :, :width]),
            "selected": routing.selected[layer, :, :width].tolist(),
            "gates": _numbers(routing.gates[layer, :, :width]),
            "threshold": None if routing.threshold is None else _numbers(routing.threshold[layer]),
            "inner": {name: _numbers(shares[layer]) for name, shares in routing.inner.items()},
        }
    return {"token_ids": tokens.token_ids, "tokens": tokens.labels, "layers": layers}


def _similarity_json(similarity: Similarity) -> dict[str, Any]:
    return {
        "experts": similarity.experts,
        "cka": _numbers(similarity.cka),
        "cosine": _numbers(similarity.cosine),
        "collapse": {place: {"cka": _number(c.cka), "cosine": _number(c.cosine)} for place, c in similarity.collapse.items()},
    }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _numbers(values: Tensor) -> Any:
    """Lists of the tensor's shape; NaN, which JSON does not have, as null."""
    return [_numbers(row) for row in values] if values.ndim > 1 else [_number(value) for value in values.tolist()]


def _mean(values: Any) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


# -- on a terminal


def show(console: Console, inspection: Inspection) -> None:
    facts = f", {counted(len(inspection.texts), 'text')}, {counted(inspection.num_tokens, 'token')}"
    console.print(Text.assemble((inspection.title, "bold"), (facts, "dim")), soft_wrap=True)
    if inspection.activity is None:
        console.print(Text("no router: its experts always count fully, so there are no weights to show", style="dim"), soft_wrap=True)
    else:
        _show_activity(console, inspection.activity, inspection.is_profile)
    if inspection.tokens is not None:
        _show_tokens(console, inspection.tokens)
    _show_similarity(console, inspection)


def _heading(console: Console, title: str, facts: str) -> None:
    console.print()
    console.print(Text.assemble((title, "bold"), (f", {facts}", "dim")), soft_wrap=True)


def _show_activity(console: Console, activity: Activity, is_profile: bool) -> None:
    source = "training's profile, " if is_profile else ""
    _heading(console, "Expert weight and activation by layer", f"{source}{counted(activity.num_tokens, 'token')}")
    width = width_of(console)
    show_lines(console, activity_table(activity, width))
    if activity.is_sparse:
        most = max(map(len, activity.layers)) or 1
        counts = {str(layer): Cell(f"{count:.2f}", count / most) for layer, count in enumerate(activity.experts_by_layer)}
        console.print(Text("experts selected by a token, in each layer", style="dim"), soft_wrap=True)
        show_lines(console, HeatTable("layer", list(counts), [Row("experts", counts)], 4).lines(width))
    console.print(Text(cost(activity), style="bold"), soft_wrap=True)


def _show_tokens(console: Console, tokens: TokenRouting) -> None:
    count, shown = len(tokens.labels), tokens.labels[:_MOST_ROWS]
    _heading(console, "Router weights token by token", f"the first text, {counted(count, 'token')}")
    is_sparse = not all(bool(tokens.routing.selected[layer, :, : len(tokens.routing.experts[layer])].all()) for layer in tokens.layers)
    console.print(Text(f"weight before selection, %{'; in brackets: not selected' if is_sparse else ''}", style="dim"), soft_wrap=True)
    for layer in tokens.layers:
        names = tokens.routing.experts[layer]
        weights, selected = tokens.routing.weights[layer].tolist(), tokens.routing.selected[layer].tolist()
        scale = max(max(row) for row in weights) or 1.0
        rows = []
        for position, label in enumerate(shown):
            cells = {name: _weight_cell(weights[position][i], selected[position][i], scale) for i, name in enumerate(names)}
            rows.append(Row(f"{position:>3} {_shortened(label)}", cells))
        show_lines(console, HeatTable(f"layer {layer}", names, rows, 4).lines(width_of(console)))
    if count > len(shown):
        console.print(Text(f"{count - len(shown)} more tokens are in --json and --out", style="dim"), soft_wrap=True)


def _weight_cell(weight: float, is_selected: bool, scale: float) -> Cell:
    percent = f"{100 * weight:.0f}"
    return Cell(percent, weight / scale) if is_selected else Cell(f"({percent})", None)


def _shortened(label: str) -> str:
    return label if cell_len(label) <= _TOKEN_WIDTH else set_cell_size(label, _TOKEN_WIDTH - 1) + "…"


def _show_similarity(console: Console, inspection: Inspection) -> None:
    facts = f"{counted(inspection.num_compared, 'token')}, before the router's weight"
    _heading(console, "Similarity of the experts' outputs", facts)
    if not inspection.collapse:
        console.print(Text("no two experts in any layer: nothing to compare", style="dim"), soft_wrap=True)
        return
    warn_of_few(inspection.num_compared)
    mean, width = inspection.mean, width_of(console)
    between = {(a, b): mean.between(a, b).cka for a in mean.places for b in mean.places}
    rows = [Row(a, {b: _cka_cell(between[a, b]) for b in mean.places}) for a in mean.places]
    console.print(Text("linear CKA of the experts at two places, mean over layers", style="dim"), soft_wrap=True)
    show_lines(console, HeatTable("", mean.places, rows, 5).lines(width))
    crowded = "the experts at a place, and of the absolute cosine of what they add; across: of " if len(inspection.collapse) > 1 else ""
    console.print(Text(f"collapse by layer: mean CKA of {crowded}experts at different places", style="dim"), soft_wrap=True)
    show_lines(console, _collapse_table(inspection.collapse).lines(width))


def warn_of_few(num_tokens: int) -> None:
    if num_tokens < MIN_TOKENS:
        warn(f"experts are compared by at least {MIN_TOKENS} tokens, and here are {num_tokens} behind the first of each text; give more")
    elif num_tokens < GOOD_TOKENS:
        warn(
            f"{num_tokens} tokens are few to compare experts by: the CKA of unrelated ones strays from 0 by {1.4 / num_tokens:.2f}; "
            f"give at least {GOOD_TOKENS}"
        )


def _cka_cell(value: float) -> Cell:
    return Cell(f"{value:.2f}", value) if math.isfinite(value) else Cell(_NOTHING, None)


def _collapse_cell(collapse: Collapse) -> Cell:
    cell = _cka_cell(collapse.cka)
    return Cell(f"{cell.text} {collapse.cosine:.2f}", cell.heat) if math.isfinite(collapse.cosine) else cell


def _collapse_table(collapse: Mapping[str, Sequence[Collapse | None]]) -> HeatTable:
    num_layers = len(next(iter(collapse.values())))
    rows = []
    for layer in range(num_layers):
        cells = {place: _collapse_cell(found) for place, values in collapse.items() if (found := values[layer]) is not None}
        if cells:
            rows.append(Row(str(layer), cells))
    means = {
        place: _collapse_cell(Collapse(_mean(c.cka for c in values if c), _mean(c.cosine for c in values if c)))
        for place, values in collapse.items()
    }
    width = max(len(cell.text) for row in rows for cell in row.cells.values())
    return HeatTable("layer", list(collapse), [*rows, Row("mean", means, is_summary=True)], width, 2)


# -- as files


def load_plots() -> ModuleType:
    """The module that draws. Raises InvalidRequest where matplotlib, which is an extra, is not installed."""
    return drawing_module("plots", option="--out", without="the tables need none")


def write(inspection: Inspection, folder: Path, file_format: str) -> list[Path]:
    """The numbers and a figure of each view; the files that were written."""
    plots = load_plots()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbers = folder / JSON_NAME
        numbers.write_text(json.dumps(to_json(inspection), indent=1) + "\n")
        return [numbers, *plots.write(inspection, folder, file_format)]
    except OSError as error:
        raise InvalidRequest(f"--out {folder}: cannot be written ({error.strerror})", param="out") from None

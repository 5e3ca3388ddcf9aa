"""Expert activity: what an adapter's routers did with the tokens of some prompts, as numbers and as a coloured table."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.color import Color
from rich.style import Style
from rich.text import Text
from torch import Tensor

from moa_serve.adapter.manifest import KINDS
from moa_serve.engine.routing import Routing

_ABSENT = "·"  # the layer has no such expert
_HEAT = ((0.0, (22, 26, 46)), (0.45, (30, 96, 122)), (0.75, (72, 172, 120)), (1.0, (250, 214, 72)))  # value, RGB
_BRIGHT = 0.6  # of a value: black digits from here on


@dataclass(frozen=True, slots=True)
class Use:
    """One expert in one layer: the mean of its router's output, and the share of tokens that selected it, both 0 to 1."""

    weight: float
    selected: float


class Activity:
    """Sums over tokens. Routers of one adapter only."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []
        self.num_tokens = 0
        self._weight: Tensor = torch.zeros(())
        self._selected: Tensor = torch.zeros(())

    def add(self, routing: Routing, num_tokens: int) -> None:
        """Count a prompt.

        Args:
            num_tokens: that it stands for: those of `routing`, or more where the weights of a prompt hold for its completion too.
        """
        self.names = routing.experts
        self.num_tokens += num_tokens
        self._weight = self._weight + routing.weights.double().mean(1) * num_tokens  # (L, E)
        self._selected = self._selected + routing.selected.double().mean(1) * num_tokens

    @property
    def layers(self) -> list[dict[str, Use]]:
        """Each layer's experts in canonical order; empty where the adapter leaves the layer alone."""
        return [
            {
                name: Use(float(self._weight[layer, column]) / self.num_tokens, float(self._selected[layer, column]) / self.num_tokens)
                for column, name in enumerate(names)
            }
            for layer, names in enumerate(self.names)
        ]

    @property
    def experts_per_token(self) -> tuple[float, float]:
        """(selected, all), each in the mean over tokens and over layers that have experts."""
        layers = [layer for layer in self.layers if layer]
        selected = sum(use.selected for layer in layers for use in layer.values())
        return selected / len(layers), sum(map(len, layers)) / len(layers)

    @property
    def skippable(self) -> float:
        """Share of expert evaluations that have the weight 0."""
        selected, total = self.experts_per_token
        return 1 - selected / total

    def to_json(self) -> dict[str, Any]:
        selected, total = self.experts_per_token
        return {
            "num_tokens": self.num_tokens,
            "experts_per_token": round(selected, 4),
            "num_experts": round(total, 4),
            "skippable": round(self.skippable, 4),
            "layers": [
                {name: {"weight": round(use.weight, 4), "selected": round(use.selected, 4)} for name, use in layer.items()}
                for layer in self.layers
            ],
        }

    def cost(self) -> str:
        selected, total = self.experts_per_token
        chosen = f"{selected:.2f} of {total:.4g} experts per token and layer selected"
        return f"{chosen}, {self.skippable:.0%} of expert evaluations can be skipped"

    def table(self, width: int) -> list[Text]:
        """Layers down, experts across, at most `width` columns wide: numbers coloured by size, so that both eye and pipe can read them.

        What does not fit is first written shorter, then continued below: nothing is left out.
        """
        layers = {index: layer for index, layer in enumerate(self.layers) if layer}
        names = sorted({name for layer in layers.values() for name in layer}, key=_canonical)
        is_sparse = any(use.selected < 1 for layer in layers.values() for use in layer.values())
        scale = 1.0 if is_sparse else max(use.weight for layer in layers.values() for use in layer.values())
        style = _CellStyle(is_sparse, is_short=False, scale=scale or 1.0)
        widths = _widths(names, style)
        if _LABEL + sum(widths) > width:
            style = _CellStyle(is_sparse, is_short=True, scale=scale or 1.0)
            widths = _widths(names, style)
        lines = [Text(style.legend, style="dim")]
        for start, end in _blocks(names, widths, width - _LABEL):
            lines += _block(layers, names[start:end], widths[start:end], style)
        return lines


_LABEL = 6  # columns for "layer"


@dataclass(frozen=True, slots=True)
class _CellStyle:
    """How a cell says what it says: the share of tokens where experts are skipped, the weight alone where all always count."""

    is_sparse: bool
    is_short: bool
    scale: float

    @property
    def legend(self) -> str:
        if self.is_sparse:
            return "tokens that selected the expert, %" + ("" if self.is_short else ", and the router's mean weight")
        return "the router's mean weight" + (", %" if self.is_short else "") + "; every expert counts for every token"

    @property
    def width(self) -> int:
        return 3 if self.is_short else 8 if self.is_sparse else 4

    def text(self, use: Use) -> str:
        if self.is_short:
            return f"{100 * (use.selected if self.is_sparse else use.weight):.0f}"
        return f"{100 * use.selected:3.0f} {use.weight:.2f}" if self.is_sparse else f"{use.weight:.2f}"

    def heat(self, use: Use) -> Style:
        return _heat(use.selected if self.is_sparse else use.weight / self.scale)


def _canonical(name: str) -> tuple[int, int]:
    site, _, index = name.partition("/")
    return KINDS.index(site), int(index or 0)


def _widths(names: Sequence[str], style: _CellStyle) -> list[int]:
    """Of each column. A linear's name stands once above all its experts, so it is only the first that may have to make room for it."""
    gap = 1 if style.is_short else 2
    widths = [style.width + gap for _ in names]
    for site, group in itertools.groupby(range(len(names)), key=lambda index: _site(names[index])):
        columns = list(group)
        widths[columns[0]] += max(0, len(site) + gap - sum(widths[column] for column in columns))
    return widths


def _blocks(names: Sequence[str], widths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Ranges of columns that fit; the experts of one linear stay together where they fit at all."""
    blocks, start = [], 0
    while start < len(names):
        end, used = start, 0
        while end < len(names) and (end == start or used + widths[end] <= width):
            used += widths[end]
            end += 1
        cut = end
        while end < len(names) and cut > start and _site(names[cut]) == _site(names[cut - 1]):
            cut -= 1
        end = cut if cut > start else end
        blocks.append((start, end))
        start = end
    return blocks


def _site(name: str) -> str:
    return name.partition("/")[0]


def _block(layers: dict[int, dict[str, Use]], names: Sequence[str], widths: Sequence[int], style: _CellStyle) -> list[Text]:
    lines = _header(names, widths)
    for index, layer in layers.items():
        row = Text.assemble((f"{index:>{_LABEL - 1}} ", "dim"))
        for name, width in zip(names, widths, strict=True):
            use = layer.get(name)
            row.append(_centred(style.text(use) if use else _ABSENT, width), style.heat(use) if use else "dim")
        lines.append(row)
    footer = Text.assemble(("mean".rjust(_LABEL - 1) + " ", "bold"))
    for name, width in zip(names, widths, strict=True):
        uses = [layer[name] for layer in layers.values() if name in layer]
        mean = Use(sum(use.weight for use in uses) / len(uses), sum(use.selected for use in uses) / len(uses))
        footer.append(_centred(style.text(mean), width), style.heat(mean) + Style(bold=True))
    return [*lines, footer]


def _header(names: Sequence[str], widths: Sequence[int]) -> list[Text]:
    top = "layer "
    for site, group in itertools.groupby(zip(names, widths, strict=True), key=lambda column: _site(column[0])):
        top += _centred(site, sum(width for _, width in group))
    numbers = " " * _LABEL + "".join(_centred(name.partition("/")[2], width) for name, width in zip(names, widths, strict=True))
    lines = [top, numbers] if numbers.strip() else [top]
    return [Text(line.rstrip(), style="bold") for line in lines]


def _centred(text: str, width: int) -> str:
    return text.rjust((width + len(text)) // 2).ljust(width)


def _heat(value: float) -> Style:
    """Dark for 0, yellow for 1; rich takes the nearest colour that the terminal has."""
    value = min(max(value, 0.0), 1.0)
    upper = next(i for i, (stop, _) in enumerate(_HEAT) if value <= stop) or 1
    (low, cold), (high, hot) = _HEAT[upper - 1], _HEAT[upper]
    part = (value - low) / (high - low)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(cold, hot, strict=True))
    return Style(color="black" if value >= _BRIGHT else "white", bgcolor=Color.from_rgb(red, green, blue))

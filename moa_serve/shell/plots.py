"""The figures of `moa-serve inspect`, by matplotlib: an extra, so this module is imported only where somebody wants figures.

Figures are made without pyplot, under matplotlib's own defaults, whatever a user's matplotlibrc says. Texts from files and models are
drawn as they are: no mathtext, no control characters, and what the font lacks as \\uXXXX.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from moa_serve.model.similarity import ACROSS, Collapse, Similarity, canonical, place_of
from moa_serve.shell.figure_style import figure_style
from moa_serve.shell.inspect import Inspection
from moa_serve.shell.terminal import visible

Array = npt.NDArray[np.float64]

MOST_TOKENS = 64  # of a text in one figure
_LONGEST_TOKEN, _LONGEST_NAME = 14, 48  # characters
_LABEL_INCHES = 0.6  # of an upright token
_TITLE_INCHES = 0.095  # of a character of the title
_MOST_INCHES = 14.0  # height of a heat map, however many experts
_WEIGHTS, _LIKENESS = "viridis", "magma"  # perceptually uniform
_STYLE: dict[Any, Any] = {
    "figure.titlesize": 11,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "svg.fonttype": "none",  # text stays text: it can be searched
    "svg.hashsalt": "moa_serve",  # equal numbers give equal files
    "figure.constrained_layout.h_pad": 0.07,
}


def write(inspection: Inspection, folder: Path, file_format: str) -> list[Path]:
    """One file for each view that the adapter has."""
    figures: dict[str, Callable[[Inspection], Figure]] = {}
    if inspection.activity is not None:
        figures["activity"] = activity_figure
    if inspection.tokens is not None:
        figures["tokens"] = tokens_figure
    if inspection.collapse:
        figures["similarity"] = similarity_figure
        figures["similarity_by_layer"] = similarity_by_layer_figure
    written = []
    for name, make in figures.items():
        path = folder / f"{name}.{file_format}"
        with figure_style(_STYLE):
            make(inspection).savefig(path, metadata={"Date": None} if file_format == "svg" else None)
        written.append(path)
    return written


# -- expert weight and activation by layer


def activity_figure(inspection: Inspection) -> Figure:
    """Experts down, layers across: mean weights, and where experts are skipped, the share of tokens and the number of experts selected."""
    activity = inspection.activity
    assert activity is not None
    layers, is_sparse = activity.layers, activity.is_sparse
    names = sorted({name for layer in layers for name in layer}, key=canonical)
    weight, selected = np.full((2, len(names), len(layers)), np.nan)
    for index, layer in enumerate(layers):
        for name, use in layer.items():
            weight[names.index(name), index], selected[names.index(name), index] = use.weight, use.selected
    height = _height(len(names))
    figure, axes, bars = _stack([height, height, 1.2] if is_sparse else [height], 0.3 * len(layers))
    _heat_map(axes[0], bars[0], weight, names, _outward(weight), "mean weight")
    axes[0].set_title("Weight before selection" if is_sparse else "Weight; every expert counts for every token")
    if is_sparse:
        _heat_map(axes[1], bars[1], selected, names, (0, 1), "share of tokens")
        axes[1].set_title("Activation: tokens that selected the expert")
        bars[2].set_axis_off()
        _count_bars(axes[2], activity.experts_by_layer, [len(layer) for layer in layers])
    for axis in axes:
        axis.set_xticks(range(len(layers)))
    axes[-1].set_xlabel("layer")
    source = "the training's profile, " if inspection.is_profile else ""
    return _titled(figure, inspection, "Expert weight and activation by layer", f"{source}{activity.num_tokens:,} tokens")


def _count_bars(axis: Axes, selected: Sequence[float], total: Sequence[int]) -> None:
    places = range(len(selected))
    axis.bar(places, total, color="0.9", width=0.8)
    axis.bar(places, selected, color=matplotlib.colormaps[_WEIGHTS](0.45), width=0.8)
    axis.set_xlim(-0.5, len(selected) - 0.5)
    axis.set_ylabel("experts")
    axis.set_title("Experts that a token selects, mean (grey: experts of the layer)")
    axis.spines[["top", "right"]].set_visible(False)


# -- router weights token by token


def tokens_figure(inspection: Inspection) -> Figure:
    """For each chosen layer experts down, tokens across; grey where an expert was not selected."""
    tokens = inspection.tokens
    assert tokens is not None
    labels, routing = tokens.labels[:MOST_TOKENS], tokens.routing
    names = {layer: routing.experts[layer] for layer in tokens.layers}
    weights = {layer: routing.weights[layer, : len(labels), : len(names[layer])].double().numpy().T for layer in names}
    selected = {layer: routing.selected[layer, : len(labels), : len(names[layer])].numpy().T for layer in names}
    figure, axes, bars = _stack([_height(len(own)) for own in names.values()], 0.2 * len(labels), _LABEL_INCHES)
    limits = _outward(np.concatenate([weight.flatten() for weight in weights.values()]))
    is_sparse = not all(mask.all() for mask in selected.values())
    for axis, bar, layer in zip(axes, bars, names, strict=True):
        _heat_map(axis, bar, np.where(selected[layer], weights[layer], np.nan), names[layer], limits, "router weight")
        if is_sparse:
            _paint(axis, np.where(selected[layer], np.nan, weights[layer]), limits, _greys())
            _separate(axis, names[layer], "0.2")
        axis.set_title(f"Layer {layer}")
        axis.set_xticks(range(len(labels)), [_drawable(label, _LONGEST_TOKEN) for label in labels], rotation=90)
    if is_sparse:
        patch = Patch(color=_greys()(0.5), label="not selected (darker: higher weight)")
        axes[0].legend(handles=[patch], loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    count = len(tokens.labels)
    shown = f"the first text, {count:,} tokens" if count == len(labels) else f"the first {len(labels)} of the first text's {count:,} tokens"
    return _titled(figure, inspection, "Router weights token by token", shown)


def _greys() -> Colormap:
    return LinearSegmentedColormap.from_list("left out", ["0.93", "0.72"])


# -- similarity of the experts' outputs


def similarity_figure(inspection: Inspection) -> Figure:
    """Left every pair in the mean over layers, right the collapse of each place from layer to layer."""
    mean, collapse = inspection.mean, inspection.collapse
    has_cosine = any(math.isfinite(found.cosine) for values in collapse.values() for found in values if found)
    size = max(_height(len(mean.experts)) * (1.3 if len(mean.experts) <= _FEW else 1), 3.6 if has_cosine else 2.6)
    figure = Figure(figsize=(size + 8.2, size + 1.6), layout="constrained")
    grid = figure.add_gridspec(2 if has_cosine else 1, 3, width_ratios=[size, 0.14, 5.6])
    matrix, bar = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    _heat_map(matrix, bar, mean.cka.numpy(), mean.experts, (0, 1), "linear CKA", _LIKENESS)
    matrix.set_xticks(matrix.get_yticks(), [label.get_text() for label in matrix.get_yticklabels()], rotation=90)
    matrix.set_title("CKA of each pair, mean over layers")
    lines = figure.add_subplot(grid[0, 2])
    _collapse_lines(lines, collapse, lambda found: found.cka, "CKA")
    lines.set_title("Collapse by layer: CKA, mean over pairs of experts")
    if has_cosine:
        lines = figure.add_subplot(grid[1, 2])
        _collapse_lines(lines, collapse, lambda found: found.cosine, "|cosine|")
        lines.set_title("Collapse by layer: |cosine| of outputs, mean over pairs of experts")
    lines.set_xlabel("layer")
    return _titled(figure, inspection, "Similarity of the experts' outputs, before the router's weight", _compared(inspection))


def _collapse_lines(axis: Axes, collapse: Mapping[str, Sequence[Collapse | None]], value: Callable[[Collapse], float], label: str) -> None:
    for index, (place, values) in enumerate(collapse.items()):
        line = [value(found) if found else math.nan for found in values]
        if np.isfinite(line).any():
            colour = "0.25" if place == ACROSS else f"C{index}"
            name = "at different places" if place == ACROSS else f"at {place}"
            axis.plot(line, color=colour, marker="o", markersize=3, linewidth=1.2, label=name, linestyle="--" if place == ACROSS else "-")
    axis.set_xlim(-0.5, len(next(iter(collapse.values()))) - 0.5)
    axis.set_ylim(-0.05, 1.05)
    axis.set_ylabel(label)
    axis.grid(color="0.9")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    if len(axis.lines) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    elif axis.lines:
        axis.set_ylabel(f"{label}, experts {axis.lines[0].get_label()}")


def similarity_by_layer_figure(inspection: Inspection) -> Figure:
    """A small matrix for each layer, all in one scale."""
    layers = [(index, layer) for index, layer in enumerate(inspection.similarity) if layer is not None]
    names = inspection.mean.experts
    columns = _columns(len(layers))
    rows, size = -(-len(layers) // columns), 1.3 if len(names) <= _FEW else 1.8
    figure = Figure(figsize=(size * columns + 2.0, (size + 0.2) * rows + 1.6), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for place, axis in enumerate(axes.flat):
        if place >= len(layers):
            axis.set_axis_off()
            continue
        index, layer = layers[place]
        image = axis.imshow(_spread(layer, names), _LIKENESS, vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"layer {index}")
        ticks, texts = _place_ticks(names)
        axis.set_yticks(ticks, texts if place % columns == 0 else [""] * len(ticks))
        axis.set_xticks(ticks, texts if place // columns == rows - 1 else [""] * len(ticks), rotation=90)
        axis.tick_params(labelsize=6, length=2)
    assert image is not None
    figure.colorbar(image, ax=axes, label="linear CKA", shrink=0.5, aspect=30, pad=0.02)
    return _titled(figure, inspection, "Similarity of the experts' outputs in each layer", _compared(inspection))


def _columns(count: int) -> int:
    """Of a grid for `count` panels that is wider than high and leaves few places empty."""
    best = math.sqrt(1.4 * count)
    return min(range(max(1, round(best) - 2), round(best) + 3), key=lambda columns: (-count % columns, abs(columns - best)))


def _spread(layer: Similarity, names: Sequence[str]) -> np.ma.MaskedArray[tuple[int, int], np.dtype[np.float64]]:
    """(E, E) of all experts of the adapter; those that the layer does not have are masked."""
    out = np.full((len(names), len(names)), np.nan)
    places = [names.index(name) for name in layer.experts]
    out[np.ix_(places, places)] = layer.cka.numpy()
    return np.ma.masked_invalid(out)


def _compared(inspection: Inspection) -> str:
    return f"{inspection.num_compared:,} tokens compared"


# -- pieces

_FEW, _MOST_NUMBERS = 12, 40  # experts, and layers or tokens, whose cells have numbers in them


def _height(num_experts: int) -> float:
    """Inches of a heat map with one row for each."""
    return min(_MOST_INCHES, num_experts * (0.28 if num_experts <= _FEW else 0.15))


def _stack(heights: Sequence[float], width: float, between: float = 0.0) -> tuple[Figure, list[Axes], list[Axes]]:
    """A figure of panels one below the other, each with room for a colour bar beside it; sizes in inches."""
    width = max(width, 4.5)
    figure = Figure(figsize=(width + 2.0, sum(heights) + (0.5 + between) * len(heights) + 1.0), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[width, 0.14], height_ratios=heights)
    panels = [figure.add_subplot(grid[row, 0]) for row in range(len(heights))]
    return figure, panels, [figure.add_subplot(grid[row, 1]) for row in range(len(heights))]


def _heat_map(
    axis: Axes, bar: Axes, values: Array, names: Sequence[str], limits: tuple[float, float], label: str, colours: str = _WEIGHTS
) -> None:
    """Rows are experts, and columns too where the matrix is square; NaN stays white."""
    image = _paint(axis, values, limits, matplotlib.colormaps[colours])
    ticks, texts = _place_ticks(names) if len(names) * 0.12 > _MOST_INCHES else (list(range(len(names))), list(names))
    axis.set_yticks(ticks, texts)
    axis.tick_params(length=2)
    _separate(axis, names, "white", is_square=values.shape[0] == values.shape[1])
    bar.figure.colorbar(image, cax=bar, label=label)


def _paint(axis: Axes, values: Array, limits: tuple[float, float], colours: Colormap) -> AxesImage:
    """A coloured cell for each value that is not NaN, with the number in it where there is room."""
    shown = np.ma.masked_invalid(values)
    image = axis.imshow(shown, colours, aspect="auto", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    if len(values) <= _FEW and values.shape[1] <= _MOST_NUMBERS:
        _write_numbers(axis, image, values)
    return image


def _separate(axis: Axes, names: Sequence[str], colour: str, *, is_square: bool = False) -> None:
    """Lines between the experts of one place and those of the next."""
    for edge in _edges(names):
        axis.axhline(edge, color=colour, linewidth=1.2)
        if is_square:
            axis.axvline(edge, color=colour, linewidth=1.2)


def _write_numbers(axis: Axes, image: AxesImage, values: Array) -> None:
    brightness = image.to_rgba(values)[..., :3] @ (0.3, 0.6, 0.1)
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            is_bright = brightness[row, column] > 0.5
            text = f"{value:.2f}".replace("0.", ".", 1)
            number = axis.text(column, row, text, ha="center", va="center", fontsize=5.5, color="black" if is_bright else "white")
            number.set_in_layout(False)  # it stands inside; measuring hundreds of them takes seconds


def _edges(names: Sequence[str]) -> list[float]:
    """Between which rows a place with several experts begins or ends."""
    places = [place_of(name) for name in names]
    if len(set(places)) == len(places):
        return []
    return [index - 0.5 for index in range(1, len(places)) if places[index] != places[index - 1]]


def _place_ticks(names: Sequence[str]) -> tuple[list[float], list[str]]:
    """One tick for each place, in the middle of its experts."""
    places = [place_of(name) for name in names]
    unique = list(dict.fromkeys(places))
    return [places.index(place) + (places.count(place) - 1) / 2 for place in unique], unique


def _outward(values: Array) -> tuple[float, float]:
    """Limits of a scale that shows differences between weights, at round numbers and at least 0.1 apart."""
    low, high = math.floor(np.nanmin(values) * 20) / 20, math.ceil(np.nanmax(values) * 20) / 20
    return (low, high) if high - low > 0.09 else (max(0.0, low - 0.05), high + 0.05)


def _titled(figure: Figure, inspection: Inspection, title: str, facts: str) -> Figure:
    """What is shown, and below it of what: adapter, base, tokens."""
    name, base = (_drawable(text, _LONGEST_NAME) for text in (inspection.name, inspection.base))
    text = f"{title}\n{name} ({inspection.adapter.manifest.variant}) on {base}, {facts}"
    width, height = figure.get_size_inches()
    figure.set_size_inches(max(width, _TITLE_INCHES * max(map(len, text.splitlines()))), height)
    figure.suptitle(text, x=0.01, ha="left")
    return figure


def _drawable(text: str, longest: int) -> str:
    """`text` in characters that the font has, cut to `longest` of them."""
    known = _font()
    shown = "".join(char if ord(char) in known else char.encode("unicode_escape").decode() for char in visible(text))
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


@functools.cache
def _font() -> frozenset[int]:
    """Characters that DejaVu Sans has."""
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())

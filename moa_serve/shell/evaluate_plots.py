"""The figure of `moa-serve eval --plot`, by matplotlib: an extra, so it is imported only where one is wanted.

For every task, scorer and adapter: accuracy against the share of experts that its routers did not select, a line for each way to skip, and
what each ablation costs, a bar each.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moa_serve.shell.figure_style import figure_style
from moa_serve.shell.terminal import visible
from moa_serve.train.scoring import Estimate
from moa_serve.train.variations import ABLATIONS, SWEPT

if TYPE_CHECKING:
    from moa_serve.shell.evaluate import Report
    from moa_serve.train.evaluate import Round, Score

_STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 7}
_LONGEST_NAME = 40  # characters
_COLOURS = {group: f"C{index}" for index, group in enumerate((*SWEPT, *ABLATIONS))}
_OFFSETS = dict(zip(SWEPT, ((0, 12), (0, 5), (0, -10), (6, 3)), strict=True))  # of a point's name, so that few of them meet

_Panel = tuple[float, Callable[[Axes], None]]  # its height in inches, and what draws it


def write(report: "Report", path: Path) -> None:
    """Raises OSError: the file cannot be written."""
    panels = [panel for found in report.rounds for panel in _panels(found, {name: one.label for name, one in report.columns.items()})]
    with figure_style(_STYLE):
        columns = min(len(panels), 2)
        lines = [panels[first : first + columns] for first in range(0, len(panels), columns)]
        heights = [max(height for height, _ in line) for line in lines]
        figure = Figure(figsize=(5.6 * columns, sum(heights)), layout="constrained")
        axes = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
        for row, line in zip(axes, lines, strict=True):
            for axis, (_, draw) in zip(row, line, strict=False):
                draw(axis)
            for axis in row[len(line) :]:
                axis.set_axis_off()
        figure.savefig(path, format="png")


def _panels(found: "Round", labels: Mapping[str | None, str]) -> list[_Panel]:
    panels: list[_Panel] = []
    base = next((score for score in found.scores if score.adapter is None), None)
    for own in found.scores:
        if own.adapter is None or own.variation is not None:
            continue
        others = [score for score in found.scores if score.adapter == own.adapter and score.variation is not None]
        swept = [score for score in others if score.variation is not None and score.variation.group in SWEPT]
        ablated = [score for score in others if score.variation is not None and score.variation.group in ABLATIONS]
        title = visible(f"{labels[own.adapter]}: {found.task.name}, {found.scorer}, {len(found.rows):,} rows")
        if swept:
            panels.append((3.9, partial(_curves, own, swept, base, title, found.scorer == "loss")))
        if ablated:
            panels.append((1.3 + 0.2 * len(ablated), partial(_bars, own, ablated, title, found.scorer == "loss")))
    return panels


def _scaled(found: Estimate, is_loss: bool) -> tuple[float, float]:
    """Nats, or percent, with the standard error."""
    scale = 1.0 if is_loss else 100.0
    return scale * found.value, scale * found.standard_error


def _curves(own: "Score", swept: "Sequence[Score]", base: "Score | None", title: str, is_loss: bool, axis: Axes) -> None:
    if base is not None and base.score is not None:
        axis.axhline(_scaled(base.score, is_loss)[0], color="0.6", linestyle=":", linewidth=1, label="base alone")
    if own.score is not None and own.usage is not None:
        value, error = _scaled(own.score, is_loss)
        axis.axhspan(value - error, value + error, color="0.93", linewidth=0)
        axis.plot(100 * own.usage.not_selected, value, color="0.1", marker="*", markersize=9, linestyle="none", label="its own way ± SE")
    for group in SWEPT:
        points = [
            (100 * score.usage.not_selected, *_scaled(score.score, is_loss), score.variation.name.split()[-1])
            for score in swept
            if score.variation is not None and score.variation.group == group and score.usage is not None and score.score is not None
        ]
        if not points:
            continue
        places, values, errors, names = zip(*sorted(points), strict=True)
        axis.errorbar(places, values, yerr=errors, color=_COLOURS[group], marker="o", markersize=3, linewidth=1, elinewidth=0.6,
                      capsize=2, label=group)  # fmt: skip
        for place, value, name in zip(places, values, names, strict=True):
            axis.annotate(
                name, (place, value), textcoords="offset points", xytext=_OFFSETS[group], fontsize=6, color=_COLOURS[group], ha="center"
            )
    axis.set_title(title)
    axis.set_xlabel("experts not selected, %")
    axis.set_ylabel("nats a token" if is_loss else "right, %")
    axis.set_xlim(-3, 103)
    if not is_loss:
        axis.set_ylim(bottom=0)
    axis.grid(color="0.92")
    axis.legend()


def _bars(own: "Score", ablated: "Sequence[Score]", title: str, is_loss: bool, axis: Axes) -> None:
    lines = [
        (score.variation.name[:_LONGEST_NAME], score.against_own, _COLOURS[score.variation.group])
        for score in ablated
        if score.variation is not None and score.against_own is not None
    ]
    if own.against_base is not None:
        lines.append(("base alone", Estimate(-own.against_base.value, own.against_base.standard_error), "0.6"))
    for place, (_, difference, colour) in enumerate(reversed(lines)):
        value, error = _scaled(difference, is_loss)
        axis.barh(place, value, xerr=error, color=colour, height=0.7, error_kw={"elinewidth": 0.8, "capsize": 2})
    axis.axvline(0, color="0.2", linewidth=0.8)
    axis.set_yticks(range(len(lines)), [name for name, *_ in reversed(lines)])
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.set_title(title)
    axis.set_xlabel(f"{'nats a token' if is_loss else 'points right'} against all experts, ± SE row by row")
    axis.grid(color="0.92", axis="x")
    axis.set_axisbelow(True)

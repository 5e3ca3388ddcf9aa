"""The figures of `moa-serve bench step`, `growth` and `reference`, by matplotlib: an extra, so it is imported only where one is wanted.

Made without pyplot, under matplotlib's own defaults, whatever a user's matplotlibrc says.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moa_serve.bench import goals
from moa_serve.bench.goals import Judged
from moa_serve.bench.timing import Spread
from moa_serve.shell.figure_style import figure_style

if TYPE_CHECKING:
    from moa_serve.bench.growth import GrowthReport
    from moa_serve.bench.reference import ReferenceReport
    from moa_serve.bench.step import StepReport

_MOST_LINES = 8  # in one figure; more cases are drawn one below the other
_LABELS = {
    "rows": "rows",
    "context": "tokens of context",
    "adapters": "different adapters",
    "experts": "experts at each linear",
    "active": "% of the experts that are active",
}
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7,
}


def write_step(report: "StepReport", title: str, path: Path) -> None:
    """Left each case's step over the base's, right the tokens/s, by rows that decode. Raises OSError."""
    decoding = [size for size in report.sizes if size.tokens == 1]
    rows = [size.rows for size in decoding]
    names = list(dict.fromkeys(name for size in decoding for name in size.cases if not name.endswith("_apart")))
    if len(names) > _MOST_LINES:
        _write_families(report, names, title, path)
        return
    with figure_style(_STYLE):
        figure, (left, right) = _panels(title)
        for index, name in enumerate(names):
            there = [size for size in decoding if name in size.cases]
            places, cases = [size.rows for size in there], [size.cases[name] for size in there]
            colour = "0.4" if name in ("base", "control") else f"C{index % 10}"
            if name != "base":
                _line(left, places, [case.to_base.found for case in cases], name, colour)
            if name != "control":
                right.plot(places, [case.tokens_per_second for case in cases], color=colour, marker="o", markersize=3, label=name)
        left.plot(rows, [goals.adapter_to_base(count, 1) for count in rows], color="0.6", linestyle=":", label="goal of one MoA adapter")
        left.set_title("Step over the base's, median and quartiles")
        right.set_title("Tokens/s")
        _finish(figure, (left, right), rows, path)


def _write_families(report: "StepReport", names: Sequence[str], title: str, path: Path) -> None:
    """A line for each case, left its step over the base's, right its milliseconds; a colour for each size. Raises OSError."""
    with figure_style(_STYLE):
        figure, axes = _panels(title, height=0.8 + 0.28 * len(names))
        places = range(len(names), 0, -1)
        for index, size in enumerate(report.sizes):
            label = f"{size.rows} rows decode" if size.tokens == 1 else f"{size.tokens} tokens prefill"
            shift = 0.22 * ((len(report.sizes) - 1) / 2 - index)
            there = [(place + shift, size.cases[name]) for place, name in zip(places, names, strict=True) if name in size.cases]
            heights = [place for place, _ in there]
            _dots(axes[0], heights, [case.to_base.found for _, case in there], label, f"C{index}")
            _dots(axes[1], heights, [case.ms for _, case in there], label, f"C{index}")
        axes[0].set_title("Step over the base's, median and quartiles")
        axes[1].set_title("Milliseconds a step")
        axes[1].set_xscale("log")
        axes[1].xaxis.set_major_formatter("{x:g}")
        axes[1].xaxis.set_minor_formatter("{x:g}")
        for axis in axes:
            axis.set_yticks(list(places), list(names))
            axis.grid(color="0.92")
        axes[0].legend()
        figure.savefig(path, format="png")


def write_growth(report: "GrowthReport", title: str, path: Path) -> None:
    """A panel for each thing that was varied: steps over the base's at the first value, a line for each case. Raises OSError."""
    with figure_style(_STYLE):
        figure = Figure(figsize=(2.2 + 2.8 * len(report.grown), 3.6), layout="constrained")
        figure.suptitle(f"{title}: step over the base's at the first value, median and quartiles", x=0.01, ha="left")
        colours: dict[str, str] = {}  # of a case, the same in all panels
        for axis, growth in zip(figure.subplots(1, len(report.grown), squeeze=False)[0], report.grown, strict=True):
            values = [value for value in growth.points if value is not None]
            for name in growth.points[values[-1]]:
                colour = "0.6" if name == "control" else "0.2" if name == "base" else colours.setdefault(name, f"C{len(colours)}")
                _line(axis, values, [growth.points[value][name].to_first for value in values], name, colour)
            if growth.thing != "active":
                axis.set_xscale("log", base=2)
            axis.set_xticks(values, list(map(str, values)))
            axis.minorticks_off()
            axis.set_xlabel(_LABELS[growth.thing])
            axis.grid(color="0.92")
            axis.legend()
        figure.savefig(path, format="png")


def write_reference(report: "ReferenceReport", title: str, path: Path) -> None:
    """Left theirs over ours with its goals, right the milliseconds, by rows. Raises OSError."""
    rows = [size.rows for size in report.sizes]
    with figure_style(_STYLE):
        figure, (left, right) = _panels(title)
        lines: dict[str, list[Judged]] = {
            "authors' way, adapter": [size.adapter for size in report.sizes],
            "transformers, base": [size.base for size in report.sizes],
        }
        for index, (name, found) in enumerate(lines.items()):
            _line(left, rows, [one.found for one in found], name, f"C{index}")
            wanted = [(count, one.goal) for count, one in zip(rows, found, strict=True) if one.goal is not None]
            if wanted:
                places, heights = zip(*wanted, strict=True)
                left.plot(places, heights, color=f"C{index}", marker="_", markersize=14, linestyle="none")
        for index, name in enumerate(report.sizes[0].ms):
            if name != "control":
                _line(right, rows, [size.ms[name] for size in report.sizes], name, f"C{index}")
        left.set_ylim(bottom=0)
        left.set_title("Their step over ours, median and quartiles (dashes: goals)")
        right.set_title("Milliseconds a step")
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter("{x:g}")
        _finish(figure, (left, right), rows, path)


def _panels(title: str, height: float = 4.2) -> tuple[Figure, tuple[Axes, Axes]]:
    """Inside a `figure_style`; the height in inches."""
    figure = Figure(figsize=(11.0, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure, (figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2))


def _dots(axis: Axes, heights: Sequence[float], values: Sequence[Spread], name: str, colour: str) -> None:
    middle = [value.median for value in values]
    reach = [[value.median - value.low for value in values], [value.high - value.median for value in values]]
    axis.errorbar(middle, heights, xerr=reach, color=colour, marker="o", markersize=4, linestyle="none", capsize=2, label=name)


def _line(axis: Axes, places: Sequence[int], values: Sequence[Spread], name: str, colour: str) -> None:
    middle = [value.median for value in values]
    reach = [[value.median - value.low for value in values], [value.high - value.median for value in values]]
    axis.errorbar(places, middle, yerr=reach, color=colour, marker="o", markersize=3, linewidth=1.2, capsize=2, label=name)


def _finish(figure: Figure, axes: Sequence[Axes], rows: Sequence[int], path: Path) -> None:
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(rows), [str(count) for count in rows])
        axis.set_xlabel("rows")
        axis.grid(color="0.92")
        axis.legend()
    figure.savefig(path, format="png")

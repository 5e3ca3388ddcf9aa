"""The figure of `moa-serve bench serve`, by matplotlib: an extra, so this module is imported only where somebody wants it.

Drawn without pyplot, under matplotlib's own defaults, as in plots.py.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moa_serve.bench.serve import Measured, Report
from moa_serve.shell.figure_style import figure_style
from moa_serve.shell.terminal import visible


def write(report: Report, file: Path) -> None:
    """A PNG file. Raises OSError."""
    with figure_style({}):
        speed_and_times(report).savefig(file, format="png")


def speed_and_times(report: Report) -> Figure:
    """Speed, time to the first token and gaps by the number of streams, a line for each server."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    speed, ttft, gap = figure.subplots(1, 3, squeeze=False)[0]
    for index, server in enumerate(report.servers):
        rows = [found for found in report.measured if found.server == server.name]
        _speed_line(speed, rows, f"C{index}", visible(server.name))
        _time_lines(ttft, rows, "ttft", f"C{index}")
        _time_lines(gap, rows, "gap", f"C{index}")
    streams = list(dict.fromkeys(found.num_streams for found in report.measured))
    for axis, title in ((speed, "tokens/s, quartiles"), (ttft, "TTFT in ms"), (gap, "gap between tokens in ms")):
        axis.set_title(title if axis is speed else f"{title}, median (p99 dashed)")
        axis.set_xticks(range(len(streams)), list(map(str, streams)))
        axis.set_xlabel("streams")
        axis.set_ylim(bottom=0)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    speed.legend()
    return figure


def _speed_line(axis: Axes, rows: Sequence[Measured], colour: str, label: str) -> None:
    spreads = [spread for row in rows if (spread := row.spread("tokens_per_second")) is not None]
    medians = [spread.median for spread in spreads]
    reach = [[spread.median - spread.low for spread in spreads], [spread.high - spread.median for spread in spreads]]
    axis.errorbar(range(len(medians)), medians, reach, color=colour, marker="o", markersize=3, capsize=2, label=label)


def _time_lines(axis: Axes, rows: Sequence[Measured], figure: str, colour: str) -> None:
    for quantile, style in (("p50", "-"), ("p99", "--")):
        spreads = [row.spread(f"{figure}_{quantile}_seconds") for row in rows]
        values = [math.nan if spread is None else 1000 * spread.median for spread in spreads]
        axis.plot(range(len(values)), values, color=colour, linestyle=style, marker="o", markersize=3)

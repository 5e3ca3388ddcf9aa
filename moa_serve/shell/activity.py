"""Expert activity to look at: a line on what it cost, and a coloured table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from moa_serve.engine.activity import Activity, Use
from moa_serve.model.similarity import canonical
from moa_serve.shell.heat import Cell, HeatTable, Row


def cost(activity: Activity) -> str:
    selected, total = activity.experts_per_token
    chosen = f"{selected:.2f} of {total:.4g} experts per token and layer selected"
    return f"{chosen}, {activity.skippable:.0%} of expert evaluations can be skipped"


def activity_table(activity: Activity, width: int) -> list[Text]:
    """Layers down, experts across, at most `width` columns wide.

    What does not fit is first written shorter, then continued below: nothing is left out.
    """
    layers = {index: layer for index, layer in enumerate(activity.layers) if layer}
    names = sorted({name for layer in layers.values() for name in layer}, key=canonical)
    is_sparse = activity.is_sparse
    scale = 1.0 if is_sparse else max(use.weight for layer in layers.values() for use in layer.values())
    style = _CellStyle(is_sparse, is_short=False, scale=scale or 1.0)
    table = _table(layers, names, style)
    if not table.fits(width):
        style = replace(style, is_short=True)
        table = _table(layers, names, style)
    return [Text(style.legend, style="dim"), *table.lines(width)]


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

    def cell(self, use: Use) -> Cell:
        return Cell(self.text(use), use.selected if self.is_sparse else use.weight / self.scale)


def _table(layers: Mapping[int, Mapping[str, Use]], names: Sequence[str], style: _CellStyle) -> HeatTable:
    rows = [Row(str(index), {name: style.cell(use) for name, use in layer.items()}) for index, layer in layers.items()]
    footer = {}
    for name in names:
        uses = [layer[name] for layer in layers.values() if name in layer]
        footer[name] = style.cell(Use(sum(use.weight for use in uses) / len(uses), sum(use.selected for use in uses) / len(uses)))
    return HeatTable("layer", names, [*rows, Row("mean", footer, is_summary=True)], style.width, 1 if style.is_short else 2)

"""A table of numbers coloured by size, for eye and pipe: rows down, columns across, as wide as the terminal and no wider."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from moa_serve.shell.terminal import PLAIN_WIDTH, is_terminal

_ABSENT = "·"  # the row has no such column
_HEAT = ((0.0, (22, 26, 46)), (0.45, (30, 96, 122)), (0.75, (72, 172, 120)), (1.0, (250, 214, 72)))  # value, RGB
_BRIGHT = 0.6  # of a value: black digits from here on


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in one place, and how hot it is from 0 to 1; None: no colour."""

    text: str
    heat: float | None


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    cells: Mapping[str, Cell]  # by column
    is_summary: bool = False


@dataclass(frozen=True, slots=True)
class HeatTable:
    """
    Args:
        corner: what the labels of the rows are.
        names: of the columns; of `Q/0`, `Q/1`, ... the `Q` stands once above all of them.
        cell_width: columns of the terminal that a text needs; `gap` more lie between two.
    """

    corner: str
    names: Sequence[str]
    rows: Sequence[Row]
    cell_width: int
    gap: int = 1

    def fits(self, width: int) -> bool:
        return self._label_width + sum(self._widths) <= width

    def lines(self, width: int) -> list[Text]:
        """At most `width` wide: columns that do not fit continue below, none is left out."""
        lines = []
        for start, end in self._blocks(width - self._label_width):
            lines += self._block(self.names[start:end], self._widths[start:end])
        return lines

    @property
    def _label_width(self) -> int:
        return max(cell_len(label) for label in (self.corner, *(row.label for row in self.rows))) + 1

    @property
    def _widths(self) -> list[int]:
        """Of each column. A linear's name stands once above all its experts, so only the first may have to make room for it."""
        widths = [max(self.cell_width, cell_len(name.partition("/")[2])) + self.gap for name in self.names]
        for site, group in itertools.groupby(range(len(self.names)), key=lambda index: _site(self.names[index])):
            columns = list(group)
            widths[columns[0]] += max(0, len(site) + self.gap - sum(widths[column] for column in columns))
        return widths

    def _blocks(self, width: int) -> list[tuple[int, int]]:
        """Ranges of columns that fit; the experts of one linear stay together where they fit at all."""
        names, widths = self.names, self._widths
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

    def _block(self, names: Sequence[str], widths: Sequence[int]) -> list[Text]:
        lines = self._header(names, widths)
        for row in self.rows:
            line = Text.assemble((self._label(row.label), "bold" if row.is_summary else "dim"))
            for name, width in zip(names, widths, strict=True):
                cell = row.cells.get(name, Cell(_ABSENT, None))
                style = Style(dim=True) if cell.heat is None else _colours(cell.heat)
                line.append(_centred(cell.text, width), style + Style(bold=True) if row.is_summary else style)
            lines.append(line)
        return lines

    def _label(self, text: str) -> str:
        """Numbers stand at the right, text at the left."""
        width = self._label_width - 1
        return (text.rjust(width) if text.isdecimal() else set_cell_size(text, width)) + " "

    def _header(self, names: Sequence[str], widths: Sequence[int]) -> list[Text]:
        top = set_cell_size(self.corner, self._label_width)
        for site, group in itertools.groupby(zip(names, widths, strict=True), key=lambda column: _site(column[0])):
            top += _centred(site, sum(width for _, width in group))
        numbers = " " * self._label_width
        numbers += "".join(_centred(name.partition("/")[2], width) for name, width in zip(names, widths, strict=True))
        lines = [top, numbers] if numbers.strip() else [top]
        return [Text(line.rstrip(), style="bold") for line in lines]


def show_lines(console: Console, lines: Sequence[Text]) -> None:
    for line in lines:
        if not is_terminal():
            line.rstrip()  # these spaces only carry colour
        console.print(line, soft_wrap=True)


def width_of(console: Console) -> int:
    """Columns to lay a table out for."""
    return console.width if is_terminal() else PLAIN_WIDTH


def _site(name: str) -> str:
    return name.partition("/")[0]


def _centred(text: str, width: int) -> str:
    return text.rjust((width + len(text)) // 2).ljust(width)


def _colours(value: float) -> Style:
    """Dark for 0, yellow for 1; rich takes the nearest colour that the terminal has."""
    value = min(max(value, 0.0), 1.0)
    upper = next(i for i, (stop, _) in enumerate(_HEAT) if value <= stop) or 1
    (low, cold), (high, hot) = _HEAT[upper - 1], _HEAT[upper]
    part = (value - low) / (high - low)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(cold, hot, strict=True))
    return Style(color="black" if value >= _BRIGHT else "white", bgcolor=Color.from_rgb(red, green, blue))

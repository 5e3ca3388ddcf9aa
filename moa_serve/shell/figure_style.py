"""How all figures look. Imports matplotlib, which is an extra: for the modules that draw, which `drawing.drawing_module` imports."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib

_COMMON: dict[Any, Any] = {
    "text.parse_math": False,  # `$x$` in a name is no formula
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look alike everywhere
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


@contextmanager
def figure_style(more: Mapping[Any, Any]) -> Iterator[None]:
    """Inside, figures are made with matplotlib's own defaults, whatever a user's matplotlibrc says, then with ours and `more`."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_COMMON | dict(more))
        yield

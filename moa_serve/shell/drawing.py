"""Modules that draw need matplotlib, which is an extra: how they are imported, and what is said where it is missing."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from moa_serve.errors import InvalidRequest
from moa_serve.shell import terminal


def drawing_module(name: str, *, option: str, without: str) -> ModuleType:
    """`moa_serve.shell.NAME`.

    Args:
        option: the flag that asked for a figure, as `--out`.
        without: what can be had without matplotlib, as "the tables need none".
    Raises:
        InvalidRequest: matplotlib is not installed.
    """
    try:
        return importlib.import_module(f"moa_serve.shell.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise InvalidRequest(
            f"{option} draws with matplotlib, which is not installed: pip install 'moa_serve[train]'; {without}", param=option.lstrip("-")
        ) from None


def write_figure(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` write the figure that --plot asked for, and say so. Raises InvalidRequest where the file cannot be written."""
    try:
        write(path)
    except OSError as error:
        raise InvalidRequest(f"--plot {path}: cannot be written ({error.strerror}); choose another file", param="plot") from None
    terminal.note(f"wrote {path}")

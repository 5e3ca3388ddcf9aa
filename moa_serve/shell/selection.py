"""Which adapters a `generate` runs: what `--adapter` and the lines of a file name, or else all that the adapters directory holds.

The files are judged by LLM.load_adapter; here is only how adapters are named on a command line.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.importers import has_config
from moa_serve.adapter.manifest import VARIANTS, Manifest
from moa_serve.adapter.store import AdapterStore
from moa_serve.errors import AdapterError, AdapterNotFound, InvalidRequest
from moa_serve.llm import LLM
from moa_serve.shell.prompts import BASE, PromptLine
from moa_serve.shell.terminal import visible, warn


@dataclass(frozen=True, slots=True)
class Wanted:
    """An adapter to load; the base where `source` is None. One that is not explicit may be broken: it is left out with a warning."""

    name: str | None
    source: AdapterSource | None
    is_explicit: bool = True


@dataclass(frozen=True, slots=True)
class Column:
    """An adapter that is loaded, or the base (name None): one of the answers that stand side by side."""

    name: str | None
    detail: str  # variant of an adapter, name of the base; fit to be shown
    revision: str | None = None
    is_routed: bool = False
    is_pooled: bool = False
    manifest: Manifest | None = field(default=None, compare=False)  # it cannot be hashed, and the revision stands for it

    @property
    def label(self) -> str:
        return self.name or BASE


THE_BASE = Wanted(None, None)


def parse_adapter(text: str, adapters_dir: Path | None) -> Wanted:
    """`NAME`, `PATH` or `NAME=PATH`, each with `:VARIANT` behind it where the files alone cannot tell; `base` is the base.

    Raises:
        AdapterNotFound: there is no such folder.
    """
    if text == BASE:
        return THE_BASE
    rest, variant = text, None
    head, _, tail = text.rpartition(":")
    if head and tail in VARIANTS and not os.path.lexists(text):
        rest, variant = head, tail
    name, equals, place = rest.partition("=")
    if equals and not os.path.lexists(rest):
        return Wanted(name, AdapterSource(_folder(place, adapters_dir), variant))
    folder = _folder(rest, adapters_dir)
    return Wanted(Path(os.path.abspath(folder)).name, AdapterSource(folder, variant))


def _folder(text: str, adapters_dir: Path | None) -> Path:
    """A name in the adapters directory comes first, so that a file beside the shell's user cannot take its place."""
    if adapters_dir is not None and _is_plain(text) and has_config(adapters_dir / text):
        return adapters_dir / text
    path = Path(os.path.expanduser(text))
    if text and path.is_dir():
        return path
    head, _, tail = text.rpartition(":")
    hint = f"; {tail!r} is no variant, known are {', '.join(VARIANTS)}" if head and "/" not in tail else ""
    raise AdapterNotFound(f"adapter {text!r}: there is no such folder{_and_holdings(adapters_dir)}{hint}", param="adapter")


def _is_plain(text: str) -> bool:
    return text not in ("", ".", "..") and "/" not in text and os.sep not in text


def _and_holdings(adapters_dir: Path | None) -> str:
    if adapters_dir is None:
        return ", and no adapters directory to look a name up in; see --adapters-dir"
    names = sorted(entry.name for entry in adapters_dir.iterdir() if has_config(entry))
    return f", and {adapters_dir} holds {', '.join(names) or 'no adapter'}"


def parse_adapters(texts: Sequence[str], adapters_dir: Path | None) -> list[Wanted]:
    """All of `--adapter`, in their order. Raises InvalidRequest where two have one name."""
    wanted: list[Wanted] = []
    for text in texts:
        one = parse_adapter(text, adapters_dir)
        if any(other.name == one.name for other in wanted):
            raise InvalidRequest(
                f"--adapter {text}: the name {one.name or BASE!r} is given twice; name one differently with NAME=PATH", param="adapter"
            )
        wanted.append(one)
    return wanted


def wanted_by_lines(lines: Iterable[PromptLine], known: Sequence[Wanted], adapters_dir: Path | None) -> list[Wanted]:
    """What the lines of a file name beyond `known`: names only, for a file of prompts shall not choose folders of this machine."""
    wanted: dict[str | None, Wanted] = {one.name: one for one in known}
    for line in lines:
        if not line.has_adapter or line.adapter in wanted:
            continue
        name = line.adapter
        if name is None:
            wanted[None] = THE_BASE
        elif adapters_dir is not None and _is_plain(name) and has_config(adapters_dir / name):
            wanted[name] = Wanted(name, AdapterSource(adapters_dir / name))
        else:
            raise AdapterNotFound(
                f"{line.where}: adapter {name!r} is not named with --adapter{_and_holdings(adapters_dir)}", param="adapter"
            )
    return list(wanted.values())[len(known) :]


def wanted_by_default(llm: LLM, adapters_dir: Path | None, *, with_base: bool) -> list[Wanted]:
    """The base, and whatever the adapters directory holds."""
    wanted = [THE_BASE] if with_base else []
    if adapters_dir is None:
        return wanted
    for name in AdapterStore(llm.config, base_name=llm.name, adapters_dir=adapters_dir).scan():
        if name == BASE:
            warn(f"adapter {name!r} is left out: this name stands for the base; run it with --adapter NAME={adapters_dir / name}")
        else:
            wanted.append(Wanted(name, AdapterSource(adapters_dir / name), is_explicit=False))
    return wanted


def load(llm: LLM, wanted: Iterable[Wanted]) -> dict[str | None, Column]:
    """Load each adapter and try it; warnings go to standard error.

    Raises:
        AdapterError: an adapter that was named cannot be used; one that was only found is left out.
    """
    columns: dict[str | None, Column] = {}
    for one in wanted:
        if one.name is None or one.source is None:
            columns[None] = Column(None, visible(llm.name))
            continue
        try:
            adapter = llm.load_adapter(one.name, one.source)
        except AdapterError as error:
            if one.is_explicit:
                raise
            warn(f"left out: {error}")
            continue
        for warning in adapter.warnings:
            warn(f"adapter {one.name!r}: {warning}")
        manifest = adapter.manifest
        columns[one.name] = Column(
            one.name,
            manifest.variant,
            adapter.revision,
            is_routed=manifest.router.site != "none",
            is_pooled=manifest.is_pooled,
            manifest=manifest,
        )
    return columns

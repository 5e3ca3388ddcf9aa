"""`moa-serve convert --prune`: which experts are meant, and the table of what became of the adapter. What can go is adapter/prune.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Never

from rich import box
from rich.console import Console
from rich.table import Table

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.checkpoint import revision_of
from moa_serve.adapter.manifest import KINDS
from moa_serve.adapter.prune import prune
from moa_serve.errors import InvalidRequest
from moa_serve.shell.report import ROUTERS, ranges
from moa_serve.shell.terminal import print_table

STDIN = "-"


def read_entries(text: str, stdin: BinaryIO) -> tuple[tuple[str, ...], str | None]:
    """The experts of `--prune`: entries with commas between them, or what GET /v1/adapters/{name}/experts answered, in a file or `-`.

    Returns:
        Entries as those of `moa.disable`, and the revision that the answer is about.
    Raises:
        InvalidRequest: the file cannot be read or is no such answer, or it suggests nothing.
    """
    if text == STDIN:
        return _suggested(stdin.read(), "standard input")
    if not text.endswith(".json"):
        return tuple(entry.strip() for entry in text.split(",")), None
    try:
        return _suggested(Path(text).read_bytes(), text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(f"{text}: cannot be read ({reason})", param="prune") from None


def _suggested(data: bytes, name: str) -> tuple[tuple[str, ...], str | None]:
    def refuse(problem: str) -> Never:
        raise InvalidRequest(f"{name}: {problem}", param="prune")

    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        refuse("is not valid JSON")
    if not isinstance(answer, dict) or "prune" not in answer:
        refuse("has no 'prune'; give what GET /v1/adapters/NAME/experts answered")
    suggestion, revision = answer["prune"], answer.get("revision")
    if suggestion is None:
        refuse("suggests nothing yet: the adapter had too few tokens, or was not in memory; ask again after more traffic")
    entries = suggestion.get("disable") if isinstance(suggestion, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        refuse("has no list of experts in prune.disable")
    if not entries:
        refuse("suggests nothing: every expert is used more than its bound; ask with a higher max_selected or max_weight")
    return tuple(entries), revision if isinstance(revision, str) else None


def pruned(whole: Adapter, entries: tuple[str, ...], revision: str | None) -> Adapter:
    """The adapter without them.

    Args:
        revision: that the entries were found for; None where nobody says.
    Raises:
        InvalidRequest: that is another one, or as `prune`.
    """
    if revision is not None and revision != whole.revision:
        raise InvalidRequest(
            f"the suggestion is for revision {revision[:12]}, but the adapter is {whole.revision[:12]}, whose experts may be used "
            f"otherwise; ask the server that serves this one, or give the entries themselves",
            param="prune",
        )
    found = prune(whole.manifest, entries, revision=whole.revision)
    tensors = found.tensors(whole.tensors)
    return Adapter(found.manifest, tensors, revision_of(found.manifest, tensors), whole.source_format, whole.warnings)


def show(console: Console, whole: Adapter, left: Adapter) -> None:
    """Experts that are gone, and parameters and bytes before and after, by kind."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_footer=True, footer_style="bold")
    table.add_column("expert", "total")
    table.add_column("removed from layers", _removed(whole, left), overflow="fold")
    for title, totals in (
        ("parameters", (whole.manifest.num_parameters, left.manifest.num_parameters)),
        ("bytes", (whole.num_bytes, left.num_bytes)),
    ):
        for when, total in zip(("before", "after"), totals, strict=True):
            table.add_column(f"{title} {when}", f"{total:,}", justify="right")
    for cells in _rows(whole, left):
        table.add_row(*cells)
    print_table(console, table)


def _removed(whole: Adapter, left: Adapter) -> str:
    counts = [sum(len(expert.layers) for expert in adapter.manifest.experts) for adapter in (whole, left)]
    return f"{counts[0] - counts[1]:,} of {counts[0]:,}"


def _rows(whole: Adapter, left: Adapter) -> Iterator[tuple[str, ...]]:
    sizes = [_sizes(adapter) for adapter in (whole, left)]
    for kind in (*KINDS, ROUTERS):
        if kind in sizes[0]:
            before, after = (found.get(kind, (0, 0)) for found in sizes)
            numbers = (before[0], after[0], before[1], after[1])
            yield kind, _where(whole, left, kind), *(f"{number:,}" for number in numbers)


def _where(whole: Adapter, left: Adapter, kind: str) -> str:
    """The layers that lost experts of a kind, and how many where they lost not all."""
    lost: dict[int, int] = {}
    for layer, plan in enumerate(whole.manifest.plans):
        if gone := len(plan.at(kind)) - len(left.manifest.layer(layer).at(kind)):
            lost[layer] = gone
    parts = []
    for count in sorted(set(lost.values())):
        layers = ranges([layer for layer, gone in lost.items() if gone == count])
        parts.append(layers if count == 1 else f"{layers} ({count} each)")
    return ", ".join(parts)


def _sizes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """(parameters, bytes) by kind of expert; ROUTERS is what belongs to no expert alone."""
    found: dict[str, tuple[int, int]] = {}
    for name, (owner, _) in adapter.manifest.owners().items():
        kind = ROUTERS if owner is None else owner.partition("/")[0]
        parameters, size = found.get(kind, (0, 0))
        found[kind] = parameters + adapter.tensors[name].numel(), size + adapter.tensors[name].nbytes
    return found

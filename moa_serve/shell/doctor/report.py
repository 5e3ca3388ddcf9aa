"""What the checks said: a table for people, and a JSON document to attach to a report, in which nothing tells whose machine it is."""

import getpass
import json
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_serve.bench import goals
from moa_serve.model.cache import cache_dir
from moa_serve.shell import terminal
from moa_serve.shell.doctor.findings import Checked, Subject, trusted, verdict_of
from moa_serve.shell.doctor.installation import machine
from moa_serve.shell.doctor.parity import EXACT, LARGEST, MEAN

SCHEMA = "moa-doctor/1"
_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_PATH = re.compile(r"(?<![\w)\]])~?/[^\s,;:()'\"]+")
_SHORTEST_NAME = 3  # a user called "a" is not to be found in words


def show(console: Console, checked: Sequence[Checked]) -> None:
    """A line for each check with what to do below it, the bench's figures where there are some, and the verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("", "check", "found"):
        table.add_column(name, no_wrap=name != "found", overflow="fold")
    for one in checked:
        finding, style = one.finding, _STYLES[one.finding.verdict]
        found = Text(terminal.one_line(finding.found), style="dim" if finding.verdict == "skipped" else "")
        if finding.advice:
            found.append(f"\n-> {terminal.one_line(finding.advice)}", style=style)
        table.add_row(Text(finding.verdict, style=style), one.name, found)
    terminal.print_table(console, table)
    for one in checked:
        if one.finding.details and "rows" in one.finding.details:
            terminal.print_table(console, _bench_table(one.finding.details))
    style = "bold green" if trusted(checked) else "bold red"
    console.print(Text(verdict_of(checked), style=style), soft_wrap=True)


def _bench_table(details: Mapping[str, Any]) -> Table:
    title = f"{details['base']}, {details['backend']}, {details['dtype']}, a decode step behind {details['context']} tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("rows", "case", "ms", "to base", "goal"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in details["rows"]:
        ms, to_base = row["ms"], row["to_base"]
        ratio = f"{to_base['median']:.3f} ({to_base['low']:.3f}-{to_base['high']:.3f}){' !' if to_base['is_met'] is False else ''}"
        time = f"{ms['median']:.2f} ({ms['low']:.2f}-{ms['high']:.2f})"
        table.add_row(str(row["rows"]), row["case"], time, ratio, "" if to_base["goal"] is None else f"<= {to_base['goal']:g}")
    return table


def to_json(subject: Subject, checked: Sequence[Checked]) -> dict[str, Any]:
    """Schema `moa-doctor/1`. Without host name, user name, paths and the name of the base."""
    document = {
        "schema": SCHEMA,
        "moa_serve": version("moa_serve"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "asked": {
            "model": "the default base" if subject.model is None else "another base",
            "backend": subject.backend,
            "device": subject.device,
            "quick": subject.is_quick,
        },
        "machine": machine(),
        "checks": [_check(one) for one in checked],
        "goals": {
            "float32_distance": EXACT,
            "bfloat16_mean_distance": MEAN,
            "bfloat16_largest_distance": LARGEST,
            "one_adapter_to_base": {str(rows): goals.adapter_to_base_on_gpu(rows) for rows in (1, 16, goals.DISTINCT_ADAPTERS)},
            "distinct_adapters": goals.DISTINCT_ADAPTERS,
            "distinct_adapters_to_base": goals.DISTINCT_TO_BASE_ON_GPU,
        },
        "is_trusted": trusted(checked),
        "verdict": verdict_of(checked),
    }
    private: dict[str, Any] = _private(document, _known_paths(subject))
    return private


def _check(one: Checked) -> dict[str, Any]:
    finding = one.finding
    return {
        "name": one.name,
        "verdict": finding.verdict,
        "found": finding.found,
        "advice": finding.advice,
        "details": finding.details,
        "seconds": round(one.seconds, 3),
    }


def _known_paths(subject: Subject) -> list[str]:
    """Those that texts may hold, longest first: a pattern alone does not know where one with spaces ends."""
    known = [Path.home(), Path.cwd(), cache_dir(), Path(tempfile.gettempdir()), Path(sys.prefix), Path(__file__).parents[3]]
    if subject.model is not None:
        known.append(Path(subject.model).expanduser().absolute())
    return sorted((str(path) for path in known if len(path.parts) > 1), key=len, reverse=True)


def _private(value: Any, paths: Sequence[str]) -> Any:
    """The same without paths, host name and user name in any text."""
    if isinstance(value, Mapping):
        return {key: _private(item, paths) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_private(item, paths) for item in value]
    return without_private(value, paths) if isinstance(value, str) else value


def without_private(text: str, paths: Sequence[str] = ()) -> str:
    """Args: paths: to be taken out with all that follows up to a space, beside whatever looks like a path."""
    for path in paths:
        text = text.replace(path, "/path")
    text = _PATH.sub("[path]", text)
    for name, instead in ((platform.node(), "[host]"), (_user(), "[user]")):
        if len(name) >= _SHORTEST_NAME:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return ""


def write(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

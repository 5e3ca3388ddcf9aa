"""What `moa-serve eval` shows and writes: a table for each task and scorer, and the same as JSON and Markdown with every setting.

The files hold no text of the data: rows by their index, predictions, and whether they are right, so that anyone can count again.
"""

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from moa_serve.adapter.checkpoint import replace_file
from moa_serve.adapter.manifest import Manifest
from moa_serve.errors import InvalidRequest
from moa_serve.llm import LLM
from moa_serve.shell import terminal
from moa_serve.shell.prompts import BASE
from moa_serve.shell.selection import Column
from moa_serve.shell.terminal import print_table, visible
from moa_serve.train.evaluate import Evaluation, Round, Score
from moa_serve.train.scoring import Estimate, Verdict
from moa_serve.train.variations import Variation, ablations, given, sweep

FORMAT = "moa-eval/1"
_BATCH_TOKENS = 1024  # in a step; 1.2 times the tokens/s of 256 and 64, the server's sizes (as in train/evaluate.py)
_FULL_WIDTH = 96  # columns of a table with its variants; narrower terminals see it without
JSON_FILE, MARKDOWN_FILE = "results.json", "results.md"


@dataclass(frozen=True, slots=True)
class Report:
    """All rounds of a run, and what it takes to run it again."""

    base: Mapping[str, Any]
    settings: Mapping[str, Any]
    columns: Mapping[str | None, Column]
    rounds: list[Round] = field(default_factory=list)


def errors(report: Report) -> list[tuple[str, list[str]]]:
    """(task and adapter, what its answers ended with), where there is any."""
    return [
        (f"{found.task.name}, {found.scorer}, {_label(score)}", score.errors)
        for found in report.rounds
        for score in found.scores
        if score.errors
    ]


def _label(score: Score) -> str:
    return f"{score.adapter or BASE}{'' if score.variation is None else f', {score.variation.name}'}"


def _given(moa: Mapping[str, Any], manifest: Manifest) -> list[Variation]:
    return [given(moa, manifest)]


def variations(
    columns: Mapping[str | None, Column],
    *,
    moa: Sequence[Mapping[str, Any]] = (),
    ablate: Sequence[str] = (),
    is_swept: bool = False,
    is_explicit: bool = True,
) -> dict[str | None, list[Variation]]:
    """How else each adapter is to be asked: as `moa` says, with experts left out, and by a sweep. The base has no routers.

    Args:
        is_explicit: the adapters were named; else those without a router are passed over, with a warning.
    Raises:
        InvalidRequest: what is asked for is not for one of the adapters; the message has its name.
    """
    wanted: list[Callable[[Manifest], list[Variation]]] = [partial(_given, options) for options in moa]
    wanted += [partial(ablations, one) for one in ablate]
    wanted += [sweep] * is_swept
    found: dict[str | None, list[Variation]] = {}
    for name, column in columns.items():
        if column.manifest is None:
            continue
        if not (column.is_routed or is_explicit):
            if wanted:
                terminal.warn(f"adapter {column.label!r} has no router: it is scored in its own way alone")
            continue
        try:
            asked = [variation for make in wanted for variation in make(column.manifest)]
        except InvalidRequest as error:
            raise InvalidRequest(f"adapter {column.label!r}: {error}", param=error.param) from None
        # A kind of one expert is an expert, too: what was asked before is not asked again.
        found[name] = [one for place, one in enumerate(asked) if one.moa not in [other.moa for other in asked[:place]]]
    if wanted and not found:
        raise InvalidRequest("there is no adapter with a router to ask; name one with --adapter", param="adapter")
    return found


def engine_options(num_rows: int) -> dict[str, int]:
    """Sizes for work that nobody waits for token by token: prompts are prefilled as fast as there is room."""
    budget = max(_BATCH_TOKENS, num_rows)
    return {"max_num_seqs": num_rows, "max_batch_tokens": budget, "max_mixed_prefill_tokens": budget}


def describe_base(llm: LLM) -> dict[str, Any]:
    return {"name": llm.name, "digest": llm.base_digest, "backend": llm.backend, "device": str(llm.device), "dtype": llm.base_dtype}


def play(evaluation: Evaluation, report: Report, *, is_shown: bool, out: Path | None) -> None:
    """All rounds of a run: a bar on standard error where somebody watches, the table of each, and the files up to date after each."""
    console = terminal.messages()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=evaluation.num_pairs)
        for found in evaluation.run(lambda what, done: bar.update(task, description=visible(what), completed=done)):
            report.rounds.append(found)
            bar.stop()  # while it runs, it takes standard output to standard error
            if is_shown:
                show(terminal.output(), found, report.columns)
            if out is not None:
                write(report, out)
            bar.start()


# -- one table, for a terminal and for Markdown


def heading(found: Round) -> str:
    task = found.task
    of = f" of {task.num_rows:,}" if len(found.rows) < task.num_rows else ""
    parts = [f"{task.name}, {found.scorer}, {len(found.rows):,}{of} rows"]
    if any(example.kind == "choice" for example in found.rows):
        parts[0] += f" in {task.form} form"
    if found.chance is not None and found.majority is not None:
        parts.append(f"chance {_percent(found.chance)} %, always the same place {_percent(found.majority)} %")
    return "; ".join(parts)


def cost(found: Round) -> str:
    """The speed of the whole mixed batch."""
    what = "adapters" if all(score.variation is None for score in found.scores) else "adapters and ways to ask them"
    together = f"{len(found.scores)} {what} in one batch: " if len(found.scores) > 1 else ""
    return f"{together}{found.num_tokens:,} tokens in {found.seconds:.1f} s, {found.tokens_per_second:,.0f} tokens/s"


def table_rows(found: Round, columns: Mapping[str | None, Column]) -> tuple[list[str], list[list[str]]]:
    """(titles, cells). A column that would be empty is left out."""
    is_loss = found.scorer == "loss"
    titles = ["adapter", "variant", "asked", "nats/token" if is_loss else "right %", "against base", "against\nits own way"]
    titles += ["per\nbyte %", "no\nanswer", "errors", "experts\na token", "not\nselected %", "not\ncomputed %"]
    rows = [
        [
            columns[score.adapter].label,
            _variant(columns[score.adapter]),
            "" if score.variation is None else score.variation.name,
            *_cells(score, is_loss),
        ]
        for score in found.scores
    ]
    kept = [i for i in range(len(titles)) if i in (0, 3) or any(row[i] not in ("", "0", "0.0") for row in rows)]
    return [titles[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _variant(column: Column) -> str:
    return "" if column.name is None else column.detail


def _cells(score: Score, is_loss: bool) -> list[str]:
    usage, per_byte = score.usage, score.per_byte
    return [
        "-" if score.score is None else _estimate(score.score, is_loss),
        _difference(score.against_base, is_loss),
        _difference(score.against_own, is_loss),
        "" if per_byte is None or per_byte == score.score else _percent(per_byte.value),
        "" if is_loss else str(score.num_unanswered),
        str(len(score.errors)),
        "" if usage is None else f"{usage.experts_per_token:.2f}/{usage.num_experts:.4g}",
        "" if usage is None else _percent(usage.not_selected),
        "" if usage is None else _percent(usage.not_computed),
    ]


def _difference(found: Estimate | None, is_loss: bool) -> str:
    return "" if found is None else _estimate(found, is_loss, sign="+") + " *" * found.is_beyond_chance


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _estimate(found: Estimate, is_loss: bool, sign: str = "") -> str:
    """With its standard error: nats with four digits, shares in percent."""
    scale, digits = (1, 4) if is_loss else (100, 1)
    return f"{scale * found.value:{sign}.{digits}f} ± {scale * found.standard_error:.{digits}f}"


NOTE = "± one standard error; * more than two of them away from what it is held against, row by row"


def show(console: Console, found: Round, columns: Mapping[str | None, Column]) -> None:
    titles, rows = table_rows(found, columns)
    if terminal.is_terminal() and console.width < _FULL_WIDTH and "variant" in titles:
        titles, rows = titles[:1] + titles[2:], [row[:1] + row[2:] for row in rows]
    console.print(Text(visible(heading(found)), style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in titles:  # where it is narrow, names are folded and numbers are not
        if title in ("adapter", "variant", "asked"):
            table.add_column(title, overflow="fold", min_width=8)
        else:
            table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(visible(cell), style="bold" if cell.endswith(" *") else "") for cell in row))
    print_table(console, table)
    console.print(Text(f"{NOTE}\n{cost(found)}", style="dim"), soft_wrap=True)
    console.print()


# -- files


def to_json(report: Report) -> dict[str, Any]:
    tasks = {found.task.path: found.task for found in report.rounds}
    return {
        "format": FORMAT,
        "versions": {"moa_serve": version("moa_serve"), "torch": version("torch"), "python": platform.python_version()},
        "base": dict(report.base),
        "settings": dict(report.settings),
        "adapters": [
            {"name": column.label, "variant": _variant(column) or None, "revision": column.revision} for column in report.columns.values()
        ],
        "tasks": [
            {"name": task.name, "path": task.path, "sha256": task.digest, "form": task.form, "num_rows": task.num_rows}
            for task in tasks.values()
        ],
        "rounds": [_round_json(found) for found in report.rounds],
    }


def _round_json(found: Round) -> dict[str, Any]:
    return {
        "task": found.task.name,
        "path": found.task.path,
        "scorer": found.scorer,
        "metric": "nats_per_token" if found.scorer == "loss" else "accuracy",
        "n": len(found.rows),
        "chance": _rounded(found.chance),
        "majority": _rounded(found.majority),
        "num_tokens": found.num_tokens,
        "seconds": round(found.seconds, 3),
        "tokens_per_second": round(found.tokens_per_second, 1),
        "rows": [example.row for example in found.rows],
        "scores": [_score_json(score, found) for score in found.scores],
    }


def _score_json(score: Score, found: Round) -> dict[str, Any]:
    is_loss = found.scorer == "loss"
    answers = list(zip(found.rows, score.verdicts, strict=True))
    item: dict[str, Any] = {
        "adapter": score.adapter or BASE,
        "asked": None if score.variation is None else asdict(score.variation),
        "value": _rounded(score.score.value) if score.score else None,
        "standard_error": _rounded(score.score.standard_error) if score.score else None,
        "against_base": _estimate_json(score.against_base),
        "against_own": _estimate_json(score.against_own),
        "num_tokens": score.num_tokens,
        "errors": {str(example.row): verdict.error for example, verdict in answers if verdict.error is not None},
        "routing": None,
    }
    if not is_loss:
        item["correct"] = round(sum(verdict.value for verdict in score.verdicts))
        item["unanswered"] = score.num_unanswered
        item["accuracy_per_byte"] = _rounded(score.per_byte.value) if score.per_byte else None
    if score.usage is not None:
        usage = score.usage
        item["routing"] = {
            "experts_per_token": _rounded(usage.experts_per_token),
            "num_experts": _rounded(usage.num_experts),
            "not_selected": _rounded(usage.not_selected),
            "not_computed": _rounded(usage.not_computed),
        }
    item["answers"] = [_answer_json(verdict, is_loss) for _, verdict in answers]
    return item


def _answer_json(verdict: Verdict, is_loss: bool) -> list[Any]:
    """Of a loss [nats, tokens]; of an answer [what was predicted, whether it is right]."""
    return [_rounded(verdict.value), verdict.weight] if is_loss else [verdict.prediction, bool(verdict.value)]


def _estimate_json(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "difference": _rounded(found.value),
        "standard_error": _rounded(found.standard_error),
        "beyond_two_standard_errors": found.is_beyond_chance,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def to_markdown(report: Report) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items() if value is not None)
    base = report.base
    where = f"{base['backend']} backend on {base['device']}, {base['dtype']}"
    lines = ["# Evaluation", "", f"Base {_cell(base['name'])} (`{base['digest'][:12]}`), {where}; {_cell(settings)}."]
    for found in report.rounds:
        titles, rows = table_rows(found, report.columns)
        lines += ["", f"## {_cell(heading(found))}", "", _line(titles), _line(["---"] * len(titles))]
        lines += [_line(row) for row in rows]
        lines += ["", f"{cost(found)}. `{Path(found.task.path).name}` sha256 `{found.task.digest[:12]}`."]
    lines += ["", f"{NOTE}.".replace("*", "\\*")]
    if revisions := [f"{_cell(column.label)} `{column.revision[:12]}`" for column in report.columns.values() if column.revision]:
        lines += ["", f"Revisions: {', '.join(revisions)}."]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """A name of a file or of an adapter must not end a cell."""
    return " ".join(visible(text).split()).replace("|", "\\|")


def prepare(folder: Path) -> None:
    """Make the folder before the work, which may take hours. Raises InvalidRequest."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{folder}: cannot be made ({error.strerror}); choose another --out", param="out") from None


def write(report: Report, folder: Path) -> None:
    """Each file whole or not at all, since it is written after every round, and an interrupt must not cost those before.

    Raises:
        InvalidRequest: the folder cannot be written.
    """
    for name, text in ((JSON_FILE, json.dumps(to_json(report)) + "\n"), (MARKDOWN_FILE, to_markdown(report))):
        try:
            replace_file(folder / name, text.encode())
        except OSError as error:
            raise InvalidRequest(f"{folder / name}: cannot be written ({error.strerror}); choose another --out", param="out") from None

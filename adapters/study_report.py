"""docs/results.md and its pictures from the runs in docs/results/. Numbers come from there; the words that judge them stand in the page's
hand-written part, docs/results/notes.md, which is put at the top as it is."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

Run = dict[str, Any]
TABLES = (
    ("Families (the paper's tables 1 and 2)", ("base", "lora", "lora-slow", "molora", "hydralora", "adamole", "soft", "sparse")),
    ("Parts of Soft MoA (table 3)", ("prompt", "parallel", "composition", "lora-sigmoid", "soft")),
    ("What routes, and what is weighed (table 5)", ("soft", "softmax", "instance", "unipeft")),
    (
        "Thresholds (table 4)",
        ("constant-25", "constant-50", "constant-75", "learned-25", "sparse", "learned-75", "learned-100", "random-100"),
    ),
)


def write(results: Path, rows: Sequence[Any], tasks: Iterable[str], num_jobs: int, console: Console) -> None:
    titles = {row.name: row.title for row in rows} | {"base": "Base"}
    runs = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    page = [(results / "notes.md").read_text().rstrip() if (results / "notes.md").exists() else "# First results", ""]
    if len(runs) < num_jobs:
        page += [f"**Not finished:** {len(runs)} of {num_jobs} runs are there. Rows that are missing below have not been run.", ""]
    for task in tasks:
        own = [run for run in runs if run["task"] == task]
        if own:
            page += _task(task, own, titles)
    page += _agreement(runs, titles)
    _picture(results / "accuracy.png", runs, titles, [task for task in tasks if any(run["task"] == task for run in runs)])
    page += ["## Accuracy at one glance", "", "![accuracy of every row on both tasks](results/accuracy.png)", ""]
    (results.parent / "results.md").write_text("\n".join(page).rstrip() + "\n")
    console.print(f"wrote {results.parent / 'results.md'} from {len(runs)} runs")


def headline(run: Run) -> str:
    """For each test row whether the answer is right ("1"), by likelihood where there are choices, else by generation."""
    wanted = "likelihood" if any(name.endswith("likelihood") for name in run["scores"]) else "generation"
    return answers(run, wanted)


def answers(run: Run, scorer: str) -> str:
    """The same by one scorer, a task's test files one after the other; "" where it was not scored so."""
    return "".join(score["right"] for name, score in sorted(run["scores"].items()) if name.endswith(scorer) and "right" in score)


def share(right: str) -> float:
    return right.count("1") / len(right)


def mean_and_error(runs: list[Run]) -> tuple[float, float]:
    """Accuracy and its standard error over test rows. Seeds answer the same rows, so a row counts once, with its mean over the seeds."""
    rows = np.array([[char == "1" for char in headline(run)] for run in runs], dtype=float).mean(0)
    return float(rows.mean()), float(rows.std() / math.sqrt(len(rows)))


def loss(run: Run) -> float | None:
    """Nats per learned token of the examples held out from training, by the tensors as saved."""
    found: float | None = run["training"]["result"]["saved_loss"] if run["training"] else None
    return found


def skipped(run: Run) -> float | None:
    parts = [score["routing"]["not_selected"] for score in run["scores"].values() if score.get("routing")]
    return sum(parts) / len(parts) if parts else None


def _task(task: str, runs: list[Run], titles: dict[str, str]) -> list[str]:
    page = []
    for title, names in TABLES:
        found = [(name, [run for run in runs if run["row"] == name]) for name in names]
        lines = [_line(name, own, titles) for name, own in found if own]
        if not lines:
            continue
        head = ["", "seeds", "right", "± SE", "by generation" if _has(runs, "likelihood") else "held-out loss", "skipped"]
        head += ["parameters", "training", "peak memory"]
        page += [f"## {task}: {title}", "", _row(head), _row(["---", *["---:"] * (len(head) - 1)]), *map(_row, lines), ""]
    return page


def _has(runs: list[Run], scorer: str) -> bool:
    return any(answers(run, scorer) for run in runs)


def _line(name: str, runs: list[Run], titles: dict[str, str]) -> list[str]:
    mean, error = mean_and_error(runs)
    spread = f" ({', '.join(f'{100 * share(headline(run)):.1f}' for run in runs)})" if len(runs) > 1 else ""
    other = [value for run in runs if (value := _second(run)) is not None]
    shares = [value for run in runs if (value := skipped(run)) is not None]
    training = [run["training"]["result"] for run in runs if run["training"]]
    return [
        titles[name],
        str(len(runs)),
        f"{100 * mean:.1f} %{spread}",
        f"{100 * error:.1f}",
        _second_text(runs, other),
        f"{100 * sum(shares) / len(shares):.0f} %" if shares and max(shares) > 0 else "",
        f"{runs[0]['parameters'] / 1e6:.2f} M" if runs[0]["parameters"] else "",
        f"{sum(one['seconds'] for one in training) / len(training):.0f} s" if training else "",
        f"{max(one['peak_memory_bytes'] for one in training) / 2**30:.1f} GiB" if training else "",
    ]


def _second(run: Run) -> float | None:
    if answers(run, "likelihood"):
        return share(other) if (other := answers(run, "generation")) else None
    return loss(run)


def _second_text(runs: list[Run], values: list[float]) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{100 * mean:.1f} %" if answers(runs[0], "likelihood") else f"{mean:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _agreement(runs: list[Run], titles: dict[str, str]) -> list[str]:
    """Correlation of the experts' mean weights (layers x experts) between seeds: whether training finds the same use for them again."""
    lines = []
    for task in sorted({run["task"] for run in runs}):
        for name in ("soft", "sparse"):
            own = [run for run in runs if (run["task"], run["row"]) == (task, name) and run["profile"]]
            pairs = [(a, b) for i, a in enumerate(own) for b in own[i + 1 :]]
            seeds = ", ".join(f"{a['seed']}-{b['seed']}" for a, b in pairs)
            if not pairs:
                continue
            found = {kind: [_correlation(a, b, kind) for a, b in pairs] for kind in ("weight", "selected")}
            weight = ", ".join(f"{value:.2f}" for value in found["weight"])
            chosen = ", ".join(f"{value:.2f}" for value in found["selected"]) if name == "sparse" else ""
            lines.append(_row([task, titles[name], seeds, weight, chosen]))
    if not lines:
        return []
    head = [_row(["task", "", "seeds", "weights", "shares selected"]), _row(["---", "---", "---", "---:", "---:"])]
    text = "Correlation between two seeds of an expert's mean weight, and of its share of tokens, over all layers and experts."
    return ["## Agreement between seeds", "", text, "", *head, *lines, ""]


def _correlation(a: Run, b: Run, kind: str) -> float:
    one, other = (np.array([use[kind] for layer in run["profile"]["layers"] for use in layer.values()]) for run in (a, b))
    return float(np.corrcoef(one, other)[0, 1]) if one.std() and other.std() else math.nan


def _names(runs: list[Run], titles: dict[str, str], task: str) -> list[str]:
    """The rows of which the task has runs, in the order of the titles."""
    found = {run["row"] for run in runs if run["task"] == task}
    return [name for name in titles if name in found]


def _picture(path: Path, runs: list[Run], titles: dict[str, str], tasks: list[str]) -> None:
    most = max(len(_names(runs, titles, task)) for task in tasks)
    figure = Figure(figsize=(6 * len(tasks), 1.5 + 0.35 * most), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        names = _names(runs, titles, task)
        found = {name: [run for run in runs if (run["task"], run["row"]) == (task, name)] for name in names}
        names.sort(key=lambda name: mean_and_error(found[name])[0])
        for place, name in enumerate(names):
            mean, error = mean_and_error(found[name])
            kind = titles[name].split()[0]
            colour = {"Base": "0.6", "Soft": "tab:orange", "Sparse": "tab:green"}.get(kind, "tab:blue")
            axes.errorbar(100 * mean, place, xerr=200 * error, fmt="o", color=colour, capsize=3)
            axes.plot([100 * share(headline(run)) for run in found[name]], [place] * len(found[name]), "|", color=colour, markersize=9)
        axes.set_yticks(range(len(names)), [titles[name] for name in names], fontsize=8)
        axes.set_xlabel("right, % (bars: two standard errors; ticks: seeds)")
        axes.set_title(task)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)

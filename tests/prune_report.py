"""What pruning saves and what it costs: bytes, decode steps and right answers before and after, for the shipped MoA adapters.

    python -m tests.prune_report --data DIR

The suggestion comes as a server would make it: from what the routers did with `mawps/train_clean.json` in DIR (prompts, and the answers
that the adapter gives), at several bounds. Right answers are counted on `mawps/test.json`, which no suggestion has seen, by generation. A
decode step is timed on the serving backend, whole and pruned taking turns; the control is the whole one against itself. Nothing else
should run meanwhile; without --rounds nothing is timed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moa_serve import LLM
from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.checkpoint import revision_of, write_adapter
from moa_serve.adapter.prune import prune
from moa_serve.bench.step import Clock
from moa_serve.bench.timing import Spread, interleaved, quiet, ratio
from moa_serve.bench.workload import Pages, Workload, steps_for
from moa_serve.llm import new_model, open_base
from moa_serve.metrics.experts import use_of
from moa_serve.metrics.pruning import Bound, Suggestion, suggest
from moa_serve.shell.evaluate import engine_options
from moa_serve.train.evaluate import Evaluation
from moa_serve.train.scoring import Estimate, paired_difference, read_task

ADAPTERS = Path(__file__).parents[1] / "adapters"
BOUNDS: Mapping[str, tuple[float, ...]] = {"math-sparse": (0.01, 0.05, 0.2, 0.4), "math-soft": (0.02, 0.2, 0.3, 0.4)}
ROWS, CONTEXT = (1, 8), 128
CONTROL = "control"


@dataclass(frozen=True)
class Version:
    """An adapter, whole or pruned; `suggestion` is None for the whole one."""

    name: str
    adapter: Adapter
    suggestion: Suggestion | None = None

    @property
    def num_experts(self) -> int:
        return sum(len(expert.layers) for expert in self.adapter.manifest.experts)


@dataclass(frozen=True)
class Accuracy:
    """`same`: share of rows with the whole one's prediction. `against`: of the whole one, row by row."""

    right: Estimate
    against: Estimate | None
    same: float


def versions_of(llm: LLM, name: str, data: Path, rows: int | None, folder: Path) -> list[Version]:
    """The adapter, and what is left of it at each bound, loaded as `name`, `name@bound`."""
    whole = llm.load_adapter(name, ADAPTERS / name)
    task = read_task(data / "mawps" / "train_clean.json", "authors", limit=rows, seed=0)
    list(Evaluation(llm, [task], [name], scorer="generation").run())
    totals = llm.routing_totals(name)
    assert totals is not None
    use = use_of(name, whole.revision, totals.experts, totals, None, None, has_dead=True)
    versions = [Version(name, whole)]
    for limit in BOUNDS[name]:
        keeps_all = whole.manifest.router.select.kind == "all"
        found = suggest(whole, use, Bound.of(whole.manifest, None if keeps_all else limit, limit if keeps_all else None))
        assert found is not None
        if not found.disable:
            versions.append(Version(f"{name}@{limit}", whole, found))
            continue
        made = prune(whole.manifest, found.disable, revision=whole.revision)
        tensors = made.tensors(whole.tensors)
        write_adapter(folder / f"{name}-{limit}", made.manifest, tensors)
        left = Adapter(made.manifest, tensors, revision_of(made.manifest, tensors), whole.source_format)
        versions.append(Version(f"{name}@{limit}", left, found))
    _say(f"{name}: {totals.tokens:,} tokens of training prompts and answers were routed")
    return versions


def accuracy_of(llm: LLM, versions: Sequence[Version], data: Path, rows: int | None, folder: Path) -> dict[str, Accuracy]:
    task = read_task(data / "mawps" / "test.json", "authors", limit=rows, seed=0)
    changed = [version for version in versions if version.suggestion is None or version.suggestion.disable]
    names = {version.name: version.name.replace("@", "-") for version in changed}
    for version in changed:
        if version.suggestion is not None:
            llm.load_adapter(names[version.name], AdapterSource(folder / names[version.name]))
    (found,) = Evaluation(llm, [task], list(names.values()), scorer="generation").run()
    whole = found.scores[0].verdicts
    told = {}
    for name, score in zip(names, found.scores, strict=True):
        assert score.score is not None
        same = sum(a.prediction == b.prediction for a, b in zip(score.verdicts, whole, strict=True)) / len(whole)
        told[name] = Accuracy(score.score, paired_difference(score.verdicts, whole), same)
    return told


def steps_of(versions: Sequence[Version], options: argparse.Namespace) -> dict[str, dict[int, Spread]]:
    """Seconds of a decode step over the whole adapter's, by version and rows."""
    base, backend = open_base(None, backend=options.backend, device="cpu", dtype=options.dtype)
    found: dict[str, dict[int, Spread]] = {CONTROL: {}}
    with closing(new_model(backend, base)) as model:
        pages = Pages(model, [CONTEXT] * max(ROWS))
        ready = {version.name: model.prepare(version.adapter) for version in versions}
        whole = versions[0].name
        for rows in ROWS:
            work = {name: Workload(pages, [prepared] * rows) for name, prepared in ready.items()}
            work[CONTROL] = Workload(pages, [ready[whole]] * rows)
            work["base"] = Workload(pages, [None] * rows)
            clock, steps = Clock(model), steps_for(work[whole].run)
            with quiet():
                times = interleaved({name: clock.measurement(name, [one], steps) for name, one in work.items()}, options.rounds)
            for name in work:
                found.setdefault(name, {})[rows] = ratio(times[name], times[whole])
    return found


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="folder with mawps/train_clean.json and mawps/test.json")
    arguments.add_argument("--adapter", choices=list(BOUNDS), action="append", help="again for more; all if omitted")
    arguments.add_argument("--routed-rows", type=int, default=200, help="of the training file, to make the suggestions from")
    arguments.add_argument("--rows", type=int, help="of the test file; all if omitted")
    arguments.add_argument("--rounds", type=int, default=0, help="in which every version has its turn; 0 times nothing")
    arguments.add_argument("--backend", default="auto")
    arguments.add_argument("--dtype", default="auto")
    options = arguments.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {}
    sizes: dict[str, Any] = engine_options(64)
    for name in options.adapter or BOUNDS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            with LLM(backend=options.backend, dtype=options.dtype, prefix_cache=False, **sizes) as llm:
                versions = versions_of(llm, name, options.data, options.routed_rows, folder)
                scores = accuracy_of(llm, versions, options.data, options.rows, folder)
                _say(f"{name}: {llm.backend} backend, {llm.base_dtype}")
            changed = [version for version in versions if version.name in scores]
            steps = steps_of(changed, options) if options.rounds else {}
        Console(stderr=True, width=160).print(table_of(versions, scores, steps))
        report[name] = {
            "versions": {
                version.name: {
                    "experts": version.num_experts,
                    "bytes": version.adapter.num_bytes,
                    "suggestion": None if version.suggestion is None else asdict(version.suggestion),
                    "accuracy": asdict(scores[version.name]) if version.name in scores else None,
                }
                for version in versions
            },
            "steps": {of: {rows: spread.to_json() for rows, spread in found.items()} for of, found in steps.items()},
        }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def table_of(versions: Sequence[Version], scores: Mapping[str, Accuracy], steps: Mapping[str, Mapping[int, Spread]]) -> Table:
    table = Table("adapter", "experts", "bytes", "right %", "against whole", "same answer %", *(f"step, {rows} rows" for rows in ROWS))
    for version in versions:
        cells = [version.name, str(version.num_experts), f"{version.adapter.num_bytes:,}"]
        if (score := scores.get(version.name)) is not None:
            cells += [_percent(score.right), "" if score.against is None else _percent(score.against), f"{100 * score.same:.1f}"]
            cells += _ratios(steps.get(version.name, {}))
        table.add_row(*cells)
    for name in (CONTROL, "base"):
        if name in steps:
            table.add_row(name, "", "", "", "", "", *_ratios(steps[name]))
    return table


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} ± {100 * found.standard_error:.1f}"


def _ratios(found: Mapping[int, Spread]) -> list[str]:
    return [f"{spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f})" for spread in found.values()]


if __name__ == "__main__":
    sys.exit(main())

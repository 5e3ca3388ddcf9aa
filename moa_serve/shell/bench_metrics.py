"""`moa-serve bench metrics`: its options and its table. What is measured is bench/metrics.py."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from moa_serve.shell import terminal
from moa_serve.shell.bench_step import (
    BackendOption,
    BaseOption,
    CoreOption,
    DtypeOption,
    JsonOption,
    RoundsOption,
    ShapesOption,
    check_core,
    goal_of,
    judged,
    new_table,
    opened_base,
    refuse_two_bases,
    spread,
    title_of,
)

if TYPE_CHECKING:
    from moa_serve.bench.metrics import MetricsReport


def bench_metrics(
    command: typer.Context,
    rows: Annotated[int, typer.Option(min=1, help="That decode, each with an adapter of its own.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens that stand before the first decoded one.")] = 64,
    rounds: RoundsOption = 30,
    core: CoreOption = None,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    model: BaseOption = None,
    shapes: ShapesOption = None,
) -> None:
    """What it costs a decode step that it is counted, and what a scrape a second adds.

    One engine in this process, without HTTP, with a made-up Soft MoA of the paper's sizes for each row, all of them in the grid. "none" has
    no metrics, "attached" has, "control" is "none" again; they take turns step by step. "scraped" is read by another thread every second as
    well. "hooks" is what a step calls, timed by itself, over the step. Nothing else should run.
    """
    with terminal.spinner("Loading torch"):
        import torch

        from moa_serve.bench import metrics
        from moa_serve.bench.timing import quiet
        from moa_serve.llm import resolve
    refuse_two_bases(command, shapes)
    check_core(core)
    plan = metrics.Plan(rows=rows, context=context, rounds=rounds)
    resolved, _, computed = resolve(backend, "cpu", dtype)
    if core is not None:
        torch.set_num_threads(1)
    with quiet(core):  # a backend has as many threads as it sees cores
        report = metrics.measure(opened_base(model, shapes, computed), resolved, plan, on_progress=terminal.note)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        show(report)


def show(report: "MetricsReport") -> None:
    """A line for each case."""
    table = new_table(title_of(report.computed.base, report.computed), ("case",), ("step ms", "to none", "of CPU time", "goal"))
    for case, found in report.step_ms.items():
        over, cpu = report.ratios.get(case), report.ratios.get(f"{case}_cpu")
        table.add_row(case, spread(found, 3), judged(over) if over else "", judged(cpu) if cpu else "", goal_of(over) if over else "")
    hooks = report.ratios["hooks"]
    table.add_row("hooks", spread(report.hooks_us, 1) + " us", judged(hooks), "", goal_of(hooks))
    console = terminal.output()
    terminal.print_table(console, table)
    console.print(f"a scrape of {report.page_lines:,} lines takes {spread(report.scrape_ms, 1)} ms")
    plan = report.plan
    console.print(
        f"{terminal.counted(plan.rows, 'row')} behind {plan.context} tokens; medians (quartiles) of "
        f"{terminal.counted(plan.rounds, 'round')} of {report.inner_steps} steps; ! misses its goal"
    )

"""`moa-serve bench prefix`: its options and its table. What is measured is bench/prefix.py."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from moa_serve.shell import terminal
from moa_serve.shell.bench_step import (
    BackendOption,
    BaseOption,
    DtypeOption,
    JsonOption,
    RoundsOption,
    ShapesOption,
    goal_of,
    judged,
    new_table,
    opened_base,
    refuse_two_bases,
    spread,
    title_of,
)

if TYPE_CHECKING:
    from moa_serve.bench.prefix import PrefixReport


def bench_prefix(
    command: typer.Context,
    shared_tokens: Annotated[
        int, typer.Option(min=16, help="Tokens at the beginning of a prompt that a hit finds; full pages of 16.")
    ] = 512,
    own_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind them that every request has for itself.")] = 16,
    rounds: RoundsOption = 15,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    model: BaseOption = None,
    shapes: ShapesOption = None,
) -> None:
    """What the prefix cache saves: the time to the first token where the beginning of the prompt is known, over where nothing is.

    One engine in this process, without HTTP, asked for one token at a time: of the base alone, and with a made-up Soft MoA of the paper's
    sizes. "control" is a miss again. Nothing else should run.
    """
    with terminal.spinner("Loading torch"):
        from moa_serve.bench import prefix
        from moa_serve.llm import resolve
    refuse_two_bases(command, shapes)
    plan = prefix.Plan(shared_tokens=shared_tokens, own_tokens=own_tokens, rounds=rounds)
    resolved, _, computed = resolve(backend, "cpu", dtype)
    report = prefix.measure(opened_base(model, shapes, computed), resolved, plan, on_progress=terminal.note)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        show(report)


def show(report: "PrefixReport") -> None:
    """A line for each model and case."""
    table = new_table(title_of(report.computed.base, report.computed), ("model", "case"), ("TTFT ms", "to miss", "goal"))
    for name, cases in report.first_token_ms.items():
        for case, found in cases.items():
            over = report.ratios.get(f"{name} {case}")
            table.add_row(name, case, spread(found, 2), judged(over) if over else "", goal_of(over) if over else "")
    console = terminal.output()
    terminal.print_table(console, table)
    plan, crossed = report.plan, report.ratios["crossed_tokens"]
    console.print(f"prompts of {plan.num_tokens} tokens, of which a hit shares {plan.shared_tokens} and computes {plan.own_tokens}")
    console.print(
        f"tokens that one model found of what the other had left: {crossed.found.median:g}{' !' if crossed.is_met is False else ''}"
    )
    console.print(f"medians (quartiles) of {terminal.counted(plan.rounds, 'round')}; ! misses its goal")

"""`moa-serve bench options`: what routing options cost a decode step, and what they save. Light, so that `--help` answers at once."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moa_serve.errors import InvalidRequest
from moa_serve.shell import terminal
from moa_serve.shell.bench_step import (
    BaseOption,
    ContextOption,
    CoreOption,
    DtypeOption,
    JsonOption,
    RoundsOption,
    ThreadsOption,
    new_table,
    numbers,
    opened_model,
    spread,
    title_of,
)

if TYPE_CHECKING:
    from moa_serve.bench.options import OptionsReport


def bench_options(
    adapter: Annotated[str, typer.Argument(help="A NAME in the adapters directory, or a folder in any format.", show_default=False)],
    adapters_dir: Annotated[
        Path | None,
        typer.Option("--adapters-dir", envvar="MOA_ADAPTERS_DIR", exists=True, file_okay=False, help="Folder of adapter folders."),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", envvar="MOA_BACKEND", help="auto, native or torch.")] = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = 1,
    core: CoreOption = None,
    rows: Annotated[str, typer.Option(help="Sequences that decode a token each, one batch size after the other.")] = "1,8,32",
    rules: Annotated[str, typer.Option(help="Different rules in a batch, that all select what the adapter's own way does.")] = "1,2,8,32",
    sweep: Annotated[bool, typer.Option("--sweep/--no-sweep", help="Every way of eval --sweep, asked for by all rows, too.")] = True,
    context: ContextOption = 128,
    rounds: RoundsOption = 15,
    as_json: JsonOption = False,
    model: BaseOption = None,
) -> None:
    """What routing options cost a decode step that mixes them, and what they save, as ratios to the adapter's own way.

    Tokens are random, so the share of experts that was selected stands beside the time. Nothing else should run meanwhile: the control,
    the adapter's own way against itself, tells how much the machine wavers.
    """
    with terminal.spinner("Loading torch"):
        from moa_serve.adapter.store import AdapterStore
        from moa_serve.bench import options
        from moa_serve.shell.selection import parse_adapter
    usual = Path("adapters")
    wanted = parse_adapter(adapter, adapters_dir or (usual if usual.is_dir() else None))
    if wanted.name is None or wanted.source is None:
        raise InvalidRequest("the base alone has no routers to ask; name an adapter", param="adapter")
    plan = options.Plan(rows=numbers("rows", rows), rules=numbers("rules", rules), is_swept=sweep, rounds=rounds, context=context)
    with opened_model(model, backend, dtype, threads, core) as (opened, base):
        found = AdapterStore(base.config, base_name=base.name, base_digest=base.digest).read(wanted.name, wanted.source)
        report = options.measure(opened, found, plan, on_progress=terminal.note)
    title = f"{title_of(base.name, report)}, {wanted.name}"
    if as_json:
        typer.echo(json.dumps({"base": base.name, "adapter": wanted.name} | report.to_json()))
    else:
        show_options(report, title)


def show_options(report: "OptionsReport", title: str) -> None:
    """A line for each case, and for each number of rows its step over that of the adapter's own way, and what was selected."""
    console = terminal.output()
    titles = [f"{size.rows} row{'s' * (size.rows > 1)}, to own" for size in report.sizes]
    table = new_table(title, ("asked",), (*titles, "selected"))
    largest = max(report.sizes, key=lambda size: size.rows)  # has every case
    for name in largest.cases:
        cases = [size.cases.get(name) for size in report.sizes]
        selected = largest.cases[name].selected_share
        table.add_row(
            name, *("" if case is None else spread(case.to_own, 3) for case in cases), "" if selected is None else f"{selected:.0%}"
        )
    terminal.print_table(console, table)
    own = ", ".join(f"{size.cases['its own way'].ms.median:.2f} ms at {terminal.counted(size.rows, 'row')}" for size in report.sizes)
    busy = min(size.cpu_share for size in report.sizes)
    console.print(
        f"medians (quartiles) of {report.plan.rounds} rounds; its own way: {own}; at least {busy:.2f} cores were ours meanwhile; "
        f"selected: of the experts, in the step of {terminal.counted(largest.rows, 'row')}"
    )

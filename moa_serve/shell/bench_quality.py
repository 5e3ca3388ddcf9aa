"""`moa-serve bench quality`: its options and its table. What is compared and how is bench/quality.py."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moa_serve.shell import terminal

if TYPE_CHECKING:
    from moa_serve.bench.quality import Agreement, Report


def bench_quality(
    reference: Annotated[str, typer.Option("--reference", help="BACKEND:DTYPE to compare with.")] = "torch:float32",
    other: Annotated[str, typer.Option("--other", help="BACKEND:DTYPE to judge.")] = "native:bfloat16",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of an adapter to compare with as well, or NAME=PATH, with :VARIANT as in generate; again for more.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Take only so many of the fixed prompts.", show_default="all")] = None,
    model: Annotated[str | None, typer.Option("--model", envvar="MOA_MODEL", help="Base.", show_default="SmolLM2-135M-Instruct")] = None,
    device: Annotated[str, typer.Option("--device", envvar="MOA_DEVICE", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """How often one way of computing a base agrees with another one on the best next token, and how far their distributions are apart.

    For every token of the fixed prompts: top-1 agreement and KL(reference || other) in nats, for the base alone and with each adapter.
    Needs room in the temporary folder: for the default base about 300 MB, and as much again for each adapter.
    """
    with terminal.spinner("Loading torch"):
        from moa_serve.bench.quality import Setting, measure
        from moa_serve.bench.texts import PROMPTS
        from moa_serve.shell import selection
    settings = Setting.parse(reference, "reference"), Setting.parse(other, "other")
    sources = {one.name: one.source for one in selection.parse_adapters(adapter or [], None) if one.name and one.source}
    # A base that must be fetched or converted first draws a bar of its own, so only a folder gets a spinner.
    with terminal.spinner("Comparing", shown=model is not None and Path(model).is_dir()):
        report = measure(model, *settings, adapters=sources, prompts=PROMPTS[:prompts], device=device)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        show(report)


def show(report: "Report") -> None:
    """One line for the base and for each adapter; what misses its goal is told so."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from moa_serve.bench.quality import GOAL_KL, GOAL_TOP1

    title = f"{terminal.visible(report.base)}: {report.other} against {report.reference}, {terminal.counted(report.num_prompts, 'prompt')}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("adapter", overflow="fold", min_width=8)
    for name in ("positions", "same best token", "mean KL", "max KL", "margin where not"):
        table.add_column(name, justify="right", no_wrap=True)
    for agreement in report.agreements:
        table.add_row(*map(Text, _cells(agreement, GOAL_TOP1, GOAL_KL)))
    console = terminal.output()
    console.print(Text(title, style="bold"), soft_wrap=True)
    terminal.print_table(console, table)
    console.print(
        f"goals: the same best token at {100 * GOAL_TOP1:.0f} % of the positions, mean KL {GOAL_KL} nats; ! misses its goal; "
        f"margin: between the reference's two best tokens, in nats"
    )


def _cells(agreement: "Agreement", goal_top1: float, goal_kl: float) -> list[str]:
    return [
        "base alone" if agreement.adapter is None else terminal.visible(agreement.adapter),
        f"{agreement.num_positions:,}",
        f"{100 * agreement.top1:.2f} %" + (" !" if agreement.top1 < goal_top1 else ""),
        f"{agreement.mean_kl:.5f}" + (" !" if agreement.mean_kl > goal_kl else ""),
        f"{agreement.max_kl:.5f}",
        "" if agreement.margin is None else f"{agreement.margin:.4f}",
    ]

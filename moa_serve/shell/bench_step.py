"""`moa-serve bench step`, `growth` and `reference`: steps of the model against each other, and against the authors' way of computing them.

Light, so that `--help` answers at once: what loads torch is imported inside. What is measured, and how, is in bench/.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa_serve.errors import InvalidRequest
from moa_serve.shell import terminal
from moa_serve.shell.drawing import drawing_module, write_figure

if TYPE_CHECKING:
    from torch import device as Device
    from torch import dtype as Dtype

    from moa_serve.bench.goals import Judged
    from moa_serve.bench.growth import Growth, GrowthReport
    from moa_serve.bench.options import OptionsReport
    from moa_serve.bench.reference import ReferenceReport
    from moa_serve.bench.serve import Computed
    from moa_serve.bench.step import StepReport
    from moa_serve.bench.timing import Spread
    from moa_serve.model.backend import Backend as Model
    from moa_serve.model.weights import Base

BackendOption = Annotated[str, typer.Option("--backend", envvar="MOA_BACKEND", help="auto, native or torch.")]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Of the backend and of torch.")]
CoreOption = Annotated[
    int | None, typer.Option("--core", min=0, help="Pin one thread to this processor core.", show_default="wherever the system likes")
]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="In which every case has its turn; medians and quartiles are shown.")]
ContextOption = Annotated[int, typer.Option("--context", min=1, help="Tokens that stand before a decoded one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
_Plot = Annotated[Path | None, typer.Option("--plot", dir_okay=False, help="Write a figure, as PNG.", metavar="PNG", show_default=False)]
_BaseDtype = Annotated[str, typer.Option(help="auto (the base's weights are in --dtype) or int8 (native backend only).")]
_Device = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto (CUDA where there is a device).")]
DtypeOption = Annotated[str, typer.Option(help="auto (float32 for torch on a CPU, else bfloat16), bfloat16 or float32.")]
BaseOption = Annotated[str | None, typer.Option("--model", envvar="MOA_MODEL", help="Base.", show_default="SmolLM2-135M-Instruct")]
ShapesOption = Annotated[
    str | None,
    typer.Option(
        "--shapes",
        help="In place of --model a base with made-up weights: llama-3.2-1b or llama-3.1-8b.",
        metavar="NAME",
        show_default=False,
    ),
]


def bench_step(
    command: typer.Context,
    backend: BackendOption = "auto",
    device: _Device = "cpu",
    dtype: DtypeOption = "auto",
    base_dtype: _BaseDtype = "auto",
    threads: ThreadsOption = 1,
    core: CoreOption = None,
    rows: Annotated[str, typer.Option(help="Sequences that decode a token each, one batch size after the other.")] = "1,2,4,8,16,32",
    prefill: Annotated[str, typer.Option(help="Tokens of one sequence to prefill; empty for none.")] = "256",
    families: Annotated[
        str, typer.Option(help="Families to measure beside soft_moa and sparse_moa, as lora,mola; all, or none.")
    ] = "soft_moa_no_prompt",
    adapters: Annotated[int, typer.Option(min=2, help="In a mixed batch, which there is from as many rows on.")] = 8,
    context: ContextOption = 128,
    rounds: RoundsOption = 15,
    as_json: JsonOption = False,
    plot: _Plot = None,
    model: BaseOption = None,
    shapes: ShapesOption = None,
) -> None:
    """What a step of the model costs with one adapter and with several, as ratios to the base alone.

    Adapters are made up in the paper's sizes; Sparse ones are tuned so that 59 % of their experts are selected. Nothing else should run
    meanwhile: the control, the base against itself, tells how much the machine wavers. With --base-dtype int8, the base in bfloat16 takes
    its turns as well.
    """
    draw = _drawing(plot)
    with terminal.spinner("Loading torch"):
        from moa_serve.bench import step
        from moa_serve.native.model import NativeModel
    refuse_two_bases(command, shapes)
    plan = step.Plan(
        rows=numbers("rows", rows),
        prefills=numbers("prefill", prefill) if prefill else (),
        families=step.OTHERS if families == "all" else () if families == "none" else tuple(families.split(",")),
        num_adapters=adapters,
        rounds=rounds,
        context=context,
    )
    with opened_model(model, backend, dtype, threads, core, shapes, base_dtype, device, plan.families, adapters) as (opened, base):
        plain = None
        if opened.base_dtype == "int8":
            again = opened_base(model, shapes, opened.dtype)
            plain = NativeModel(again.config, again.weights, threads=threads)
        with nullcontext() if plain is None else closing(plain):
            report = step.measure(opened, plan, plain=plain, on_progress=terminal.note)
    title = title_of(_placed(base.name, opened), report)
    if as_json:
        typer.echo(json.dumps({"base": base.name} | report.to_json()))
    else:
        show_step(report, title)
    draw("write_step", report, title)


def bench_growth(
    command: typer.Context,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = 1,
    core: CoreOption = None,
    rows: Annotated[str, typer.Option(help="Sequences that decode a token each.")] = "1,2,4,8",
    context: Annotated[str, typer.Option(help="Tokens before the decoded one of each of the 8 rows.")] = "128,512,1024,2048,4096",
    adapters: Annotated[str, typer.Option(help="Different adapters among the 8 rows.")] = "1,2,4,8",
    experts: Annotated[str, typer.Option(help="Experts at each linear of molora, hydralora and mola.")] = "2,4,8,16",
    active: Annotated[str, typer.Option(help="Percentage of a Sparse MoA's experts that is selected.")] = "0,25,50,75,100",
    rounds: RoundsOption = 15,
    as_json: JsonOption = False,
    plot: _Plot = None,
    model: BaseOption = None,
    shapes: ShapesOption = None,
) -> None:
    """How what a decode step costs grows with rows, context, adapters, experts, and the share of them that is active.

    One thing is varied at a time, in the values that its option lists (an empty one leaves it out); the others stay at 8 rows, 128 tokens
    of context and one adapter. "to base" is against the base at the same value, "to the first base" against the base at the first one;
    "adapter part" is what routers and experts alone take, by the processor's counter, against the same at the first value (the native
    backend counts it). Nothing else should run meanwhile: the control, the base against itself, tells how much the machine wavers.
    """
    draw = _drawing(plot)
    with terminal.spinner("Loading torch"):
        from moa_serve.bench import growth
    refuse_two_bases(command, shapes)
    given = {"rows": rows, "context": context, "adapters": adapters, "experts": experts, "active": active}
    plan = growth.Plan(values={thing: numbers(thing, text) for thing, text in given.items() if text}, rounds=rounds)
    with opened_model(model, backend, dtype, threads, core, shapes) as (opened, base):
        report = growth.measure(opened, plan, on_progress=terminal.note)
    title = title_of(base.name, report)
    if as_json:
        typer.echo(json.dumps({"base": base.name} | report.to_json()))
    else:
        show_growth(report, title)
    draw("write_growth", report, title)


def bench_reference(
    backend: BackendOption = "auto",
    device: _Device = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, or auto (float32 for torch on a CPU, else bfloat16).")] = "bfloat16",
    threads: ThreadsOption = 1,
    core: CoreOption = None,
    rows: Annotated[str, typer.Option(help="Sequences that decode a token each, one batch size after the other.")] = "1,8,16",
    family: Annotated[str, typer.Option(help="Of the adapter: sparse_moa or soft_moa.")] = "sparse_moa",
    context: ContextOption = 128,
    rounds: RoundsOption = 15,
    as_json: JsonOption = False,
    plot: _Plot = None,
    model: BaseOption = None,
) -> None:
    """Decode steps against the authors' way of computing on transformers, and the base alone against transformers.

    The same weights, adapter, tokens, dtype and threads on both sides, taking turns in one process.
    """
    draw = _drawing(plot)
    with terminal.spinner("Loading torch and transformers"):
        from transformers.utils import logging

        from moa_serve.bench import reference
    logging.disable_progress_bar()
    sizes = numbers("rows", rows)
    with opened_model(model, backend, dtype, threads, core, device=device) as (opened, base):
        if base.folder is None:
            raise InvalidRequest(f"{base.name} has no folder that transformers could load", param="model")
        report = reference.compare(
            opened, base.folder, family=family, rows=sizes, rounds=rounds, context=context, on_progress=terminal.note
        )
    title = f"{title_of(_placed(base.name, opened), report)}, {report.family}"
    if as_json:
        typer.echo(json.dumps({"base": base.name} | report.to_json()))
    else:
        show_reference(report, title)
    draw("write_reference", report, title)


# -- what they need


def _drawing(plot: Path | None) -> Callable[[str, Any, str], None]:
    """Draws the figure of --plot with a function of bench_plots; nothing without the option. What is missing is told before the work."""
    if plot is None:
        return lambda write, report, title: None
    plots = drawing_module("bench_plots", option="--plot", without="the tables need none")
    return lambda write, report, title: write_figure(plot, partial(getattr(plots, write), report, title))


def numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequest(f"{option} is {text!r}, but must be whole numbers, as 1,8,16", param=option) from None


def refuse_two_bases(command: typer.Context, shapes: str | None) -> None:
    """MOA_MODEL may be there for other commands; --model must be meant."""
    source = command.get_parameter_source("model")
    if shapes is not None and source is not None and source.name == "COMMANDLINE":
        raise InvalidRequest("--shapes is a base of its own; give it or --model", param="shapes")


def check_core(core: int | None) -> None:
    """Raises InvalidRequest: this process may not run there."""
    allowed = sorted(os.sched_getaffinity(0))
    if core is not None and core not in allowed:
        raise InvalidRequest(f"core is {core}, but this process may use {', '.join(map(str, allowed))}", param="core")


@contextmanager
def opened_model(
    model: str | None,
    backend: str,
    dtype: str,
    threads: int,
    core: int | None,
    shapes: str | None = None,
    base_dtype: str = "auto",
    device: str = "cpu",
    families: Sequence[str] = (),
    num_adapters: int = 8,
) -> "Iterator[tuple[Model, Base]]":
    """The base under its backend, with the process pinned and without the garbage collector.

    On a GPU with slots for so many Soft and Sparse MoA sets, and one of each of the other `families`.
    """
    import torch

    from moa_serve.bench.step import ALWAYS
    from moa_serve.bench.synthetic import slot_shape
    from moa_serve.bench.timing import quiet
    from moa_serve.engine.engine import EngineOptions
    from moa_serve.llm import new_model, resolve
    from moa_serve.native.model import NativeModel

    if core is not None and threads > 1:
        raise InvalidRequest(f"core is {core}, but {threads} threads on one core would only wait for each other", param="core")
    check_core(core)
    resolved, where, computed = resolve(backend, device, dtype, base_dtype)
    base = opened_base(model, shapes, computed, where)
    torch.set_num_threads(threads)
    slots = EngineOptions(num_slots=len(ALWAYS) * num_adapters + len(families) + 1)  # and one for those that are tried
    shape = slot_shape((*ALWAYS, *families), base.config)
    # The native backend's threads stay where they are made, so it is made behind the pinning.
    with quiet(core):
        opened: Model = (
            NativeModel(base.config, base.weights, threads=threads, is_int8=base_dtype == "int8")
            if resolved == "native"
            else new_model(resolved, base, options=slots, shape=shape)
        )
        with closing(opened):
            yield opened, base


def opened_base(model: str | None, shapes: str | None, dtype: "Dtype", device: "Device | None" = None) -> "Base":
    """The one that --shapes or --model names; on the CPU where no device is."""
    from moa_serve.bench.shapes import made_up_base, shapes_of
    from moa_serve.model.weights import load_base

    if shapes is None:
        return load_base(model, device=device or "cpu", dtype=dtype)
    config = shapes_of(shapes)
    terminal.note(f"making up weights for {shapes}")
    return made_up_base(shapes, config, dtype, device)


def _placed(base: str, model: "Model") -> str:
    """The base's name, and which GPU has it where one has."""
    import torch

    return base if model.device.type == "cpu" else f"{base} on {torch.cuda.get_device_name(model.device)}"


def title_of(base: str, report: "StepReport | GrowthReport | ReferenceReport | OptionsReport | Computed") -> str:
    return f"{base}, {report.backend}, {report.dtype}, {terminal.counted(report.threads, 'thread')}"


# -- tables


def show_step(report: "StepReport", title: str) -> None:
    """A table of all cases at each size, and one of the ratios between them."""
    console = terminal.output()
    cases = new_table(title, ("rows", "tokens", "case"), ("ms", "to base", "tokens/s", "selected"))
    ratios = new_table("ratios", ("rows", "tokens", "of"), ("found", "goal"))
    for size in report.sizes:
        shape = (str(size.rows), str(size.tokens))
        for name, case in size.cases.items():
            selected = "" if case.selected_share is None else f"{case.selected_share:.0%}"
            cases.add_row(*shape, name, spread(case.ms, 2), judged(case.to_base), f"{case.tokens_per_second:.0f}", selected)
        for name, found in size.ratios.items():
            ratios.add_row(*shape, name, judged(found), goal_of(found))
    terminal.print_table(console, cases)
    terminal.print_table(console, ratios)
    console.print(_footer(report, min(size.cpu_share for size in report.sizes)))


def show_growth(report: "GrowthReport", title: str) -> None:
    """One line for each case at each value, what was varied one below the other."""
    from moa_serve.bench.growth import ROWS
    from moa_serve.bench.workload import CONTEXT

    console = terminal.output()
    table = new_table(title, ("varied", "value", "case"), ("ms", "to base", "to the first base", "adapter part", "selected"))
    for growth in report.grown:
        for value, cases in growth.points.items():
            for name, one in cases.items():
                timing = one.timing
                cells = [growth.thing, "" if value is None else _value(growth, value), name, spread(timing.ms, 2), judged(timing.to_base)]
                selected = "" if timing.selected_share is None else f"{timing.selected_share:.0%}"
                part = "" if one.adapter_part is None else spread(one.adapter_part, 2)
                table.add_row(*cells, spread(one.to_first, 3), part, selected)
    terminal.print_table(console, table)
    console.print(f"where it is not varied: {ROWS} rows, {CONTEXT} tokens of context, one adapter of the paper's sizes")
    console.print(_footer(report, min(growth.cpu_share for growth in report.grown)))


def _value(growth: "Growth", value: int) -> str:
    return f"{value} %" if growth.thing == "active" else str(value)


def _footer(report: "StepReport | GrowthReport", busy: float) -> str:
    more = "; the goals are of one thread" if report.threads > 1 else ""
    return f"medians (quartiles) of {report.plan.rounds} rounds; ! misses its goal{more}; at least {busy:.2f} cores were ours meanwhile"


def show_reference(report: "ReferenceReport", title: str) -> None:
    """One line for each comparison: theirs, ours, and how often ours goes into theirs."""
    console = terminal.output()
    table = new_table(title, ("rows", "against"), ("theirs, ms", "ours, ms", "theirs/ours", "goal"))
    for size in report.sizes:
        lines: Mapping[str, tuple[str, str, Judged]] = {
            "authors' way": ("authors", "ours", size.adapter),
            "transformers' base": ("transformers", "base", size.base),
            "control": ("control", "base", size.control),
        }
        for name, (theirs, ours, found) in lines.items():
            table.add_row(str(size.rows), name, spread(size.ms[theirs], 2), spread(size.ms[ours], 2), judged(found), goal_of(found))
    terminal.print_table(console, table)
    console.print(f"medians (quartiles) of {report.rounds} rounds, context {report.context}; ! misses its goal")


def new_table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def spread(found: "Spread", digits: int) -> str:
    return f"{found.median:.{digits}f} ({found.low:.{digits}f}-{found.high:.{digits}f})"


def judged(found: "Judged") -> str:
    return spread(found.found, 3) + (" !" if found.is_met is False else "")


def goal_of(found: "Judged") -> str:
    if found.goal is None:
        return ""
    return f"{'>=' if found.is_floor else '<='} {found.goal:g}"

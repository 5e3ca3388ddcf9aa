"""`moa-serve bench swap`: its options and its tables. What is measured is bench/swap.py."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from moa_serve.shell import terminal
from moa_serve.shell.bench_step import (
    BackendOption,
    BaseOption,
    DtypeOption,
    JsonOption,
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
    from moa_serve.bench.swap import SwapReport
    from moa_serve.bench.timing import Spread


def bench_swap(
    command: typer.Context,
    adapters: Annotated[int, typer.Option(min=2, help="Adapters that the traffic asks for; more than there are slots.")] = 16,
    slots: Annotated[int, typer.Option(min=1, help="Slots that they share.")] = 8,
    streams: Annotated[int, typer.Option(min=1, help="Streams at the same time; more than there are slots wait for each other.")] = 8,
    requests: Annotated[int, typer.Option(min=2, help="Requests that each stream sends, one after another.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=4, help="Tokens to generate for a request, in the mean.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="In which every engine has its turn; medians and quartiles are shown.")] = 7,
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    model: BaseOption = None,
    shapes: ShapesOption = None,
) -> None:
    """What it costs that adapters share slots: the same traffic with a slot for each of them, and with fewer.

    Engines in this process, without HTTP, take turns: "resident" has a slot for every adapter, "control" is the same again, "swapped" has
    too few, so that with the usual numbers every request swaps, "few" has only as many adapters as slots. "base" asks for no adapter, and
    "idle" neither, but adapters stand in its slots. Made-up Soft MoA of the paper's sizes are loaded from files and packed once before
    anything is counted, as a server does when it loads one; what is counted is swaps of adapters that are packed. Nothing else should run.
    """
    with terminal.spinner("Loading torch"):
        from moa_serve.bench import swap
        from moa_serve.llm import resolve
    refuse_two_bases(command, shapes)
    plan = swap.Plan(
        adapters=adapters,
        slots=slots,
        streams=streams,
        requests=requests,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        rounds=rounds,
    )
    resolved, _, computed = resolve(backend, "cpu", dtype)
    base = opened_base(model, shapes, computed)
    report = swap.measure(base, resolved, plan, on_progress=terminal.note)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        show(report)


def show(report: "SwapReport") -> None:
    """A line for each engine, one for each ratio, and what loading and a swap took."""
    plan, computed = report.plan, report.computed
    title = title_of(computed.base, computed)
    asked = {"swapped": (plan.adapters, plan.slots), "few": (plan.slots, plan.slots), "base": (0, plan.slots), "idle": (0, plan.slots)}
    engines = new_table(title, ("engine",), ("adapters", "slots", "tokens/s", "TTFT ms", "p99", "gap ms", "p99", "swaps"))
    for one in report.measured:
        numbers = map(str, asked.get(one.server, (plan.adapters, plan.adapters)))
        times = [one.spread(f"{figure}_{quantile}_seconds") for figure in ("ttft", "gap") for quantile in ("p50", "p99")]
        speed = one.spread("tokens_per_second")
        assert speed is not None, "every wave has a speed"
        engines.add_row(one.server, *numbers, spread(speed, 1), *map(_milliseconds, times), f"{report.swaps[one.server]:g}")
    ratios = new_table("ratios", ("of", "one over the other"), ("found", "goal"))
    for name, found in report.ratios.items():
        ratios.add_row(name, _MEANING[name], judged(found), goal_of(found))
    console = terminal.output()
    terminal.print_table(console, engines)
    terminal.print_table(console, ratios)
    traffic = f"{terminal.counted(plan.streams, 'stream')} of {plan.requests} requests, {plan.prompt_tokens} tokens in"
    console.print(f"a wave: {traffic}, about {plan.max_tokens} out; swaps: of a wave")
    console.print(f"medians (quartiles) of {terminal.counted(plan.rounds, 'round')}; ! misses its goal")
    console.print(
        f"to load an adapter took {spread(report.read_ms, 1)} ms to read and {spread(report.pack_ms, 1)} ms to pack for the first time, "
        f"before all that is counted; to put one into a slot {spread(report.swap_ms, 3)} ms"
    )


_MEANING = {
    "control_throughput": "control / resident, tokens/s",
    "control_gap_p99": "control / resident, p99 of the gaps",
    "swap_gap_p99": "swapped / resident, p99 of the gaps",
    "swap_throughput": "swapped / few, tokens/s",
    "idle_throughput": "idle / base, tokens/s",
}


def _milliseconds(found: "Spread | None") -> str:
    return "-" if found is None else f"{1000 * found.median:,.1f}"

"""`moa-serve bench`: measurements as a table against their goals, and as one JSON document."""

import json
from typing import Annotated, Any

import typer

from moa_serve.shell.bench_metrics import bench_metrics
from moa_serve.shell.bench_options import bench_options
from moa_serve.shell.bench_prefix import bench_prefix
from moa_serve.shell.bench_quality import bench_quality
from moa_serve.shell.bench_serve import bench_serve
from moa_serve.shell.bench_step import bench_growth, bench_reference, bench_step
from moa_serve.shell.bench_swap import bench_swap

bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure on this machine, as ratios of two things in one interleaved run.")
bench.command("step")(bench_step)
bench.command("growth")(bench_growth)
bench.command("reference")(bench_reference)
bench.command("serve")(bench_serve)
bench.command("swap")(bench_swap)
bench.command("prefix")(bench_prefix)
bench.command("metrics")(bench_metrics)
bench.command("quality")(bench_quality)
bench.command("options")(bench_options)


@bench.command("train")
def bench_train(
    family: Annotated[
        list[str] | None, typer.Option("--family", help="lora, soft_moa, sparse_moa, molora, hydralora or adamole; again for more.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved repetitions; medians are shown.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.", show_default="torch's own choice")] = None,
    model: Annotated[str | None, typer.Option("--model", envvar="MOA_MODEL", help="Base.", show_default="SmolLM2-135M-Instruct")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Tokens/s of training steps, against the same adapter computed expert by expert with gather and scatter.

    Forward, backward and optimizer of the real trainer on made-up examples of 80 tokens, 32 a step. Nothing else should run meanwhile;
    the control, ours against ours, tells how much the machine wavers.
    """
    from moa_serve.errors import InvalidRequest
    from moa_serve.shell import terminal

    with terminal.spinner("Loading torch"):
        import torch

        from moa_serve.bench import train as measured
        from moa_serve.model.weights import load_base
        from moa_serve.train.run import DTYPES
    names = family or ["lora", "soft_moa", "sparse_moa", "molora"]
    for name in names:
        if name not in measured.RECIPES:
            raise InvalidRequest(f"family is {name!r}, but must be one of {', '.join(measured.RECIPES)}", param="family")
    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype is {dtype!r}, but must be bfloat16 or float32", param="dtype")
    if threads is not None:
        torch.set_num_threads(threads)
    base = load_base(model, dtype=DTYPES[dtype])
    timings = []
    for name in names:
        with terminal.spinner(f"Measuring {name}"):
            timings.append(measured.measure(base, name, pairs=pairs))
    if as_json:
        run: dict[str, Any] = {"base": base.name, "dtype": dtype, "threads": torch.get_num_threads(), "pairs": pairs}
        typer.echo(json.dumps(run | {"families": [timing.to_json() for timing in timings]}))
    else:
        measured_table(timings, f"{base.name}, {dtype}, {torch.get_num_threads()} threads, {pairs} interleaved pairs")


def measured_table(timings: list[Any], title: str) -> None:
    """One line a family; what misses its goal is told so."""
    from rich import box
    from rich.table import Table

    from moa_serve.bench.train import GOAL_BYTES, GOAL_RATIO, GOAL_TOKENS
    from moa_serve.shell.terminal import output, print_table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("family")
    for name in ("parameters", "tokens/s", "against gather/scatter", "control", "peak memory"):
        table.add_column(name, justify="right")
    for timing in timings:
        table.add_row(
            timing.name,
            f"{timing.parameters:,}",
            _judged(f"{timing.tokens_per_second:.0f}", timing.tokens_per_second >= GOAL_TOKENS),
            _judged(f"{timing.against:.2f}x", timing.against >= GOAL_RATIO),
            f"{timing.control:.2f}x",
            _judged(f"{timing.peak_memory_bytes / 2**30:.2f} GiB", timing.peak_memory_bytes < GOAL_BYTES),
        )
    console = output()
    print_table(console, table)
    console.print(f"goals: {GOAL_TOKENS} tokens/s on two cores, {GOAL_RATIO}x, under {GOAL_BYTES / 2**30:.0f} GiB; ! misses its goal")


def _judged(text: str, is_met: bool) -> str:
    return text if is_met else f"{text} !"

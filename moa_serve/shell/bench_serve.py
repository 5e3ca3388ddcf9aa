"""`moa-serve bench serve`: its options, its table, and where its figure comes from. The requests are bench/serve.py."""

import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from moa_serve.errors import InvalidRequest
from moa_serve.shell import terminal
from moa_serve.shell.drawing import drawing_module

if TYPE_CHECKING:
    from moa_serve.bench.serve import Measured, Report
    from moa_serve.bench.timing import Spread


def bench_serve(
    url: Annotated[
        list[str],
        typer.Option("--url", help="A server, as http://127.0.0.1:8000 or NAME=URL; again for more, which take turns.", show_default=False),
    ],
    streams: Annotated[
        list[int] | None, typer.Option("--streams", min=1, help="Streams at the same time; again for more.", show_default="1, 8 and 32")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Model or adapter to ask for; again for more, which the streams ask for in turn.",
            show_default="the first that a server lists",
        ),
    ] = None,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of a prompt; drawn anew for every request.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each request.")] = 64,
    requests_per_stream: Annotated[int, typer.Option(min=1, help="Requests that each stream sends, one after another.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved repetitions; medians are shown.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the prompts; take another one to measure again a server that keeps prefixes.")] = 0,
    api_key: Annotated[str | None, typer.Option("--api-key", help="Bearer token for all servers.", show_default=False)] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the figures; needs matplotlib.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Tokens/s, time to the first token and gaps between tokens of OpenAI-compatible servers that run, over HTTP.

    Streaming /v1/completions, greedy, a new connection for every request. Several servers take turns round by round; the first one is
    compared with each other one. Nothing else should run meanwhile. Exit code 1 with one line at the first request that fails.
    """
    from moa_serve.bench.serve import Load, Target, measure

    targets = [Target.parse(text) for text in url]
    drawing = None if plot is None else _load_plot(plot)  # what is missing is better told before the work than after it
    report = measure(
        targets,
        Load(prompt_words, max_tokens, requests_per_stream, seed),
        streams=streams or [1, 8, 32],
        models=model or (),
        rounds=rounds,
        api_key=api_key,
        on_streams=lambda count: terminal.note(f"measuring {terminal.counted(count, 'stream')}"),  # a spinner's thread would take time
    )
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        show(report)
    _warn_of_short_answers(report)
    if drawing is not None:
        try:
            drawing.write(report, plot)
        except OSError as error:
            raise InvalidRequest(f"--plot {plot}: cannot be written ({error.strerror}); choose another file", param="plot") from None
        terminal.note(f"wrote {plot}")


def _load_plot(file: Path) -> ModuleType:
    """The module that draws. Raises InvalidRequest where it cannot."""
    if file.suffix != ".png":
        raise InvalidRequest(f"--plot {file}: only PNG is drawn; name it FILE.png", param="plot")
    if not file.absolute().parent.is_dir():
        raise InvalidRequest(f"--plot {file}: there is no folder {file.parent}; make it first", param="plot")
    return drawing_module("bench_serve_plot", option="--plot", without="the table needs none")


def show(report: "Report") -> None:
    """One line for each number of streams and each server."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    load, first = report.load, report.servers[0].name
    title = (
        f"{terminal.counted(load.prompt_words, 'word')} in, {terminal.counted(load.max_tokens, 'token')} out, greedy, "
        f"{terminal.counted(load.requests_per_stream, 'request')} a stream; {terminal.counted(report.num_rounds, 'interleaved round')}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("streams", justify="right")
    table.add_column("server", overflow="fold", min_width=8)
    for name in ("tokens/s", "quartiles", "TTFT ms", "p99", "gap ms", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
    if report.against:
        table.add_column(Text(terminal.visible(f"{first} / it")), justify="right")
    ratios = {(found.num_streams, found.other): found.ratio for found in report.against}
    for found in report.measured:
        cells = [str(found.num_streams), terminal.visible(found.server), *_cells(found)]
        if report.against:
            cells.append(_ratio(ratios.get((found.num_streams, found.server))))
        table.add_row(*map(Text, cells))
    console = terminal.output()
    console.print(Text(title, style="bold"), soft_wrap=True)
    terminal.print_table(console, table)


def _cells(found: "Measured") -> list[str]:
    speed = found.spread("tokens_per_second")
    assert speed is not None, "every wave has a speed"
    times = [found.spread(f"{figure}_{quantile}_seconds") for figure in ("ttft", "gap") for quantile in ("p50", "p99")]
    return [f"{speed.median:,.1f}", f"{speed.low:,.1f} to {speed.high:,.1f}", *map(_milliseconds, times)]


def _milliseconds(spread: "Spread | None") -> str:
    return "-" if spread is None else f"{1000 * spread.median:,.1f}"


def _ratio(spread: "Spread | None") -> str:
    return "" if spread is None else f"{spread.median:.2f}x ({spread.low:.2f} to {spread.high:.2f})"


def _warn_of_short_answers(report: "Report") -> None:
    """Fewer tokens than asked for are another load, so that the speeds of two servers cannot be compared."""
    for found in report.measured:
        for wave in found.waves:
            wanted = wave.num_requests * report.load.max_tokens
            if wave.num_tokens < wanted:
                terminal.warn(
                    f"{found.server}, {terminal.counted(found.num_streams, 'stream')}: answers ended early, "
                    f"with {wave.num_tokens:,} of {wanted:,} tokens"
                )
                break

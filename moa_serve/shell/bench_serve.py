"""`moa-serve bench serve`: its options, its table, and where its figure comes from. The requests are bench/serve.py.

Light, so that `--help` answers at once: only --engine loads torch.
"""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moa_serve.errors import InvalidRequest
from moa_serve.shell import terminal
from moa_serve.shell.bench_step import goal_of
from moa_serve.shell.drawing import drawing_module, write_figure

if TYPE_CHECKING:
    from moa_serve.bench.engine_load import EngineLoad
    from moa_serve.bench.goals import Judged
    from moa_serve.bench.serve import Measured, Report, Served
    from moa_serve.bench.timing import Spread

_ENGINE_PANEL = "The engine without HTTP"
_OF_ENGINE = ("base", "adapters_dir", "backend", "device", "dtype", "base_dtype")


def _engine_option(flag: str, text: str, variable: str | None = None, **more: Any) -> Any:
    return typer.Option(flag, envvar=variable, help=text, rich_help_panel=_ENGINE_PANEL, **more)


def bench_serve(
    context: typer.Context,
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
            show_default="the first that a server lists; of the engine, its base",
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
    engine: Annotated[
        bool,
        _engine_option(
            "--engine",
            "Give an engine in this process its turns, too, as `engine`: the same prompts, streams and max_tokens, no HTTP. The first "
            "server is judged against it, so give it what that server has: base, adapters, backend, device, dtype and processor cores.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        _engine_option("--base", "Base: a folder, a GGUF file or a hub id.", "MOA_MODEL", show_default="SmolLM2-135M-Instruct"),
    ] = None,
    adapters_dir: Annotated[
        Path | None,
        _engine_option(
            "--adapters-dir",
            "Folder with the adapters that --model names.",
            "MOA_ADAPTERS_DIR",
            show_default="./adapters where it exists",
        ),
    ] = None,
    backend: Annotated[str, _engine_option("--backend", "auto, native or torch.", "MOA_BACKEND")] = "auto",
    device: Annotated[str, _engine_option("--device", "auto, cpu or cuda.", "MOA_DEVICE")] = "auto",
    dtype: Annotated[
        str,
        _engine_option("--dtype", "auto (float32 for torch on a CPU, else bfloat16), float32 or bfloat16.", "MOA_DTYPE"),
    ] = "auto",
    base_dtype: Annotated[
        str, _engine_option("--base-dtype", "auto (the base's weights are in --dtype) or int8 (native backend only).", "MOA_BASE_DTYPE")
    ] = "auto",
) -> None:
    """Tokens/s, time to the first token and gaps between tokens of OpenAI-compatible servers that run, over HTTP.

    Streaming /v1/completions, greedy, a new connection for every request. Several servers take turns round by round; the first one is
    compared with each other one, and with the engine alone. Nothing else should run meanwhile. Exit code 1 with one line at the first
    request that fails.
    """
    from moa_serve.bench.serve import Load, Target, measure

    targets = [Target.parse(text) for text in url]
    if not engine:
        _refuse_options_of_engine(context)
    drawing = None if plot is None else _load_plot(plot)  # what is missing is better told before the work than after it
    with _opened(engine, base, adapters_dir, backend=backend, device=device, dtype=dtype, base_dtype=base_dtype) as opened:
        report = measure(
            targets,
            Load(prompt_words, max_tokens, requests_per_stream, seed),
            streams=streams or [1, 8, 32],
            models=model or (),
            rounds=rounds,
            api_key=api_key,
            engine=opened,
            on_streams=lambda count: terminal.note(f"measuring {terminal.counted(count, 'stream')}"),  # a spinner's thread would take time
        )
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        show(report)
    _warn_of_short_answers(report)
    if drawing is not None and plot is not None:
        write_figure(plot, partial(drawing.write, report))


def _refuse_options_of_engine(context: typer.Context) -> None:
    """Variables may be there for a server that is started in the same shell; an option must be meant."""
    for name in _OF_ENGINE:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidRequest(
                f"--{name.replace('_', '-')} is of the engine without HTTP; give --engine too, or leave it out", param=name
            )


@contextmanager
def _opened(has_engine: bool, base: str | None, adapters_dir: Path | None, **computed: str) -> "Iterator[EngineLoad | None]":
    """The engine of --engine for the length of a measurement; `computed` as `EngineLoad` has it."""
    if not has_engine:
        yield None
        return
    if adapters_dir is None:
        adapters_dir = Path("adapters") if Path("adapters").is_dir() else None
    elif not adapters_dir.is_dir():
        raise InvalidRequest(f"--adapters-dir {adapters_dir}: there is no such folder; name the one of the server", param="adapters_dir")
    with terminal.spinner("Loading torch"):
        from moa_serve.bench.engine_load import EngineLoad
    # A base that must be fetched or converted first draws a bar of its own, so only a folder gets a spinner.
    with terminal.spinner("Loading the base", shown=base is not None and Path(base).is_dir()):
        opened = EngineLoad(base, adapters_dir=adapters_dir, **computed)
    with closing(opened):
        yield opened


def _load_plot(file: Path) -> ModuleType:
    """The module that draws. Raises InvalidRequest where it cannot."""
    if file.suffix != ".png":
        raise InvalidRequest(f"--plot {file}: only PNG is drawn; name it FILE.png", param="plot")
    if not file.absolute().parent.is_dir():
        raise InvalidRequest(f"--plot {file}: there is no folder {file.parent}; make it first", param="plot")
    return drawing_module("bench_serve_plot", option="--plot", without="the table needs none")


def show(report: "Report") -> None:
    """One line for each number of streams and each contestant, and below them what the engine was, where there is one."""
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
    ratios = {(found.num_streams, found.other): found.ratio for found in report.against}
    has_goal = any(found.goal is not None for found in ratios.values())
    if report.against:
        table.add_column(Text(terminal.visible(f"{first} / it")), justify="right")
    if has_goal:
        table.add_column("goal", justify="right", no_wrap=True)
    for found in report.measured:
        cells = [str(found.num_streams), terminal.visible(found.server), *_cells(found)]
        judged = ratios.get((found.num_streams, found.server))
        if report.against:
            cells.append("" if judged is None else _ratio(judged))
        if has_goal:
            cells.append("" if judged is None else goal_of(judged))
        table.add_row(*map(Text, cells))
    console = terminal.output()
    console.print(Text(title, style="bold"), soft_wrap=True)
    terminal.print_table(console, table)
    for server in report.servers:
        if server.computed is not None:
            console.print(Text(_engine_line(server) + ("; ! misses its goal" if has_goal else ""), style="dim"), soft_wrap=True)


def _engine_line(server: "Served") -> str:
    found = server.computed
    assert found is not None, "the engine says how it computes"
    asked = f", asked for {', '.join(server.models)}" if server.models != [found.base] else ""
    threads = terminal.counted(found.threads, "thread")
    return terminal.visible(f"{server.name}: {found.base}, {found.backend} on {found.device}, {found.dtype}, {threads}{asked}")


def _cells(found: "Measured") -> list[str]:
    speed = found.spread("tokens_per_second")
    assert speed is not None, "every wave has a speed"
    times = [found.spread(f"{figure}_{quantile}_seconds") for figure in ("ttft", "gap") for quantile in ("p50", "p99")]
    return [f"{speed.median:,.1f}", f"{speed.low:,.1f} to {speed.high:,.1f}", *map(_milliseconds, times)]


def _milliseconds(spread: "Spread | None") -> str:
    return "-" if spread is None else f"{1000 * spread.median:,.1f}"


def _ratio(judged: "Judged") -> str:
    spread = judged.found
    return f"{spread.median:.3f}x ({spread.low:.3f} to {spread.high:.3f}){' !' if judged.is_met is False else ''}"


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

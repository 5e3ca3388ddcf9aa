"""`moa-serve`, the command: reads flags and variables, composes the parts, shows what came of it, says so in the exit code.

0 all is well; 1 an adapter is wrong, or a completion ended in an error; 2 wrong usage, or a base that cannot be served; 130 Ctrl-C.
Whatever loads torch is imported inside the commands, so that `--help` and mistakes in flags answer at once.
"""

import dataclasses
import gc
import inspect
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moa_serve.errors import AdapterCorrupt, AdapterError, DataInvalid, InvalidRequest, MoaError, ModelError
from moa_serve.settings import HIDDEN, WITHOUT_FLAG, Explained, ServerSettings, load_settings, strange_variables
from moa_serve.shell import terminal
from moa_serve.shell.bench_command import bench
from moa_serve.shell.doctor.command import doctor
from moa_serve.shell.train_command import train

if TYPE_CHECKING:
    from moa_serve.adapter.adapter import Adapter, AdapterSource
    from moa_serve.llm import LLM
    from moa_serve.shell.answers import Answer
    from moa_serve.shell.selection import Column

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


class Shell(TyperGroup):
    """Turns whatever a command meets into one line and an exit code. A reader who has left (`| head`) is typer's affair: exit 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MoaError as error:
            terminal.show_error(error)
            raise typer.Exit(USAGE if isinstance(error, ModelError | InvalidRequest | DataInvalid) else FAILURE) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Shell,
    name="moa-serve",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="One frozen LLaMA base, many Mixture-of-Adapters sets on it, one chosen per request.",
)

Model = Annotated[
    str | None,
    typer.Option("--model", envvar="MOA_MODEL", help="Base: a folder, a GGUF file or a hub id.", show_default="SmolLM2-135M-Instruct"),
]
Variant = Annotated[str | None, typer.Option("--variant", help="Family of the adapter, where its files alone cannot tell it.")]
AdaptersDir = Annotated[
    Path | None,
    typer.Option(
        "--adapters-dir",
        envvar="MOA_ADAPTERS_DIR",
        exists=True,
        file_okay=False,
        help="Folder of adapter folders.",
        show_default="./adapters where it exists",
    ),
]
Backend = Annotated[str, typer.Option("--backend", envvar="MOA_BACKEND", help="auto, native, triton or torch.")]
Device = Annotated[str, typer.Option("--device", envvar="MOA_DEVICE", help="auto, cpu or cuda.")]
Dtype = Annotated[
    str, typer.Option("--dtype", envvar="MOA_DTYPE", help="auto (float32 for torch on a CPU, else bfloat16), float32 or bfloat16.")
]

BaseDtype = Annotated[
    str,
    typer.Option("--base-dtype", envvar="MOA_BASE_DTYPE", help="auto (the base's weights are in --dtype) or int8 (native backend only)."),
]

Moa = Annotated[
    str | None,
    typer.Option(
        "--moa",
        help="Routing options of every adapter, as JSON: mode, threshold, top_k, disable, force (docs/routing.md).",
        show_default="the adapter's own way",
    ),
]


def _version_line() -> str:
    python = ".".join(map(str, sys.version_info[:3]))
    return f"moa-serve {version_of('moa_serve')} (Python {python}, torch {version_of('torch')})"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(_version_line())
        raise typer.Exit


@app.callback()
def shell(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options before the command."""


@app.command()
def version() -> None:
    """Show the version."""
    typer.echo(_version_line())


@app.command()
def check(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter: our format, the authors', or PEFT LoRA.", show_default=False)],
    model: Model = None,
    variant: Variant = None,
    no_self_test: Annotated[bool, typer.Option("--no-self-test", help="Only read and validate; do not run a test prompt.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for a wrong adapter too.")] = False,
) -> None:
    """Read an adapter, validate it against the base, and try it.

    Exit code 1 with the whole list of what is wrong with the adapter; 2 where the base itself cannot be served.
    """
    from moa_serve.adapter.adapter import AdapterSource
    from moa_serve.shell import report

    name = _name_of(adapter)
    try:
        found, base = _read_adapter(name, AdapterSource(adapter, variant), model, is_tried=not no_self_test)
    except AdapterError as error:
        if as_json:
            typer.echo(json.dumps(report.failure_json(name, error)))
        raise
    if as_json:
        typer.echo(json.dumps(report.to_json(name, found, base, not no_self_test)))
    else:
        report.show(terminal.output(), name, found, base, is_tried=not no_self_test)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the adapter, in any format that `check` reads.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder, or an adapter of format version 1 to overwrite.")],
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="EXPERTS",
            help="Leave experts out: PROMPT,Q@3-9,*@20 as in moa.disable, or a .json file, or - for standard input, with what "
            "GET /v1/adapters/NAME/experts answered.",
            show_default=False,
        ),
    ] = None,
    variant: Variant = None,
    model: Model = None,
) -> None:
    """Write an adapter in our format, version 1, then read it back to see that it is the same.

    Exit code 1 where SRC is missing or wrong, or DST holds something else; 2 where the base itself cannot be served, or the experts cannot
    be left out.
    """
    from moa_serve.adapter.adapter import AdapterSource
    from moa_serve.adapter.checkpoint import write_adapter
    from moa_serve.shell import prune as pruning

    entries = None if prune is None else pruning.read_entries(prune, typer.get_binary_stream("stdin"))
    whole, base = _read_adapter(_name_of(source), AdapterSource(source, variant), model, is_tried=False)
    found = whole if entries is None else pruning.pruned(whole, *entries)
    write_adapter(destination, found.manifest, found.tensors)
    written, _ = _read_adapter(_name_of(destination), AdapterSource(destination), model, is_tried=False)
    if written.revision != found.revision:
        raise AdapterCorrupt(
            f"{destination}: was written as revision {found.revision[:12]} but reads back as {written.revision[:12]}; "
            f"do not use it, and check the disk"
        )
    for warning in found.warnings:
        terminal.warn(warning)
    if found is not whole:
        pruning.show(terminal.output(), whole, found)
    typer.echo(f"wrote {terminal.one_line(str(destination))}: {found.manifest.variant} for {base}, from {found.source_format}")
    typer.echo(f"  {found.manifest.num_parameters:,} parameters, {found.num_bytes:,} bytes")
    typer.echo(f"  revision {found.revision}, the same when read back")


@app.command()
def fingerprint(
    adapter: Annotated[list[str], typer.Argument(help="Names that requests would use: of adapters, or of an alias.", show_default=False)],
    data: Annotated[
        list[Path], typer.Option(help="What they were trained on: a file, or a folder with train.json; again for more.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="File to write, or to add to.", dir_okay=False, show_default=False)],
    form: Annotated[str, typer.Option(help="As in training: authors or cloze.")] = "authors",
    model: Model = None,
) -> None:
    """Count the tokens of an adapter's training prompts, for `serve --auto`: the model `auto` picks the adapter that a prompt is most like.

    Exit code 2 where the data, the file or the base is wrong.
    """
    import torch

    from moa_serve.adapter.fingerprint import Fingerprint, read_fingerprints, write_fingerprints
    from moa_serve.model.weights import load_base
    from moa_serve.text import Tokenizer
    from moa_serve.train.data import find_file, read_examples
    from moa_serve.train.prompts import encode_prompt

    if form not in ("authors", "cloze"):
        raise InvalidRequest(f"form is {form!r}, but must be authors or cloze", param="form")
    base = load_base(model, dtype=torch.bfloat16)
    tokenizer = None if base.folder is None else Tokenizer.from_folder(base.folder)
    if tokenizer is None:
        raise InvalidRequest("the base has no tokenizer, so prompts have no tokens", param="model")
    found = read_fingerprints(out, base.digest) if out.exists() else {}
    examples = [example for path in data for example in read_examples(find_file(path, "train"), "cloze" if form == "cloze" else "authors")]
    if any(example.kind == "chat" for example in examples):
        raise DataInvalid("rows of a chat have no single prompt; give rows with 'instruction'", param="data")
    made = Fingerprint.of(encode_prompt(example, tokenizer) for example in examples)
    write_fingerprints(out, base.digest, found | dict.fromkeys(adapter, made))
    typer.echo(f"{len(examples):,} prompts of {made.counts.sum():,} tokens for {', '.join(adapter)}: {terminal.one_line(str(out))}")


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts, taken as they are; - reads one a line from standard input.", show_default=False)
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help='More prompts. FILE.jsonl: a line is a string or {"prompt": text or token ids, "adapter": name or null}, '
            "and a line with an adapter runs under that one alone. Another file, or -: one prompt a line."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="An adapter to run, again for each: a NAME in the adapters directory, a PATH, or NAME=PATH; with :VARIANT behind it where "
            "the files cannot tell. base is the base alone. Without --adapter: the base and every adapter in the adapters directory.",
            show_default=False,
        ),
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Leave the base out.")] = False,
    adapters_dir: AdaptersDir = None,
    model: Model = None,
    backend: Backend = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    base_dtype: BaseDtype = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate for each.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the best token; up to 2 is more daring.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest best tokens that reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many best tokens; 0 is all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds draw equal tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before, again for each.", show_default=False)] = None,
    moa: Moa = None,
    show_routing: Annotated[bool, typer.Option("--show-routing", help="Show what each adapter's routers selected.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each prompt and adapter.")] = False,
) -> None:
    """Complete prompts under several adapters, side by side, all in one mixed batch.

    Exit code 1 where an adapter cannot be used or a completion ended in an error; 2 where a prompt, a flag or the base is wrong.
    """
    from moa_serve.adapter.rules import parse_options
    from moa_serve.shell.prompts import read_prompts

    lines = read_prompts(prompt or [], file, typer.get_binary_stream("stdin"))
    if not lines:
        raise typer.BadParameter("there is no prompt; give one, or a file with --file", param_hint="PROMPT")

    from moa_serve.engine.request import SamplingParams
    from moa_serve.shell import answers, selection

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ()))
    options = None if moa is None else parse_options(moa)
    adapters_dir = adapters_dir or _usual_adapters_dir()
    named = selection.parse_adapters(adapter or [], adapters_dir)
    if no_base and selection.THE_BASE in named:
        raise InvalidRequest("--adapter base and --no-base contradict each other; leave one out", param="no_base")
    by_lines = selection.wanted_by_lines(lines, named, adapters_dir)

    with _loaded(model, backend=backend, device=device, dtype=dtype, base_dtype=base_dtype) as llm:
        needs_default = not named and not all(line.has_adapter for line in lines)
        default = selection.wanted_by_default(llm, adapters_dir, with_base=not no_base) if needs_default else named
        explicit = {one.name: one for one in by_lines}  # an adapter that a line names may not be left out, wherever it was found
        wanted = {one.name: one for one in default} | explicit
        with terminal.spinner("Loading the adapters"):
            columns = selection.load(llm, wanted.values())
        pairs = answers.pair(lines, columns, [columns[one.name] for one in default if one.name in columns])
        with terminal.spinner(f"Generating {terminal.counted(len(pairs), 'completion')} in one batch"):
            start = time.perf_counter()
            found = answers.run(llm, pairs, params, options)
            seconds = time.perf_counter() - start
        if as_json:
            for answer in found:
                typer.echo(answers.to_json(answer, answers.activity_of(llm, [answer], options) if show_routing else None))
        else:
            _show(llm, found, columns.values() if show_routing else (), options)
        tokens = sum(len(answer.completion.token_ids) for answer in found)
        terminal.note(
            f"{terminal.counted(len(found), 'completion')}, {terminal.counted(tokens, 'token')}, {tokens / seconds:.1f} tokens/s; "
            f"{llm.name}, {llm.backend} backend on {llm.device}, {llm.base_dtype}"
        )
    if any(answer.completion.error is not None for answer in found):
        raise typer.Exit(FAILURE)


def _show(llm: "LLM", found: "list[Answer]", routed: "Iterable[Column]", moa: "Mapping[str, Any] | None") -> None:
    from moa_serve.shell import answers

    console = terminal.output()
    answers.show(console, found)
    for column in routed:
        if column.name is not None:
            with terminal.spinner("Asking the routers"):
                activity = answers.activity_of(llm, [answer for answer in found if answer.column == column], moa)
            answers.show_activity(console, column, activity)


@app.command("inspect")
def inspect_adapter(
    adapter: Annotated[str, typer.Argument(help="A NAME in the adapters directory, or a folder in any format.", show_default=False)],
    text: Annotated[list[str] | None, typer.Option(help="Text to read, again for each; - is standard input.", show_default=False)] = None,
    file: Annotated[str | None, typer.Option(help="More texts, one a line; FILE.jsonl as in generate.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to show token by token, as 0,15,29.", show_default="the first, the middle and the last"),
    ] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder to write figures and inspect.json to.")] = None,
    file_format: Annotated[str, typer.Option("--format", help="Of the figures: png or svg.")] = "png",
    variant: Variant = None,
    adapters_dir: AdaptersDir = None,
    model: Model = None,
    backend: Backend = "torch",  # the one whose experts can be looked at
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output instead of the tables.")] = False,
) -> None:
    """Look into an adapter: expert weights by layer and token by token, and how alike its experts are.

    Without a text: by layer, the profile of its training where it has one; for the rest, some sentences. --out needs matplotlib.
    Exit code 1 where the adapter cannot be used; 2 where a text, a flag or the base is wrong.
    """
    from moa_serve.shell.prompts import read_prompts

    lines = read_prompts(text or [], file, typer.get_binary_stream("stdin"))
    if (text or file) and not lines:
        raise typer.BadParameter("there is no text in it", param_hint="--text or --file")

    from moa_serve.shell import inspect as inspection
    from moa_serve.shell import selection

    if file_format not in inspection.FORMATS:
        raise typer.BadParameter(f"{file_format!r} is neither png nor svg", param_hint="--format")
    if out is not None:
        inspection.load_plots()  # what is missing is better told before the work than after it
    adapters_dir = adapters_dir or _usual_adapters_dir()
    wanted = selection.parse_adapter(adapter, adapters_dir)
    if wanted.name is None or wanted.source is None:
        raise InvalidRequest("the base alone has no experts to look into; name an adapter", param="adapter")
    source = wanted.source if variant is None else dataclasses.replace(wanted.source, variant=variant)
    with _loaded(model, backend=backend, device=device, dtype=dtype) as llm:
        with terminal.spinner("Loading the adapter"):
            found = llm.load_adapter(wanted.name, source)
        for warning in found.warnings:
            terminal.warn(warning)
        with terminal.spinner("Looking into it"):
            seen = inspection.inspect_adapter(llm, wanted.name, found, lines, layers)
        if as_json:
            typer.echo(json.dumps(inspection.to_json(seen)))
        else:
            inspection.show(terminal.output(), seen)
        if out is not None:
            with terminal.spinner("Drawing"):
                written = inspection.write(seen, out, file_format)
            terminal.note(f"wrote {', '.join(map(str, written))}")


app.command("train")(train)
app.command("doctor")(doctor)
app.add_typer(bench)


@app.command("eval")
def evaluate(
    data: Annotated[
        list[Path],
        typer.Option(help="Questions: a .json or .jsonl file, or a folder with test.json; again for more.", show_default=False),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="An adapter to score, again for each: NAME, PATH or NAME=PATH, with :VARIANT as in generate; base is the base alone. "
            "Without --adapter: the base and every adapter in the adapters directory.",
            show_default=False,
        ),
    ] = None,
    adapters_dir: AdaptersDir = None,
    form: Annotated[str, typer.Option(help="Of choice tasks: authors (numbered choices) or cloze (the text of the choice).")] = "authors",
    scorer: Annotated[
        str,
        typer.Option(
            help="generation, likelihood, both, or auto: numbers and texts by generation, numbered choices by both, cloze by likelihood."
        ),
    ] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Take this many questions of each file, the same ones for equal seeds.")] = None,
    seed: Annotated[int, typer.Option(help="Which questions --limit takes.")] = 0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to generate for each.", show_default="200; 40 where a choice is to be named")
    ] = None,
    moa: Annotated[
        list[str] | None,
        typer.Option(
            help="""Routing options as JSON, such as '{"top_k": 2}': each adapter is scored under them too; again for more.""",
            show_default=False,
        ),
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            help="Score each adapter without some of its experts too: kinds, experts, layers, or layers:N for N at a time; again for more.",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Score each adapter under thresholds and top-k from one end to the other too.")
    ] = False,
    batch_rows: Annotated[int, typer.Option(min=1, help="Questions that run at the same time.")] = 64,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder to write results.json and results.md to.")] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a figure of --ablate and --sweep, as PNG.", metavar="PNG", show_default=False)
    ] = None,
    model: Model = None,
    backend: Backend = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    base_dtype: BaseDtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output instead of the tables.")] = False,
) -> None:
    """Score adapters on data files, all of them in one mixed batch, beside the base and beside chance.

    With --moa, --ablate and --sweep, each adapter with a router is asked in other ways beside its own, in the same batch.

    Exit code 1 where an adapter cannot be used or an answer ended in an error; 2 where the data, a flag or the base is wrong.
    """
    from moa_serve.adapter.rules import parse_options
    from moa_serve.shell.drawing import drawing_module, write_figure
    from moa_serve.train.scoring import WANTED, read_task
    from moa_serve.train.variations import check_ablation

    for name, value, known in (("form", form, ("authors", "cloze")), ("scorer", scorer, WANTED)):
        if value not in known:
            raise InvalidRequest(f"{name} is {value!r}, but must be one of {', '.join(known)}", param=name)
    asked = [parse_options(text) for text in moa or []]
    for one in ablate or []:
        check_ablation(one)
    if plot is not None and not (ablate or sweep):
        raise InvalidRequest("plot draws what --ablate and --sweep found; give one of them, or leave it out", param="plot")
    tasks = [read_task(path, "cloze" if form == "cloze" else "authors", limit=limit, seed=seed) for path in data]
    with terminal.spinner("Loading torch"):
        from moa_serve.shell import evaluate as view
        from moa_serve.shell import selection
        from moa_serve.train.evaluate import Evaluation
    plots = None if plot is None else drawing_module("evaluate_plots", option="--plot", without="the tables need none")
    adapters_dir = adapters_dir or _usual_adapters_dir()
    named = selection.parse_adapters(adapter or [], adapters_dir)
    if out is not None:
        view.prepare(out)

    with _loaded(model, backend=backend, device=device, dtype=dtype, base_dtype=base_dtype, **view.engine_options(batch_rows)) as llm:
        with terminal.spinner("Loading the adapters"):
            columns = selection.load(llm, named or selection.wanted_by_default(llm, adapters_dir, with_base=True))
        others = view.variations(columns, moa=asked, ablate=ablate or [], is_swept=sweep, is_explicit=bool(named))
        evaluation = Evaluation(llm, tasks, list(columns), scorer=scorer, max_tokens=max_tokens, variations=others)
        settings = {"form": form, "scorer": scorer, "limit": limit, "seed": seed, "max_tokens": max_tokens, "batch_rows": batch_rows}
        report = view.Report(view.describe_base(llm), settings, columns)
        view.play(evaluation, report, is_shown=not as_json, out=out)
    if as_json:
        typer.echo(json.dumps(view.to_json(report)))
    if plot is not None and plots is not None:
        write_figure(plot, partial(plots.write, report))
    if out is not None:
        terminal.note(f"wrote {out / view.JSON_FILE} and {out / view.MARKDOWN_FILE}")
    failed = view.errors(report)
    for label, errors in failed:
        terminal.warn(f"{label}: {terminal.counted(len(errors), 'answer')} ended in an error: {errors[0]}")
    if failed:
        raise typer.Exit(FAILURE)


def _serve(*, config: Path | None, print_settings: bool, **flags: Any) -> None:
    """Serve the base and its adapters over the OpenAI API.

    Every option is also an environment variable (MOA_PORT, MOA_API_KEY, ...) and a key of the TOML file of --config; an option
    counts before the variable, and that before the file. Stops after SIGTERM, when running requests have ended: exit 0.
    """
    settings = load_settings(flags, config)
    if print_settings:
        typer.echo("\n".join(_toml(item) for item in settings.explain()))
        for warning in strange_variables():
            terminal.warn(warning)
        raise typer.Exit
    tls = None
    if settings.tls is not None:
        from moa_serve.api.tls import Tls

        tls = Tls(*settings.tls)
    gc.disable()  # until it is ready: what is imported and loaded stays, and to look through it again and again takes a tenth of the start
    with terminal.spinner("Loading torch"):
        from moa_serve.shell.server import serve
    raise typer.Exit(serve(settings, tls))


def _toml(item: Explained) -> str:
    """A line of a settings file. What is hidden, or not set, is a comment, so that the file can be used as it is."""
    if item.value is None:
        return f"# {item.name} is not set"
    is_hidden = HIDDEN in (item.value if isinstance(item.value, list) else [item.value])
    return f"{'# ' if is_hidden else ''}{item.name} = {json.dumps(item.value, ensure_ascii=False)}  # {item.source}"


def _serve_parameters() -> list[inspect.Parameter]:
    """One option for each setting: name, help and bounds are written once, in settings.py."""
    file = typer.Option("--config", envvar="MOA_CONFIG", exists=True, dir_okay=False, help="TOML file with settings.")
    shown = typer.Option("--print-settings", help="Show every setting and where it comes from as a TOML file, and exit.")
    parameters = [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, file]),
        inspect.Parameter("print_settings", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, shown]),
    ]
    for name, setting in ServerSettings.model_fields.items():
        if name in WITHOUT_FLAG:
            continue
        flag = f"--{name.replace('_', '-')}"
        is_switch, is_list = setting.annotation is bool, isinstance(setting.default, tuple)
        if is_switch and setting.default:
            flag += f"/--no-{name.replace('_', '-')}"
        default = setting.get_default(call_default_factory=True)
        shown = "; ".join(filter(None, [None if is_switch or default in (None, ()) else str(default), f"MOA_{name.upper()}"]))
        option = typer.Option(flag, help=f"{setting.description} ({shown})", show_default=False)
        kind: Any = bool | None if is_switch else list[str] | None if is_list else str | None
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]))
    return parameters


_serve.__signature__ = inspect.Signature(_serve_parameters())  # type: ignore[attr-defined]
_serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _serve_parameters()}
app.command("serve")(_serve)


@contextmanager
def _loaded(model: str | None, **options: Any) -> "Iterator[LLM]":
    """An LLM for the length of a command, with arguments as it has them."""
    with terminal.spinner("Loading torch"):
        from moa_serve.llm import LLM

    # A base that must be fetched or converted first draws a bar of its own, so only a folder gets a spinner.
    with terminal.spinner("Loading the base", shown=model is not None and Path(model).is_dir()):
        llm = LLM(model, prefix_cache=False, **options)  # routers are shown, and they say nothing about tokens that are not computed
    with llm:
        yield llm


def _read_adapter(name: str, source: "AdapterSource", model: str | None, *, is_tried: bool) -> "tuple[Adapter, str]":
    """(adapter, name of the base). Without a try the base's weights are not needed, but its digest is: of bytes, not of values."""
    if is_tried:
        with _loaded(model) as llm:
            return llm.load_adapter(name, source), llm.name
    import torch

    from moa_serve.adapter.store import AdapterStore
    from moa_serve.model.weights import load_base

    base = load_base(model, dtype=torch.bfloat16)
    return AdapterStore(base.config, base_name=base.name, base_digest=base.digest).read(name, source), base.name


def _name_of(folder: Path) -> str:
    """An adapter's name is its folder's, as the user wrote it: a link keeps its own."""
    return Path(os.path.abspath(folder)).name


def _usual_adapters_dir() -> Path | None:
    folder = Path("adapters")
    return folder if folder.is_dir() else None


def _open_closed_streams() -> None:
    """`>&-` closes standard output; the next file or connection would get its number, and what is printed would go there."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False))


def main() -> None:
    """The console's entry."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 shows "?", rather than ending us
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()

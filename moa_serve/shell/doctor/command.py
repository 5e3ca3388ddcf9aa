"""`moa-serve doctor`, the command. Light, so that `--help` answers at once: what loads torch is imported inside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moa_serve.errors import InvalidRequest
from moa_serve.shell import terminal
from moa_serve.shell.doctor.findings import Check, Finding, Subject, run, trusted

UNTRUSTED = 1
_DEVICES = ("auto", "cpu", "cuda")


def doctor(
    command: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", envvar="MOA_MODEL", help="Base to look for: a folder, a GGUF file or a hub id.", show_default="SmolLM2-135M-Instruct"
        ),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", envvar="MOA_BACKEND", help="What is to compute, as in serve.")] = "auto",
    device: Annotated[str, typer.Option("--device", envvar="MOA_DEVICE", help="auto, cpu or cuda.")] = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, metavar="FILE", help="Write all of it as JSON, to attach to a report.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Without the bench, which takes two minutes on a GPU.")] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Check nothing: say what fits on a GPU, which need not be here. A base's config.json is enough."),
    ] = False,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes", help="With --plan, in place of --model: llama-3.2-1b or llama-3.1-8b.", metavar="NAME", show_default=False
        ),
    ] = None,
    memory: Annotated[
        list[int] | None,
        typer.Option(
            "--memory",
            min=1,
            metavar="GB",
            help="With --plan, of a card; may be given again. 24, 48 and 80 are what an RTX 4090, an L40S and an H100 report, others GiB.",
            show_default="24, 48, 80",
        ),
    ] = None,
    num_slots: Annotated[
        int | None, typer.Option("--num-slots", min=1, help="With --plan, adapters that one batch can mix.", show_default="8")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len", min=1, help="With --plan, tokens of the longest sequence.", show_default="the base's own, or what fits"
        ),
    ] = None,
    adapters_dir: Annotated[
        Path | None,
        typer.Option(
            "--adapters-dir",
            exists=True,
            file_okay=False,
            help="With --plan, make slots as large as the adapters in this folder need them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check this installation, and let what would serve compute: made-up adapters of every family against known numbers.

    Nothing is fetched. On a GPU decode steps are timed too. Exit code 0: trust it; 1: do not, and why. With --plan 1 where nothing fits.
    """
    _check_plan(command, plan, shapes)
    if device not in _DEVICES:
        raise InvalidRequest(f"device is {device!r}, but must be one of {', '.join(_DEVICES)}", param="device")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InvalidRequest(f"json: there is no folder {json_file.absolute().parent}", param="json")
    try:
        with terminal.spinner("Loading torch"):
            import torch
    except (ImportError, OSError) as error:
        terminal.warn(f"torch cannot be loaded: {error}; install the package again")
        typer.echo("do not trust it, because torch failed")
        raise typer.Exit(UNTRUSTED) from None
    if plan:
        with terminal.spinner("Loading the parts"):
            from moa_serve.shell.doctor import plan as planning
            from moa_serve.shell.doctor import report
        sizes = list(dict.fromkeys(memory or planning.MEMORY))
        found = planning.outlook(model, shapes, sizes, num_slots=num_slots, max_model_len=max_model_len, adapters_dir=adapters_dir)
        planning.show(terminal.output(), found)
        if json_file is not None:
            _write(json_file, report.write(planning.to_json(found)))
        if not found.fits:
            raise typer.Exit(UNTRUSTED)
        return
    with terminal.spinner("Loading the parts"):
        from moa_serve.shell.doctor import report
        from moa_serve.shell.doctor.checks import COMPUTING, INSTALLATION

    has_cuda = torch.cuda.is_available()
    subject = Subject(
        model=model, backend=backend, device=device, is_on_gpu=device == "cuda" or (device == "auto" and has_cuda), is_quick=quick
    )
    is_absent = device == "cuda" and not has_cuda
    checks = [*INSTALLATION, *((Check(one.name, _on_no_device) for one in COMPUTING) if is_absent else COMPUTING)]
    with _progress(len(checks)) as (on_progress, advance):
        checked = []
        for one in run(checks, replace(subject, on_progress=on_progress)):
            checked.append(one)
            advance()
    report.show(terminal.output(), checked)
    if json_file is not None:
        _write(json_file, report.write(report.to_json(subject, checked)))
    if not trusted(checked):
        raise typer.Exit(UNTRUSTED)


def _check_plan(command: typer.Context, is_plan: bool, shapes: str | None) -> None:
    """Raises InvalidRequest: an option that means nothing here; variables may be there for other commands."""

    def given(*names: str) -> str | None:
        sources = {name: command.get_parameter_source(name) for name in names}
        return next((name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"), None)

    meant = given("backend", "device", "quick") if is_plan else given("shapes", "memory", "num_slots", "max_model_len", "adapters_dir")
    if meant is not None:
        option = "--" + meant.replace("_", "-")
        told = "a plan is of the triton backend on CUDA, and checks nothing" if is_plan else "it is for --plan"
        raise InvalidRequest(f"{option}: {told}; leave it out{'' if is_plan else ', or add that'}", param=meant)
    if shapes is not None and given("model"):
        raise InvalidRequest("--shapes is a base of its own; give it or --model", param="shapes")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"json: {file} cannot be written: {error.strerror}", param="json") from error
    terminal.note(f"wrote {file}")


def _on_no_device(subject: Subject) -> Finding:
    return Finding("skipped", "there is no CUDA device to compute on")


@contextmanager
def _progress(count: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(say what goes on, one more is done), on standard error where a person watches."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = terminal.messages()
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=count)
        yield (lambda text: bar.update(task, description=text)), (lambda: bar.advance(task))

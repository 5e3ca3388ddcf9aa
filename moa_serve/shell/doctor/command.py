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
) -> None:
    """Check this installation, and let what would serve compute: made-up adapters of every family against known numbers.

    Nothing is fetched. On a GPU decode steps are timed too. Exit code 0: trust it; 1: do not, and why.
    """
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
        try:
            json_file.write_text(report.write(report.to_json(subject, checked)), encoding="utf-8")
        except OSError as error:
            raise InvalidRequest(f"json: {json_file} cannot be written: {error.strerror}", param="json") from error
        terminal.note(f"wrote {json_file}")
    if not trusted(checked):
        raise typer.Exit(UNTRUSTED)


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

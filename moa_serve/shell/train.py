"""What `moa-serve train` shows while it works: a bar with loss, speed and time left, scalars for TensorBoard, and what came of it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from moa_serve.shell.terminal import messages, note, print_table, visible, warn
from moa_serve.train.loop import STATE_FILE, Listener
from moa_serve.train.loop import Progress as StepDone
from moa_serve.train.run import Summary, Trained

_SMOOTHING = 0.9  # of the loss and the speed that the bar shows


class _Bar:
    """The bar, and one line for every evaluation above it; without a terminal the lines alone."""

    def __init__(self, progress: Progress, task: Any, console: Console) -> None:
        self._progress, self._task, self._console = progress, task, console
        self._loss, self._speed = math.nan, math.nan

    def __call__(self, done: StepDone) -> None:
        self._loss = done.loss if math.isnan(self._loss) else _SMOOTHING * self._loss + (1 - _SMOOTHING) * done.loss
        per_second = done.tokens_per_second
        self._speed = per_second if math.isnan(self._speed) else _SMOOTHING * self._speed + (1 - _SMOOTHING) * per_second
        self._progress.update(self._task, completed=done.step, loss=self._loss, speed=self._speed)
        if done.evaluation is None:
            return
        line = f"step {done.step}/{done.num_steps}  loss {self._loss:.4f}  {self._speed:.0f} tokens/s"
        if done.evaluation.loss is not None:
            line += f"  held-out loss {done.evaluation.loss:.4f}"
        if done.health is not None:
            health = done.health
            line += f"  routers: imbalance {health.imbalance:.2f}, entropy {health.entropy:.2f}, idle {health.idle:.0%}"
            line += f", skipped {health.skipped:.0%}" if health.skipped else ""
        self._console.print(Text(line), soft_wrap=True)


class _Scalars:
    """TensorBoard's event files. What an earlier run left there of the steps that are still to come is hidden."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def __call__(self, done: StepDone) -> None:
        scalars = {"train/loss": done.loss, "train/learning_rate": done.rate, "train/grad_norm": done.grad_norm}
        scalars |= {"train/tokens_per_second": done.tokens_per_second, "train/tokens": done.tokens}
        if done.evaluation is not None and done.evaluation.loss is not None:
            scalars["held_out/loss"] = done.evaluation.loss
        if done.health is not None:
            scalars |= {f"router/{name}": getattr(done.health, name) for name in done.health.__slots__}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, done.step)

    def close(self) -> None:
        self._writer.close()


@contextmanager
def watched(summary: Summary, out: Path, state_dir: Path) -> Iterator[Listener]:
    """A listener for the length of a run."""
    console = messages()
    console.print(Text(_beginning(summary, out)), soft_wrap=True)
    if summary.num_too_long:
        warn(f"{summary.num_too_long} examples are longer than the maximum length and left out")
    if summary.num_shared:
        warn(f"{summary.num_shared} held-out examples are also among those to learn from, so the held-out loss is a little too good")
    try:
        scalars = _Scalars(state_dir / "scalars", summary.resumed_at)
    except ImportError:
        scalars = None
        warn("tensorboard is not installed, so no scalars are written; pip install 'moa_serve[train]'")
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("training", total=summary.num_steps, completed=summary.resumed_at, loss=math.nan, speed=0.0)
            bar = _Bar(progress, task, console)

            def listen(done: StepDone) -> None:
                bar(done)
                if scalars is not None:
                    scalars(done)

            yield listen
    except KeyboardInterrupt:
        has_state = (state_dir / STATE_FILE).exists()
        note(
            f"interrupted; the state of the last evaluation is in {state_dir}, and --resume goes on from it"
            if has_state
            else "interrupted before the first evaluation, so there is no state to go on from"
        )
        raise
    finally:
        if scalars is not None:
            scalars.close()


def _beginning(summary: Summary, out: Path) -> str:
    text = (
        f"training {visible(out.name)} on {visible(summary.base)}: {summary.num_parameters:,} parameters, "
        f"{summary.num_examples:,} examples ({summary.num_held_out:,} held out), {summary.num_steps:,} steps, {summary.num_tokens:,} tokens"
    )
    return text + (f"; resumed at step {summary.resumed_at:,}" if summary.resumed_at else "")


def show(console: Console, trained: Trained) -> None:
    """What was made, as a table."""
    result = (trained.manifest.training or {})["result"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    early = ", stopped early" if trained.is_early else ""
    rows = [
        ("adapter", f"{trained.folder}"),
        ("variant", trained.manifest.variant),
        ("size", f"{trained.manifest.num_parameters:,} parameters, {trained.num_bytes / 1e6:.2f} MB"),
        ("steps", f"{result['steps']:,} ({result['tokens']:,} tokens{early}); the best was {trained.best_step:,}"),
        (
            "speed",
            f"{result['tokens_per_second']:,} tokens/s, {result['seconds']:,} s, {result['peak_memory_bytes'] / 2**30:.2f} GiB at the peak",
        ),
    ]
    if trained.saved_loss is not None:
        rows.append(("held-out loss", f"{trained.best_loss:.4f}; {trained.saved_loss:.4f} as saved"))
    for name, value in rows:
        table.add_row(name, visible(value))
    print_table(console, table)

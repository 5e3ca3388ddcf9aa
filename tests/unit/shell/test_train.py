"""What is shown of a training run: warnings before it, a line for each evaluation, what an interrupt leaves, scalars."""

from pathlib import Path

import pytest

from moa_serve.shell.train import watched
from moa_serve.train.health import RouterHealth
from moa_serve.train.loop import STATE_FILE, Evaluation
from moa_serve.train.loop import Progress as StepDone
from moa_serve.train.run import Summary


def summary(**more: int) -> Summary:
    numbers = {"num_parameters": 1234, "num_examples": 20, "num_held_out": 4, "num_too_long": 0, "num_steps": 9, "num_tokens": 900}
    return Summary("tiny", **(numbers | {"resumed_at": 0} | more))


def done(step: int, loss: float = 1.5, evaluation: Evaluation | None = None, health: RouterHealth | None = None) -> StepDone:
    return StepDone(step, 9, loss, 1e-3, 0.5, 100 * step, 400.0, evaluation, health)


def test_an_evaluation_is_a_line_where_nobody_watches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with watched(summary(), tmp_path / "out", tmp_path) as listen:
        listen(done(1))
        listen(done(2, 1.5, Evaluation(2, 1.25), RouterHealth(0.5, 0.75, 0.25, 0.125, 0.375)))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "1,234 parameters, 20 examples (4 held out), 9 steps, 900 tokens" in printed.err
    assert "step 1/9" not in printed.err
    assert "step 2/9  loss 1.5000  400 tokens/s  held-out loss 1.2500  routers: imbalance 0.50, entropy 0.75, idle 12%" in printed.err
    assert "skipped 38%" in printed.err


def test_what_is_wrong_with_the_data_is_said_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with watched(summary(num_too_long=3, num_shared=2), tmp_path / "out", tmp_path):
        printed = capsys.readouterr().err
    assert "3 examples are longer than the maximum length and left out" in printed
    assert "2 held-out examples are also among those to learn from" in printed


@pytest.mark.parametrize(("has_state", "told"), [(True, "--resume goes on from it"), (False, "there is no state to go on from")])
def test_an_interrupt_says_what_is_left(has_state: bool, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if has_state:
        (tmp_path / STATE_FILE).write_bytes(b"")
    with pytest.raises(KeyboardInterrupt), watched(summary(), tmp_path / "out", tmp_path):
        raise KeyboardInterrupt
    assert told in capsys.readouterr().err


def test_scalars_of_steps_that_are_done_again_are_hidden(tmp_path: Path) -> None:
    """Interrupted at step 3 and resumed at step 2: one point a step, the later one."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed_at, steps, loss in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        with watched(summary(resumed_at=resumed_at), tmp_path / "out", tmp_path) as listen:
            for step in steps:
                listen(done(step, loss))
    found = events.EventAccumulator(str(tmp_path / "scalars"))
    found.Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]

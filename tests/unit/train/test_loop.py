"""A run: it learns, it stops when it should, and an interrupted one ends with the same bits as one that was not."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from training import RECIPES, examples, full_disk, tiny_base, trainer_for

from moa_serve.errors import InvalidRequest
from moa_serve.model.weights import Base, load_base
from moa_serve.train.loop import STATE_FILE, Progress, Trainer, TrainSettings, split


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return tiny_base(tmp_path_factory.mktemp("base"))


def run(trainer: Trainer, **options: int) -> list[Progress]:
    seen: list[Progress] = []
    trainer.run(seen.append, **options)
    return seen


def thresholds(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The weights and biases of threshold functions."""
    return [tensor for name, tensor in tensors.items() if ".threshold." in name]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_falls(name: str, base: Base) -> None:
    """Some tens of steps on a tiny base, for every family."""
    trainer = trainer_for(base, RECIPES[name], epochs=10, learning_rate=1e-2)
    before = trainer.loss_of(trainer.state.tensors)
    seen = run(trainer)
    assert len(seen) == trainer.num_steps == 30
    share = 0.99 if name == "prompt" else 0.9  # beside a random base, attention to a prompt alone can do little
    assert sum(step.loss for step in seen[-5:]) / 5 < share * sum(step.loss for step in seen[:3]) / 3
    assert trainer.state.best_loss < before


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("soft", {}),
        ("sparse", {}),
        ("adamole", {}),
        ("lora", {}),
        ("instance", {"checkpointing": True}),
        ("sparse", {"checkpointing": True, "straight_through": None, "weight_decay": 0.1}),
        ("lora", {"learning_rate": 0.5, "decay": "none", "warmup": 0.0, "patience": 1}),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(name: str, settings: dict[str, Any], base: Base, tmp_path: Path) -> None:
    """Interrupted twice, by a new process each time as far as the trainer can tell; also where the end is an early one."""
    whole = trainer_for(base, RECIPES[name], evaluations=6, **settings)
    seen = run(whole)
    again: list[Progress] = []
    for number, stop in enumerate((4, 4, 99)):
        part = trainer_for(base, RECIPES[name], evaluations=6, work_dir=tmp_path, **settings)
        assert part.resume() == (number > 0)
        again = again[: part.state.step] + run(part, max_steps=stop)
    assert (whole.state.step < whole.num_steps) == ("patience" in settings)
    assert part.state.step == whole.state.step
    assert [step.health for step in again] == [step.health for step in seen]
    assert [step.loss for step in again] == [step.loss for step in seen]
    assert same(part.state.tensors, whole.state.tensors)
    assert same(part.state.best, whole.state.best)
    assert part.state.history == whole.state.history
    assert part.state.tokens == whole.state.tokens


def test_a_run_that_is_done_has_nothing_left_to_do(base: Base, tmp_path: Path) -> None:
    whole = trainer_for(base, RECIPES["lora"], work_dir=tmp_path)
    run(whole)
    again = trainer_for(base, RECIPES["lora"], work_dir=tmp_path)
    assert again.resume()
    assert run(again) == []
    assert same(again.state.best, whole.state.best)


@pytest.mark.parametrize("name", ["sparse", "instance", "adamole"])
def test_a_run_learns_and_goes_on_on_any_device(name: str, device: str, tmp_path: Path) -> None:
    """Masters, batches and counters stand where the base does; a state made there can be read without that device."""
    folder = tmp_path / "base"
    folder.mkdir()
    tiny_base(folder)
    base = load_base(folder, device=torch.device(device), dtype=torch.float32)
    first = trainer_for(base, RECIPES[name], evaluations=3, work_dir=tmp_path, learning_rate=1e-2)
    seen = run(first, max_steps=8)
    assert seen[-1].loss < seen[0].loss
    assert {tensor.device.type for tensor in first.state.tensors.values()} == {device}
    second = trainer_for(base, RECIPES[name], evaluations=3, work_dir=tmp_path, learning_rate=1e-2)
    assert second.resume()
    assert second.state.step == 8
    assert same(second.state.tensors, first.state.tensors)
    done = run(second)
    assert done[-1].step == second.num_steps
    assert second.profile(second.state.best) is not None


def test_what_was_done_after_the_last_evaluation_is_done_again(base: Base, tmp_path: Path) -> None:
    first = trainer_for(base, RECIPES["lora"], evaluations=3, work_dir=tmp_path)
    run(first, max_steps=6)
    second = trainer_for(base, RECIPES["lora"], evaluations=3, work_dir=tmp_path)
    assert second.resume()
    assert second.state.step == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [({"learning_rate": 1e-3}, "learning_rate"), ({"seed": 1}, "seed"), ({"batch_size": 4, "decay": "linear"}, "batch_size, decay")],
    ids=str,
)
def test_another_runs_state_is_refused(change: dict[str, Any], named: str, base: Base, tmp_path: Path) -> None:
    """Going on under other settings would be a run that nobody can repeat."""
    run(trainer_for(base, RECIPES["lora"], work_dir=tmp_path), max_steps=3)
    with pytest.raises(InvalidRequest, match=f"other {named};"):
        trainer_for(base, RECIPES["lora"], work_dir=tmp_path, **change).resume()
    with pytest.raises(InvalidRequest, match="other manifest"):
        trainer_for(base, RECIPES["soft"], work_dir=tmp_path).resume()


def test_a_damaged_state_is_told(base: Base, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"not a state")
    with pytest.raises(InvalidRequest, match="is no state of a training run"):
        trainer_for(base, RECIPES["lora"], work_dir=tmp_path).resume()


def test_a_state_that_cannot_be_written_is_one_line_and_leaves_the_last_one(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer_for(base, RECIPES["lora"], evaluations=3, work_dir=tmp_path)
    run(first, max_steps=4)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InvalidRequest, match="the state cannot be written"):
        run(first)
    again = trainer_for(base, RECIPES["lora"], evaluations=3, work_dir=tmp_path)
    assert again.resume()
    assert again.state.step == 4


def test_without_a_state_a_run_begins(base: Base, tmp_path: Path) -> None:
    assert not trainer_for(base, RECIPES["lora"], work_dir=tmp_path).resume()


def test_adding_gradients_up_is_one_big_batch(base: Base) -> None:
    """Each learned token counts the same, however the step is cut into forwards."""
    whole, pieces = (trainer_for(base, RECIPES["soft"], micro_batch_tokens=size) for size in (10_000, 20))
    one, other = run(whole, max_steps=1)[0], run(pieces, max_steps=1)[0]
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


@pytest.mark.parametrize(("tau", "moves"), [(0.1, True), (None, False)])
def test_thresholds_move_with_the_estimator_only(tau: float | None, moves: bool, base: Base) -> None:
    """In the authors' code the threshold function stays at its random start."""
    trainer = trainer_for(base, RECIPES["sparse"], straight_through=tau)
    before = [tensor.detach().clone() for tensor in thresholds(trainer.state.tensors)]
    run(trainer, max_steps=6)
    after = thresholds(trainer.state.tensors)
    assert len(before) == 6
    assert all(torch.equal(a, b) != moves for a, b in zip(before, after, strict=True))


def test_weight_decay_does_not_move_what_has_no_gradient(base: Base) -> None:
    trainer = trainer_for(base, RECIPES["sparse"], straight_through=None, weight_decay=0.5)
    before = [tensor.detach().clone() for tensor in thresholds(trainer.state.tensors)]
    run(trainer, max_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, thresholds(trainer.state.tensors), strict=True))


def test_it_stops_early_and_keeps_the_best(base: Base) -> None:
    """A learning rate far too high makes things worse after a while."""
    trainer = trainer_for(base, RECIPES["lora"], epochs=20, evaluations=30, patience=2, learning_rate=0.5, decay="none", warmup=0.0)
    run(trainer)
    state = trainer.state
    assert state.step < trainer.num_steps
    assert state.num_worse == 2
    assert state.best_loss == min(one.loss for one in state.history if one.loss is not None)
    assert trainer.loss_of(state.best) == pytest.approx(state.best_loss)


def test_without_anything_held_out_the_last_is_the_best(base: Base) -> None:
    trainer = trainer_for(base, RECIPES["lora"])
    trainer.data = type(trainer.data)(trainer.data.train, [])
    run(trainer)
    assert trainer.state.best_step == trainer.num_steps
    assert same(trainer.state.best, {name: tensor.detach() for name, tensor in trainer.state.tensors.items()})
    assert [one.loss for one in trainer.state.history] == [None] * 10


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(base: Base) -> None:
    trainer = trainer_for(base, RECIPES["lora"])
    with torch.no_grad():
        trainer.state.tensors["layers.0.Q.lora_B"].fill_(torch.inf)
    with pytest.raises(InvalidRequest, match="lower --learning-rate"):
        run(trainer)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_held_out_loss_that_is_not_finite_is_never_the_best(loss: float, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is not greater than any number, and no manifest can hold it."""
    trainer = trainer_for(base, RECIPES["lora"])
    run(trainer, max_steps=2)
    best = trainer.state.best
    monkeypatch.setattr(trainer, "loss_of", lambda tensors: loss)
    with pytest.raises(InvalidRequest, match=r"held-out loss after step 4 is .*; lower --learning-rate"):
        run(trainer)
    assert trainer.state.best is best


@pytest.mark.parametrize("decay", ["cosine", "linear", "none"])
def test_the_rate_rises_then_falls(decay: str) -> None:
    settings = TrainSettings(learning_rate=1e-2, warmup=0.1, decay=decay)
    rates = [settings.rate_at(step, 100) for step in range(100)]
    assert rates[0] < rates[5] < rates[10] == 1e-2
    assert all(0 < rate <= 1e-2 for rate in rates)
    assert (rates[99] < 2e-4) == (decay != "none")
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_some_examples_are_held_out() -> None:
    rows = examples(40)
    data = split(rows, 0.1, seed=0)
    assert (len(data.train), len(data.validation)) == (36, 4)
    assert {id(row) for row in (*data.train, *data.validation)} == {id(row) for row in rows}
    assert [id(r) for r in split(rows, 0.1, seed=0).validation] == [id(r) for r in data.validation]
    assert [id(r) for r in split(rows, 0.1, seed=1).validation] != [id(r) for r in data.validation]


def test_a_row_that_is_read_twice_is_not_on_both_sides() -> None:
    """Else what is learned would judge itself. Rows that are read once are held out as if nobody had asked."""
    once = examples(40)
    names = [f"row {index}" for index in range(40)]
    data = split([*once, *once], 0.2, seed=0, rows=names * 2)
    held_out, learned = {id(row) for row in data.validation}, [id(row) for row in data.train]
    assert len(data.validation) == len(held_out) == 8
    assert sorted(learned) == sorted([id(row) for row in once if id(row) not in held_out] * 2)
    plain, named = split(once, 0.2, seed=3), split(once, 0.2, seed=3, rows=names)
    assert [id(row) for row in plain.validation] == [id(row) for row in named.validation]
    assert [id(row) for row in plain.train] == [id(row) for row in named.train]


def test_a_profile_says_what_the_routers_do(base: Base) -> None:
    trainer = trainer_for(base, RECIPES["sparse"])
    run(trainer, max_steps=4)
    profile = trainer.profile(trainer.state.tensors)
    assert profile is not None
    assert profile["num_tokens"] == sum(len(row.token_ids) - 1 for row in trainer.data.validation)
    assert len(profile["layers"]) == 3
    assert list(profile["layers"][0]) == ["Q", "K", "V", "O", "DOWN", "P_ADAPTER"]
    uses = [use for layer in profile["layers"] for use in layer.values()]
    assert all(0 <= use["weight"] <= 1 and 0 <= use["selected"] <= 1 for use in uses)
    assert any(use["selected"] > 0 for use in uses)
    assert trainer_for(base, RECIPES["lora"]).profile({}) is None


def test_the_routers_health_comes_with_every_evaluation(base: Base) -> None:
    seen = run(trainer_for(base, RECIPES["sparse"], evaluations=3))
    healths = [step.health for step in seen if step.evaluation]
    assert len(healths) == 3
    assert all(health is not None and 0 <= health.entropy <= 1 and 0 <= health.skipped <= 1 for health in healths)
    assert all(step.health is None for step in run(trainer_for(base, RECIPES["lora"])))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0}, {"learning_rate": 0}, {"learning_rate": 2}, {"warmup": 1}, {"validation": 0.9}, {"decay": "step"},
        {"max_grad_norm": 0}, {"patience": -1}, {"straight_through": 0}, {"epochs": 0}, {"weight_decay": -1}, {"max_train_tokens": 0},
        {"weight_decay": float("inf")}, {"seed": 2**63},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        TrainSettings(**wrong)  # type: ignore[arg-type]
    assert caught.value.param == next(iter(wrong))

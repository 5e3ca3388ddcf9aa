"""`moa-serve train` from files to a folder that serves; and what it says where it cannot."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import copy_rows, tiny_base, write_rows
from typer.testing import CliRunner

from moa_serve import LLM, SamplingParams
from moa_serve.__main__ import app
from moa_serve.adapter.manifest import Manifest
from moa_serve.errors import AdapterExists, DataInvalid, InvalidRequest
from moa_serve.model.memory import peak_memory_bytes, reset_peak_memory
from moa_serve.train.loop import TrainSettings
from moa_serve.train.recipe import Recipe
from moa_serve.train.run import Trained, TrainingRun, train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_base(folder)
    return folder


def run_for(base: Path, tmp_path: Path, rows: list[dict[str, Any]] | None = None, **more: Any) -> TrainingRun:
    data = write_rows(tmp_path / "train.json", copy_rows(24) if rows is None else rows)
    settings: dict[str, Any] = {"batch_size": 8, "epochs": 2, "validation": 0.2} | more.pop("settings", {})
    options: dict[str, Any] = {"recipe": Recipe(variant="sparse_moa", rank=4), "dtype": "float32", "max_length": 400} | more
    return TrainingRun(data=(data,), out=tmp_path / "out", model=str(base), settings=TrainSettings(**settings), **options)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(run_for(base, tmp_path_factory.mktemp("run"), license="CC0-1.0", description="Copies a word."))


def test_what_was_trained_serves(trained: Trained, base: Path) -> None:
    with LLM(base, adapters={"copy": trained.folder}, backend="torch") as llm:
        done = llm.generate(["red blue"], SamplingParams(temperature=0, max_tokens=4), adapter="copy")[0]
        assert done.finish_reason in ("length", "stop")


def test_the_manifest_tells_how_it_was_made(trained: Trained) -> None:
    manifest = Manifest.parse(json.loads((trained.folder / "adapter.json").read_text()))
    assert (manifest.license, manifest.description) == ("CC0-1.0", "Copies a word.")
    assert manifest.base.digest
    training = manifest.training
    assert training is not None
    assert training["data"]["files"][0].endswith("/train.json")
    assert not training["data"]["files"][0].startswith("/")
    assert len(training["data"]["sha256"]) == 64
    assert (training["data"]["examples"], training["data"]["held_out"]) == (19, 5)
    assert training["recipe"]["variant"] == "sparse_moa"
    assert training["settings"]["learning_rate"] == 6e-3
    result = training["result"]
    assert result["steps"] == 6
    assert result["held_out_loss"][-1][0] == 6
    assert result["peak_memory_bytes"] > 0
    assert manifest.profile is not None
    assert manifest.profile["num_tokens"] > 0
    assert set(manifest.profile["layers"][0]) == {"Q", "K", "V", "O", "DOWN", "P_ADAPTER"}


def test_the_loss_is_also_that_of_the_rounded_file(trained: Trained) -> None:
    """bfloat16 moves a router a little; the figure that is told is the file's."""
    assert trained.saved_loss is not None
    assert trained.saved_loss != trained.best_loss
    assert trained.saved_loss == pytest.approx(trained.best_loss, rel=0.02)


def test_an_interrupted_run_goes_on_to_the_same_file(base: Path, tmp_path: Path) -> None:
    """Through files and a new trainer: the weights are equal bit by bit."""
    whole = run_for(base, tmp_path, settings={"evaluations": 3})
    train(whole)
    expected = (whole.out / "adapter.safetensors").read_bytes()

    class Interrupt(Exception):
        pass

    class Stops:
        def __enter__(self) -> Any:
            def listen(progress: Any) -> None:
                if progress.step == 3:
                    raise Interrupt

            return listen

        def __exit__(self, *_: object) -> None: ...

    (tmp_path / "again").mkdir()
    again = run_for(base, tmp_path / "again", settings={"evaluations": 3}, resume=True)
    with pytest.raises(Interrupt):
        train(again, begin=lambda summary: Stops())
    assert not again.out.exists()
    resumed_at = []

    class Notes(Stops):
        def __enter__(self) -> Any:
            return None

    def begin(summary: Any) -> Notes:
        resumed_at.append(summary.resumed_at)
        return Notes()

    train(again, begin=begin)
    assert resumed_at == [2]
    assert (again.out / "adapter.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ([], {}, "has no rows"),
        ([{"instruction": "x"}], {}, "row 1: has no 'output'"),
        ([{"instruction": "x", "output": ""}], {}, "row 1: 'output' is empty"),
        ([{"text": "x"}], {}, "row 1: has the fields text"),
        (copy_rows(3), {"max_length": 20}, "all 3 examples are longer than 20 tokens"),
        (copy_rows(1), {}, "too few to hold 1 out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_data_is_one_line(rows: list[dict[str, Any]], more: dict[str, Any], told: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid) as caught:
        train(run_for(base, tmp_path, rows, **more))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_long_examples_are_counted(base: Path, tmp_path: Path) -> None:
    rows = [*copy_rows(10), {"instruction": "red " * 90, "output": "red"}]
    summaries = []

    class Quiet:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def begin(summary: Any) -> Quiet:
        summaries.append(summary)
        return Quiet()

    run = run_for(base, tmp_path, rows, max_length=300)
    train(run, begin=begin)
    assert summaries[0].num_too_long == 1


def test_a_file_that_is_named_twice_counts_twice_and_never_judges_itself(base: Path, tmp_path: Path) -> None:
    summaries: list[Any] = []

    def begin(summary: Any) -> Any:
        summaries.append(summary)
        return nullcontext()

    rows = [{"instruction": f"word {i}", "output": f"w{i}"} for i in range(20)]
    once = run_for(base, tmp_path, rows, recipe=Recipe(variant="lora"), settings={"epochs": 1})
    train(replace(once, data=once.data * 2), begin=begin)
    assert (summaries[0].num_examples, summaries[0].num_held_out, summaries[0].num_shared) == (32, 4, 0)


def test_held_out_files_are_told_and_belong_to_the_state(base: Path, tmp_path: Path) -> None:
    """Best tensors and patience hang on them. What is also learned from is counted, what is too long as well."""
    summaries: list[Any] = []

    def begin(summary: Any) -> Any:
        summaries.append(summary)
        return nullcontext()

    (tmp_path / "held").mkdir()
    rows = [{"instruction": f"word {i}", "output": f"w{i}"} for i in range(12)]
    (tmp_path / "held" / "test.json").write_text("not to be chosen by")
    held = write_rows(
        tmp_path / "held" / "validation.json", [*rows[:2], {"instruction": "new", "output": "n"}, {"instruction": "x" * 300, "output": "n"}]
    )
    run = run_for(base, tmp_path, rows, recipe=Recipe(variant="lora"), validation_data=(held.parent,), settings={"epochs": 1})
    trained = train(run, begin=begin)
    assert (summaries[0].num_examples, summaries[0].num_held_out, summaries[0].num_shared, summaries[0].num_too_long) == (12, 3, 2, 1)
    assert trained.manifest.training is not None
    data = trained.manifest.training["data"]
    assert data["held_out_files"] == ["held/validation.json"]
    assert (len(data["held_out_sha256"]), data["also_learned"]) == (64, 2)
    write_rows(held, [{"instruction": "other", "output": "o"}])
    with pytest.raises(InvalidRequest, match="other validation_data"):
        train(replace(run, resume=True))


def test_a_length_beyond_the_context_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"the context of .+ ends at [0-9]+ tokens"):
        train(run_for(base, tmp_path, max_length=1_000_000))


def test_the_threshold_gradient_is_of_sparse_moa(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="lora has no use for it"):
        run_for(base, tmp_path, recipe=Recipe(variant="lora"), settings={"straight_through": None})


def test_a_folder_of_another_format_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    """It was refused after the training, for an adapter.json of any kind let it pass before."""
    run = run_for(base, tmp_path)
    run.out.mkdir()
    (run.out / "adapter.json").write_text('{"format": "other/1"}')
    with pytest.raises(AdapterExists, match="no adapter folder of ours"):
        train(run)


@pytest.mark.parametrize("option", ["out", "work_dir"])
def test_a_folder_that_cannot_be_made_is_told_before_the_training(option: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run, path = run_for(base, tmp_path), tmp_path / "file" / "x"
    run = replace(run, out=path) if option == "out" else replace(run, work_dir=path)
    with pytest.raises(InvalidRequest, match="cannot be made"):
        train(run, begin=lambda summary: pytest.fail("it began"))


def test_the_current_folder_has_a_work_folder_beside_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert replace(run_for(base, tmp_path), out=Path(".")).state_dir == tmp_path / "here.training"


def test_a_peak_is_that_of_its_own_run() -> None:
    """A process may train more than once, and a peak that never falls would be that of the largest before."""
    device = torch.device("cpu")
    large = torch.ones(2**27)  # 512 MiB
    assert large.sum() == 2**27
    before = peak_memory_bytes(device)
    del large
    reset_peak_memory(device)
    if peak_memory_bytes(device) == before:
        pytest.skip("this system's peaks never fall")
    assert peak_memory_bytes(device) < before - 2**28


def test_a_folder_of_something_else_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    run = run_for(base, tmp_path)
    run.out.mkdir()
    (run.out / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterExists, match="no adapter folder"):
        train(run)


@pytest.mark.parametrize("wrong", [{"dtype": "float16"}, {"save_dtype": "int8"}, {"max_length": 1}], ids=str)
def test_options_out_of_range_are_refused(wrong: dict[str, Any], base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        run_for(base, tmp_path, **wrong)


# -- the command


def command(base: Path, tmp_path: Path, *more: str, rows: list[dict[str, Any]] | None = None) -> Any:
    data = write_rows(tmp_path / "train.json", copy_rows(24) if rows is None else rows)
    files = ["--data", str(data), "--out", str(tmp_path / "made"), "--model", str(base)]
    return CliRunner().invoke(app, ["train", *files, "--dtype", "float32", "--max-length", "400", "--batch-size", "8", *more])


def test_the_command_makes_an_adapter(base: Path, tmp_path: Path) -> None:
    done = command(base, tmp_path, "--variant", "hydralora", "--num-experts", "2", "--rank", "4", "--validation", "0.2")
    assert done.exit_code == 0, done.output
    assert "hydralora" in done.output
    assert "held-out loss" in done.output
    assert json.loads((tmp_path / "made" / "adapter.json").read_text())["variant"] == "hydralora"
    assert list((tmp_path / "made.training" / "scalars").glob("events*"))
    assert (tmp_path / "made.training" / "state.pt").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--variant", "dora"), "variant is 'dora'"),
        (("--variant", "lora", "--max-threshold", "0.3"), "lora has no use for it"),
        (("--threshold-grad", "ste"), "straight-through or none"),
        (("--variant", "sparse_moa", "--threshold-grad", "none", "--threshold-tau", "0.3"), "has no use for it"),
        (("--variant", "adamole", "--threshold-tau", "0.3"), "adamole has no use for it"),
        (("--num-experts", "many"), "must be a number"),
        (("--form", "open"), "authors or cloze"),
        (("--warmup", "1.5"), "share from 0"),
        (("--rank", "9999"), "rank"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(more: tuple[str, ...], told: str, base: Path, tmp_path: Path) -> None:
    done = command(base, tmp_path, *more)
    assert told in done.output
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.output


def test_bad_data_is_exit_code_2(base: Path, tmp_path: Path) -> None:
    done = command(base, tmp_path, rows=[{"instruction": "x"}])
    assert done.exit_code == 2
    assert "row 1: has no 'output'" in done.output

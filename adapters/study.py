"""The comparison of docs/results.md: every family of the paper's tables 1 to 5 at one token budget, on two tasks, scored the same way.

    python adapters/study.py run --data DIR [--tokens N] [--worker 1/2]     trains and scores what is missing; as many workers as you like
    python adapters/study.py report                                          writes docs/results.md and its pictures from what is there

A run is a file in docs/results/, named by task, row and seed, with its figures and settings and without any text of the data. What is
there is not done again, and a training that was interrupted is resumed, so the study can be stopped at any time.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moa_serve.llm import LLM
from moa_serve.shell.evaluate import Report as EvalReport
from moa_serve.shell.evaluate import engine_options, to_json
from moa_serve.train.data import Example, read_examples
from moa_serve.train.evaluate import Evaluation
from moa_serve.train.loop import TrainSettings
from moa_serve.train.recipe import Recipe
from moa_serve.train.run import TrainingRun, train
from moa_serve.train.scoring import Task, read_task, subset
from moa_serve.train.tasks import Form

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
RUNS = HERE / "study.training"  # adapters and states; not committed


@dataclass(frozen=True, slots=True)
class StudyTask:
    """Training files below --data; test files and how many of their rows (see `_tests`); `max_tokens` to generate.

    `validation` is the share that chooses the best tensors: about 40 examples, so that choosing does not cost more than training.
    """

    train: tuple[str, ...]
    test: tuple[tuple[str, int], ...]
    form: Form
    scorer: str
    max_tokens: int
    validation: float


TASKS = {
    "mawps": StudyTask(
        ("mawps/train_clean.json",), (("mawps/test.json", 238), ("AddSub/test.json", 262)), "authors", "generation", 40, 0.05
    ),
    "arc": StudyTask(
        ("ARC-Easy/train.json", "ARC-Challenge/train.json", "openbookqa/train.json"),
        (("ARC-Easy/test.json", 500),),
        "cloze",
        "both",
        16,
        0.005,
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a recipe, what of the settings differs, and the seeds to run."""

    name: str
    title: str
    recipe: Recipe
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, Any] = field(default_factory=dict)


THREE = (0, 1, 2)
SPARSE = {"variant": "sparse_moa"}
ROWS = (
    Row("soft", "Soft MoA", Recipe(), THREE),
    Row("sparse", "Sparse MoA, learned threshold <= 0.5", Recipe(**SPARSE), THREE),
    Row("lora", "LoRA r16", Recipe(variant="lora", rank=16), THREE),
    Row("molora", "MoLoRA 8 x r8", Recipe(variant="molora")),
    Row("hydralora", "HydraLoRA 8 x r8", Recipe(variant="hydralora")),
    Row("adamole", "AdaMoLE 8 x r8", Recipe(variant="adamole")),
    Row("prompt", "Prompt alone", Recipe(variant="prompt")),
    Row("parallel", "Parallel adapter alone", Recipe(variant="parallel_adapter")),
    Row("composition", "Plain composition, no router", Recipe(variant="composition")),
    Row("lora-sigmoid", "LoRA experts + sigmoid router", Recipe(bottleneck=0, prompt_length=0)),
    Row("softmax", "Soft MoA, softmax router", Recipe(activation="softmax")),
    Row("instance", "Soft MoA, instance level", Recipe(variant="soft_moa_instance")),
    Row("unipeft", "UniPEFT", Recipe(variant="unipeft")),
    Row("constant-25", "Sparse MoA, constant 0.25", Recipe(**SPARSE, threshold="constant", max_threshold=0.25)),
    Row("constant-50", "Sparse MoA, constant 0.5", Recipe(**SPARSE, threshold="constant")),
    Row("constant-75", "Sparse MoA, constant 0.75", Recipe(**SPARSE, threshold="constant", max_threshold=0.75)),
    Row("learned-25", "Sparse MoA, learned <= 0.25", Recipe(**SPARSE, max_threshold=0.25)),
    Row("learned-75", "Sparse MoA, learned <= 0.75", Recipe(**SPARSE, max_threshold=0.75)),
    Row("learned-100", "Sparse MoA, learned <= 1", Recipe(**SPARSE, max_threshold=1.0)),
    Row(
        "random-100",
        "Sparse MoA, threshold without gradient <= 1",
        Recipe(**SPARSE, max_threshold=1.0),
        settings={"straight_through": None},
    ),
    Row("lora-slow", "LoRA r16 at 1.5e-3", Recipe(variant="lora", rank=16), settings={"learning_rate": 1.5e-3}),
)


@dataclass(frozen=True, slots=True)
class Job:
    task: str
    row: Row | None  # None is the base
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-base" if self.row is None else f"{self.task}-{self.row.name}-{self.seed}"

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"


def jobs() -> Iterator[Job]:
    """Seed 0 of everything first, so that an unfinished study has every row."""
    for seed in THREE:
        for task in TASKS:
            if seed == 0:
                yield Job(task, None, 0)
            for row in ROWS:
                if seed in row.seeds:
                    yield Job(task, row, seed)


def run(data: Path, tokens: int, worker: int, num_workers: int, console: Console) -> None:
    mine = [job for index, job in enumerate(jobs()) if index % num_workers == worker]
    RESULTS.mkdir(parents=True, exist_ok=True)
    llm: LLM | None = None
    for number, job in enumerate(mine, start=1):
        if job.file.exists():
            continue
        console.print(f"[{number}/{len(mine)}] {job.name}")
        folder = None if job.row is None else _trained(job, data, tokens)
        if llm is None:
            llm = LLM(backend="torch", dtype="bfloat16", kv_cache_bytes=2**29, **engine_options(128))
        result = _scored(job, data, llm, folder)
        job.file.with_suffix(".new").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(job.file.with_suffix(".new"), job.file)
        console.print("  " + ", ".join(f"{name} {found['value']:.3f}" for name, found in result["scores"].items()))


def _trained(job: Job, data: Path, tokens: int) -> Path:
    row, task = job.row, TASKS[job.task]
    assert row is not None
    of_row = {"learning_rate": 6e-3} | row.settings
    settings = TrainSettings(
        seed=job.seed, max_train_tokens=tokens, batch_size=8, epochs=20, patience=0, validation=task.validation, **of_row
    )
    run = TrainingRun(
        data=tuple(data / name for name in task.train), out=RUNS / f"{tokens}" / job.name, form=task.form,
        resume=True, recipe=row.recipe, settings=settings,
    )  # fmt: skip
    if not (run.out / "adapter.json").exists():
        # A process of its own, so that its peak of memory is the training's and not that of the engine that scores.
        child = multiprocessing.get_context("spawn").Process(target=_train, args=(run, torch.get_num_threads()))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"{job.name}: the training ended with exit code {child.exitcode}")
    return run.out


def _train(run: TrainingRun, threads: int) -> None:
    torch.set_num_threads(threads)
    train(run, begin=lambda summary: nullcontext())


def _scored(job: Job, data: Path, llm: LLM, folder: Path | None) -> dict[str, Any]:
    task, name = TASKS[job.task], None
    if folder is not None:
        name = job.name
        llm.load_adapter(name, folder)
    tests = _tests(task, data)
    evaluation = Evaluation(llm, tests, [name], scorer=task.scorer, max_tokens=task.max_tokens)
    start = time.perf_counter()
    found = to_json(EvalReport({}, {}, {}, list(evaluation.run())))["rounds"]
    seconds = time.perf_counter() - start
    manifest = json.loads((folder / "adapter.json").read_text()) if folder is not None else {}
    if name is not None:
        llm.unload_adapter(name)
    scores = {
        f"{part['task']}/{part['scorer']}": _compact(part["scores"][0] | {"n": part["n"], "chance": part["chance"]}) for part in found
    }
    return {
        "task": job.task,
        "row": job.row.name if job.row else "base",
        "seed": job.seed,
        "test_rows": sum(len(test.examples) for test in tests),
        "scores": scores,
        "eval_seconds": round(seconds, 1),
        "training": manifest.get("training"),
        "profile": manifest.get("profile"),
        "parameters": _parameters(manifest),
    }


def _tests(task: StudyTask, data: Path) -> list[Task]:
    """Fixed rows (scoring.subset) of the test files, without questions that were trained on or that an earlier file asked already."""
    seen = {_bare(example) for name in task.train for example in read_examples(data / name, task.form)}
    tests = []
    for path, count in task.test:
        whole = read_task(data / path, task.form)
        fresh = [example for example in whole.examples if _bare(example) not in seen]
        seen |= {_bare(example) for example in fresh}
        tests.append(replace(whole, examples=tuple(subset(fresh, count, seed=0))))
    return tests


def _bare(example: Example) -> str:
    return "".join(char for char in example.instruction.lower() if char.isalnum())


def _compact(score: dict[str, Any]) -> dict[str, Any]:
    """The figures, and for each answer only whether it is right: enough to compare two runs row by row."""
    answers = score.pop("answers")
    if "correct" in score:
        score["right"] = "".join("1" if right else "0" for _, right in answers)
    return {name: value for name, value in score.items() if value is not None and name not in ("adapter", "against_base")}


def _parameters(manifest: dict[str, Any]) -> int:
    from moa_serve.adapter.manifest import Manifest

    return Manifest.parse(manifest).num_parameters if manifest else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--data", type=Path, required=True)
    runs.add_argument("--tokens", type=int, default=32_000, help="training tokens of every row")
    runs.add_argument("--worker", default="1/1", help="K/N: do every Nth job from the Kth on")
    runs.add_argument("--threads", type=int, default=1)
    commands.add_parser("report")
    given = parser.parse_args()
    console = Console(highlight=False)
    if given.command == "run":
        torch.set_num_threads(given.threads)
        worker, _, num_workers = given.worker.partition("/")
        run(given.data, given.tokens, int(worker) - 1, int(num_workers), console)
    else:
        from study_report import write  # beside this file

        write(RESULTS, ROWS, TASKS, len(list(jobs())), console)


if __name__ == "__main__":
    main()

"""A training run from files to an adapter folder: reads, encodes, trains, rounds, measures, writes.

Composition only; the parts are data, prompts, recipe, objective and loop. `train` is what the command calls, and what a script can.
"""

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch

from moa_serve.adapter.checkpoint import is_own_folder, write_adapter
from moa_serve.adapter.manifest import BaseShape, Manifest
from moa_serve.errors import AdapterExists, DataInvalid, InvalidRequest
from moa_serve.llm import resolve_device
from moa_serve.model.memory import reset_peak_memory
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import Base, load_base
from moa_serve.text import Tokenizer
from moa_serve.train.batches import num_inputs
from moa_serve.train.data import Example, data_digest, find_file, read_examples
from moa_serve.train.loop import Listener, Trainer, TrainingData, TrainSettings, split
from moa_serve.train.objective import CheckpointedTransformer
from moa_serve.train.prompts import Encoded, encode_all
from moa_serve.train.recipe import Recipe, fresh_tensors, manifest_of
from moa_serve.train.tasks import Form

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_LENGTH, MAX_LENGTH_CHOICES = 300, 200  # tokens of an example: the paper's for mathematics and for commonsense


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What to train on what, and where to put it.

    Args:
        data: files, or folders with train.json. A file may be named again, to count twice.
        out: folder of the adapter.
        validation_data: files, or folders with validation.json, to hold out in place of a share of `data`.
        form: of choice tasks, see data.read_examples.
        limit: examples to take of each file, drawn by the seed; None is all.
        max_length: longest example in tokens; None is the paper's, 300, or 200 where all examples are choices.
        model: the base, as `LLM` takes it.
        dtype: to compute in; `save_dtype` of the file.
        work_dir: of the state and the scalars; None is `out` with ".training" behind it.
        resume: go on from the state in `work_dir`.
    """

    data: tuple[Path, ...]
    out: Path
    validation_data: tuple[Path, ...] = ()
    form: Form = "authors"
    limit: int | None = None
    max_length: int | None = None
    model: str | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    save_dtype: str = "bfloat16"
    work_dir: Path | None = None
    resume: bool = False
    description: str | None = None
    license: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    settings: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        for name in ("dtype", "save_dtype"):
            if getattr(self, name) not in DTYPES:
                raise InvalidRequest(f"{name.replace('_', '-')} is {getattr(self, name)!r}, but must be bfloat16 or float32", param=name)
        if self.max_length is not None and self.max_length < 2:
            raise InvalidRequest(f"max-length is {self.max_length}, but must be at least 2", param="max_length")
        if self.settings.straight_through != TrainSettings().straight_through and self.recipe.variant != "sparse_moa":
            raise InvalidRequest(
                f"the thresholds' gradient is of sparse_moa; {self.recipe.variant} has no use for it", param="straight_through"
            )

    @property
    def state_dir(self) -> Path:
        out = self.out if self.out.name not in ("", "..") else self.out.resolve()  # `.` has no name to put something behind
        return self.work_dir or out.with_name(out.name + ".training")


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run is about to do: shown before it begins. `num_shared` of the held-out examples are also learned from."""

    base: str
    num_parameters: int
    num_examples: int
    num_held_out: int
    num_too_long: int
    num_steps: int
    num_tokens: int
    resumed_at: int
    num_shared: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of it. `saved_loss` is the held-out loss of the tensors as they are in the file."""

    manifest: Manifest
    folder: Path
    num_bytes: int
    best_step: int
    best_loss: float
    saved_loss: float | None
    is_early: bool


def train(
    run: TrainingRun,
    *,
    begin: Callable[[Summary], AbstractContextManager[Listener | None]] | None = None,
) -> Trained:
    """Train an adapter and write its folder.

    Args:
        begin: called once everything is read and right; its context lasts while the run does, and what it gives is told of every step.
    Raises:
        DataInvalid, InvalidRequest, ModelError, AdapterError: before the first step, but for a loss that is not finite, or a full disk.
    """
    _check_destination(run)
    torch.manual_seed(run.settings.seed)
    device = resolve_device(run.device)
    reset_peak_memory(device)
    examples, held_out = _read(run.data, "train", run), _read(run.validation_data, "validation", run)
    base = load_base(run.model, device=device, dtype=DTYPES[run.dtype])
    max_length = _max_length(run, examples, base)
    encoded, num_too_long = _encode(base, examples, max_length)
    if held_out:
        apart, more = _encode(base, held_out, max_length)
        data, num_too_long = TrainingData([one for _, one in encoded], [one for _, one in apart]), num_too_long + more
    else:
        rows = [example.where for example, _ in encoded]
        data = split([one for _, one in encoded], run.settings.validation, run.settings.seed, rows=rows)
    model = (CheckpointedTransformer if run.settings.checkpointing else Transformer)(base.config, base.weights)
    manifest = manifest_of(run.recipe, BaseShape.of(base.config, base.digest))
    digest = data_digest([find_file(path, "train") for path in run.data])
    held_out_digest = data_digest([find_file(path, "validation") for path in run.validation_data]) if run.validation_data else None
    identity = {"data": digest, "base": base.digest, "dtype": run.dtype, "form": run.form, "max_length": run.max_length, "limit": run.limit}
    identity["validation_data"] = held_out_digest
    tensors = fresh_tensors(manifest, run.settings.seed)
    _make_folders(run)
    trainer = Trainer(model, manifest, tensors, data, run.settings, work_dir=run.state_dir, identity=identity)
    state = trainer.state
    if run.resume:
        trainer.resume()
    planned = sum(num_inputs(data.train[index]) for step in trainer.plan for index in step)
    num_shared = _num_shared(data)
    made_with = {"moa_serve": version_of("moa_serve"), "torch": torch.__version__, "machine": platform.machine()}  # fails before, if at all
    summary = Summary(
        base.name, manifest.num_parameters, len(data.train), len(data.validation), num_too_long, trainer.num_steps, planned, state.step,
        num_shared,
    )  # fmt: skip
    with begin(summary) if begin else nullcontext() as listen:
        trainer.run(listen)
    saved = {name: tensor.detach().to("cpu", DTYPES[run.save_dtype]) for name, tensor in state.best.items()}
    read_back = {name: tensor.float() for name, tensor in saved.items()}
    saved_loss = trainer.loss_of(read_back) if data.validation else None
    held_out_files = {
        "held_out_files": [_shown(find_file(path, "validation")) for path in run.validation_data],
        "held_out_sha256": held_out_digest,
    }
    training = {
        "data": {
            "files": [_shown(find_file(path, "train")) for path in run.data],
            "sha256": digest,
            **(held_out_files if run.validation_data else {}),
            "form": run.form,
            "examples": len(data.train),
            "held_out": len(data.validation),
            "too_long": num_too_long,
            "also_learned": num_shared,
        },
        "recipe": run.recipe.used(),
        "settings": _plain(run.settings) | {"max_length": max_length, "limit": run.limit, "dtype": run.dtype},
        "result": {
            "steps": state.step,
            "best_step": state.best_step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
            "peak_memory_bytes": state.peak_memory_bytes,
            "held_out_loss": [[one.step, round(one.loss, 5)] for one in state.history if one.loss is not None],
            "saved_loss": None if saved_loss is None else round(saved_loss, 5),
        },
        "made_with": made_with,
        "date": time.strftime("%Y-%m-%d"),
    }
    raw = manifest.model_dump(mode="json", exclude_none=True) | {"training": training}
    optional = {"profile": trainer.profile(read_back), "description": run.description, "license": run.license}
    final = Manifest.parse(raw | {name: value for name, value in optional.items() if value is not None})
    write_adapter(run.out, final, saved)
    size = sum(file.stat().st_size for file in run.out.iterdir() if file.is_file())
    return Trained(final, run.out, size, state.best_step, state.best_loss, saved_loss, state.step < trainer.num_steps)


def _check_destination(run: TrainingRun) -> None:
    """What stands in the way of the result is better told before hours of training than after them."""
    if run.out.exists() and (not run.out.is_dir() or (any(run.out.iterdir()) and not is_own_folder(run.out))):
        raise AdapterExists(f"{run.out}: is no adapter folder of ours and not empty; give --out a new folder")


def _make_folders(run: TrainingRun) -> None:
    for folder in (run.state_dir, run.out.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"{folder}: cannot be made ({error.strerror}); choose another --out or --work-dir", param="out") from None


def _read(paths: Sequence[Path], usual: str, run: TrainingRun) -> list[Example]:
    examples: list[Example] = []
    for path in paths:
        found = read_examples(find_file(path, usual), run.form)
        if run.limit is not None and run.limit < len(found):
            drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(run.settings.seed))[: run.limit]
            found = [found[index] for index in sorted(drawn.tolist())]
        examples += found
    return examples


def _encode(base: Base, examples: Sequence[Example], max_length: int) -> tuple[list[tuple[Example, Encoded]], int]:
    tokenizer = Tokenizer.from_folder(base.folder) if base.folder else None
    if tokenizer is None:
        raise DataInvalid(
            f"the base {base.name} has no tokenizer, so text cannot be trained on; give one with tokenizer.json", param="model"
        )
    if not base.config.eos_token_ids:
        raise DataInvalid(f"the base {base.name} names no end of text (eos_token_id), so a response could not learn to end", param="model")
    return encode_all(examples, tokenizer, max_length=max_length, eos_token_id=base.config.eos_token_ids[0])


def _num_shared(data: TrainingData) -> int:
    learned = {tuple(example.token_ids) for example in data.train}
    return sum(tuple(example.token_ids) in learned for example in data.validation)


def _max_length(run: TrainingRun, examples: Sequence[Example], base: Base) -> int:
    limit = base.config.max_position
    if run.max_length is None:
        return min(limit, MAX_LENGTH_CHOICES if all(example.choices for example in examples) else MAX_LENGTH)
    if run.max_length > limit:
        raise InvalidRequest(f"max-length is {run.max_length}, but the context of {base.name} ends at {limit} tokens", param="max_length")
    return run.max_length


def _shown(path: Path) -> str:
    """The last two parts: enough to recognise a file, and nothing of the machine."""
    return "/".join(path.parts[-2:])


def _plain(settings: Any) -> dict[str, Any]:
    """A dataclass as JSON, defaults included: they may change, a model card may not."""
    return {name: value for name, value in asdict(settings).items() if value is not None}

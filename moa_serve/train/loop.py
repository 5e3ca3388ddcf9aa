"""The training run: optimizer, schedule, validation, checkpoints. What it learns is the objective's affair, what it reads data.py's.

A run is a function of its data, recipe and settings: its batches and learning rates are known before its first step (batches.plan_steps),
and nothing is drawn on the way. So a run that was interrupted and resumed ends with the same bits as one that was not.
Owned by the one thread that calls it.
"""

import io
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_serve.adapter.checkpoint import replace_file
from moa_serve.adapter.manifest import Manifest
from moa_serve.engine.activity import Activity
from moa_serve.engine.routing import assemble
from moa_serve.errors import DataInvalid, InvalidRequest
from moa_serve.model.batch import RoutingTrace
from moa_serve.model.counters import RouterCounters
from moa_serve.model.memory import peak_memory_bytes
from moa_serve.model.transformer import Transformer
from moa_serve.train.batches import TokenBatch, num_inputs, plan_steps, split_by_tokens
from moa_serve.train.health import RouterHealth
from moa_serve.train.objective import Objective, trainable
from moa_serve.train.prompts import Encoded

STATE_FILE = "state.pt"
_FILL = 64
"""Tokens of a forward are filled up to a multiple of this. For every new size oneDNN compiles each of its bfloat16 kernels anew and keeps
them: without it a run on mawps grew from 1.9 to 4.2 GB in 80 steps, and was 1.5 times slower."""
_STATE_FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How to train. Learning rate and batch size are the paper's (arXiv:2506.05928, section 4).

    Args:
        learning_rate: of AdamW, at its highest.
        weight_decay: AdamW's; 0, because a router is no better for being small.
        warmup: share of all steps in which the rate rises from 0.
        decay: cosine, linear (both to 0) or none.
        max_grad_norm: the gradient's norm over all tensors is cut to it.
        batch_size: examples in a step.
        micro_batch_tokens: tokens in one forward and backward, pads of attention included; a step of more adds their gradients up.
        epochs: passes over the data.
        max_train_tokens: end after the step that reaches this many tokens; None is all epochs.
        validation: share of the examples held out, unless they come from a file of their own.
        evaluations: how often in a run the held-out loss is computed, the end included.
        patience: end after this many evaluations in a row without a better loss; 0 never.
        straight_through: tau of the thresholds' straight-through estimator; None gives thresholds no gradient, as in the authors' code.
        checkpointing: recompute blocks in the backward, for less memory.
        seed: of the first tensors, the batches and the split.
    """

    learning_rate: float = 6e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    decay: str = "cosine"
    max_grad_norm: float = 1.0
    batch_size: int = 32
    micro_batch_tokens: int = 768
    epochs: int = 2
    max_train_tokens: int | None = None
    validation: float = 0.05
    evaluations: int = 10
    patience: int = 3
    straight_through: float | None = 0.1
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name.replace('_', '-')} is {getattr(self, name)!r}, but must be {what}", param=name)

        for name in ("batch_size", "micro_batch_tokens", "epochs", "evaluations"):
            need(getattr(self, name) >= 1, name, "at least 1")
        need(0 < self.learning_rate <= 1, "learning_rate", "above 0 and at most 1")
        need(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more")
        need(0 <= self.warmup < 1, "warmup", "a share from 0 to below 1")
        need(0 <= self.validation <= 0.5, "validation", "a share from 0 to 0.5")
        need(self.decay in ("cosine", "linear", "none"), "decay", "cosine, linear or none")
        need(self.max_grad_norm > 0, "max_grad_norm", "above 0")
        need(self.max_train_tokens is None or self.max_train_tokens >= 1, "max_train_tokens", "at least 1")
        need(self.patience >= 0, "patience", "0 or more")
        need(self.straight_through is None or self.straight_through > 0, "straight_through", "above 0")
        need(-(2**63) <= self.seed < 2**63, "seed", "a whole number of 64 bits")

    def rate_at(self, step: int, num_steps: int) -> float:
        """The learning rate of step 0, 1, ... of `num_steps`."""
        warm = math.ceil(self.warmup * num_steps)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        done = (step - warm) / max(1, num_steps - warm)
        factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "none": 1.0}[self.decay]
        return self.learning_rate * factor


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out loss, in nats per learned token, after `step` steps; None where nothing is held out."""

    step: int
    loss: float | None


@dataclass(eq=False, slots=True)
class State:
    """All that a run needs to go on."""

    tensors: dict[str, Tensor]
    best: dict[str, Tensor]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    num_worse: int = 0
    peak_memory_bytes: int = 0  # of the process, or of every process that had a part in the run
    history: list[Evaluation] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Progress:
    """One step that is done. `loss` in nats per learned token; `health` where it was looked at."""

    step: int
    num_steps: int
    loss: float
    rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    evaluation: Evaluation | None = None
    health: RouterHealth | None = None


Listener = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    train: Sequence[Encoded]
    validation: Sequence[Encoded]


def split(examples: Sequence[Encoded], share: float, seed: int, *, rows: Sequence[Hashable] | None = None) -> TrainingData:
    """Hold out a share of the examples, at least one where the share is above 0.

    Args:
        rows: the row that each was read from. A row that stands in the data several times, because its file was named again, is held out
            with all of its copies, and counts once there; else what is learned would judge itself.
    Raises:
        DataInvalid: nothing is left to learn from.
    """
    rows = range(len(examples)) if rows is None else rows
    first: dict[Hashable, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row, index)
    unique = list(first.values())
    count = min(len(unique), max(1, round(share * len(unique)))) if share else 0
    if count >= len(unique):
        raise DataInvalid(f"the data has {len(unique)} usable examples, which are too few to hold {count} out; add more, or --validation 0")
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = sorted(unique[place] for place in order[:count])
    hidden = {rows[index] for index in held_out}
    return TrainingData(
        [example for row, example in zip(rows, examples, strict=True) if row not in hidden], [examples[i] for i in held_out]
    )


class Trainer:
    """One run.

    Args:
        work_dir: where its state is kept, after every evaluation; None keeps none.
        identity: what must be equal for a state to be resumed, by name; differences are told by these names.
    """

    def __init__(
        self,
        model: Transformer,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        data: TrainingData,
        settings: TrainSettings,
        *,
        work_dir: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.manifest, self.data, self.settings = model, manifest, data, settings
        self._work_dir = work_dir
        self._identity = dict(identity or {}) | {"settings": asdict(settings), "manifest": manifest.model_dump_json()}
        self._lengths = [num_inputs(example) for example in data.train]
        self.plan = plan_steps(
            self._lengths, batch_size=settings.batch_size, epochs=settings.epochs, max_tokens=settings.max_train_tokens, seed=settings.seed
        )
        tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        self.state = State(trainable(tensors), {name: tensor.clone() for name, tensor in tensors.items()})
        self.objective = Objective(model, manifest, self.state.tensors, straight_through=settings.straight_through)
        # note: a threshold function without its estimator has no gradient at all; AdamW leaves what has none as it is.
        self._optimizer = torch.optim.AdamW(self.state.tensors.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self._counters = RouterCounters(manifest, model.device)

    # -- the run

    @property
    def num_steps(self) -> int:
        return len(self.plan)

    @property
    def is_done(self) -> bool:
        patience = self.settings.patience
        return self.state.step >= self.num_steps or (patience > 0 and self.state.num_worse >= patience)

    def run(self, listen: Listener | None = None, *, max_steps: int | None = None) -> None:
        """Train until the plan is done, or it stops early; or for `max_steps` steps of it.

        Raises:
            InvalidRequest: the loss, or that of the held-out examples, is not finite; or the state cannot be written.
        """
        end = self.num_steps if max_steps is None else min(self.num_steps, self.state.step + max_steps)
        evaluate_at = {round(self.num_steps * (i + 1) / self.settings.evaluations) for i in range(self.settings.evaluations)}
        while self.state.step < end and not self.is_done:
            started = time.perf_counter()
            loss, tokens, rate, norm = self._step(self.plan[self.state.step])
            self.state.step += 1
            self.state.tokens += tokens
            self.state.seconds += (seconds := time.perf_counter() - started)
            self.state.peak_memory_bytes = max(self.state.peak_memory_bytes, peak_memory_bytes(self.model.device))
            evaluation, health = None, None
            if self.state.step in evaluate_at:
                evaluation, health = self._evaluate(), RouterHealth.of(self._counters.snapshot())
                self._counters = RouterCounters(self.manifest, self.model.device)
                self.save()
            if listen is not None:
                listen(Progress(self.state.step, self.num_steps, loss, rate, norm, self.state.tokens, tokens / seconds, evaluation, health))

    def _step(self, indices: Sequence[int]) -> tuple[float, int, float, float]:
        """(loss per learned token, tokens, learning rate, norm of the gradient)."""
        rate = self.settings.rate_at(self.state.step, self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        pieces = list(split_by_tokens(indices, self._lengths, self.settings.micro_batch_tokens))
        num_targets = sum(self.data.train[index].num_targets for index in indices)
        total, tokens = 0.0, 0
        for piece in pieces:
            batch = TokenBatch.of([self.data.train[index] for index in piece], self.model.device, fill=_FILL)
            loss = self.objective.loss(batch, counters=self._counters)
            (loss / num_targets).backward()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
            total += loss.item()
            tokens += batch.num_tokens
        norm = torch.nn.utils.clip_grad_norm_(self.state.tensors.values(), self.settings.max_grad_norm).item()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise _diverged(f"the loss of step {self.state.step + 1} is {total / num_targets}, its gradient's norm {norm}")
        self._optimizer.step()
        return total / num_targets, tokens, rate, norm

    def _evaluate(self) -> Evaluation:
        """Keep the tensors with the lowest held-out loss; where nothing is held out, the last ones."""
        state = self.state
        loss = self.loss_of(state.tensors) if self.data.validation else None
        if loss is not None and not math.isfinite(loss):  # neither better nor worse than another, and no number for a manifest
            raise _diverged(f"the held-out loss after step {state.step} is {loss}")
        if loss is not None and loss >= state.best_loss:
            state.num_worse += 1
        else:
            state.best_step, state.num_worse = state.step, 0
            state.best = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
            state.best_loss = state.best_loss if loss is None else loss
        state.history.append(Evaluation(state.step, loss))
        return state.history[-1]

    @torch.no_grad()
    def loss_of(self, tensors: Mapping[str, Tensor]) -> float:
        """Nats per learned token of the held-out examples."""
        objective = Objective(self.model, self.manifest, tensors, straight_through=None)
        total, count = 0.0, 0
        for batch in self._batches(self.data.validation):
            total += objective.loss(batch).item()
            count += batch.num_targets
        return total / count

    def _batches(self, examples: Sequence[Encoded]) -> list[TokenBatch]:
        lengths = [num_inputs(example) for example in examples]
        pieces = split_by_tokens(range(len(examples)), lengths, self.settings.micro_batch_tokens)
        return [TokenBatch.of([examples[index] for index in piece], self.model.device) for piece in pieces]

    # -- state

    def save(self) -> None:
        """Write the state, whole or not at all."""
        if self._work_dir is None:
            return
        state = self.state
        content = {
            "format": _STATE_FORMAT,
            "identity": self._identity,
            "tensors": {name: tensor.detach() for name, tensor in state.tensors.items()},
            "best": state.best,
            "optimizer": self._optimizer.state_dict(),
            "numbers": {name: getattr(state, name) for name in _NUMBERS},
            "history": [(one.step, one.loss) for one in state.history],
            "counters": self._counters.state(),
        }
        path, data = self._work_dir / STATE_FILE, io.BytesIO()
        torch.save(content, data)
        try:
            self._work_dir.mkdir(parents=True, exist_ok=True)
            replace_file(path, data.getvalue())
        except OSError as error:
            raise InvalidRequest(
                f"{path}: the state cannot be written ({error.strerror}); make room, or choose another --work-dir", param="work_dir"
            ) from None

    def resume(self) -> bool:
        """Go on from the saved state, where there is one.

        Raises:
            InvalidRequest: it was left by a run of other data or settings.
        """
        path = None if self._work_dir is None else self._work_dir / STATE_FILE
        if path is None or not path.exists():
            return False
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")  # another machine may have made it
            is_known = content["format"] == _STATE_FORMAT
        except Exception as error:  # whatever the unpickler says of a damaged file
            raise InvalidRequest(f"{path}: is no state of a training run ({type(error).__name__}); remove it to begin anew") from None
        if not is_known:
            raise InvalidRequest(f"{path}: was left by another version; remove it to begin anew")
        if differences := _differences(content["identity"], self._identity):
            raise InvalidRequest(
                f"{path}: was left by a run with other {', '.join(differences)}; give the same, or remove the folder to begin anew",
                param="resume",
            )
        state = self.state
        with torch.no_grad():
            for name, tensor in state.tensors.items():
                tensor.copy_(content["tensors"][name])
        state.best = {name: tensor.to(self.model.device) for name, tensor in content["best"].items()}
        self._optimizer.load_state_dict(content["optimizer"])
        for name, value in content["numbers"].items():
            setattr(state, name, value)
        state.history = [Evaluation(*one) for one in content["history"]]
        self._counters.restore(content["counters"])
        return True

    # -- what comes of it

    @torch.no_grad()
    def profile(self, tensors: Mapping[str, Tensor], max_tokens: int = 20_000) -> dict[str, Any] | None:
        """What the routers do on held-out examples (of the trained ones where none are): mean weight before selection, and share selected.

        Returns:
            `adapter.json`'s `profile`; None for an adapter without routers.
        """
        if self.manifest.router.site == "none":
            return None
        objective = Objective(self.model, self.manifest, tensors, straight_through=None)
        activity = Activity()
        for batch in self._batches(self.data.validation or self.data.train):
            trace = RoutingTrace()
            objective.loss(batch, trace=trace)
            activity.add(assemble(self.manifest, [trace.records[0]], batch.num_tokens), batch.num_tokens)
            if activity.num_tokens >= max_tokens:
                break
        found = activity.to_json()
        return {name: found[name] for name in ("num_tokens", "layers")}


_NUMBERS = ("step", "tokens", "seconds", "best_step", "best_loss", "num_worse", "peak_memory_bytes")


def _diverged(what: str) -> InvalidRequest:
    return InvalidRequest(f"{what}; lower --learning-rate, or train in float32", param="learning_rate")


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names under which two identities differ; of settings the single ones."""
    names = []
    for name in sorted(saved.keys() | own.keys()):
        a, b = saved.get(name), own.get(name)
        if a != b and isinstance(a, dict) and isinstance(b, dict):
            names += _differences(a, b)
        elif a != b:
            names.append(name)
    return names

"""`moa-serve bench train`: tokens/s of training on this machine, against the same adapter computed with gather and scatter.

Forward, backward and optimizer of the real trainer on made-up examples; the two ways alternate, medians are compared, and an A/A pair tells
what the machine's noise is.
"""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moa_serve.adapter.manifest import BaseShape
from moa_serve.bench.gathered import gathered
from moa_serve.bench.timing import seconds
from moa_serve.model.memory import peak_memory_bytes, reset_peak_memory
from moa_serve.model.moa import MoaWeights
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import Base
from moa_serve.train.batches import num_inputs
from moa_serve.train.loop import Trainer, TrainingData, TrainSettings
from moa_serve.train.objective import Objective
from moa_serve.train.prompts import Encoded
from moa_serve.train.recipe import Recipe, fresh_tensors, manifest_of

GOAL_TOKENS, GOAL_RATIO, GOAL_BYTES = 400, 1.3, 4 * 2**30

RECIPES = {
    "lora": Recipe(variant="lora", rank=16),
    "soft_moa": Recipe(variant="soft_moa"),
    "sparse_moa": Recipe(variant="sparse_moa"),
    "molora": Recipe(variant="molora"),
    "hydralora": Recipe(variant="hydralora"),
    "adamole": Recipe(variant="adamole"),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """One family. `against` is the gathered way's seconds over ours, `control` ours over ours; medians of pairs in one run."""

    name: str
    parameters: int
    tokens_per_second: float
    against: float
    control: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Gathered(Objective):
    def adapter(self) -> MoaWeights:
        return gathered(super().adapter())


def examples(count: int, tokens: int, answer: int, vocab_size: int) -> list[Encoded]:
    """`count` made-up examples of `tokens` inputs, of which `answer` are learned; lengths spread by a fifth, as real ones."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        length = tokens + round(tokens * 0.2 * (2 * index / max(1, count - 1) - 1)) + 1
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        made.append(Encoded(ids, [False] * (length - answer) + [True] * answer))
    return made


def measure(base: Base, name: str, *, pairs: int, batch_size: int = 32, tokens: int = 80, answer: int = 12) -> Timing:
    """Time `pairs` interleaved triples (ours, gathered, ours) of optimizer steps, after one of each to warm up."""
    reset_peak_memory(base.weights.embed.device)  # else it were that of the families measured before
    manifest = manifest_of(RECIPES[name], BaseShape.of(base.config, base.digest))
    data = TrainingData(examples(batch_size, tokens, answer, base.config.vocab_size), [])
    settings = TrainSettings(batch_size=batch_size, epochs=4 * pairs + 8, validation=0, evaluations=1, patience=0)
    trainer = Trainer(Transformer(base.config, base.weights), manifest, fresh_tensors(manifest, 0), data, settings)
    ours, other = trainer.objective, _Gathered(trainer.model, manifest, trainer.state.tensors, straight_through=settings.straight_through)

    def step(objective: Objective) -> float:
        trainer.objective = objective
        return seconds(lambda: trainer.run(max_steps=1))

    step(ours)
    peak = peak_memory_bytes(trainer.model.device)  # before the other way has run
    step(other)
    triples = [(step(ours), step(other), step(ours)) for _ in range(pairs)]
    per_step = sum(map(num_inputs, data.train))
    return Timing(
        name,
        manifest.num_parameters,
        per_step / statistics.median(time for first, _, last in triples for time in (first, last)),
        statistics.median(2 * middle / (first + last) for first, middle, last in triples),
        statistics.median(last / first for first, _, last in triples),
        peak,
    )

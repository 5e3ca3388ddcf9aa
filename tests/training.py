"""What tests of training share: a tiny base with a tokenizer, a recipe for each family, made-up data and a trainer on them."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from families import TINY, write_base, write_tokenizer

from moa_serve.adapter.manifest import BaseShape, Manifest
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import Base, load_base
from moa_serve.train.loop import Trainer, TrainingData, TrainSettings
from moa_serve.train.prompts import Encoded
from moa_serve.train.recipe import Recipe, fresh_tensors, manifest_of

WITH_TOKENIZER = TINY | {"vocab_size": 260, "eos_token_id": 2}

_SMALL: dict[str, Any] = {"rank": 4}
RECIPES = {
    "soft": Recipe(variant="soft_moa", bottleneck=4, prompt_length=3, **_SMALL),
    "soft_softmax": Recipe(variant="soft_moa", activation="softmax", router_net="linear", **_SMALL),
    "soft_residual_all_targets": Recipe(variant="soft_moa", router_input="residual", targets=("Q", "K", "V", "O", "UP", "GATE", "DOWN")),
    "lora_sigmoid_router": Recipe(variant="soft_moa", bottleneck=0, prompt_length=0),
    "sparse": Recipe(variant="sparse_moa", bottleneck=4, **_SMALL),
    "sparse_prompt": Recipe(variant="sparse_moa", prompt_length=3, max_threshold=0.9),
    "sparse_constant": Recipe(variant="sparse_moa", threshold="constant", max_threshold=0.5),
    "instance": Recipe(variant="soft_moa_instance", bottleneck=4),
    "unipeft": Recipe(variant="unipeft", prompt_length=3),
    "molora": Recipe(variant="molora", num_experts=(3,), **_SMALL),
    "hydralora": Recipe(variant="hydralora", num_experts=(3,), **_SMALL),
    "mola": Recipe(variant="mola", num_experts=(2, 3, 4), top_k=2, **_SMALL),
    "adamole": Recipe(variant="adamole", num_experts=(3,), **_SMALL),
    "lora": Recipe(variant="lora", rank=16),
    "prompt": Recipe(variant="prompt", prompt_length=4),
    "parallel_adapter": Recipe(variant="parallel_adapter", bottleneck=6),
    "composition": Recipe(variant="composition"),
    "nested_molora": Recipe(variant="soft_moa", inner="molora", num_experts=(2,)),
    "nested_hydra": Recipe(variant="sparse_moa", inner="hydralora", num_experts=(2,)),
}


def tiny_base(folder: Path, seed: int = 0) -> Base:
    """float32, with the byte tokenizer."""
    write_base(folder, WITH_TOKENIZER, seed)
    write_tokenizer(folder)
    return load_base(folder, dtype=torch.float32)


def examples(count: int, seed: int = 0, vocab_size: int = 260) -> list[Encoded]:
    """Random prompts of 3 to 12 tokens; the response is the prompt's first token three times and the end: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, 13, (), generator=generator))
        prompt = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        response = [prompt[0]] * 3 + [2]
        made.append(Encoded(prompt + response, [False] * length + [True] * len(response)))
    return made


def manifest_for(base: Base, recipe: Recipe) -> Manifest:
    return manifest_of(recipe, BaseShape.of(base.config, base.digest))


def trainer_for(base: Base, recipe: Recipe, *, num_examples: int = 24, work_dir: Path | None = None, **settings: Any) -> Trainer:
    manifest = manifest_for(base, recipe)
    chosen = TrainSettings(**({"batch_size": 8, "epochs": 4, "patience": 0, "micro_batch_tokens": 64} | settings))
    data = TrainingData(examples(num_examples), examples(6, seed=1))
    model = Transformer(base.config, base.weights)
    return Trainer(model, manifest, fresh_tensors(manifest, chosen.seed), data, chosen, work_dir=work_dir)


def full_disk(_: int) -> None:
    """In place of `os.fsync`: what a disk without room says when it is asked to keep what was written."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def copy_rows(count: int) -> list[dict[str, str]]:
    """Instructions whose response is their first word, twice."""
    words = ("red", "blue", "green", "black", "white", "grey", "pink", "brown")
    return [
        {"instruction": f"{words[i % 8]} {words[(i * 3 + 1) % 8]}", "input": "", "output": f"{words[i % 8]} {words[i % 8]}"}
        for i in range(count)
    ]

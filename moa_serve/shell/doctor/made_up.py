"""A small base and an adapter of every family, drawn from fixed seeds: the same numbers on every machine and in every version.

numpy promises that RandomState never draws others, and uniform numbers need no function that a processor could round its own way.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import VARIANTS, BaseShape
from moa_serve.bench.synthetic import FAMILIES
from moa_serve.config import ModelConfig
from moa_serve.model.cache import caching_in
from moa_serve.model.weights import allocate, named_tensors
from moa_serve.train.recipe import Recipe, manifest_of

# The sizes of a recipe's defaults are the paper's; beside the families that are measured, what else routers can be.
RECIPES: Mapping[str, Recipe] = {
    **{name: recipe for name, recipe in FAMILIES.items() if name != "soft_moa_no_prompt"},
    "soft_moa_softmax": Recipe(variant="soft_moa", activation="softmax", router_input="residual", targets=("Q", "UP", "GATE")),
    "sparse_moa_constant": Recipe(
        variant="sparse_moa", threshold="constant", router_input="residual", router_net="linear", prompt_length=4
    ),
    "mola_layerwise": Recipe(variant="mola", num_experts=(3, 5), targets=("K", "GATE", "DOWN"), rank=4),
}


def _config(*, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, vocab: int) -> dict[str, Any]:
    """As config.json has it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    }


TINY = _config(hidden=64, inner=96, heads=4, kv_heads=2, head_dim=16, vocab=64)
SMALL = _config(hidden=256, inner=384, heads=4, kv_heads=2, head_dim=64, vocab=512)  # heads as LLaMA's


@contextmanager
def written(config: Mapping[str, Any], names: tuple[str, ...] = tuple(RECIPES)) -> Iterator[tuple[Path, dict[str, Path]]]:
    """(folder of a base, folders of its adapters by name), in a temporary folder; caches are elsewhere meanwhile.

    And torch has one thread meanwhile: for sizes like these a second one only waits, twenty times as long where others want its core.
    """
    with TemporaryDirectory() as scratch, own_cache(), _one_thread():
        base, adapters = Path(scratch) / "base", {name: Path(scratch) / name for name in names}
        write_base(base, config)
        for name, folder in adapters.items():
            write_family(folder, name, config)
        yield base, adapters


def write_base(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    parsed = ModelConfig.from_hf(config)
    draw = _Numbers("base")
    names = named_tensors(parsed, allocate(parsed, torch.device("meta"), torch.float32))
    tensors = {}
    for name, tensor in names:
        shape = tuple(tensor.shape)
        scale = 0.18 if name == "model.embed_tokens.weight" else shape[-1] ** -0.5  # logits as the authors' goldens have them
        tensors[name] = float(name.endswith("norm.weight")) + scale * draw(shape)
    save_file(tensors, folder / "model.safetensors")


def write_family(folder: Path, name: str, config: Mapping[str, Any], seed: int = 0) -> None:
    """An adapter of `RECIPES[name]`, with weights large enough that every wrong rule shows in the logits; another seed is another one."""
    manifest = manifest_of(RECIPES[name], BaseShape.of(ModelConfig.from_hf(config)))
    draw = _Numbers(f"{name} {seed}")
    tensors = {
        tensor: (0.7 if tensor.endswith(("bias", "gate", "rows")) else shape[-1] ** -0.5) * draw(shape)
        for tensor, shape in manifest.expected_tensors().items()
    }
    write_adapter(folder, manifest, tensors)


def has_router(name: str) -> bool:
    return VARIANTS[RECIPES[name].variant].site != "none"


def prompt_ids(length: int, vocab: int, seed: int = 0) -> list[int]:
    return [int(number) for number in np.random.RandomState(seed).randint(0, vocab, length)]


class _Numbers:
    """Uniform ones of mean 0 and variance 1; `of` says which series."""

    def __init__(self, of: str) -> None:
        self._random = np.random.RandomState(zlib.crc32(of.encode()))

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy((12**0.5 * (self._random.random_sample(shape) - 0.5)).astype(np.float32))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_cache() -> Iterator[None]:
    """Packed adapters and digests of what is thrown away at once do not go into the user's cache, nor is a file of there read."""
    with TemporaryDirectory() as folder, caching_in(Path(folder)):
        yield

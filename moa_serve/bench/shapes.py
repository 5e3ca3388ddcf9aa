"""Bases that nobody trained: the shapes of a real one and made-up weights, to measure what a larger base costs without fetching it.

What a step costs does not depend on its weights, as long as they are ordinary numbers. Not for serving.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from moa_serve.config import ModelConfig, RopeConfig
from moa_serve.errors import InvalidRequest
from moa_serve.model.weights import Base, allocate, named_tensors

SHAPES = {
    "llama-3.2-1b": ModelConfig(
        architecture="llama",
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128_256,
        max_position=131_072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(500_000.0, "llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": ModelConfig(
        architecture="llama",
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        max_position=131_072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(500_000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
    ),
}

_DRAWN = 1_000_003  # numbers that all weights are cut from; a prime, so that no two rows of a weight are the same ones
_SCALE = 0.02  # as LLaMA's are before training; far from what bfloat16 calls tiny


def shapes_of(name: str) -> ModelConfig:
    """Raises InvalidRequest: there are no such shapes."""
    if name not in SHAPES:
        raise InvalidRequest(f"shapes is {name!r}, but must be one of {', '.join(SHAPES)}", param="shapes")
    return SHAPES[name]


def made_up_base(name: str, config: ModelConfig, dtype: torch.dtype, device: torch.device | None = None) -> Base:
    """A base without a folder and a tokenizer: norms of 1, and for everything else the same normal numbers again and again.

    Drawing a billion of them would take longer than the measurement.
    """
    with torch.inference_mode(False):
        weights = allocate(config, device or torch.device("cpu"), dtype)
    numbers = _Numbers(weights.embed)
    for key, tensor in named_tensors(config, weights):
        if key.endswith("norm.weight"):
            tensor.fill_(1)
        else:
            numbers.fill(tensor)
    return Base(config, weights, f"made-up {name}", hashlib.sha256(f"{config} {dtype}".encode()).hexdigest(), None)


class _Numbers:
    """Normal numbers, which begin again after a million."""

    def __init__(self, like: Tensor) -> None:
        self._drawn = (torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)) * _SCALE).to(like)
        self._next = 0

    def fill(self, tensor: Tensor) -> None:
        """`tensor` is contiguous."""
        flat = tensor.view(-1)
        start = 0
        for part in self._parts(len(flat)):
            flat[start : start + len(part)] = part
            start += len(part)

    def _parts(self, count: int) -> Iterator[Tensor]:
        while count:
            part = self._drawn[self._next : self._next + count]
            self._next = (self._next + len(part)) % _DRAWN
            count -= len(part)
            yield part

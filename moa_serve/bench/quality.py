"""`moa-serve bench quality`: how near one way of computing a base is to another one, by what both expect after each token of fixed prompts.

The reference runs first, and its log-probabilities go to a temporary folder (60 tokens of 49,152 are 12 MB): two bases are never in memory
at once, so that whatever can be served can be compared.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moa_serve.adapter.adapter import AdapterSource
from moa_serve.bench.texts import PROMPTS
from moa_serve.errors import InvalidRequest, MoaError
from moa_serve.llm import LLM, resolve

GOAL_TOP1, GOAL_KL = 0.98, 0.01


@dataclass(frozen=True, slots=True)
class Setting:
    """A way of computing a base, written as `torch:float32` or, with its weights in eight bits, as `native:int8`."""

    backend: str
    dtype: str

    @classmethod
    def parse(cls, text: str, param: str) -> "Setting":
        """Raises InvalidRequest: it is not written so; `param` is the option that it came from."""
        backend, _, dtype = text.partition(":")
        if not backend or not dtype:
            raise InvalidRequest(
                f"--{param} {text!r} must be BACKEND:DTYPE, such as torch:float32, native:bfloat16 or native:int8", param=param
            )
        return cls(backend, dtype)

    def __str__(self) -> str:
        return f"{self.backend}:{self.dtype}"

    def check(self, device: str) -> None:
        """Raises InvalidRequest: it cannot be had here."""
        options = self.options
        resolve(self.backend, device, options["dtype"], options["base_dtype"])

    @property
    def options(self) -> dict[str, str]:
        """Arguments of `LLM`."""
        dtype, base_dtype = ("bfloat16", "int8") if self.dtype == "int8" else (self.dtype, "auto")
        return {"backend": self.backend, "dtype": dtype, "base_dtype": base_dtype}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near the other setting's distributions of the next token are to the reference's.

    Args:
        adapter: None is the base alone.
        num_positions: tokens of all prompts; each has a distribution.
        top1: share of them at which both find the same token best.
        mean_kl, max_kl: KL(reference || other) over the positions, in nats.
        margin: where the best tokens differ, the mean of how far apart the reference's two best log-probabilities are, in nats: near 0
            it is a tie that rounding decides; None where they never differ.
    """

    adapter: str | None
    num_positions: int
    top1: float
    mean_kl: float
    max_kl: float
    margin: float | None

    @classmethod
    def of(cls, adapter: str | None, pairs: Iterable[tuple[Tensor, Tensor]]) -> "Agreement":
        """
        Args:
            pairs: (reference, other) of each prompt: log-probabilities, each (T, V) float32.
        """
        found = [_compared(reference, other) for reference, other in pairs]
        divergence, is_same, margin = (torch.cat([parts[index] for parts in found]) for index in range(3))
        differing = margin[~is_same]
        return cls(
            adapter,
            len(divergence),
            float(is_same.double().mean()),
            float(divergence.double().mean()),
            float(divergence.max()),
            float(differing.double().mean()) if len(differing) else None,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _compared(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position the divergence, whether the best tokens are the same, and the reference's margin; each (T,)."""
    # No divergence is negative; what is, is rounding.
    divergence = F.kl_div(other, reference, reduction="none", log_target=True).sum(-1).clamp(min=0)
    best, second = reference.topk(2).values.unbind(-1)
    return divergence, reference.argmax(-1) == other.argmax(-1), best - second


@dataclass(frozen=True, slots=True)
class Report:
    """The base alone first, then each adapter."""

    base: str
    reference: Setting
    other: Setting
    num_prompts: int
    agreements: list[Agreement]

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "reference": str(self.reference),
            "other": str(self.other),
            "prompts": self.num_prompts,
            "agreements": [agreement.to_json() for agreement in self.agreements],
        }


def measure(
    model: str | PathLike[str] | None,
    reference: Setting,
    other: Setting,
    *,
    adapters: Mapping[str, AdapterSource] | None = None,
    prompts: Sequence[str] = PROMPTS,
    device: str = "auto",
) -> Report:
    """Compare two settings of a base, alone and with each adapter.

    Args:
        model: as in `LLM`.
        prompts: texts, at least one.
    Raises:
        InvalidRequest: a setting cannot be had, or the base has no tokenizer.
        ModelError, AdapterError: the base or an adapter cannot be used.
        MoaError: a setting gives NaN or infinity, or the temporary folder has no room.
    """
    for setting in (reference, other):
        setting.check(device)
    sources = dict(adapters or {})
    names = [None, *sources]
    with TemporaryDirectory(prefix="moa-quality-") as folder:
        files = {name: [Path(folder) / f"{index}-{number}.npy" for number in range(len(prompts))] for index, name in enumerate(names)}
        with LLM(model, adapters=sources, device=device, **reference.options) as llm:
            base, token_ids = llm.name, _encoded(llm, prompts)
            for name in names:
                for file, ids in zip(files[name], token_ids, strict=True):
                    _save(file, _log_probs(llm, ids, name, reference))
        with LLM(model, adapters=sources, device=device, **other.options) as llm:
            agreements = [Agreement.of(name, _pairs(llm, files[name], token_ids, name, other)) for name in names]
    return Report(base, reference, other, len(prompts), agreements)


def _pairs(
    llm: LLM, files: Sequence[Path], token_ids: Sequence[list[int]], adapter: str | None, setting: Setting
) -> Iterator[tuple[Tensor, Tensor]]:
    """What was kept of each prompt, and what `llm` says of it; one prompt at a time."""
    for file, ids in zip(files, token_ids, strict=True):
        yield torch.from_numpy(np.load(file)), _log_probs(llm, ids, adapter, setting)


def _encoded(llm: LLM, prompts: Sequence[str]) -> list[list[int]]:
    if llm.tokenizer is None:
        raise InvalidRequest(
            f"model {llm.name!r} has no tokenizer, so the fixed prompts cannot be read; use a base with one", param="model"
        )
    return [llm.tokenizer.encode(prompt, parse_special=False) for prompt in prompts]


def _log_probs(llm: LLM, token_ids: Sequence[int], adapter: str | None, setting: Setting) -> Tensor:
    """(T, V) float32 log-probabilities of the next token after each one."""
    logits = llm.logits(token_ids, adapter=adapter)
    if not bool(torch.isfinite(logits).all()):
        whose = "the base" if adapter is None else f"adapter {adapter!r}"
        raise MoaError(f"{whose} gives NaN or infinity with {setting}, so there is nothing to compare; its weights overflow there")
    return logits.log_softmax(-1)


def _save(file: Path, log_probs: Tensor) -> None:
    try:
        np.save(file, log_probs.numpy())
    except OSError as error:
        raise MoaError(
            f"{file.parent}: the reference's log-probabilities cannot be kept ({error}); make room there, or set TMPDIR to another folder"
        ) from None

"""Why a base in eight bits has a scale and a minimum for each 32 inputs: `python -m tests.int8_schemes` (two minutes).

Computes the default base in float32 with weights, and perhaps inputs, rounded as each scheme would, and compares what it expects after
each token of the fixed prompts with the base itself. Nothing of it is served but the last one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_serve import LLM
from moa_serve.bench.quality import Agreement
from moa_serve.bench.texts import PROMPTS
from moa_serve.model import transformer
from moa_serve.native.packing import Int8, pack_sections

Rounding = Callable[[Tensor], Tensor]


def by_scale(group: int | None) -> Rounding:
    """Whole multiples of a scale, -127 to 127, one for `group` neighbours or for the whole row."""

    def rounded(rows: Tensor) -> Tensor:
        groups = rows.view(*rows.shape[:-1], -1, group or rows.shape[-1])
        scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        return ((groups / scale).round() * scale).view_as(rows)

    return rounded


def as_served(weight: Tensor) -> Tensor:
    return Int8().unpack(pack_sections([weight], Int8()), slice(0, len(weight)), weight.shape[1]).float()


def as_is(rows: Tensor) -> Tensor:
    return rows


SCHEMES: dict[str, tuple[Rounding, Rounding]] = {  # of weights and of inputs
    "a scale a row, inputs in eight bits": (by_scale(None), by_scale(None)),
    "a scale for 32, inputs in eight bits": (by_scale(32), by_scale(32)),
    "a scale a row": (by_scale(None), as_is),
    "a scale for 64": (by_scale(64), as_is),
    "a scale for 32": (by_scale(32), as_is),
    "a scale and a minimum for 32 (served)": (as_served, as_is),
}


@contextmanager
def rounding(weights: Rounding, inputs: Rounding) -> Iterator[None]:
    """The torch backend's products of the base, rounded; each weight once."""
    known: dict[int, Tensor] = {}
    plain = vars(transformer)["linear"]

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() not in known:
            known[weight.data_ptr()] = weights(weight)
        return F.linear(inputs(x), known[weight.data_ptr()], bias)

    setattr(transformer, "linear", product)  # noqa: B010  # what the module imported
    try:
        yield
    finally:
        setattr(transformer, "linear", plain)  # noqa: B010


def main() -> None:
    with LLM(backend="torch", device="cpu", dtype="float32") as llm:
        assert llm.tokenizer is not None
        ids = [llm.tokenizer.encode(prompt, parse_special=False) for prompt in PROMPTS]
        reference = [llm.logits(one).log_softmax(-1) for one in ids]
        for name, (weights, inputs) in SCHEMES.items():
            with torch.inference_mode(), rounding(weights, inputs):
                found = Agreement.of(None, zip(reference, (llm.logits(one).log_softmax(-1) for one in ids), strict=True))
            sys.stdout.write(f"{name:40} same best token {found.top1:7.2%}   mean KL {found.mean_kl:.5f}\n")


if __name__ == "__main__":
    main()

"""The golden folders in bfloat16, natively and on a GPU: how far from the authors' float32 numbers, and how many selections flip.

A selection is discontinuous: a weight within bfloat16's rounding of its threshold may fall on the other side, and after that the row's
logits are another expert's. So logits are compared up to a row's first flip, and flips are counted.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import ON_GPU, computing
from goldens import Golden, goldens

from moa_serve import LLM

MOST_FLIPS = {"mola": 0.025, "adamole": 0.025}  # of all selections; 0.015 for layer routers
# Mean and largest distance; torch and triton round the residual stream in each layer, too.
LIMITS = {"native": (0.03, 0.4), "torch": (0.04, 0.6), "triton": (0.04, 0.6)}


@pytest.fixture(scope="module", params=goldens(), ids=lambda golden: golden.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    found: Golden = request.param
    return found


@pytest.fixture(scope="module", params=["native", *ON_GPU])
def llms(request: pytest.FixtureRequest, golden: Golden) -> Iterator[tuple[LLM, LLM]]:
    options: dict[str, Any] = {"adapters": {"a": golden.source}, "kv_cache_bytes": 2**22}
    with (
        LLM(golden.base, **computing(request.param), dtype="bfloat16", **options) as ours,
        LLM(golden.base, backend="torch", device="cpu", dtype="float32", **options) as exact,
    ):
        yield ours, exact


def test_close_until_a_selection_flips(golden: Golden, llms: tuple[LLM, LLM], record_property: Callable[[str, object], None]) -> None:
    ours, exact = llms
    off = []
    manifest = exact._resolve("a")[1]
    assert manifest is not None
    num_flips = num_selections = 0
    for row, prompt in enumerate(golden.prompts):
        until = len(prompt)
        if manifest.router.site != "none":
            found, expected = ours.route(prompt, adapter="a"), exact.route(prompt, adapter="a")
            flips = found.selected != expected.selected  # (L, T, E)
            num_flips += int(flips.sum())
            num_selections += sum(len(names) for names in expected.experts) * len(prompt)
            flipped = flips.any(2).any(0).nonzero()
            until = int(flipped[0]) if len(flipped) else until
        logits = ours.logits(prompt, adapter="a")
        assert bool(logits.isfinite().all())
        off.append((logits[:until] - golden.expected["logits"][row][:until]).abs())
    share, distance = num_flips / max(num_selections, 1), torch.cat(off)
    record_property("flips", f"{num_flips} of {num_selections}")
    mean, largest = LIMITS[ours.backend]
    assert float(distance.mean()) <= mean
    assert float(distance.max()) <= largest
    assert share <= MOST_FLIPS.get(manifest.variant, 0.015)


def test_the_base_alone(golden: Golden, llms: tuple[LLM, LLM]) -> None:
    mean, largest = LIMITS[llms[0].backend]
    for row, prompt in enumerate(golden.prompts):
        off = (llms[0].logits(prompt) - golden.expected["base.logits"][row]).abs()
        assert float(off.mean()) <= mean
        assert float(off.max()) <= largest
    assert llms[0].dtype == torch.bfloat16

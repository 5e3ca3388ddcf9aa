"""What a step that decodes launches and allocates, and what of it depends on who is in it: counted on the meta device, where nothing runs.

A tensor there has no numbers. A step that asked for one (`.item()`, `.tolist()`, `nonzero`, an `if` on a tensor), and so had to wait for a
GPU, fails in every test of this file.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from families import FAMILIES, TINY, raw_manifest
from gpu_launches import META, PAGE, Launched, MetaModel
from torch import Tensor

from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RouterRule, RoutingRules
from moa_serve.config import ModelConfig
from moa_serve.gpu.kernels import CHUNK_FIELDS
from moa_serve.gpu.step import StepBuffers, host_numbers, runs_of
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch

SHORT = ModelConfig.from_hf(TINY)
LONG = replace(SHORT, max_position=4096)  # so long that several programs share a row's keys

NINE = ["mm", "attend_in", "attend", "mm", "residual", "mm", "act", "mm", "residual"]
TEN = ["mm", "attend_in", "attend", "merge", *NINE[3:]]
KEPT_WEIGHTS = ["zeros", *["index", "copy_", "copy_"] * 2]  # of instance-level routing, for each of two segments
ROTATION = ["_to_copy", "mul", "cos", "sin", "_to_copy", "_to_copy", "_to_copy", "_to_copy"]
HEAD = ["index_select", "index_select", "sum", "mm", "div", "add", "rsqrt", "mul_"]


def manifest(family: str) -> Manifest:
    return Manifest.parse(raw_manifest(family))


def names(launched: Sequence[Launched]) -> list[str]:
    return [one.name for one in launched]


@pytest.mark.parametrize(("config", "layer"), [(SHORT, NINE), (LONG, TEN)], ids=["one program", "splits"])
@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_a_layer_launches_what_the_base_alone_does(family: str | None, config: ModelConfig, layer: list[str]) -> None:
    """Nine launches, ten where programs share a row's keys, of all kinds of adapters: one more, in each of 32 layers, costs every token."""
    model = MetaModel(config, [] if family is None else [manifest(family)])
    launched = names(model.step([1] * 3, [None] * 3 if family is None else [0, None, 0]))
    is_pooled = family is not None and model.adapters[0].manifest.is_pooled
    first = len(launched) - launched[::-1].index("embed")
    last = first + len(layer) * config.num_layers
    assert launched[first:last] == layer * config.num_layers
    # Once a step. In a recorded one the numbers are copied into its buffers.
    assert launched[:first] == ["zeros", *(KEPT_WEIGHTS * is_pooled), *["_to_copy"] * 6, *ROTATION, "embed"]
    assert launched[last:] == [*HEAD, *(["count"] if family is not None and model.model.layout.routers else [])]


def test_rows_that_stand_apart_take_a_launch_for_each_product() -> None:
    """Four more a layer, where there are adapters in the step, and none where the base is alone in it."""
    model = MetaModel(SHORT, [manifest("soft")], gathers=True)
    layer = [name for part in NINE for name in ([part, "shrink"] if part == "mm" else [part])]
    for slots, expected in (([0, None], layer), ([None, None], NINE)):
        launched = names(model.step([1] * 2, slots))
        first = launched.index("embed") + 1
        assert launched[first : first + len(expected) * SHORT.num_layers] == expected * SHORT.num_layers


@pytest.mark.parametrize("ask", [Tensor.item, Tensor.tolist, Tensor.nonzero, bool])
def test_a_step_that_asked_a_tensor_would_fail_here(ask: Callable[[Tensor], object]) -> None:
    """What all of this file rests on: where tensors have no numbers, nobody gets one by waiting for it."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        ask(torch.ones(1, device=META))


class StaticStep:
    """The buffers of all steps of N rows, and the device's part of such a step on them."""

    def __init__(self, model: MetaModel, rows: int) -> None:
        self.model, config = model, model.model.config

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=META)

        self.buffers = StepBuffers(
            token_ids=new(rows, dtype=torch.int64),
            positions=new(rows, dtype=torch.int64),
            chunks=new(rows, CHUNK_FIELDS),
            places=new(rows),
            rows=None,
            lengths=new(rows),
            slots=new(rows),
            tables=new(rows, config.max_position // PAGE),
            counters=new(rows, 4, dtype=torch.int64),
            given=new(config.num_layers, rows, 2 * model.model.layout.output_block, dtype=torch.float32),
            logit_rows=new(rows, dtype=torch.int64),
        )

    def run(self, batch: ForwardBatch, spans: list[CachedSpan]) -> tuple[list[tuple[object, ...]], list[str]]:
        """Facts of all that is launched, and what is allocated."""
        model, recorder = self.model.model, self.model.recorder
        runs, counted = runs_of(batch, spans, model._rules)
        own = model._eager(batch, host_numbers(runs, counted, spans, PAGE))
        for part in fields(StepBuffers):
            buffer, numbers = getattr(self.buffers, part.name), getattr(own, part.name)
            if numbers is not None and numbers.numel():
                buffer[tuple(map(slice, numbers.shape))].copy_(numbers)  # they fit, whoever is in the step
        views = model._workspace.views(len(batch.token_ids))
        with torch.no_grad(), recorder.step():
            model._compute(self.buffers, views, None, True, [])
            model._logits(self.buffers, views)
            model._count(self.buffers, views)
        return recorder.facts(), list(recorder.allocated.values())


def several() -> MetaModel:
    return MetaModel(LONG, [manifest(family) for family in ("soft", "molora", "nested_hydra", "instance", "lora")])


def test_steps_of_as_many_rows_are_the_same_launches() -> None:
    """Other adapters, slots, rules and lengths: the same kernels, grids, constants and addresses, or a recorded step would be another's."""
    model = several()
    step = StaticStep(model, 4)
    step.run(*model.batch([1] * 4, (0,) * 4))  # makes what is made once
    rules = RoutingRules({(0, "layer"): RouterRule(threshold=0.5)})
    found = []
    for adapters, computed, others in (((0, 0, None, 1), 3, None), ((2, 1, 3, 4), 700, rules), ((None, None, None, 2), 4000, None)):
        batch, spans = model.batch([1] * 4, adapters, computed)
        found.append(step.run(replace(batch, segments=tuple(replace(own, rules=others) for own in batch.segments)), spans))
    assert found[0] == found[1] == found[2]


def test_what_a_step_allocates() -> None:
    """Rotations and logits, and of no layer anything: memory that is asked for at each step may not be there at one of them."""
    model = several()
    step = StaticStep(model, 4)
    step.run(*model.batch([1] * 4, (0, 1, 2, None)))
    _, allocated = step.run(*model.batch([1] * 4, (0, 1, 2, None)))
    assert allocated == [*ROTATION, "index_select", "index_select", "sum", "empty", "div", "add", "rsqrt"]

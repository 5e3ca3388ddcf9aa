"""The yardstick for training: the same adapter, computed expert by expert with gather and scatter, as the authors' modules do.

For each expert: find the rows that it counts for, gather them, run it, put the result into a tensor of zeros of the full size, add that up
(../docs/design.md; measured against in `bench train`). The same numbers as `model.moa`, another way to them.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_serve.model.moa import LoraExperts, Mixture, MoaLayer, MoaWeights, ParallelAdapter, Routed


def _scattered(rows: Tensor, values: Tensor, out: Tensor) -> Tensor:
    full = torch.zeros_like(out)
    full[rows] = values.to(out.dtype)
    return out + full


@dataclass(eq=False, slots=True)
class GatheredLora:
    """`LoraExperts`, one (A, B, scale) at a time."""

    experts: list[tuple[Tensor, Tensor, float]]
    mixture: Mixture

    @classmethod
    def of(cls, stacked: LoraExperts) -> "GatheredLora":
        inner = stacked.mixture.inner
        owner = torch.zeros(stacked.b.shape[1], dtype=torch.int64) if inner is None else inner
        experts = []
        for index in torch.unique(owner).tolist():
            columns = (owner == index).nonzero()[:, 0]
            rows = columns if stacked.a_row is None else stacked.a_row[columns]
            experts.append((stacked.a[rows], stacked.b[:, columns], float(stacked.scale.expand(stacked.b.shape[1])[columns[0]])))
        return cls(experts, stacked.mixture)

    def __call__(self, u: Tensor, gates: Tensor | None, routed: Routed | None) -> Tensor:
        weights = self.mixture.expert_weights(gates, routed)
        out = u.new_zeros(len(u), self.experts[0][1].shape[0])
        for index, (a, b, scale) in enumerate(self.experts):
            if weights is None:
                out = out + F.linear(F.linear(u, a), b) * scale
                continue
            weight = weights[:, index]
            rows = torch.where(weight != 0)[0]
            out = _scattered(rows, F.linear(F.linear(u[rows], a), b) * scale * weight[rows, None], out)
        return out


@dataclass(eq=False, slots=True)
class GatheredParallel:
    """`ParallelAdapter` without inner experts."""

    stacked: ParallelAdapter
    mixture: Mixture

    def __call__(self, m: Tensor, gates: Tensor | None, routed: Routed | None) -> Tensor:
        weight = self.mixture.expert_weights(gates, routed)
        rows = torch.arange(len(m)) if weight is None else torch.where(weight[:, 0] != 0)[0]
        values = F.linear(F.silu(self.stacked.down(m[rows])), self.stacked.up, self.stacked.up_bias[0])
        return _scattered(rows, values if weight is None else values * weight[rows], torch.zeros_like(m))


def gathered(adapter: MoaWeights) -> MoaWeights:
    """The same adapter, its LoRA experts and parallel adapters computed this way; a prompt is dense in the authors' code too."""
    layers: list[MoaLayer | None] = []
    for layer in adapter.layers:
        if layer is None:
            layers.append(None)
            continue
        assert layer.parallel is None or layer.parallel.mixture.router is None, "no nested parallel adapter"
        parallel = None if layer.parallel is None else GatheredParallel(layer.parallel, layer.parallel.mixture)
        linears = {target: GatheredLora.of(experts) for target, experts in layer.linears.items()}
        layers.append(replace(layer, linears=linears, parallel=parallel))  # type: ignore[arg-type]  # equal to call
    return MoaWeights(adapter.manifest, layers)

"""The loss, through the very module that serves: `model.build` makes the adapter from the tensors that are trained, `Transformer` runs it.

Nothing here computes an adapter of its own. Owned by the thread that trains.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moa_serve.adapter.manifest import Manifest
from moa_serve.model.attention import Attention, PaddedCausalAttention
from moa_serve.model.batch import ForwardBatch, PooledRows, RoutingTrace, Segment
from moa_serve.model.build import build
from moa_serve.model.counters import RouterCounters
from moa_serve.model.moa import MoaWeights, Router
from moa_serve.model.stacked import Part
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import LayerWeights
from moa_serve.train.batches import IGNORED, TokenBatch


class CheckpointedTransformer(Transformer):
    """Keeps the input of each block only, and computes the block again in the backward: less memory for a third more time."""

    def block(
        self,
        index: int,
        w: LayerWeights,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        parts: list[Part],
        attention: Attention,
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super().block(index, w, x, rope, batch, parts, attention)
        run: Callable[..., Tensor] = super().block
        again = replace(batch, trace=None, observer=None), [replace(part, heard=None) for part in parts]
        runs = iter(((batch, parts), again))
        out: Tensor = checkpoint(lambda x: run(index, w, x, rope, *next(runs), attention), x, use_reentrant=False)
        return out


class Objective:
    """Negative log-likelihood of the learned tokens.

    Args:
        model: the frozen base.
        tensors: float32 masters of exactly `manifest.expected_tensors()`; they are the leaves that get gradients.
        straight_through: tau of the thresholds' straight-through estimator (moa.Router); None is the authors' gradient, which is none.
    """

    def __init__(self, model: Transformer, manifest: Manifest, tensors: Mapping[str, Tensor], *, straight_through: float | None) -> None:
        self.model, self.manifest, self.tensors, self.straight_through = model, manifest, tensors, straight_through

    def adapter(self) -> MoaWeights:
        """The adapter as it stands, in the base's dtype; differentiable where gradients are on."""
        weights = build(self.manifest, self.tensors, self.model.weights, self.model.config, self.model.dtype)
        if self.manifest.router.select.kind in ("constant", "threshold_fn"):
            for layer in weights.layers:
                if layer is not None and isinstance(layer.router, Router):
                    layer.router.straight_through = self.straight_through
        return weights

    def loss(self, batch: TokenBatch, *, counters: RouterCounters | None = None, trace: RoutingTrace | None = None) -> Tensor:
        """Sum over the learned tokens, in nats; () float32."""
        adapter = self.adapter()
        # Instance level: the mean over the prompt alone, as when serving; the authors' includes answer and padding in training.
        pooled = PooledRows.of_whole(batch.lengths, batch.prompts, adapter, self.model.device) if self.manifest.is_pooled else None
        segment = Segment(0, len(batch.token_ids), adapter, pooled, counters)
        if counters is not None:
            counters.tokens += len(batch.token_ids)
        forward = ForwardBatch(batch.token_ids, batch.positions, (segment,), batch.rows, trace)
        logits = self.model.forward(forward, PaddedCausalAttention(batch.lengths, self.model.device))
        return F.cross_entropy(logits, batch.targets, ignore_index=IGNORED, reduction="sum")


def trainable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves that get gradients, by name."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}

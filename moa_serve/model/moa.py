"""The mathematics of mixtures of adapters, once, for every family that is served.

    w = route(x)                              (T, E) float32, exactly 0 where an expert is not kept
    delta_e(u) = w_e * scale_e * B_e (A_e u)

`Router` is net -> activation -> select -> finalise; the experts below it are LoRA on a base linear, a parallel adapter beside the FFN
and a zero-initialised prompt in attention. Plain LoRA is w = 1; Soft MoA is Sparse MoA with nothing cut. Weights and selection are
float32 always: `>=` is discontinuous, and a rounded router flips experts. An expert with w = 0 counts as not computed, so its product
is selected away and never multiplied: 0 * NaN is NaN.

Sources: arXiv:2506.05928 (Soft and Sparse MoA), Hydra-/MoLoRA, MoLA and AdaMoLE as the paper's baselines compute them;
docs/adapter-format.md has the formulas. Tensors in, tensors out; no files, no requests. Owned by the thread that runs the forward.

Where T tokens are said, (S, T) are understood too: the weights of S adapters side by side (stacked.py), each for its own T tokens.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RouterRule
from moa_serve.config import ModelConfig
from moa_serve.model.ops import plain, rms_norm
from moa_serve.model.weights import LayerWeights


@dataclass(eq=False, slots=True)
class Routed:
    """What a router said of T tokens and E experts.

    `scores` (T, E) its outputs before selection, `threshold` (T, 1) or None, `selected` (T, E) bool, `gates` (T, E) the weights that
    count, exactly 0 where not selected. All float32.
    """

    scores: Tensor
    threshold: Tensor | None
    selected: Tensor
    gates: Tensor

    def rows(self, index: Tensor | slice) -> "Routed":
        threshold = None if self.threshold is None else self.threshold[index]
        return Routed(self.scores[index], threshold, self.selected[index], self.gates[index])


@dataclass(eq=False, slots=True)
class Affine:
    """weight (out, in) and bias (out,), or no bias."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.weight.dtype == torch.float32 and not torch.is_grad_enabled() and x.shape[-1] % _PARTS == 0:
            return self._in_parts(x)
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        return torch.bmm(x, self.weight.mT) if self.bias is None else torch.baddbmm(self.bias, x, self.weight.mT)

    def _in_parts(self, x: Tensor) -> Tensor:
        """The same, added up from parts of the inputs: a router has so few rows and outputs that a GPU has no other work to share out."""
        parts, weights = (whole.view(*whole.shape[:-1], _PARTS, -1).transpose(-2, -3) for whole in (x, self.weight))
        out: Tensor = (parts @ weights.mT).sum(-3)  # (C, T, in / C), (C, out, in / C), or (S, C, ...)
        return out if self.bias is None else out + self.bias


_PARTS = 16


@dataclass(eq=False, slots=True)
class LinearNet:
    """logits = W x + b, (T, D) -> (T, E)."""

    out: Affine

    def __call__(self, x: Tensor) -> Tensor:
        return self.out(x)


@dataclass(eq=False, slots=True)
class SwigluNet:
    """logits = W2 (silu(W1 x + b1) * (W3 x + b3)) + b2, (T, D) -> (T, E)."""

    w1: Affine
    w2: Affine
    w3: Affine

    def __call__(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


@dataclass(eq=False, slots=True)
class Router:
    """Weights of E experts for each token; float32 whatever the base computes in. `rule` has the formulas; of equal scores that top-k
    chooses from the first is kept."""

    net: LinearNet | SwigluNet
    softmax: bool
    rule: RouterRule
    threshold_fn: Affine | None = None
    straight_through: float | None = None  # tau; set by the trainer, see `_hard_gates`

    def __call__(self, x: Tensor, rule: RouterRule | None = None) -> Routed:
        """`rule`: instead of the router's own."""
        rule = rule or self.rule
        x = x.float()
        logits = self.net(x)
        scores = logits.softmax(-1) if self.softmax else logits.sigmoid()
        threshold = self._threshold(x, scores, rule)
        values = scores if threshold is None or not rule.subtracts else scores - threshold
        selected = _selected(scores, values, threshold, rule)
        if threshold is not None and not rule.subtracts:
            gates = self._hard_gates(scores, threshold, selected)
        else:
            gates = values if _keeps_all(rule) else torch.where(selected, values, 0.0)
        return Routed(scores, threshold, selected, _normalised(gates) if rule.renormalises else gates)

    def _hard_gates(self, scores: Tensor, threshold: Tensor, selected: Tensor) -> Tensor:
        """g = s * [s >= t]. The step has no slope, so t would never learn, and neither would an expert that is not selected.

        With `straight_through` tau the forward is the same and the backward is that of s * sigmoid((s - t) / tau) in the second factor:
        dg = [s >= t] ds + s * sigmoid'((s - t) / tau) / tau * (ds - dt). Without it: the authors' gradient, which leaves t where it was.
        Source: straight-through estimators, Bengio et al. 2013, arXiv:1308.3432.
        """
        hard = torch.where(selected, scores, 0.0)
        if self.straight_through is None or not torch.is_grad_enabled():
            return hard
        soft = scores.detach() * ((scores - threshold) / self.straight_through).sigmoid()
        return hard + (soft - soft.detach())

    def _threshold(self, x: Tensor, scores: Tensor, rule: RouterRule) -> Tensor | None:
        if rule.threshold is None:
            return None
        if not rule.is_function:
            return scores.new_full((*scores.shape[:-1], 1), rule.threshold)
        assert self.threshold_fn is not None, "only a router with a threshold function has such a rule"
        return rule.threshold * self.threshold_fn(x).sigmoid()


def _keeps_all(rule: RouterRule) -> bool:
    return rule.threshold is None and not rule.top_k and not rule.disabled


def _selected(scores: Tensor, values: Tensor, threshold: Tensor | None, rule: RouterRule) -> Tensor:
    """(T, E) bool: which experts are kept."""
    if threshold is None:
        kept = torch.ones_like(scores, dtype=torch.bool)
    elif rule.subtracts:
        kept = values > 0
    else:
        kept = scores >= threshold
    forced = _outputs(rule.forced, scores) if rule.forced else None
    if forced is not None:
        kept = kept | forced
    if rule.disabled:
        kept = kept & ~_outputs(rule.disabled, scores)
    if not rule.top_k:
        return kept
    ranked = values.nan_to_num(nan=2.0)  # above all scores, so that it comes out and the row fails
    if forced is not None:
        ranked = ranked.masked_fill(forced, math.inf)
    ranked = torch.where(kept, ranked, -math.inf)
    # A stable sort, because topk may keep any of several equal scores and the answer must not depend on the batch.
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : rule.top_k]
    return kept & torch.zeros_like(kept).scatter(-1, order, True)


def _outputs(bits: int, scores: Tensor) -> Tensor:
    """(E,) bool: which outputs have their bit set. On the device, where it may be part of a recorded step."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    signed = bits - (1 << 64) if bits >> 63 else bits
    return (torch.full_like(places, signed) >> places) & 1 != 0


def _normalised(gates: Tensor) -> Tensor:
    """gates / their sum; a row of zeros stays zeros."""
    total = gates.sum(-1, keepdim=True)
    return gates / torch.where(total == 0, 1.0, total)


def scaled(values: Tensor, weight: Tensor | None) -> Tensor:
    """values * weight, and exactly 0 where the weight is 0, even if the value is not finite.

    In training the product itself: a weight of 0 has to learn what its value would have done.
    """
    if weight is None:
        return values
    if weight.requires_grad:
        return (values * weight).to(values.dtype)
    return (values * weight).masked_fill_(weight == 0, 0.0).to(values.dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if weight.dim() == 2 else torch.bmm(x, weight.mT)


@dataclass(eq=False, slots=True)
class Mixture:
    """How the columns of an expert's second factor are weighed: the layer's gate of the expert, an own softmax router, both, or neither.

    `column` is the output of the layer router that weighs it; `router` reads the expert's own input and has one output for each of
    its inner experts; `inner` (C,) int64 says which inner expert each column belongs to.
    """

    column: int | None = None
    router: Router | None = None
    inner: Tensor | None = None

    def route(self, x: Tensor, rule: RouterRule | None) -> Routed | None:
        """`rule`: instead of the own router's."""
        return self.router(x, rule) if self.router else None

    def expert_weights(self, gates: Tensor | None, routed: Routed | None) -> Tensor | None:
        """(T, 1), or (T, E) where there are inner experts; float32; None where everything counts fully."""
        outer = None if gates is None or self.column is None else gates[..., self.column : self.column + 1]
        if routed is None or outer is None:
            return outer if routed is None else routed.gates
        if outer.requires_grad:
            return outer * routed.gates  # as in `scaled`: an expert that is not kept has to hear of what it would have done
        return torch.where(outer != 0, outer * routed.gates, 0.0)  # a nested router that overflows is not asked where w = 0

    def column_weights(self, gates: Tensor | None, routed: Routed | None) -> Tensor | None:
        """The same for each of the C columns: (T, 1) or (T, C)."""
        weights = self.expert_weights(gates, routed)
        return weights if weights is None or self.inner is None else weights[..., self.inner]


@dataclass(eq=False, slots=True)
class LoraExperts:
    """All LoRA experts at one base linear: delta(u) = B (w * scale * (A u)).

    `a` (Ra, in) and `b` (out, Rb) stack the experts. `a_row` (Rb,) int64 names the row of `a` that each column of `b` takes: HydraLoRA's
    experts share their rows; None where the two run in step. `scale` (Rb,) float32 is alpha / rank.
    """

    a: Tensor
    b: Tensor
    a_row: Tensor | None
    scale: Tensor
    mixture: Mixture

    def __call__(self, u: Tensor, gates: Tensor | None, routed: Routed | None) -> Tensor:
        low = _product(u.to(self.a.dtype), self.a)
        if self.a_row is not None:
            low = low[..., self.a_row]
        weight = self.mixture.column_weights(gates, routed)
        return _product(scaled(low, self.scale if weight is None else weight * self.scale), self.b)


@dataclass(eq=False, slots=True)
class JoinedLora:
    """LoRA at linears that read the same: `LoraExperts` of each, side by side (T, sum of out), with their first products in one.

    `a` (sum of R, in) has all of their rows, `b` (out, R) of each its second factor; `column` (sum of R,) int64 names the layer's gate
    that weighs each row, None where nothing does.
    """

    a: Tensor
    b: list[Tensor]
    scale: Tensor
    column: Tensor | None

    def __call__(self, u: Tensor, gates: Tensor | None, routed: Routed | None) -> Tensor:
        weight = self.scale if gates is None or self.column is None else gates.index_select(-1, self.column) * self.scale
        low = scaled(_product(u.to(self.a.dtype), self.a), weight)
        parts = torch.split(low, [b.shape[-1] for b in self.b], dim=-1)
        return torch.cat([_product(part, b) for part, b in zip(parts, self.b, strict=True)], dim=-1)


@dataclass(eq=False, slots=True)
class ParallelAdapter:
    """pa(m) = sum_e w_e (Up_e silu(Down_e m + d_e) + c_e), beside the FFN.

    `up` (D, C) stacks the inner experts' columns, `up_bias` (E, D) has one row for each; `down_row` (C,) as LoraExperts' `a_row`.
    """

    down: Affine
    up: Tensor
    up_bias: Tensor
    down_row: Tensor | None
    mixture: Mixture

    def __call__(self, m: Tensor, gates: Tensor | None, routed: Routed | None) -> Tensor:
        low = F.silu(self.down(m.to(self.up.dtype)))
        if self.down_row is not None:
            low = low[..., self.down_row]
        out = _product(scaled(low, self.mixture.column_weights(gates, routed)), self.up)
        weight = self.mixture.expert_weights(gates, routed)
        return out + (self.up_bias if weight is None else weight.to(out.dtype) @ self.up_bias)


@dataclass(eq=False, slots=True)
class PromptExpert:
    """Zero-initialised attention to n learned rows: w * gate_h * softmax(q_h . K / sqrt(P)) V, a softmax of its own.

    `keys`, `values` (K, n, P) float32 are the frozen projections of the rows, made once by `project`; q is rotated, they are not.
    With inner experts there is one softmax over all their rows, and each row is then weighed by its expert's share.
    """

    rows: Tensor
    head_gate: Tensor
    mixture: Mixture
    keys: Tensor
    values: Tensor

    def __call__(self, q: Tensor, gates: Tensor | None, routed: Routed | None) -> Tensor:
        """(T, H, P) -> (T, H, P)."""
        grouped = q.float().view(*q.shape[:-2], self.keys.shape[-3], -1, q.shape[-1])  # (T, K, H/K, P)
        scores = torch.einsum("...tkgp,...knp->...tkgn", grouped, self.keys) / math.sqrt(q.shape[-1])
        share = scores.softmax(-1)
        weight = self.mixture.column_weights(gates, routed)
        if weight is not None:
            share = scaled(share, weight[..., None, None, :])
        out = torch.einsum("...tkgn,...knp->...tkgp", share, self.values).flatten(-3, -2)
        return (out * self.head_gate[..., None]).to(q.dtype)

    @staticmethod
    def project(rows: Tensor, base: LayerWeights, config: ModelConfig) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows (n, D) under the base's K and V: no norm before, no rotation, k_norm where the base has one."""
        start, size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        both = slice(start, start + 2 * size)
        bias = None if base.qkv_bias is None else base.qkv_bias[both].float()
        projected = F.linear(rows.float(), plain(base.qkv)[both].float(), bias)
        keys, values = projected.view(len(rows), 2, config.num_kv_heads, config.head_dim).permute(1, 2, 0, 3)
        if base.k_norm is not None:
            keys = rms_norm(keys, base.k_norm.float(), config.rms_norm_eps)
        return keys.contiguous(), values.contiguous()


@dataclass(eq=False, slots=True)
class MoaLayer:
    """The experts of one decoder layer and, where there is one, the router that weighs them all."""

    router: Router | None
    reads_residual: bool
    linears: dict[str, LoraExperts]
    prompt: PromptExpert | None
    parallel: ParallelAdapter | None
    joined: dict[str, JoinedLora] = field(default_factory=dict)  # QKV, GATE_UP: instead of `linears` there


@dataclass(eq=False, slots=True)
class MoaWeights:
    """One adapter ready to compute: `layers` has None where no expert stands.

    To serve, `joined` (stacked.py) are the same layers in fewer products; those of one `layout` are computed together.
    """

    manifest: Manifest
    layers: list[MoaLayer | None]
    joined: list[MoaLayer | None] | None = None
    layout: str | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def max_outputs(self) -> int:
        return max(self.manifest.layer(index).num_outputs for index in range(len(self.layers)))

"""Adapters of every family that is served, made up: the paper's sizes, random numbers, and for Sparse MoA its share of active experts."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.checkpoint import revision_of
from moa_serve.adapter.manifest import OUTPUT_FACTORS, BaseShape, Manifest
from moa_serve.bench.workload import PAGE, Pages, Workload, num_pages, selected_share
from moa_serve.config import ModelConfig
from moa_serve.errors import EngineError
from moa_serve.gpu.layout import SlotShape
from moa_serve.train.recipe import Recipe, fresh_tensors, manifest_of

# Rank 8, alpha 8, LoRA at Q, K, V, O and DOWN, bottleneck 16, prompt 10, 8 experts where a family has several: a recipe's defaults.
FAMILIES = {
    "soft_moa": Recipe(variant="soft_moa"),
    "soft_moa_no_prompt": Recipe(variant="soft_moa", prompt_length=0),  # the experts that sparse_moa has
    "sparse_moa": Recipe(variant="sparse_moa"),
    "soft_moa_instance": Recipe(variant="soft_moa_instance"),
    "unipeft": Recipe(variant="unipeft"),
    "molora": Recipe(variant="molora"),
    "hydralora": Recipe(variant="hydralora"),
    "mola": Recipe(variant="mola"),
    "adamole": Recipe(variant="adamole"),
    "lora": Recipe(variant="lora"),
    "prompt": Recipe(variant="prompt"),
    "parallel_adapter": Recipe(variant="parallel_adapter"),
    "composition": Recipe(variant="composition"),
    "nested_molora": Recipe(variant="soft_moa", inner="molora"),
    "nested_hydralora": Recipe(variant="soft_moa", inner="hydralora"),
}
SELECTED_SHARE, SHARE_TOLERANCE = 0.59, 0.02  # 3.55 of 6 experts are active in the paper's Sparse MoA
_BEYOND = 10.0  # logits that a router's margin is kept away from where all tokens or none are to be selected
_TUNING_ROWS, _TUNING_TOKENS = 4, 128
SPARE_TOKENS = _TUNING_ROWS * num_pages(_TUNING_TOKENS) * PAGE  # that `tuned` needs beside a workload's pages


def synthetic(family: str, config: ModelConfig, seed: int, *, scale: float = 0.02) -> Adapter:
    """A random adapter of a family in `FAMILIES`, for a base of this shape; another seed gives another one."""
    return of_recipe(FAMILIES[family], config, seed, scale=scale)


def slot_shape(families: Iterable[str], config: ModelConfig) -> SlotShape:
    """Of a GPU's slot that takes an adapter of each of these families."""
    return SlotShape.union(SlotShape.of(manifest_of(FAMILIES[family], BaseShape.of(config))) for family in families)


def of_recipe(recipe: Recipe, config: ModelConfig, seed: int, *, scale: float = 0.02) -> Adapter:
    """A random adapter of any family and any sizes.

    Args:
        scale: standard deviation of the output factors, which in a fresh adapter are zero and would leave every logit as it is.
    """
    manifest = manifest_of(recipe, BaseShape.of(config))
    generator = torch.Generator().manual_seed(seed + 1_000_000)  # not the numbers that the fresh tensors come from
    tensors = {
        name: scale * torch.randn(tensor.shape, generator=generator) if name.endswith(OUTPUT_FACTORS) else tensor
        for name, tensor in fresh_tensors(manifest, seed).items()
    }
    return _adapter(manifest, tensors)


def _adapter(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Adapter:
    """In bfloat16, as adapters are shipped."""
    narrow = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    return Adapter(manifest, narrow, revision_of(manifest, narrow), "made up")


def tuned(pages: Pages, adapter: Adapter, *, share: float = SELECTED_SHARE, tolerance: float = SHARE_TOLERANCE) -> Adapter:
    """The same Sparse MoA with its routers' biases moved until random tokens select each expert with probability `share`.

    An expert counts where sigmoid(R_e(x)) >= t(x), which is where its margin m_e(x) = R_e(x) - logit(t(x)) is at least 0. A constant in
    the bias of R_e moves the margin by as much for every token, so adding minus the (1 - share) quantile of m_e over some random tokens
    makes the layer select `share` of them, given what it reads. That depends on the layers before it, so all layers are moved at once and
    traced again, until the mean over all of them is within half the tolerance. After n passes the first n layers are final, so it ends.
    For a share of 0 or 1 the margin moves far beyond what any token has, so that no token is an exception.

    Args:
        pages: of the model that computes it; the spare ones have room for `SPARE_TOKENS`.
    Raises:
        EngineError: too many tokens have equal margins.
    """
    tensors = dict(adapter.tensors)
    bias = "router.w2.bias" if adapter.manifest.router.net == "swiglu" else "router.bias"
    found = 0.0
    for passes_left in range(adapter.manifest.base.num_layers + 1, -1, -1):
        tried = _adapter(adapter.manifest, tensors)
        trace = Workload(pages, [pages.model.prepare(tried)] * _TUNING_ROWS, tokens=_TUNING_TOKENS, seed=2).trace()
        pages.model.forget(tried.revision)
        found = selected_share(trace) or 0.0
        if abs(found - share) <= tolerance / 2 or not passes_left:
            break
        for layer, sites in trace.records[0].items():
            routed = sites["layer"]
            assert routed.threshold is not None, "a Sparse MoA has thresholds"
            margin = (_logit(routed.scores) - _logit(routed.threshold)).cpu()  # (T, E)
            name = f"layers.{layer}.{bias}"
            tensors[name] = tensors[name] - _cut(margin, share)
    if abs(found - share) > tolerance:
        raise EngineError(f"the routers of a made-up adapter cannot be tuned to select {share:.0%}: {found:.1%} is the nearest")
    return _adapter(adapter.manifest, tensors)


def _cut(margin: Tensor, share: float) -> Tensor:
    """(T, E) margins -> (E,): `share` of the tokens have at least this."""
    beyond = {0.0: _BEYOND, 1.0: -_BEYOND}.get(share, 0.0)
    return torch.quantile(margin, 1 - share, dim=0) + beyond


def _logit(probability: Tensor) -> Tensor:
    return probability.float().logit(eps=1e-7)


def made_up(pages: Pages, family: str, seed: int) -> Adapter:
    """`synthetic`, and `tuned` where it is a Sparse MoA."""
    adapter = synthetic(family, pages.model.config, seed)
    return tuned(pages, adapter) if adapter.manifest.variant == "sparse_moa" else adapter

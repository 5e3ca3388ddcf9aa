"""From an adapter's named tensors to the stacked ones that `moa.py` computes with. Runs once, when an adapter is put in its slot."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moa_serve.adapter.manifest import ExpertSpec, Manifest
from moa_serve.adapter.rules import RouterRule
from moa_serve.config import ModelConfig
from moa_serve.model.moa import (
    Affine,
    LinearNet,
    LoraExperts,
    Mixture,
    MoaLayer,
    MoaWeights,
    ParallelAdapter,
    PromptExpert,
    Router,
    SwigluNet,
)
from moa_serve.model.weights import BaseWeights

Tensors = Mapping[str, Tensor]


class _Builder:
    def __init__(self, manifest: Manifest, tensors: Tensors, base: BaseWeights, config: ModelConfig, dtype: torch.dtype) -> None:
        self.manifest, self.base, self.config, self.dtype = manifest, base, config, dtype
        self.device = base.embed.device
        self.tensors = tensors

    def build(self) -> MoaWeights:
        count = self.manifest.base.num_layers
        return MoaWeights(self.manifest, [self._layer(index) for index in range(count)])

    def _get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensors[name].to(device=self.device, dtype=dtype or self.dtype)

    def _affine(self, prefix: str, dtype: torch.dtype | None = None) -> Affine:
        bias = f"{prefix}.bias"
        return Affine(self._get(f"{prefix}.weight", dtype), self._get(bias, dtype) if bias in self.tensors else None)

    def _layer(self, index: int) -> MoaLayer | None:
        plan, spec = self.manifest.layer(index), self.manifest.router
        if not plan.experts:
            return None
        columns = dict(zip((expert.site for expert in plan.experts), plan.columns, strict=True)) if spec.site == "layer" else {}
        linears: dict[str, LoraExperts] = {}
        prompt, parallel = None, None
        for site in dict.fromkeys(expert.site for expert in plan.experts):
            group, prefix, column = plan.at(site), f"layers.{index}.{site}", columns.get(site)
            if site == "PROMPT":
                prompt = self._prompt(prefix, group[0], column, index)
            elif site == "P_ADAPTER":
                parallel = self._parallel(prefix, group[0], column)
            else:
                linears[site] = self._lora(prefix, group, column)
        router = self._router(f"layers.{index}.router") if spec.site == "layer" else None
        return MoaLayer(router, spec.input == "residual", linears, prompt, parallel)

    def _router(self, prefix: str) -> Router:
        """The router that the manifest describes, at a layer or at a linear."""
        spec = self.manifest.router
        net: LinearNet | SwigluNet
        if spec.net == "swiglu":
            net = SwigluNet(*(self._affine(f"{prefix}.{part}", torch.float32) for part in ("w1", "w2", "w3")))
        else:
            net = LinearNet(self._affine(prefix, torch.float32))
        final = net.w2 if isinstance(net, SwigluNet) else net.out
        function = self._affine(f"{prefix}.threshold", torch.float32) if spec.has_threshold_fn else None
        return Router(net, spec.activation == "softmax", RouterRule.of(spec.select, len(final.weight)), function)

    def _inner_router(self, prefix: str) -> Router:
        return Router(LinearNet(self._affine(f"{prefix}.router", torch.float32)), softmax=True, rule=RouterRule())

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _lora(self, prefix: str, group: list[ExpertSpec], column: int | None) -> LoraExperts:
        first = group[0]
        if self.manifest.router.site == "linear":
            names = [f"{prefix}/{expert.index}" for expert in group]
            ranks = [expert.rank or 0 for expert in group]
            scales = [expert.scale for expert in group]
            router, shared = self._router(f"{prefix}.router"), self.manifest.variant == "hydralora"
        elif first.inner:
            count = first.inner.num_experts
            names = [f"{prefix}.{index}" for index in range(count)]
            ranks, scales = [first.rank or 0] * count, [first.scale] * count
            router, shared = self._inner_router(prefix), first.inner.variant == "hydralora"
        else:
            names, ranks, scales, router, shared = [prefix], [first.rank or 0], [first.scale], None, False
        a = self._get(f"{prefix}.lora_A") if shared else torch.cat([self._get(f"{name}.lora_A") for name in names])
        b = torch.cat([self._get(f"{name}.lora_B") for name in names], dim=1)
        inner = self._index([e for e, rank in enumerate(ranks) for _ in range(rank)]) if router else None
        columns = [s for s, rank in zip(scales, ranks, strict=True) for _ in range(rank)]
        scale = torch.tensor(columns, dtype=torch.float32, device=self.device)
        a_row = self._index(list(range(ranks[0])) * len(names)) if shared else None
        return LoraExperts(a.contiguous(), b.contiguous(), a_row, scale, Mixture(column, router, inner))

    def _parallel(self, prefix: str, expert: ExpertSpec, column: int | None) -> ParallelAdapter:
        size, inner = expert.size or 0, expert.inner
        if not inner:
            up = self._affine(f"{prefix}.up")
            assert up.bias is not None  # expected_tensors asks for it
            return ParallelAdapter(self._affine(f"{prefix}.down"), up.weight, up.bias[None], None, Mixture(column))
        names = [f"{prefix}.{index}" for index in range(inner.num_experts)]
        up_weight = torch.cat([self._get(f"{name}.up.weight") for name in names], dim=1)
        up_bias = torch.stack([self._get(f"{name}.up.bias") for name in names])
        owner = self._index([e for e in range(inner.num_experts) for _ in range(size)])
        mixture = Mixture(column, self._inner_router(prefix), owner)
        if inner.variant == "hydralora":
            row = self._index(list(range(size)) * inner.num_experts)
            return ParallelAdapter(self._affine(f"{prefix}.down"), up_weight, up_bias, row, mixture)
        weight = torch.cat([self._get(f"{name}.down.weight") for name in names])
        bias = torch.cat([self._get(f"{name}.down.bias") for name in names])
        return ParallelAdapter(Affine(weight, bias), up_weight, up_bias, None, mixture)

    def _prompt(self, prefix: str, expert: ExpertSpec, column: int | None, layer: int) -> PromptExpert:
        rows = self._get(f"{prefix}.rows", torch.float32)
        mixture = Mixture(column)
        if expert.inner:
            owner = [e for e in range(expert.inner.num_experts) for _ in range(expert.length or 0)]
            mixture = Mixture(column, self._inner_router(prefix), self._index(owner))
        base = self.base.layers[layer]
        # Where the base stands, which may not be where the adapter is laid out.
        keys, values = (part.to(self.device) for part in PromptExpert.project(rows.to(base.qkv.device), base, self.config))
        return PromptExpert(rows, self._get(f"{prefix}.gate", torch.float32), mixture, keys, values)


def build(manifest: Manifest, tensors: Tensors, base: BaseWeights, config: ModelConfig, dtype: torch.dtype) -> MoaWeights:
    """Stack an adapter's tensors on the base's device, ready for `Transformer.forward`.

    Args:
        manifest: already checked against the base.
        tensors: exactly `manifest.expected_tensors()`.
        dtype: of the expert's matrices; routers, thresholds and the prompt's keys and values are float32 always.
    """
    return _Builder(manifest, tensors, base, config, dtype).build()

"""The first thing that a GPU computes here: some tokens with a made-up adapter, by the kernels and by the definition on the same weights.

A kernel that does not compile on this device, or computes something else there, is found before anybody is served. The made-up adapter is
as large as a slot, so that every part of the kernels runs. For more than this there is `moa-serve doctor`.
"""

from typing import Any

import torch
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import FORMAT, BaseShape, Manifest
from moa_serve.config import ModelConfig
from moa_serve.gpu.layout import SlotShape
from moa_serve.gpu.model import FusedTransformer
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch, Segment
from moa_serve.model.transformer import Transformer

_PROMPT, _STEPS, _PAGE = 19, 2, 16
_MOST_APART = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Root mean square of the differences to that of the logits. Rounding in bfloat16 gives a few hundredths; a wrong address about 1."""


def what_is_wrong(model: FusedTransformer, definition: Transformer) -> str | None:
    """None where both compute the same; else what does not, as a sentence goes on after "because".

    Both read the same weights. A slot of the model is overwritten; its cache is as before.
    """
    adapter = _made_up(model.config, model.layout.shape)
    try:
        with torch.inference_mode():
            found = {name: (_logits(model, adapter, name), _logits(definition, adapter, name)) for name in ("base", "adapter")}
    except Exception as error:  # a compiler, a driver or a kernel: whatever it was, this device is not for these kernels
        said = str(error).strip().splitlines()
        return f"its kernels do not run on this device ({type(error).__name__}{': ' + said[0] if said else ''})"
    finally:
        for one in (model, definition):
            one.forget(adapter.revision)
    for name, (ours, theirs) in found.items():
        apart = (ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        if not apart <= _MOST_APART[model.dtype]:  # not a number is wrong, too
            return f"its kernels compute other logits than the definition does (with the {name}, apart by {float(apart):.2g} of their size)"
    return None


def _logits(model: FusedTransformer | Transformer, adapter: Adapter, name: str) -> Tensor:
    """(_PROMPT + _STEPS, V), the last ones one by one."""
    pages = -(-(_PROMPT + _STEPS) // _PAGE)
    cache: Any = model.trial_cache(pages + 1, _PAGE) if isinstance(model, FusedTransformer) else model.new_cache(pages + 1, _PAGE)
    cache.zero(range(pages + 1))
    prepared = model.prepare(adapter, 0) if name == "adapter" else None
    ids = torch.arange(_PROMPT + _STEPS, device=model.device) * 7 % model.config.vocab_size
    found, start = [], 0
    for count in (_PROMPT, *[1] * _STEPS):
        segments = () if prepared is None else (Segment(0, count, prepared),)
        positions = torch.arange(start, start + count, device=model.device)
        spans = [CachedSpan(0, count, start, list(range(1, pages + 1)))]
        found.append(model.forward(ForwardBatch(ids[start : start + count], positions, segments), cache.attention(spans)).clone())
        start += count
    return torch.cat(found)


def _made_up(config: ModelConfig, shape: SlotShape) -> Adapter:
    """As much of everything as a slot takes; of families with a router at each linear, one of them."""
    layers, experts = list(range(config.num_layers)), list[dict[str, Any]]()
    variant, router = "composition", dict[str, Any](site="none")
    if shape.outputs:
        variant, router = (
            "sparse_moa",
            {"site": "layer", "input": "residual" if shape.residual else "normed", "select": {"kind": "constant", "threshold": 0.5}},
        )
        if shape.hidden:
            router |= {"net": "swiglu", "hidden": shape.hidden}
    elif shape.inner and shape.targets:
        variant, router = "molora", {"site": "linear", "input": "linear", "activation": "softmax", "bias": False}
    copies = shape.inner if variant == "molora" else 1
    rank = max(1, shape.rank // copies)
    for target in sorted(shape.targets & shape.inner_sites if variant == "molora" else shape.targets):
        for copy in range(copies):
            name = f"{target}/{copy}" if variant == "molora" else target
            experts.append({"name": name, "kind": "lora", "target": target, "layers": layers, "rank": rank, "alpha": float(rank)})
    if variant != "molora":
        if shape.prompt:
            experts.append({"name": "PROMPT", "kind": "prompt", "layers": layers, "length": shape.prompt})
        if shape.parallel:
            size = min(shape.parallel, shape.parallel_columns - 1)
            experts.append({"name": "P_ADAPTER", "kind": "parallel_adapter", "layers": layers, "size": size})
    if variant == "sparse_moa":
        experts = experts[: shape.outputs]
    base = BaseShape.of(config).model_dump(exclude_none=True)
    manifest = Manifest.parse({"format": FORMAT, "base": base, "variant": variant, "router": router, "experts": experts})
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(size, generator=generator) * size[-1] ** -0.5 for name, size in manifest.expected_tensors().items()}
    return Adapter(manifest, tensors, "trial", "trial")

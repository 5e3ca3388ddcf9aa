"""Small tensor functions that the base and the adapters share."""

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moa_serve.config import RopeConfig


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array of the host as a tensor there. The device is not waited for: the bytes are read before the call returns."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; the mean square in float32, then back to x's dtype, then the weight.

    To serve on a GPU torch's own, one operation for six: it takes the weight in float32 too, before it rounds.
    """
    if x.is_cuda and not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    if x.requires_grad and not weight.requires_grad:
        out: Tensor = _FrozenRmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]  # torch's own annotation is missing
        return out
    return _rms_norm(x, weight, eps)[0]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / rms (..., 1) float32."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype), inverse


class _FrozenRmsNorm(torch.autograd.Function):
    """The same for training beside a frozen weight: keeps x and 1 / rms, where autograd would keep three float32 copies of x.

    With u = x / rms and g the gradient: dx = (g * weight - u * mean(g * weight * u)) / rms.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit, scaled = x.float() * inverse, grads[0].float() * weight.float()
        mean = (scaled * unit).mean(-1, keepdim=True)
        return scaled.sub_(unit.mul_(mean)).mul_(inverse).to(x.dtype), None, None


def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """(P / 2,) float32, radians per position of each rotated pair.

    Llama-3.1 (`llama3`): wavelengths beyond original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor
    stay, and between them the two are blended.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = smooth.clamp(0, 1)
        frequencies = (1 - blend) * frequencies / rope.factor + blend * frequencies
    return frequencies.to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (T, H, P); dimension j pairs with j + P/2.

    Args:
        cos, sin: (T, 1, P), the cosines twice side by side, and the sines, the first of the two negative.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (T, in) times a base weight (out, in), plain or `prepacked`, plus the bias (out,): (T, out).

    torch packs a bfloat16 weight anew in every call, which at few rows takes as long as the product. Tiles of AMX read a left
    factor as it lies, so there the few rows become the right one, and they are what is packed.
    """
    if weight.is_mkldnn:
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return packed
    is_cheaper_turned = len(x) <= _TURNED_ROWS and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and _has_amx()
    if not is_cheaper_turned or x.requires_grad:
        return F.linear(x, weight, bias)
    # One row is a product of its own: as a matrix it would not be turned.
    out = torch.mv(weight, x[0])[None] if len(x) == 1 else torch.mm(weight, x.T).T.contiguous()
    return out if bias is None else out + bias


def prepacked(weight: Tensor) -> Tensor:
    """A frozen weight (out, in) as oneDNN multiplies it: for `linear` and `plain` alone, and no gradient flows through it.

    The weight itself where that is not to be had or no gain: on other devices, in float32 (MKL reads one row's weight as it lies and
    takes half of oneDNN's time) and without oneDNN or its bfloat16.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not _has_packed_linear():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    return packed


def plain(weight: Tensor) -> Tensor:
    """A weight as it was before `prepacked`, bit for bit; a copy where it was packed."""
    return weight.to_dense() if weight.is_mkldnn else weight


_TURNED_ROWS = 32  # measured with AMX and 49152 outputs: 0.6 of the time at 1 to 32 rows, 0.9 at 64
_PACKED_FOR_ROWS = 16  # the layout that oneDNN chooses hardly differs between 1 and 256


@functools.cache
def _has_packed_linear() -> bool:
    ops = torch.ops.mkldnn  # private to torch, and not in every build of it
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(ops, name) for name in names) and bool(ops._is_mkldnn_bf16_supported())


@functools.cache
def _has_amx() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return bool(capabilities.get("amx_bf16", False))

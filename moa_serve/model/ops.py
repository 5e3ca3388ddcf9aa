"""Small tensor functions that the base and the adapters share."""

import math
from typing import Any

import torch
from torch import Tensor

from moa_serve.config import RopeConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; the mean square in float32, then back to x's dtype, then the weight."""
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
    """Rotary embedding of (T, H, P) by (T, 1, P/2) cosines and sines; dimension j pairs with j + P/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

"""What kernels do with tiles in registers. Jitted functions for kernels to call; nothing here is launched."""

import triton
import triton.language as tl

# A constant of the compiled code. TRITON_INTERPRET has to be set before this module is imported, as for every kernel.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LOWEST = tl.constexpr(-3.4e38)  # a maximum of nothing: finite, so that less than it is never inf - inf
PROMPT_TILE = tl.constexpr(16)  # the least that tl.dot takes; a prompt of the paper has 10 rows


@triton.jit
def dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """(M, R) x (R, N) -> (M, N), summed in float32; M, R and N are powers of two from 16.

    float32 stays float32 ("ieee"), where Triton would round it to TF32. Triton 3.9's interpreter multiplies the bits of bfloat16 as if they
    were integers, so there both are widened first: the same numbers, since a product of two bfloat16 is exact in float32.
    """
    if IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def online_softmax(
    acc: tl.tensor, total: tl.tensor, top: tl.tensor, scores: tl.tensor, share: tl.tensor, v: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One more tile of keys: scores (G, N) as powers of 2, share (1 or G, N) what a value counts after the softmax or None, v (N, P).

    acc (G, P), total (G,) and top (G,), float32: the sums so far, both divided by 2 ** top.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    fade = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    total = total * fade + tl.sum(weights, 1)
    if share is not None:
        weights *= share
    acc = acc * fade[:, None] + dot(weights.to(v.dtype), v)
    return acc, total, new_top

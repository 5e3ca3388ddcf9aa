"""What kernels do with tiles in registers. Jitted functions for kernels to call; nothing here is launched."""

import triton
import triton.language as tl

# A constant of the compiled code. TRITON_INTERPRET has to be set before this module is imported, as for every kernel.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """(M, R) x (R, N) -> (M, N), summed in float32; M, R and N are powers of two from 16.

    float32 stays float32 ("ieee"), where Triton would round it to TF32. Triton 3.9's interpreter multiplies the bits of bfloat16 as if they
    were integers, so there both are widened first: the same numbers, since a product of two bfloat16 is exact in float32.
    """
    if IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")

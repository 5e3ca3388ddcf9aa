// Root-mean-square norms and the rotary embedding, a row at a time in float32.
#pragma once
#include <math.h>

#include "numbers.h"

namespace {

// out = x / rms(x) * weight; `size` is the true size, what stands in the padding of x is zero and of out becomes zero.
template <class N>
inline void rms_norm(const float* x, const float* weight, int64_t size, float eps, typename N::Element* out) {
  const int64_t end = padded(size);
  F16 squares = f_zero();
  for (int64_t i = 0; i < end; i += kLanes) squares = f_fma(f_load(x + i), f_load(x + i), squares);
  const F16 scale = f_set(1.0f / sqrtf(f_sum(squares) / (float)size + eps));
  for (int64_t i = 0; i < end; i += kLanes) N::store(out + i, f_mul(f_mul(f_load(x + i), scale), f_load(weight + i)));
}

// The same for one head in place; heads need not fill whole vectors.
inline void head_norm(float* head, const float* weight, int size, float eps) {
  float squares = 0;
  for (int i = 0; i < size; i++) squares += head[i] * head[i];
  const float scale = 1.0f / sqrtf(squares / (float)size + eps);
  for (int i = 0; i < size; i++) head[i] = head[i] * scale * weight[i];
}

// Dimension j turns with j + half by the token's j-th angle.
inline void rotate(float* head, const float* cosines, const float* sines, int half) {
  int j = 0;
  for (; j + kLanes <= half; j += kLanes) {
    const F16 first = f_load(head + j), second = f_load(head + j + half), cosine = f_load(cosines + j), sine = f_load(sines + j);
    f_store(head + j, f_sub(f_mul(first, cosine), f_mul(second, sine)));
    f_store(head + j + half, f_add(f_mul(second, cosine), f_mul(first, sine)));
  }
  for (; j < half; j++) {
    const float first = head[j], second = head[j + half];
    head[j] = first * cosines[j] - second * sines[j];
    head[j + half] = second * cosines[j] + first * sines[j];
  }
}

}  // namespace

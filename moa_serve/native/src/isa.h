// Sixteen float32 lanes on whatever registers there are. Everything above this file is written once against these functions and compiled
// once for each instruction set: with AVX-512 a vector is one register, with AVX2 two.
//
// No standard containers or inline library functions may be used in code that includes this file: the linker would keep one copy of
// them for all instruction sets, perhaps one that the processor cannot run.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "step_types.h"

namespace {

constexpr float kBytesOffset = 32768.0f;  // of bytes that are loaded as floats

#if defined(__AVX512F__)

struct F16 { __m512 v; };
struct Pairs { __m512i v; };  // 32 bfloat16 numbers: two neighbours in each lane

inline F16 f_set(float x) { return {_mm512_set1_ps(x)}; }
inline F16 f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void f_store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 f_add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 f_sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 f_mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 f_div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 f_fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
inline F16 f_fnma(F16 a, F16 b, F16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
// The second operand where one is NaN, as the instruction does.
inline F16 f_min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 f_max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 f_round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F16 f_times_power_of_two(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline F16 f_zero_below(F16 a, F16 x, float limit) {  // a, and 0 where x < limit
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), a.v)};
}
inline __mmask16 lanes_between(int first, int last) {
  const uint32_t below_last = last >= kLanes ? 0xffffu : (1u << (last < 0 ? 0 : last)) - 1u;
  const uint32_t below_first = first >= kLanes ? 0xffffu : (1u << (first < 0 ? 0 : first)) - 1u;
  return (__mmask16)(below_last & ~below_first);
}
inline F16 f_keep_lanes(F16 a, int first, int last, float other) {  // lanes [first, last) of a, `other` elsewhere
  return {_mm512_mask_blend_ps(lanes_between(first, last), _mm512_set1_ps(other), a.v)};
}
inline F16 f_replace_lanes(F16 a, int first, int last, float other) {  // `other` in lanes [first, last), a elsewhere
  return {_mm512_mask_blend_ps(lanes_between(first, last), a.v, _mm512_set1_ps(other))};
}
inline float f_sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
inline float f_largest(F16 a) { return _mm512_reduce_max_ps(a.v); }

inline F16 f_load_bfloat16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline F16 f_load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
// 16 bytes + kBytesOffset. A byte becomes bits 8 to 15 of 2^15, whose unit is 2^-8: one shuffle and no conversion.
inline F16 f_load_bytes(const uint8_t* p) {
  const __m512i spread = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  const __m512i places = _mm512_setr_epi32(0 << 8, 1 << 8, 2 << 8, 3 << 8, 4 << 8, 5 << 8, 6 << 8, 7 << 8, 8 << 8, 9 << 8, 10 << 8, 11 << 8,
                                           12 << 8, 13 << 8, 14 << 8, 15 << 8);
  const __m512i offset = _mm512_castps_si512(_mm512_set1_ps(kBytesOffset));
  return {_mm512_castsi512_ps(_mm512_mask_shuffle_epi8(offset, 0x2222222222222222ull, spread, places))};
}
// Lane by lane the upper halves of both, which are bfloat16, rounded to zero.
inline void f_store_cut(uint16_t* p, F16 first, F16 second) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first.v), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_castps_si512(second.v)));
}
inline Pairs pairs_load(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
inline Pairs pairs_set(uint32_t pair) { return {_mm512_set1_epi32((int)pair)}; }

#if defined(__AVX512BF16__)
inline F16 pairs_dot(F16 sum, Pairs a, Pairs b) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)}; }
inline void f_store_bfloat16(uint16_t* p, F16 a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
#else
inline F16 pairs_dot(F16 sum, Pairs a, Pairs b) {
  const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
  const __m512 a0 = _mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16)), a1 = _mm512_castsi512_ps(_mm512_and_si512(a.v, high));
  const __m512 b0 = _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16)), b1 = _mm512_castsi512_ps(_mm512_and_si512(b.v, high));
  return {_mm512_fmadd_ps(a1, b1, _mm512_fmadd_ps(a0, b0, sum.v))};
}
inline void f_store_bfloat16(uint16_t* p, F16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i whole = _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(whole, 16)));
}
#endif

#elif defined(__AVX2__) && defined(__FMA__)

struct F16 { __m256 a, b; };
struct Pairs { __m256i a, b; };

inline F16 f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F16 f_add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 f_sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 f_mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 f_div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 f_fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 f_fnma(F16 x, F16 y, F16 z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
inline F16 f_min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 f_max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 f_round(F16 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 m256_times_power_of_two(__m256 x, __m256 n) {  // n whole, and x * 2^n a normal number
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}
inline F16 f_times_power_of_two(F16 x, F16 n) { return {m256_times_power_of_two(x.a, n.a), m256_times_power_of_two(x.b, n.b)}; }
inline F16 f_zero_below(F16 x, F16 y, float limit) {
  const __m256 bound = _mm256_set1_ps(limit);
  return {_mm256_and_ps(x.a, _mm256_cmp_ps(y.a, bound, _CMP_NLT_UQ)), _mm256_and_ps(x.b, _mm256_cmp_ps(y.b, bound, _CMP_NLT_UQ))};
}
inline F16 lanes_between(int first, int last) {  // all bits set in lanes [first, last)
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
  const __m256i begin = _mm256_set1_epi32(first), end = _mm256_set1_epi32(last);
  return {_mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(begin, low), _mm256_cmpgt_epi32(end, low))),
          _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(begin, high), _mm256_cmpgt_epi32(end, high)))};
}
inline F16 f_choose(F16 lanes, F16 x, F16 y) { return {_mm256_blendv_ps(y.a, x.a, lanes.a), _mm256_blendv_ps(y.b, x.b, lanes.b)}; }
inline F16 f_keep_lanes(F16 x, int first, int last, float other) { return f_choose(lanes_between(first, last), x, f_set(other)); }
inline F16 f_replace_lanes(F16 x, int first, int last, float other) { return f_choose(lanes_between(first, last), f_set(other), x); }
inline float f_sum(F16 x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float f_largest(F16 x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline __m256 m256_from_bfloat16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline F16 f_load_bfloat16(const uint16_t* p) {
  return {m256_from_bfloat16(_mm_loadu_si128((const __m128i*)p)), m256_from_bfloat16(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline F16 f_load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256 m256_from_bytes(const uint8_t* p) {
  return _mm256_add_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))), _mm256_set1_ps(kBytesOffset));
}
inline F16 f_load_bytes(const uint8_t* p) { return {m256_from_bytes(p), m256_from_bytes(p + 8)}; }  // + kBytesOffset
inline __m256i m256_cut(__m256 first, __m256 second) {
  return _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(first), 16), _mm256_castps_si256(second), 0xaa);
}
inline void f_store_cut(uint16_t* p, F16 x, F16 y) {
  _mm256_storeu_si256((__m256i*)p, m256_cut(x.a, y.a));
  _mm256_storeu_si256((__m256i*)(p + kLanes), m256_cut(x.b, y.b));
}
inline Pairs pairs_load(const uint16_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))}; }
inline Pairs pairs_set(uint32_t pair) { return {_mm256_set1_epi32((int)pair), _mm256_set1_epi32((int)pair)}; }
inline __m256 m256_dot(__m256 sum, __m256i x, __m256i y) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
  const __m256 x0 = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), x1 = _mm256_castsi256_ps(_mm256_and_si256(x, high));
  const __m256 y0 = _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), y1 = _mm256_castsi256_ps(_mm256_and_si256(y, high));
  return _mm256_fmadd_ps(x1, y1, _mm256_fmadd_ps(x0, y0, sum));
}
inline F16 pairs_dot(F16 sum, Pairs x, Pairs y) { return {m256_dot(sum.a, x.a, y.a), m256_dot(sum.b, x.b, y.b)}; }
inline __m128i m256_to_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i whole = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}
inline void f_store_bfloat16(uint16_t* p, F16 x) {
  _mm_storeu_si128((__m128i*)p, m256_to_bfloat16(x.a));
  _mm_storeu_si128((__m128i*)(p + 8), m256_to_bfloat16(x.b));
}

#else
#error "compile with -mavx2 -mfma, -mavx512f..., or -mavx512bf16 as well: see moa_serve/native/compile.py"
#endif

inline F16 f_zero() { return f_set(0.0f); }

// e^x to within 2 units in the last place; 0 for x < -87.3, as large as a float gets for x > 88.3, NaN for NaN.
// Source: Cephes expf (Cody-Waite reduction, polynomial of degree 5 on [-ln 2 / 2, ln 2 / 2]).
inline F16 f_exp(F16 x) {
  const F16 bounded = f_min(f_set(88.3f), f_max(f_set(-87.3f), x));
  const F16 n = f_round(f_mul(bounded, f_set(1.44269504088896341f)));
  F16 r = f_fnma(n, f_set(0.693359375f), bounded);
  r = f_fnma(n, f_set(-2.12194440e-4f), r);
  F16 p = f_set(1.9875691500e-4f);
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_add(f_fma(p, f_mul(r, r), r), f_set(1.0f));
  return f_zero_below(f_times_power_of_two(p, n), x, -87.3f);
}

// Exactly 0.5 for 0.
inline F16 f_sigmoid(F16 x) { return f_div(f_set(1.0f), f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }
inline F16 f_silu(F16 x) { return f_div(x, f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }

}  // namespace

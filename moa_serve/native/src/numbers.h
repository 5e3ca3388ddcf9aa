// The two number formats a model can be computed in. `Bfloat16` keeps weights, activations and the cache in bfloat16 and adds up in
// float32, two products a lane; `Float32` is the same code on float32 throughout. Both round an activation once, when it is stored.
#pragma once
#include "isa.h"

namespace {

// Asks for memory that is read soon: the processor looks ahead by itself within a run of addresses, and pages lie apart.
inline void fetch(const void* memory, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch((const char*)memory + at, _MM_HINT_T0);
}

inline float widen(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
inline float widen(float x) { return x; }

struct Bfloat16 {
  using Element = uint16_t;
  using Weight = uint16_t;
  using Vector = Pairs;
  static constexpr int kPerLane = 2;  // elements of the reduced dimension that share a lane
#if defined(__AMX_BF16__)
  static constexpr bool kIsOnTiles = true;
#else
  static constexpr bool kIsOnTiles = false;
#endif
  static Vector load(const Element* p) { return pairs_load(p); }
  static Vector load_weight(const Weight* p) { return pairs_load(p); }
  static Vector spread(const Element* p) {  // kPerLane neighbours into every lane
    uint32_t pair;
    memcpy(&pair, p, 4);
    return pairs_set(pair);
  }
  static F16 dot(F16 sum, Vector a, Vector b) { return pairs_dot(sum, a, b); }
  static void store(Element* p, F16 a) { f_store_bfloat16(p, a); }
  static F16 load_float(const Element* p) { return f_load_bfloat16(p); }
};

struct Float32 {
  using Element = float;
  using Weight = float;
  using Vector = F16;
  static constexpr int kPerLane = 1;
  static constexpr bool kIsOnTiles = false;
  static Vector load(const Element* p) { return f_load(p); }
  static Vector load_weight(const Weight* p) { return f_load(p); }
  static Vector spread(const Element* p) { return f_set(*p); }
  static F16 dot(F16 sum, Vector a, Vector b) { return f_fma(a, b, sum); }
  static void store(Element* p, F16 a) { f_store(p, a); }
  static F16 load_float(const Element* p) { return f_load(p); }
};

// float32 arithmetic on weights that stand in bfloat16, where that holds them exactly: routers.
struct Widened : Float32 {
  using Weight = uint16_t;
  static Vector load_weight(const Weight* p) { return f_load_bfloat16(p); }
};

// Round n (a multiple of 16) floats to the model's format.
template <class N> inline void narrow(const float* from, typename N::Element* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) N::store(to + i, f_load(from + i));
}

}  // namespace

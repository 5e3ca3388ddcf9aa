// A base whose weights stand in eight bits: w = d q + m with q in 0 to 255, a scale d and a minimum m for each 32 inputs of an output, cut
// to bfloat16 (packing.py rounds beforehand for that, so that cutting is no worse than rounding, and less work).
//
// A panel is made bfloat16 again just before it is multiplied, and then everything is as with a bfloat16 base of these weights, bit for bit.
// A step reads each weight once, so a small batch, which memory limits, gets faster by the bytes that are not read. Scales for whole rows,
// and inputs in eight bits, would be faster still, and are too coarse (docs/performance.md).
#pragma once
#include "numbers.h"

namespace {

constexpr int kInt8Group = 32;  // inputs that share a scale and a minimum

// Of 32 outputs x 32 inputs. 16-bit floats; scales are multiplied by 2^12, so that small ones keep all their bits.
struct Int8Group {
  uint16_t scales[kPanel], minima[kPanel];
  uint8_t weights[kInt8Group / 2][kPanel / kLanes][2][kLanes];  // pairs of inputs, halves of the panel, the two of the pair, outputs
};
constexpr float kScaleUnit = 1.0f / 4096;

inline int64_t int8_panel_bytes(int64_t size) { return size / kInt8Group * (int64_t)sizeof(Int8Group); }

constexpr int64_t kInt8FetchBytes = 8 * sizeof(Int8Group);  // ahead in the weights

constexpr int64_t kFetchStep = sizeof(Int8Group) / kInt8Group;  // less than a cache line: none is left out

// `groups` groups of one panel -> [inputs / 2][32][2].
inline void widen_int8(const uint8_t* panel, int64_t groups, uint16_t* out) {
  for (int64_t number = 0; number < groups; number++, out += kInt8Group * kPanel) {
    const Int8Group& group = *(const Int8Group*)(panel + number * (int64_t)sizeof(Int8Group));
    for (int half = 0; half < kPanel / kLanes; half++) {
      const F16 scale = f_mul(f_load_half(group.scales + half * kLanes), f_set(kScaleUnit));
      // Bytes are loaded as q + kBytesOffset, which a float holds exactly.
      const F16 minimum = f_fnma(scale, f_set(kBytesOffset), f_load_half(group.minima + half * kLanes));
      for (int pair = 0; pair < kInt8Group / 2; pair++) {
        const uint8_t(&bytes)[2][kLanes] = group.weights[pair][half];
        // A little each time, so that no burst of it keeps the arithmetic waiting.
        _mm_prefetch((const char*)&group + kInt8FetchBytes + (half * kInt8Group / 2 + pair) * kFetchStep, _MM_HINT_T0);
        f_store_cut(out + pair * 2 * kPanel + half * 2 * kLanes, f_fma(f_load_bytes(bytes[0]), scale, minimum),
                    f_fma(f_load_bytes(bytes[1]), scale, minimum));
      }
    }
  }
}

constexpr int kNearInputs = 256;  // of a panel that are bfloat16 at a time: 16 KB, which the next level of memory never sees

// Calls do(first input, inputs) for one part of a panel after the other, when it stands in `near`.
template <class Do>
inline void for_near_parts(const uint8_t* panel, int64_t size, uint16_t* near, Do work) {
  for (int64_t k = 0; k < size; k += kNearInputs) {
    const int64_t inputs = size - k < kNearInputs ? size - k : kNearInputs;
    widen_int8(panel + int8_panel_bytes(k), inputs / kInt8Group, near);
    work(k, inputs);
  }
}

// The row `column` of a panel, as floats.
inline void int8_row(const uint8_t* panel, int column, int64_t size, float* out) {
  alignas(64) uint16_t group[kInt8Group * kPanel];
  for (int64_t first = 0; first < size; first += kInt8Group) {
    widen_int8(panel + int8_panel_bytes(first), 1, group);
    for (int k = 0; k < kInt8Group; k++) out[first + k] = widen(group[k / 2 * 2 * kPanel + 2 * column + k % 2]);
  }
}

}  // namespace

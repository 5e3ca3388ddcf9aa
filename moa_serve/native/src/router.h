// A router's word on a tile of tokens: net -> activation -> selection -> normalisation, float32 throughout, because `>=` is
// discontinuous and a rounded router flips experts. Weights may stand in bfloat16 where that holds them exactly.
//
// Not kept is exactly 0. The sigmoid of 0 is exactly 0.5.
#pragma once
#include "abi.h"
#include "experts.h"

namespace {

// scores -> gates of `outputs` experts. `threshold` is what a score had to reach.
using Select = void (*)(const MoaRouter& router, const float* scores, float threshold, float* gates);

inline void normalise(float* gates, int outputs) {
  float total = 0;
  for (int e = 0; e < outputs; e++) total += gates[e];
  if (total == 0) return;
  for (int e = 0; e < outputs; e++) gates[e] /= total;
}

inline void keep_all(const MoaRouter& router, const float* scores, float, float* gates) {
  memcpy(gates, scores, (size_t)router.outputs * sizeof(float));
}

inline void keep_reached(const MoaRouter& router, const float* scores, float threshold, float* gates) {
  for (int e = 0; e < router.outputs; e++) gates[e] = scores[e] >= threshold ? scores[e] : 0.0f;
}

inline void keep_largest(const MoaRouter& router, const float* scores, float, float* gates) {  // of equals the first
  uint64_t kept = 0;  // a router has at most 64 outputs
  for (int e = 0; e < router.outputs; e++) gates[e] = 0;
  for (int k = 0; k < router.top_k && k < router.outputs; k++) {
    int best = -1;
    for (int e = 0; e < router.outputs; e++)
      if (!(kept >> e & 1) && (best < 0 || scores[e] > scores[best])) best = e;
    kept |= uint64_t{1} << best;
    gates[best] = scores[best];
  }
  normalise(gates, router.outputs);
}

inline void keep_excess(const MoaRouter& router, const float* scores, float threshold, float* gates) {
  for (int e = 0; e < router.outputs; e++) gates[e] = scores[e] - threshold > 0 ? scores[e] - threshold : 0.0f;
  normalise(gates, router.outputs);
}

constexpr Select kSelects[MOA_NUM_SELECTS] = {keep_all, keep_reached, keep_largest, keep_excess};

inline void activate(float* logits, int outputs, bool is_softmax) {
  const int end = (int)padded(outputs, kLanes);
  if (!is_softmax) {
    for (int e = 0; e < end; e += kLanes) f_store(logits + e, f_sigmoid(f_load(logits + e)));
    return;
  }
  F16 largest = f_set(-INFINITY), total = f_zero();
  for (int e = 0; e < end; e += kLanes) largest = f_max(largest, f_keep_lanes(f_load(logits + e), 0, outputs - e, -INFINITY));
  const F16 top = f_set(f_largest(largest));
  for (int e = 0; e < end; e += kLanes) {
    const F16 share = f_exp(f_sub(f_keep_lanes(f_load(logits + e), 0, outputs - e, -INFINITY), top));
    total = f_add(total, share);
    f_store(logits + e, share);
  }
  const F16 sum = f_set(f_sum(total));
  for (int e = 0; e < end; e += kLanes) f_store(logits + e, f_div(f_load(logits + e), sum));
}

// `rows` holds one token's products with the router's rows and has room for 16 more; out go gates (outputs), the threshold, and, where
// wanted, the trace [scores | threshold | selected | gates]. `scratch` has room for the outputs and the hidden units, each rounded up to 16.
inline void finish_route(const MoaRouter& router, const uint8_t* blob, float* rows, float* scratch, float* gates, float& threshold,
                         float* trace) {
  const float* bias = (const float*)(blob + router.row_bias_at);
  for (int row = 0; row < router.num_rows; row++) rows[row] += bias[row];
  float* scores = scratch;
  if (router.hidden > 0) {
    const int width = (int)padded(router.hidden, kLanes);
    float* hidden = scratch + padded(router.outputs, kLanes);
    for (int j = 0; j < width; j += kLanes) {
      const F16 product = f_mul(f_silu(f_load(rows + j)), f_load(rows + router.hidden + j));
      f_store(hidden + j, f_keep_lanes(product, 0, router.hidden - j, 0.0f));
    }
    const float* w2 = (const float*)(blob + router.w2_at);
    const float* b2 = (const float*)(blob + router.w2_bias_at);
    for (int e = 0; e < router.outputs; e++) {
      F16 sum = f_zero();
      for (int j = 0; j < width; j += kLanes) sum = f_fma(f_load(hidden + j), f_load(w2 + (int64_t)e * width + j), sum);
      scores[e] = f_sum(sum) + b2[e];
    }
  } else {
    memcpy(scores, rows, (size_t)router.outputs * sizeof(float));
  }
  activate(scores, router.outputs, router.is_softmax != 0);
  threshold = router.max_threshold;
  if (router.has_threshold_rows) {
    float lane[kLanes];
    f_store(lane, f_sigmoid(f_set(rows[router.num_rows - 1])));
    threshold *= lane[0];
  }
  kSelects[router.select](router, scores, threshold, gates);
  if (trace == nullptr) return;
  float* place = trace + router.trace_at;
  memcpy(place, scores, (size_t)router.outputs * sizeof(float));
  place[router.outputs] = threshold;
  for (int e = 0; e < router.outputs; e++) place[router.outputs + 1 + e] = gates[e] != 0 || router.select == MOA_SELECT_ALL ? 1.0f : 0.0f;
  memcpy(place + 2 * router.outputs + 1, gates, (size_t)router.outputs * sizeof(float));
}

}  // namespace

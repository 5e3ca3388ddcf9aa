// A router's word on a tile of tokens: net -> activation -> selection -> normalisation, float32 throughout, because `>=` is
// discontinuous and a rounded router flips experts. Weights may stand in bfloat16 where that holds them exactly.
//
// Not kept is exactly 0. The sigmoid of 0 is exactly 0.5.
#pragma once
#include "abi.h"
#include "experts.h"

namespace {

inline void normalise(float* gates, int outputs) {
  float total = 0;
  for (int e = 0; e < outputs; e++) total += gates[e];
  if (total == 0) return;
  for (int e = 0; e < outputs; e++) gates[e] /= total;
}

inline uint64_t first_outputs(int outputs) { return outputs < 64 ? (uint64_t{1} << outputs) - 1 : ~uint64_t{0}; }

// NaN is above all, so that it comes out and the row fails, as where everything is kept.
inline bool is_larger(float value, float than) { return value > than || (value != value && than == than); }

// Of the kept experts the forced ones and then those with the largest values, `top_k` together; of equals the first.
inline uint64_t keep_largest(const MoaRule& rule, const float* values, uint64_t kept, int outputs) {
  uint64_t chosen = 0;
  for (int k = 0; k < rule.top_k; k++) {
    int best = -1;
    bool is_best_forced = false;
    for (int e = 0; e < outputs; e++) {
      if (!((kept & ~chosen) >> e & 1)) continue;
      const bool is_forced = rule.forced >> e & 1;
      if (best >= 0 && (is_best_forced || !(is_forced || is_larger(values[e], values[best])))) continue;
      best = e;
      is_best_forced = is_forced;
    }
    if (best < 0) break;
    chosen |= uint64_t{1} << best;
  }
  return chosen;
}

// scores -> gates of `outputs` experts, at most 64; which were kept. `threshold` is what a score had to reach.
inline uint64_t apply(const MoaRule& rule, const float* scores, float threshold, int outputs, float* gates) {
  const float subtracted = rule.subtracts ? threshold : 0.0f;
  uint64_t kept = first_outputs(outputs);
  for (int e = 0; e < outputs; e++) gates[e] = scores[e] - subtracted;
  if (rule.has_threshold) {
    kept = 0;
    for (int e = 0; e < outputs; e++) kept |= uint64_t{rule.subtracts ? gates[e] > 0 : scores[e] >= threshold} << e;
    kept |= rule.forced & first_outputs(outputs);
  }
  kept &= ~rule.disabled;
  if (rule.top_k > 0) kept = keep_largest(rule, gates, kept, outputs);
  for (int e = 0; e < outputs; e++)
    if (!(kept >> e & 1)) gates[e] = 0;
  if (rule.renormalises) normalise(gates, outputs);
  return kept;
}

inline const MoaRule& rule_of(const MoaRouter& router, const MoaRule* rules) { return rules == nullptr ? router.rule : rules[router.number]; }

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
inline void finish_route(const MoaRouter& router, const MoaRule& rule, const uint8_t* blob, float* rows, float* scratch, float* gates,
                         float& threshold, float* trace) {
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
  threshold = rule.has_threshold ? rule.threshold : 0.0f;
  if (rule.has_threshold && rule.is_function) {
    float lane[kLanes];
    f_store(lane, f_sigmoid(f_set(rows[router.num_rows - 1])));
    threshold *= lane[0];
  }
  const uint64_t kept = apply(rule, scores, threshold, router.outputs, gates);
  if (trace == nullptr) return;
  float* place = trace + router.trace_at;
  memcpy(place, scores, (size_t)router.outputs * sizeof(float));
  place[router.outputs] = threshold;
  for (int e = 0; e < router.outputs; e++) place[router.outputs + 1 + e] = kept >> e & 1 ? 1.0f : 0.0f;
  memcpy(place + 2 * router.outputs + 1, gates, (size_t)router.outputs * sizeof(float));
}

}  // namespace

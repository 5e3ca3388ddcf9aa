// Attention over pages of 16 tokens, one query row at a time, so that a row's result depends neither on its neighbours nor on how its
// sequence was cut into steps. Keys of a page stand as [head_dim / kPerLane][16][kPerLane] (a lane is a token), values as
// [16 / kPerLane][head_dim rounded up to 16][kPerLane] (a lane is a dimension).
#pragma once
#include "norm.h"

namespace {

constexpr int kHeadsTogether = 4;    // query heads that share a pass over a page's keys
constexpr int kVectorsTogether = 4;  // vectors of the head's output that are added up in registers

struct PageShape {
  int head_dim;
  template <class N>
  int64_t keys() const {
    return padded(head_dim, N::kPerLane) * kPage;
  }
  int64_t value_width() const { return padded(head_dim, kLanes); }
  int64_t values() const { return value_width() * kPage; }
};

// Which tokens of its sequence a query sees: [0, until) and [from, last].
struct Sight {
  int until, from, last;
};

inline F16 hide(F16 scores, const Sight& sight, int first_token) {
  const F16 own = f_keep_lanes(scores, sight.from - first_token, sight.last + 1 - first_token, -INFINITY);
  if (sight.until <= first_token) return own;
  return f_max(own, f_keep_lanes(scores, 0, sight.until - first_token, -INFINITY));
}

// The page after `page` that has a token in sight.
inline int next_page(int page, const Sight& sight) {
  const int next = page + 1;
  return next * kPage >= sight.until && next < sight.from / kPage ? sight.from / kPage : next;
}

inline int first_page(const Sight& sight) { return sight.until > 0 ? 0 : sight.from / kPage; }

// kHeads query heads on one kv head. `pages(i)` is the place of a sequence's i-th page, `weights` (one for each token, or NULL) count the
// tokens' shares after the softmax. `scores` has room for kHeads * 16 floats a page. Out: (kHeads, value width).
template <class N, int kHeads, class Pages>
inline void attend(const typename N::Element* q, int64_t q_stride, const typename N::Element* keys, const typename N::Element* values,
                   int64_t key_page_stride, int64_t value_page_stride, Pages pages, const Sight& sight, PageShape shape,
                   const float* weights, float* scores, float* out) {
  const float scale = 1.0f / sqrtf((float)shape.head_dim);
  const int64_t key_size = padded(shape.head_dim, N::kPerLane), width = shape.value_width();
  F16 largest[kHeads];
  for (int head = 0; head < kHeads; head++) largest[head] = f_set(-INFINITY);
  float* place = scores;
  for (int page = first_page(sight); page * kPage <= sight.last; page = next_page(page, sight)) {
    const typename N::Element* key = keys + pages(page) * key_page_stride;
    F16 sum[kHeads];
    for (int head = 0; head < kHeads; head++) sum[head] = f_zero();
    for (int64_t d = 0; d < key_size; d += N::kPerLane) {
      const typename N::Vector tokens = N::load(key + d * kPage);
      for (int head = 0; head < kHeads; head++) sum[head] = N::dot(sum[head], tokens, N::spread(q + head * q_stride + d));
    }
    for (int head = 0; head < kHeads; head++, place += kPage) {
      const F16 seen = hide(f_mul(sum[head], f_set(scale)), sight, page * kPage);
      f_store(place, seen);
      largest[head] = f_max(largest[head], seen);
    }
  }
  F16 total[kHeads];
  float top[kHeads];
  for (int head = 0; head < kHeads; head++) top[head] = f_largest(largest[head]), total[head] = f_zero();
  place = scores;
  for (int page = first_page(sight); page * kPage <= sight.last; page = next_page(page, sight))
    for (int head = 0; head < kHeads; head++, place += kPage) {
      F16 share = f_exp(f_sub(f_load(place), f_set(top[head])));
      total[head] = f_add(total[head], share);
      if (weights != nullptr) share = f_mul(share, f_load(weights + page * kPage));
      f_store(place, share);
    }
  for (int64_t column = 0; column < width; column += kVectorsTogether * kLanes) {
    const int vectors = (int)((width - column) / kLanes < kVectorsTogether ? (width - column) / kLanes : kVectorsTogether);
    F16 sum[kHeads][kVectorsTogether];
    for (int head = 0; head < kHeads; head++)
      for (int vector = 0; vector < kVectorsTogether; vector++) sum[head][vector] = f_zero();
    place = scores;
    for (int page = first_page(sight); page * kPage <= sight.last; page = next_page(page, sight), place += kHeads * kPage) {
      const typename N::Element* value = values + pages(page) * value_page_stride + column * N::kPerLane;
      typename N::Element shares[kHeads][kPage];
      for (int head = 0; head < kHeads; head++) N::store(shares[head], f_load(place + head * kPage));
      for (int token = 0; token < kPage; token += N::kPerLane)
        for (int vector = 0; vector < vectors; vector++) {
          const typename N::Vector dimensions = N::load(value + (token * width + vector * kLanes * N::kPerLane));
          for (int head = 0; head < kHeads; head++)
            sum[head][vector] = N::dot(sum[head][vector], dimensions, N::spread(shares[head] + token));
        }
    }
    for (int head = 0; head < kHeads; head++) {
      const F16 inverse = f_set(1.0f / f_sum(total[head]));
      for (int vector = 0; vector < vectors; vector++)
        f_store(out + head * width + column + vector * kLanes, f_mul(sum[head][vector], inverse));
    }
  }
}

// Any number of query heads on one kv head.
template <class N, class Pages>
inline void attend_group(int heads, const typename N::Element* q, int64_t q_stride, const typename N::Element* keys,
                         const typename N::Element* values, int64_t key_page_stride, int64_t value_page_stride, Pages pages,
                         const Sight& sight, PageShape shape, const float* weights, float* scores, float* out) {
  for (int head = 0; head < heads;) {
    const typename N::Element* own = q + head * q_stride;
    float* place = out + head * shape.value_width();
    const int together = heads - head < kHeadsTogether ? heads - head : kHeadsTogether;
    switch (together) {
      case 4:
        attend<N, 4>(own, q_stride, keys, values, key_page_stride, value_page_stride, pages, sight, shape, weights, scores, place);
        break;
      case 3:
        attend<N, 3>(own, q_stride, keys, values, key_page_stride, value_page_stride, pages, sight, shape, weights, scores, place);
        break;
      case 2:
        attend<N, 2>(own, q_stride, keys, values, key_page_stride, value_page_stride, pages, sight, shape, weights, scores, place);
        break;
      default:
        attend<N, 1>(own, q_stride, keys, values, key_page_stride, value_page_stride, pages, sight, shape, weights, scores, place);
    }
    head += together;
  }
}

// Write one token's key and value of one kv head, already in the model's format, at `slot` of its page. The first token of a page clears
// it: a hidden place still meets a share of 0, and 0 * NaN is NaN.
template <class N>
inline void append(const typename N::Element* key, const typename N::Element* value, PageShape shape, int slot,
                   typename N::Element* key_page, typename N::Element* value_page) {
  constexpr int kPer = N::kPerLane;
  if (slot == 0) {
    memset(key_page, 0, (size_t)shape.keys<N>() * sizeof(*key_page));
    memset(value_page, 0, (size_t)shape.values() * sizeof(*value_page));
  }
  for (int d = 0; d < shape.head_dim; d++) {
    key_page[(d / kPer) * kPage * kPer + slot * kPer + d % kPer] = key[d];
    value_page[(slot / kPer) * shape.value_width() * kPer + d * kPer + slot % kPer] = value[d];
  }
}

}  // namespace

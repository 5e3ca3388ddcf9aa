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

// Where the pages of a sequence stand: its i-th at table[i]; without a table, at i. One type for all: each would compile attention again.
struct Pages {
  const int32_t* table;
  int64_t operator()(int place) const { return table != nullptr ? table[place] : place; }
};

// Which tokens of its sequence a query sees: [0, until) and [from, last].
struct Sight {
  int until, from, last;
};

// A score in sight comes out as it is, also where it is NaN.
inline F16 hide(F16 scores, const Sight& sight, int first_token) {
  const F16 known = f_keep_lanes(scores, 0, sight.last + 1 - first_token, -INFINITY);
  return f_replace_lanes(known, sight.until - first_token, sight.from - first_token, -INFINITY);
}

// The page after `page` that has a token in sight.
inline int next_page(int page, const Sight& sight) {
  const int next = page + 1;
  return next * kPage >= sight.until && next < sight.from / kPage ? sight.from / kPage : next;
}

// Whether all of a page is seen, so that nothing has to be hidden.
inline bool sees_page(const Sight& sight, int page) {
  const int begin = page * kPage, end = begin + kPage;
  return end <= sight.last + 1 && (end <= sight.until || sight.from <= begin);
}

inline int first_page(const Sight& sight) { return sight.until > 0 ? 0 : sight.from / kPage; }

// kVectors vectors of the output from `column` on: the values of all pages in sight by their shares, times `inverse`.
template <class N, int kHeads, int kVectors>
inline void add_values(const float* shares, const typename N::Element* values, int64_t value_page_stride, Pages pages, const Sight& sight,
                       int64_t width, int64_t column, const F16* inverse, float* out) {
  F16 sum[kHeads][kVectors];
  for (int head = 0; head < kHeads; head++)
    for (int vector = 0; vector < kVectors; vector++) sum[head][vector] = f_zero();
  for (int page = first_page(sight); page * kPage <= sight.last; page = next_page(page, sight), shares += kHeads * kPage) {
    const typename N::Element* value = values + pages(page) * value_page_stride + column * N::kPerLane;
    typename N::Element narrow_shares[kHeads][kPage];
    for (int head = 0; head < kHeads; head++) N::store(narrow_shares[head], f_load(shares + head * kPage));
    for (int token = 0; token < kPage; token += N::kPerLane)
      for (int vector = 0; vector < kVectors; vector++) {
        const typename N::Vector dimensions = N::load(value + (token * width + vector * kLanes * N::kPerLane));
        for (int head = 0; head < kHeads; head++)
          sum[head][vector] = N::dot(sum[head][vector], dimensions, N::spread(narrow_shares[head] + token));
      }
  }
  for (int head = 0; head < kHeads; head++)
    for (int vector = 0; vector < kVectors; vector++)
      f_store(out + head * width + column + vector * kLanes, f_mul(sum[head][vector], inverse[head]));
}

// kHeads query heads on one kv head. `pages(i)` is the place of a sequence's i-th page, `weights` (one for each token, or NULL) count the
// tokens' shares after the softmax. `scores` has room for kHeads * 16 floats a page. Out: (kHeads, value width).
template <class N, int kHeads>
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
    const int following = next_page(page, sight);
    if (following * kPage <= sight.last) fetch(keys + pages(following) * key_page_stride, shape.keys<N>() * sizeof(*keys));
    fetch(values + pages(page) * value_page_stride, shape.values() * sizeof(*values));
    F16 sum[kHeads][2];  // of every other step: an addition waits for the one before it
    for (int head = 0; head < kHeads; head++) sum[head][0] = sum[head][1] = f_zero();
    for (int64_t d = 0; d < key_size; d += 2 * N::kPerLane)
      for (int turn = 0; turn < 2 && d + turn * N::kPerLane < key_size; turn++) {
        const typename N::Vector tokens = N::load(key + (d + turn * N::kPerLane) * kPage);
        for (int head = 0; head < kHeads; head++)
          sum[head][turn] = N::dot(sum[head][turn], tokens, N::spread(q + head * q_stride + d + turn * N::kPerLane));
      }
    for (int head = 0; head < kHeads; head++, place += kPage) {
      const F16 seen = hide(f_mul(f_add(sum[head][0], sum[head][1]), f_set(scale)), sight, page * kPage);
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
  F16 inverse[kHeads];
  for (int head = 0; head < kHeads; head++) inverse[head] = f_set(1.0f / f_sum(total[head]));
  int64_t column = 0;
  for (; column + kVectorsTogether * kLanes <= width; column += kVectorsTogether * kLanes)
    add_values<N, kHeads, kVectorsTogether>(scores, values, value_page_stride, pages, sight, width, column, inverse, out);
  for (; column < width; column += kLanes) add_values<N, kHeads, 1>(scores, values, value_page_stride, pages, sight, width, column, inverse, out);
}

// Any number of query heads on one kv head.
template <class N>
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
  typename N::Element *key_place = key_page + slot * kPer, *value_place = value_page + slot / kPer * shape.value_width() * kPer + slot % kPer;
  for (int d = 0; d < shape.head_dim; d += kPer) memcpy(key_place + d * kPage, key + d, kPer * sizeof(*key));
  for (int d = 0; d < shape.head_dim; d++) value_place[d * kPer] = value[d];
}

}  // namespace

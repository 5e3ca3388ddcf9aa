// What an expert adds: c = w * scale * (A u), y += B c, in tiles of neighbouring tokens. An expert that no token of a tile needs is not
// touched, and neither, without AMX, is it for those that do not. A token's numbers do not depend on which others are in its tile: every
// output is one chain of additions, or, with AMX, four that are added up at the end.
#pragma once
#include "abi.h"
#include "numbers.h"
#include "step_types.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace {

constexpr int kTogether = 4;    // tokens that share the loads of a row of A or B
constexpr int kTogetherRows = 4;  // rows of A beside each other with so many tokens: 16 sums
constexpr int kLoneRows = 8;      // with one token

template <class N, int kTokens, int kRows>
inline void dot_tile(const typename N::Element* const* x, const typename N::Weight* a, int64_t size, float* const* out) {
  F16 sum[kTokens][kRows];
  for (int token = 0; token < kTokens; token++)
    for (int row = 0; row < kRows; row++) sum[token][row] = f_zero();
  for (int64_t k = 0; k < size; k += kLanes * N::kPerLane) {
    typename N::Vector weights[kRows];
    for (int row = 0; row < kRows; row++) weights[row] = N::load_weight(a + row * size + k);
    for (int token = 0; token < kTokens; token++) {
      const typename N::Vector input = N::load(x[token] + k);
      for (int row = 0; row < kRows; row++) sum[token][row] = N::dot(sum[token][row], input, weights[row]);
    }
  }
  for (int token = 0; token < kTokens; token++)
    for (int row = 0; row < kRows; row++) out[token][row] = f_sum(sum[token][row]);
}

template <class N, int kTokens, int kRows>
inline void dot_rows(const typename N::Element* const* x, const typename N::Weight* a, int64_t size, int rows, float* const* out) {
  float* place[kTokens];
  int row = 0;
  for (; row + kRows <= rows; row += kRows) {
    for (int token = 0; token < kTokens; token++) place[token] = out[token] + row;
    dot_tile<N, kTokens, kRows>(x, a + row * size, size, place);
  }
  for (; row < rows; row++) {
    for (int token = 0; token < kTokens; token++) place[token] = out[token] + row;
    dot_tile<N, kTokens, 1>(x, a + row * size, size, place);
  }
}

// out[token][row] = a[row] . x[token] for up to kTogether tokens; `size` is a multiple of 32.
template <class N>
inline void dots(int tokens, const typename N::Element* const* x, const typename N::Weight* a, int64_t size, int rows,
                 float* const* out) {
  if (tokens == kTogether) return dot_rows<N, kTogether, kTogetherRows>(x, a, size, rows, out);
  for (int token = 0; token < tokens; token++) dot_rows<N, 1, kLoneRows>(x + token, a, size, rows, out + token);
}

// out (count, stride)[token][row] = a[row] . x[token] for the listed of `count` tokens, which stand one after the other in x (count, size);
// the others' places may be written as well. `a` stands in tiles where the instruction set has them.
template <class N>
inline void tile_product([[maybe_unused]] int count, const int32_t* listed, int num_listed, const typename N::Element* x, int64_t size,
                         const typename N::Weight* a, int rows, float* out, int64_t stride) {
#if defined(__AMX_BF16__)
  if constexpr (N::kIsOnTiles) return tile_dots(count, x, a, size, rows, out, stride);
#endif
  for (int first = 0; first < num_listed; first += kTogether) {
    const int together = num_listed - first < kTogether ? num_listed - first : kTogether;
    const typename N::Element* inputs[kTogether];
    float* place[kTogether];
    for (int member = 0; member < together; member++) {
      inputs[member] = x + listed[first + member] * size;
      place[member] = out + listed[first + member] * stride;
    }
    dots<N>(together, inputs, a, size, rows, place);
  }
}

// One panel of y += B c for kTokens tokens; b is [rank / kPerLane][32][kPerLane].
template <class N, int kTokens>
inline void expand_panel(const typename N::Element* const* c, const typename N::Element* b, int rank, float* const* y) {
  F16 sum[kTokens][2];
  for (int token = 0; token < kTokens; token++) sum[token][0] = f_load(y[token]), sum[token][1] = f_load(y[token] + kLanes);
  for (int r = 0; r < rank; r += N::kPerLane) {
    const typename N::Vector left = N::load(b + r * kPanel), right = N::load(b + r * kPanel + kLanes * N::kPerLane);
    for (int token = 0; token < kTokens; token++) {
      const typename N::Vector coefficient = N::spread(c[token] + r);
      sum[token][0] = N::dot(sum[token][0], left, coefficient);
      sum[token][1] = N::dot(sum[token][1], right, coefficient);
    }
  }
  for (int token = 0; token < kTokens; token++) f_store(y[token], sum[token][0]), f_store(y[token] + kLanes, sum[token][1]);
}

// Where a section of a fused output stands: its i-th panel is the fused one first + i * stride.
struct Section {
  float* out;
  int64_t row_stride;
  int first, stride, panels;
};

// Panels of the section that lie in the fused range [begin, end).
inline int section_place(const Section& section, int64_t fused) {
  if (fused <= section.first) return 0;
  const int64_t place = (fused - section.first + section.stride - 1) / section.stride;
  return place < section.panels ? (int)place : section.panels;
}

template <class N, int kTokens>
inline void expand_tile(const int32_t* tokens, const typename N::Element* coefficients, int64_t coefficient_stride,
                        const typename N::Element* b, int rank, const Section& section, int begin, int end) {
  const typename N::Element* c[kTokens];
  float* y[kTokens];
  for (int token = 0; token < kTokens; token++) c[token] = coefficients + tokens[token] * coefficient_stride;
  for (int panel = begin; panel < end; panel++) {
    for (int token = 0; token < kTokens; token++)
      y[token] = section.out + tokens[token] * section.row_stride + (section.first + (int64_t)panel * section.stride) * kPanel;
    expand_panel<N, kTokens>(c, b + (int64_t)panel * kPanel * rank, rank, y);
  }
}

// y += B c of one expert after the other, in panels [begin, end) of a section, for a tile of `count` tokens that stand one after the other
// there and in the coefficients. What was added is there after `finish`.
template <class N>
class Expansion {
  using Element = typename N::Element;

 public:
  Expansion(int count, int64_t coefficient_stride, const Section& section, int begin, int end)
      : count_(count), coefficient_stride_(coefficient_stride), section_(section), begin_(begin), end_(end) {}

  // For the listed tokens; the others' coefficients are 0.
  void add([[maybe_unused]] const int32_t* listed, [[maybe_unused]] int num_listed, const Element* coefficients, const Element* b, int rank) {
#if defined(__AMX_BF16__)
    if constexpr (N::kIsOnTiles) {
      for (int first = 0; first < rank; first += kTileInputs) {
        const int inputs = rank - first < kTileInputs ? rank - first : kTileInputs;
        if (number_ == kTileExperts || inputs != inputs_) finish();
        inputs_ = inputs;
        experts_[number_++] = {coefficients + first, b + first * kPanel, (int64_t)rank * kPanel};
      }
      return;
    }
#endif
    int place = 0;
    for (; place + kTogether <= num_listed; place += kTogether)
      expand_tile<N, kTogether>(listed + place, coefficients, coefficient_stride_, b, rank, section_, begin_, end_);
    for (; place < num_listed; place++) expand_tile<N, 1>(listed + place, coefficients, coefficient_stride_, b, rank, section_, begin_, end_);
  }

  void finish() {
#if defined(__AMX_BF16__)
    if (number_ == 0) return;
    float* y = section_.out + (int64_t)section_.first * kPanel;
    tile_expand(count_, inputs_, experts_, number_, coefficient_stride_, y, section_.row_stride, section_.stride, begin_, end_);
    number_ = 0;
#endif
  }

 private:
  [[maybe_unused]] const int count_;
  const int64_t coefficient_stride_;
  const Section section_;
  const int begin_, end_;
#if defined(__AMX_BF16__)
  TileExpert experts_[kTileExperts];
  int number_ = 0, inputs_ = 0;
#endif
};

// y += w * bias for the listed tokens.
inline void add_bias(const int32_t* tokens, int count, const float* weights, const float* bias, const Section& section, int begin, int end) {
  for (int token = 0; token < count; token++)
    for (int panel = begin; panel < end; panel++) {
      float* y = section.out + tokens[token] * section.row_stride + (section.first + (int64_t)panel * section.stride) * kPanel;
      for (int lane = 0; lane < kPanel; lane += kLanes)
        f_store(y + lane, f_fma(f_set(weights[token]), f_load(bias + (int64_t)panel * kPanel + lane), f_load(y + lane)));
    }
}

}  // namespace

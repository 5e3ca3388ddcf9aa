// y = x W^T with W packed in panels of 32 output columns: [out / 32][in / kPerLane][32][kPerLane].
//
// Every output is one chain of additions over the reduced dimension in ascending order, whatever the number of rows in the tile, so a
// row's result does not depend on its neighbours: that is what makes a mixed batch bitwise equal to each request alone.
#pragma once
#include "int8.h"
#include "numbers.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 rows x 2 vectors fill 24 of 32 registers; a panel and a spread input take 3
#else
constexpr int kTileRows = 3;   // 3 rows x 2 x 2 registers of 16
#endif
constexpr int kPrefetchBytes = 2048;  // ahead in the panel: about the latency of memory at the speed at which it is read

// Writes y, or adds to it, as if its chains had never been interrupted.
template <class N, int kRows>
inline void gemm_tile(const typename N::Element* x, int64_t x_stride, const typename N::Element* panel, int64_t size, float* y,
                      int64_t y_stride, bool goes_on) {
  F16 sum[kRows][2];
  for (int row = 0; row < kRows; row++)
    for (int half = 0; half < 2; half++) sum[row][half] = goes_on ? f_load(y + row * y_stride + half * kLanes) : f_zero();
  for (int64_t k = 0; k < size; k += N::kPerLane) {
    const typename N::Element* weights = panel + k * kPanel;
    const typename N::Vector left = N::load(weights), right = N::load(weights + kLanes * N::kPerLane);
    _mm_prefetch((const char*)weights + kPrefetchBytes, _MM_HINT_T0);
    _mm_prefetch((const char*)weights + kPrefetchBytes + 64, _MM_HINT_T0);
    for (int row = 0; row < kRows; row++) {
      const typename N::Vector input = N::spread(x + row * x_stride + k);
      sum[row][0] = N::dot(sum[row][0], left, input);
      sum[row][1] = N::dot(sum[row][1], right, input);
    }
  }
  for (int row = 0; row < kRows; row++) {
    f_store(y + row * y_stride, sum[row][0]);
    f_store(y + row * y_stride + kLanes, sum[row][1]);
  }
}

// The tile for the last `rows` rows, which are fewer than kTileRows.
template <class N, int kRows>
inline void gemm_rest(int rows, const typename N::Element* x, int64_t x_stride, const typename N::Element* panel, int64_t size, float* y,
                      int64_t y_stride, bool goes_on) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return gemm_tile<N, kRows>(x, x_stride, panel, size, y, y_stride, goes_on);
    gemm_rest<N, kRows - 1>(rows, x, x_stride, panel, size, y, y_stride, goes_on);
  }
}

// Panels one after the other, each for all rows: x (rows, x_stride) -> y (rows, y_stride), of which a panel writes 32 columns.
template <class N>
struct RowTiles {
  using Element = typename N::Element;
  const int rows;

  explicit RowTiles(int rows_) : rows(rows_) {}

  void product(const Element* x, int64_t x_stride, const Element* panel, int64_t size, float* y, int64_t y_stride, bool goes_on) const {
    int row = 0;
    for (; row + kTileRows <= rows; row += kTileRows)
      gemm_tile<N, kTileRows>(x + row * x_stride, x_stride, panel, size, y + row * y_stride, y_stride, goes_on);
    gemm_rest<N, kTileRows - 1>(rows - row, x + row * x_stride, x_stride, panel, size, y + row * y_stride, y_stride, goes_on);
  }

  void plain_product(const Element* x, int64_t x_stride, const Element* panel, int64_t size, float* y, int64_t y_stride) const {
    product(x, x_stride, panel, size, y, y_stride, false);
  }

  void int8_product(const Element* x, int64_t x_stride, const uint8_t* panel, int64_t size, float* y, int64_t y_stride) const {
    alignas(64) uint16_t near[kNearInputs * kPanel];
    for_near_parts(panel, size, near, [&](int64_t k, int64_t inputs) { product(x + k, x_stride, near, inputs, y, y_stride, k > 0); });
  }
};

#if defined(__AMX_BF16__)
template <>
struct RowTiles<Bfloat16> : TileRows {
  using TileRows::TileRows;
};
#else
inline void memory_is_seen() {}
#endif

// After the last product of a step: the processor need not save the tiles any longer when threads change.
inline void end_products() {
#if defined(__AMX_BF16__)
  _tile_release();
#endif
}

inline void add_row_bias(const float* bias, int rows, int64_t first, int64_t last, float* y, int64_t y_stride) {
  if (bias == nullptr) return;
  for (int row = 0; row < rows; row++)
    for (int64_t k = first * kPanel; k < last * kPanel; k += kLanes)
      f_store(y + row * y_stride + k, f_add(f_load(y + row * y_stride + k), f_load(bias + k)));
}

// Panels [first, last) of a packed weight; `bias` (padded out) or NULL. `size` is a multiple of 32.
template <class N>
inline void gemm(const typename N::Element* x, int64_t x_stride, int rows, const typename N::Element* weights, int64_t size,
                 const float* bias, int64_t first, int64_t last, float* y, int64_t y_stride) {
  if (rows == 0) return;
  const RowTiles<N> tiles(rows);
  memory_is_seen();
  for (int64_t panel = first; panel < last; panel++)
    tiles.plain_product(x, x_stride, weights + panel * kPanel * size, size, y + panel * kPanel, y_stride);
  memory_is_seen();
  add_row_bias(bias, rows, first, last, y, y_stride);
}

// The same of weights in eight bits.
inline void gemm_int8(const uint16_t* x, int64_t x_stride, int rows, const uint8_t* weights, int64_t size, const float* bias, int64_t first,
                      int64_t last, float* y, int64_t y_stride) {
  if (rows == 0) return;
  const RowTiles<Bfloat16> tiles(rows);
  memory_is_seen();
  for (int64_t panel = first; panel < last; panel++)
    tiles.int8_product(x, x_stride, weights + panel * int8_panel_bytes(size), size, y + panel * kPanel, y_stride);
  memory_is_seen();
  add_row_bias(bias, rows, first, last, y, y_stride);
}

}  // namespace

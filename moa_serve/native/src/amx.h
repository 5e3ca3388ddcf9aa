// The product on AMX tiles, which multiply 16 rows at once: the processor's matrix unit reads the same packed panels, 32 inputs a step.
//
// The number of rows of a tile does not change what a row adds up to, and every product of this instruction set goes through here, so rows
// are as independent of their neighbours as elsewhere.
#pragma once
#include "numbers.h"

namespace {

constexpr int kTile = 16;      // rows of a tile, and columns of float32 sums
constexpr int kTileInputs = 32;  // bfloat16 inputs in a tile's row

// Tiles 0 to 3 are sums (two blocks of rows x two halves of a panel), 4 and 5 inputs of the two blocks, 6 and 7 weights.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int first, int second) {
    const int counts[8] = {first, first, second, second, first, second, kTile, kTile};
    for (int tile = 0; tile < 8; tile++) row_bytes[tile] = counts[tile] > 0 ? 64 : 0, rows[tile] = (uint8_t)counts[tile];
  }
};

inline void use_tiles(int first, int second) {
  const TileShapes shapes(first, second);
  _tile_loadconfig(&shapes);
}

// GCC's tile instructions do not tell the compiler that they read memory.
inline void memory_is_seen() { __asm__ volatile("" ::: "memory"); }

template <bool kTwoBlocks>
inline void tile_product(const uint16_t* x, int64_t x_stride, const uint16_t* panel, int64_t size, float* y, int64_t y_stride) {
  const int64_t x_bytes = x_stride * 2, y_bytes = y_stride * 4;
  constexpr int kWeightBytes = kPanel * 2 * 2;  // a pair of inputs for 32 columns
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwoBlocks) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < size; k += kTileInputs) {
    _tile_loadd(6, panel + k * kPanel, kWeightBytes);
    _tile_loadd(7, panel + k * kPanel + kTile * 2, kWeightBytes);
    _tile_loadd(4, x + k, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwoBlocks) {
      _tile_loadd(5, x + kTile * x_stride + k, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, y, y_bytes);
  _tile_stored(1, y + kTile, y_bytes);
  if constexpr (kTwoBlocks) {
    _tile_stored(2, y + kTile * y_stride, y_bytes);
    _tile_stored(3, y + kTile * y_stride + kTile, y_bytes);
  }
}

// Panels [first, last) for all rows. Loads tile shapes and leaves them: `Step::run` releases them.
inline void tile_panels(const uint16_t* x, int64_t x_stride, int rows, const uint16_t* weights, int64_t size, int64_t first, int64_t last,
                        float* y, int64_t y_stride) {
  const int whole = rows / (2 * kTile) * (2 * kTile), rest = rows - whole;
  const int low = rest < kTile ? rest : kTile, high = rest - low;
  memory_is_seen();
  if (whole == 0 && rest > 0) use_tiles(low, high);
  if (whole > 0 && rest == 0) use_tiles(kTile, kTile);
  for (int64_t panel = first; panel < last; panel++) {
    const uint16_t* own = weights + panel * kPanel * size;
    float* out = y + panel * kPanel;
    if (whole > 0 && rest > 0) use_tiles(kTile, kTile);
    for (int row = 0; row < whole; row += 2 * kTile) tile_product<true>(x + row * x_stride, x_stride, own, size, out + row * y_stride, y_stride);
    if (rest == 0) continue;
    if (whole > 0) use_tiles(low, high);
    if (high > 0)
      tile_product<true>(x + whole * x_stride, x_stride, own, size, out + whole * y_stride, y_stride);
    else
      tile_product<false>(x + whole * x_stride, x_stride, own, size, out + whole * y_stride, y_stride);
  }
  memory_is_seen();
}

}  // namespace

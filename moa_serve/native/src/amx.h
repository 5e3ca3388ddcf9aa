// Products on AMX tiles, which multiply 16 rows at once: the processor's matrix unit reads the same packed panels, 32 inputs a step.
//
// The number of rows of a tile does not change what a row adds up to, and every product of this instruction set goes through here, so rows
// are as independent of their neighbours as elsewhere.
#pragma once
#include "int8.h"

namespace {

constexpr int kTile = 16;      // rows of a tile, and columns of float32 sums
constexpr int kTileInputs = 32;  // bfloat16 inputs in a tile's row

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) { row_bytes[tile] = num_rows > 0 ? (uint16_t)bytes : 0, rows[tile] = (uint8_t)num_rows; }

  void use() const {
    __asm__ volatile("" : : "r"(this) : "memory");  // GCC's intrinsic tells the compiler of the first eight bytes only
    _tile_loadconfig(this);
  }
};

// Tiles 0 to 3 are sums (two blocks of rows x two halves of a panel), 4 and 5 inputs of the two blocks, 6 and 7 weights.
inline void use_tiles(int first, int second) {
  TileShapes shapes;
  const int counts[8] = {first, first, second, second, first, second, kTile, kTile};
  for (int tile = 0; tile < 8; tile++) shapes.set(tile, counts[tile], 64);
  shapes.use();
}

// Tiles 0 to 3 are sums (tokens x rows of A) that take turns, 4 and 5 tokens, 6 and 7 rows of A.
inline void use_dot_tiles(int tokens, int rows) {
  TileShapes shapes;
  for (int tile = 0; tile < 4; tile++) shapes.set(tile, tokens, rows * 4);
  for (int tile = 4; tile < 6; tile++) shapes.set(tile, tokens, 64);
  for (int tile = 6; tile < 8; tile++) shapes.set(tile, kTile, rows * 4);
  shapes.use();
}

// GCC's tile instructions do not tell the compiler that they read memory.
inline void memory_is_seen() { __asm__ volatile("" ::: "memory"); }

constexpr int kFetchBytes = 8192;  // ahead in the weights: tile loads alone do not keep memory busy

// Where the weights of 32 inputs and 32 columns are had from, step by step.
struct FarSteps {
  const uint16_t* panel;

  const uint16_t* operator()(int64_t k) const {
    fetch((const char*)(panel + k * kPanel) + kFetchBytes, kTileInputs * kPanel * 2);
    return panel + k * kPanel;
  }
};

struct NearSteps {
  const uint16_t* panel;

  const uint16_t* operator()(int64_t k) const { return panel + k * kPanel; }
};

// Two places take turns: a step is widened while the one before is multiplied.
struct Int8Steps {
  const uint8_t* panel;
  uint16_t* near;  // 64 inputs x 32 columns

  const uint16_t* operator()(int64_t k) const {
    uint16_t* out = near + (k & kTileInputs) * kPanel;
    widen_int8(panel + int8_panel_bytes(k), 1, out);
    memory_is_seen();
    return out;
  }
};

template <bool kTwoBlocks, class Steps>
inline void panel_product(const uint16_t* x, int64_t x_stride, Steps steps, int64_t size, float* y, int64_t y_stride, bool goes_on) {
  const int64_t x_bytes = x_stride * 2, y_bytes = y_stride * 4;
  constexpr int kWeightBytes = kPanel * 2 * 2;  // a pair of inputs for 32 columns
  if (goes_on) {
    _tile_loadd(0, y, y_bytes);
    _tile_loadd(1, y + kTile, y_bytes);
    if constexpr (kTwoBlocks) {
      _tile_loadd(2, y + kTile * y_stride, y_bytes);
      _tile_loadd(3, y + kTile * y_stride + kTile, y_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwoBlocks) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t k = 0; k < size; k += kTileInputs) {
    const uint16_t* weights = steps(k);
    _tile_loadd(6, weights, kWeightBytes);
    _tile_loadd(7, weights + kTile * 2, kWeightBytes);
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

// How rows fall into blocks of two tiles, and the shapes for them. Loads tile shapes and leaves them: `Step::run` releases them.
struct TileRows {
  int whole, low, high;  // rows in full blocks, and of the last one in its two tiles

  explicit TileRows(int rows) : whole(rows / (2 * kTile) * (2 * kTile)) {
    const int rest = rows - whole;
    low = rest < kTile ? rest : kTile, high = rest - low;
    if (whole > 0)
      use_tiles(kTile, kTile);
    else
      use_tiles(low, high);
  }

  // One panel for the last block's rows.
  template <class Steps>
  void last_product(const uint16_t* x, int64_t x_stride, Steps steps, int64_t size, float* y, int64_t y_stride, bool goes_on = false) const {
    if (high > 0) return panel_product<true>(x + whole * x_stride, x_stride, steps, size, y + whole * y_stride, y_stride, goes_on);
    panel_product<false>(x + whole * x_stride, x_stride, steps, size, y + whole * y_stride, y_stride, goes_on);
  }

  // One panel for all rows.
  template <class Steps>
  void product(const uint16_t* x, int64_t x_stride, Steps steps, int64_t size, float* y, int64_t y_stride, bool goes_on = false) const {
    if (whole == 0) return last_product(x, x_stride, steps, size, y, y_stride, goes_on);
    const NearSteps again = {steps.panel};
    panel_product<true>(x, x_stride, steps, size, y, y_stride, goes_on);
    for (int row = 2 * kTile; row < whole; row += 2 * kTile)
      panel_product<true>(x + row * x_stride, x_stride, again, size, y + row * y_stride, y_stride, goes_on);
    if (low == 0) return;
    use_tiles(low, high);
    last_product(x, x_stride, again, size, y, y_stride, goes_on);
    use_tiles(kTile, kTile);
  }

  void plain_product(const uint16_t* x, int64_t x_stride, const uint16_t* panel, int64_t size, float* y, int64_t y_stride) const {
    product(x, x_stride, FarSteps{panel}, size, y, y_stride);
  }

  void int8_product(const uint16_t* x, int64_t x_stride, const uint8_t* panel, int64_t size, float* y, int64_t y_stride) const {
    alignas(64) uint16_t near[kNearInputs * kPanel];
    if (whole == 0) return last_product(x, x_stride, Int8Steps{panel, near}, size, y, y_stride);
    for_near_parts(panel, size, near, [&](int64_t k, int64_t inputs) {
      memory_is_seen();
      product(x + k, x_stride, NearSteps{near}, inputs, y, y_stride, k > 0);
    });
  }
};

// out (tokens, stride)[token][row] = a[row] . x[token]; x (tokens, size), `a` in tiles. A row of `out` has room up to the next 16.
inline void tile_dots(int tokens, const uint16_t* x, const uint16_t* a, int64_t size, int rows, float* out, int64_t stride) {
  alignas(64) float sums[4][kTile * kTile];  // a product waits for the one before it in its sum: four take turns
  memory_is_seen();
  for (int first = 0; first < rows; first += kTile) {
    const int count = rows - first < kTile ? rows - first : kTile;
    const uint16_t *left = x, *right = a + first * size;
    const int64_t left_bytes = size * 2, right_bytes = count * 4;
    // What is ahead is read soon: more rows, then the expert's B, then the next expert; an adapter lies in the order of its use.
    const auto advance = [&] {
      fetch((const char*)right + kFetchBytes, kTileInputs * count * 2);
      return left += kTileInputs, right += kTileInputs * count, left < x + size;
    };
    use_dot_tiles(tokens, count);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (;;) {
      _tile_loadd(4, left, left_bytes);
      _tile_loadd(6, right, right_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if (!advance()) break;
      _tile_loadd(5, left, left_bytes);
      _tile_loadd(7, right, right_bytes);
      _tile_dpbf16ps(1, 5, 7);
      if (!advance()) break;
      _tile_loadd(4, left, left_bytes);
      _tile_loadd(6, right, right_bytes);
      _tile_dpbf16ps(2, 4, 6);
      if (!advance()) break;
      _tile_loadd(5, left, left_bytes);
      _tile_loadd(7, right, right_bytes);
      _tile_dpbf16ps(3, 5, 7);
      if (!advance()) break;
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    memory_is_seen();
    for (int token = 0; token < tokens; token++) {
      const F16 even = f_add(f_load(sums[0] + token * kTile), f_load(sums[2] + token * kTile));
      const F16 odd = f_add(f_load(sums[1] + token * kTile), f_load(sums[3] + token * kTile));
      f_store(out + token * stride + first, f_keep_lanes(f_add(even, odd), 0, count, 0.0f));
    }
  }
}

// One expert's part of a sum, or 32 inputs of it.
struct TileExpert {
  const uint16_t *c, *b;  // coefficients (tokens, c_stride), and its place in the first packed panel of (32, rank)
  int64_t panel_size;     // of b
};

constexpr int kTileExperts = 32;  // whose sums stay in tiles from one to the next

// A panel of y (tokens, y_stride), or it and the next one, += B c of the experts, in tiles that `tile_expand` has shaped.
template <bool kTwoPanels>
inline void expand_panels(const TileExpert* experts, int number, int64_t c_stride, int panel, float* y, float* next, int64_t y_stride) {
  const int64_t y_bytes = y_stride * 4;
  _tile_loadd(0, y, y_bytes);
  _tile_loadd(1, y + kTile, y_bytes);
  if constexpr (kTwoPanels) {
    _tile_loadd(2, next, y_bytes);
    _tile_loadd(3, next + kTile, y_bytes);
  }
  for (const TileExpert* expert = experts; expert < experts + number; expert++) {
    const uint16_t *low = expert->b + panel * expert->panel_size, *high = low + expert->panel_size;
    _tile_loadd(4, expert->c, c_stride * 2);
    _tile_loadd(5, low, 128);
    _tile_loadd(6, low + 32, 128);
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 6);
    if constexpr (kTwoPanels) {
      _tile_loadd(7, high, 128);
      _tile_loadd(5, high + 32, 128);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, y, y_bytes);
  _tile_stored(1, y + kTile, y_bytes);
  if constexpr (kTwoPanels) {
    _tile_stored(2, next, y_bytes);
    _tile_stored(3, next + kTile, y_bytes);
  }
}

// y (tokens, y_stride) += B c for `number` experts of as many inputs, one after the other, in the panels begin, begin + step, ...
// Loading and storing sums takes longer than the products of a small rank.
inline void tile_expand(int tokens, int inputs, const TileExpert* experts, int number, int64_t c_stride, float* y, int64_t y_stride, int step,
                        int begin, int end) {
  memory_is_seen();
  TileShapes shapes;  // 0 to 3 sums of two panels, 4 coefficients, 5 to 7 halves of a panel of B
  for (int tile = 0; tile < 4; tile++) shapes.set(tile, tokens, 64);
  shapes.set(4, tokens, inputs * 2);
  for (int tile = 5; tile < 8; tile++) shapes.set(tile, inputs / 2, 64);
  shapes.use();
  const auto place = [&](int panel) { return y + (int64_t)panel * step * kPanel; };
  int panel = begin;
  for (; panel + 1 < end; panel += 2) expand_panels<true>(experts, number, c_stride, panel, place(panel), place(panel + 1), y_stride);
  if (panel < end) expand_panels<false>(experts, number, c_stride, panel, place(panel), nullptr, y_stride);
  memory_is_seen();
}

}  // namespace

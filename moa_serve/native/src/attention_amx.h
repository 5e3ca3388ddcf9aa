// Attention on AMX tiles: up to 16 rows at once, a row being a token's query of one head. Tokens are of one sequence and heads share a kv
// head, so that all rows read the same pages, which stand as a tile product wants its second operand (attention.h).
//
// A page that a row does not see adds 0 to it, so a row's result depends neither on its neighbours nor on how its sequence was cut.
#pragma once
#include "amx.h"
#include "attention.h"

namespace {

constexpr int kBlocks = 4;  // of 16 dimensions of the output, added up in tiles at a time

struct KeyTiles {
  int rows, whole, tail;  // of the head's dimensions, how many whole tiles of 32 there are, and how many dimensions are left

  // Tile 0 is scores (rows x 16 tokens), 4 and 6 queries and keys of 32 dimensions, 5 and 7 of the tail.
  void use() const {
    TileShapes shapes;
    shapes.set(0, rows, 64);
    shapes.set(4, rows, 64);
    shapes.set(6, kTile, 64);
    if (tail > 0) shapes.set(5, rows, tail * 2), shapes.set(7, tail / 2, 64);
    shapes.use();
  }

  void scores(const uint16_t* q, int64_t q_stride, const uint16_t* keys, float* out) const {
    _tile_zero(0);
    for (int chunk = 0; chunk < whole; chunk++) {
      _tile_loadd(4, q + chunk * kTileInputs, q_stride * 2);
      _tile_loadd(6, keys + chunk * kTileInputs * kPage, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    if (tail > 0) {
      _tile_loadd(5, q + whole * kTileInputs, q_stride * 2);
      _tile_loadd(7, keys + whole * kTileInputs * kPage, 64);
      _tile_dpbf16ps(0, 5, 7);
    }
    _tile_stored(0, out, 64);
  }
};

// Tiles 0 to 3 are sums (rows x 16 dimensions), 4 shares of a page (rows x 16 tokens), 5 and 6 values.
inline void use_value_tiles(int rows) {
  TileShapes shapes;
  for (int tile = 0; tile < kBlocks; tile++) shapes.set(tile, rows, 64);
  shapes.set(4, rows, kPage * 2);
  shapes.set(5, kPage / 2, 64);
  shapes.set(6, kPage / 2, 64);
  shapes.use();
}

inline void add_page(int blocks, const float* shares, const uint16_t* values, int64_t value_bytes) {
  _tile_loadd(4, shares, 64);
  _tile_loadd(5, values, value_bytes);
  _tile_dpbf16ps(0, 4, 5);
  if (blocks == 1) return;
  _tile_loadd(6, values + 32, value_bytes);
  _tile_dpbf16ps(1, 4, 6);
  if (blocks == 2) return;
  _tile_loadd(5, values + 64, value_bytes);
  _tile_dpbf16ps(2, 4, 5);
  if (blocks == 3) return;
  _tile_loadd(6, values + 96, value_bytes);
  _tile_dpbf16ps(3, 4, 6);
}

// q (tokens * heads, q_stride) -> out (tokens * heads, value width). `sights` of each token; `weights` (tokens, weights_stride) count the
// shares of what it sees after the softmax, or NULL; `scores` has room for 256 floats a page.
inline void attend_tile(int tokens, int heads, const uint16_t* q, int64_t q_stride, const uint16_t* keys, const uint16_t* values,
                        int64_t key_page_stride, int64_t value_page_stride, Pages pages, const Sight* sights, PageShape shape,
                        const float* weights, int64_t weights_stride, float* scores, float* out) {
  const int rows = tokens * heads, key_size = (int)padded(shape.head_dim, 2);
  const int64_t width = shape.value_width();
  const F16 scale = f_set(1.0f / sqrtf((float)shape.head_dim));
  const KeyTiles tiles = {rows, key_size / kTileInputs, key_size % kTileInputs};
  Sight all = sights[0], each = sights[0];  // of some token, and of every one
  for (int token = 1; token < tokens; token++) {
    all.until = all.until > sights[token].until ? all.until : sights[token].until;
    all.from = all.from < sights[token].from ? all.from : sights[token].from;
    all.last = all.last > sights[token].last ? all.last : sights[token].last;
    each.until = each.until < sights[token].until ? each.until : sights[token].until;
    each.from = each.from > sights[token].from ? each.from : sights[token].from;
    each.last = each.last < sights[token].last ? each.last : sights[token].last;
  }
  F16 largest[kTile], total[kTile];
  for (int row = 0; row < rows; row++) largest[row] = f_set(-INFINITY), total[row] = f_zero();
  memory_is_seen();
  tiles.use();
  float* place = scores;
  for (int page = first_page(all); page * kPage <= all.last; page = next_page(page, all), place += kTile * kPage) {
    const int following = next_page(page, all);
    if (following * kPage <= all.last) fetch(keys + pages(following) * key_page_stride, shape.keys<Bfloat16>() * 2);
    fetch(values + pages(page) * value_page_stride, shape.values() * 2);
    tiles.scores(q, q_stride, keys + pages(page) * key_page_stride, place);
    memory_is_seen();
    const bool is_whole = sees_page(each, page);
    for (int row = 0; row < rows; row++) {
      F16 seen = f_mul(f_load(place + row * kPage), scale);
      if (!is_whole) seen = hide(seen, sights[row / heads], page * kPage);
      f_store(place + row * kPage, seen);
      largest[row] = f_max(largest[row], seen);
    }
  }
  for (int row = 0; row < rows; row++) largest[row] = f_set(f_largest(largest[row]));
  place = scores;
  for (int page = first_page(all); page * kPage <= all.last; page = next_page(page, all), place += kTile * kPage)
    for (int row = 0; row < rows; row++) {
      F16 share = f_exp(f_sub(f_load(place + row * kPage), largest[row]));
      total[row] = f_add(total[row], share);
      if (weights != nullptr) share = f_mul(share, f_load(weights + row / heads * weights_stride + page * kPage));
      Bfloat16::store((uint16_t*)(place + row * kPage), share);
    }
  memory_is_seen();
  use_value_tiles(rows);
  for (int64_t column = 0; column < width; column += kBlocks * kLanes) {
    const int blocks = (int)((width - column) / kLanes < kBlocks ? (width - column) / kLanes : kBlocks);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    place = scores;
    for (int page = first_page(all); page * kPage <= all.last; page = next_page(page, all), place += kTile * kPage)
      add_page(blocks, place, values + pages(page) * value_page_stride + column * 2, width * 4);
    float* sums = out + column;
    _tile_stored(0, sums, width * 4);
    if (blocks > 1) _tile_stored(1, sums + kLanes, width * 4);
    if (blocks > 2) _tile_stored(2, sums + 2 * kLanes, width * 4);
    if (blocks > 3) _tile_stored(3, sums + 3 * kLanes, width * 4);
  }
  memory_is_seen();
  for (int row = 0; row < rows; row++) {
    const F16 inverse = f_set(1.0f / f_sum(total[row]));
    for (int64_t d = 0; d < width; d += kLanes) f_store(out + row * width + d, f_mul(f_load(out + row * width + d), inverse));
  }
}

}  // namespace

// One step of the model: every layer of every token in one call. All threads of the team run `Step::run`; each takes a share of the
// output columns (products), rows (norms) or tiles (experts, attention), and they meet between phases. No share depends on what is computed, only
// on the batch, so the result does not depend on the number of threads.
//
// What an adapter adds is a list compiled from its manifest (abi.h): routers, shrinks and expands by stage. The loop knows no family.
#pragma once
#include <stddef.h>

#include "attention.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#endif
#include "gemm.h"
#include "router.h"
#include "step_types.h"

namespace {

struct Share {
  int64_t begin, end;
};

inline Share share_of(int64_t size, int thread, int threads) { return {size * thread / threads, size * (thread + 1) / threads}; }

template <class N>
struct Step {
  using Element = typename N::Element;

  MoaStep& step;
  const MoaModel& model;
  const MoaBatch& batch;
  const MoaBuffers& at;
  const int thread, threads;
  const int tokens;
  const PageShape page;
  const int64_t hidden, inner, query, key;  // padded widths
  const int64_t fused;                      // of Q, K and V together
  float* const scratch;
  int32_t* const list;
  uint64_t last_tick = 0;

  Step(MoaStep& given, int thread_, int threads_)
      : step(given),
        model(*given.model),
        batch(*given.batch),
        at(given.buffers),
        thread(thread_),
        threads(threads_),
        tokens(given.batch->num_tokens),
        page{given.model->head_dim},
        hidden(padded(given.model->hidden)),
        inner(padded(given.model->inner)),
        query(padded((int64_t)given.model->heads * given.model->head_dim)),
        key(padded((int64_t)given.model->kv_heads * given.model->head_dim)),
        fused(query + 2 * key),
        scratch(given.buffers.scratch + thread_ * given.buffers.scratch_stride),
        list(given.buffers.lists + (int64_t)thread_ * given.batch->num_tokens) {}

  void run() {
    last_tick = __rdtsc();
    embed();
    meet();
    for (int layer = 0; layer < model.num_layers; layer++) {
      run_layer(layer);
      if (thread == 0) step.layers_done->fetch_add(1, std::memory_order_relaxed);
    }
    run_head();
    end_products();
  }

  void meet() {
    if (threads > 1) team_meet(step.team);
  }

  void count(MoaPart part) {
    if (thread != 0) return;
    const uint64_t now = __rdtsc();
    step.ticks[part] += now - last_tick;
    last_tick = now;
  }

  Share rows() const { return share_of(tokens, thread, threads); }

  // -- base

  void embed() {
    const int half = model.head_dim / 2;
    for (int64_t row = rows().begin; row < rows().end; row++) {
      float* x = at.x + row * hidden;
      const int64_t id = batch.token_ids[row];
      const Element* table = (const Element*)model.embed;
      if (model.embed_is_head && is_int8()) {
        int8_row((const uint8_t*)table + id / kPanel * int8_panel_bytes(hidden), id % kPanel, hidden, x);
      } else if (model.embed_is_head) {
        const Element* panel = table + id / kPanel * kPanel * hidden + id % kPanel * N::kPerLane;
        for (int64_t k = 0; k < hidden; k++) x[k] = widen(panel[k / N::kPerLane * kPanel * N::kPerLane + k % N::kPerLane]);
      } else {
        for (int64_t k = 0; k < hidden; k += kLanes) f_store(x + k, N::load_float(table + id * hidden + k));
      }
      for (int j = 0; j < half; j++) {
        const float angle = (float)batch.positions[row] * model.inverse_frequencies[j];
        at.cosines[row * half + j] = cosf(angle);
        at.sines[row * half + j] = sinf(angle);
      }
      at.gates[row * at.gate_stride] = 1.0f;
    }
  }

  void run_layer(int index) {
    const MoaLayer& layer = model.layers[index];
    norm_rows(layer.attention_norm);
    meet();
    count(MOA_PART_BASE);
    adapted_product(index, MOA_STAGE_ATTENTION, layer.qkv, layer.qkv_bias, share_of(fused / kPanel, thread, threads), at.qkv, fused);
    meet();
    fill_cache(index, layer);
    meet();
    count(MOA_PART_BASE);
    attention(index);
    meet();
    count(MOA_PART_ATTENTION);
    add_product_to_residual(index, MOA_STAGE_OUTPUT, layer.o, layer.o_bias);
    norm_rows(layer.ffn_norm);
    meet();
    count(MOA_PART_BASE);
    const Share pairs = share_of(inner / kPanel, thread, threads);  // a gate panel and the up panel beside it
    adapted_product(index, MOA_STAGE_FFN, layer.gate_up, layer.gate_up_bias, {2 * pairs.begin, 2 * pairs.end}, at.gate_up, 2 * inner);
    multiply_gates(pairs);
    meet();
    count(MOA_PART_BASE);
    add_product_to_residual(index, MOA_STAGE_DOWN, layer.down, layer.down_bias);
    count(MOA_PART_BASE);
    count_routing(index);
  }

  void run_head() {
    Element* rows = (Element*)at.logit_rows;
    const Share mine = share_of(batch.num_logits, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; row++)
      rms_norm<N>(at.x + batch.logit_rows[row] * hidden, model.norm, model.hidden, model.eps, rows + row * hidden);
    meet();
    const int64_t width = padded(model.vocab);
    const Share columns = share_of(width / kPanel, thread, threads);
    base_product(rows, batch.num_logits, model.head, hidden, nullptr, columns, batch.logits, width);
    count(MOA_PART_HEAD);
  }

  void norm_rows(const float* weight) {
    for (int64_t row = rows().begin; row < rows().end; row++)
      rms_norm<N>(at.x + row * hidden, weight, model.hidden, model.eps, (Element*)at.normed + row * hidden);
  }

  bool is_int8() const { return model.base_format == MOA_BASE_INT8; }

  // out (rows, width) = x (rows, size) W^T + bias, in this thread's columns, with W of the base.
  void base_product(const Element* x, int rows, const void* weights, int64_t size, const float* bias, Share columns, float* out, int64_t width) {
    if constexpr (N::kPerLane == 2) {
      if (is_int8()) return gemm_int8(x, size, rows, (const uint8_t*)weights, size, bias, columns.begin, columns.end, out, width);
    }
    gemm<N>(x, size, rows, (const Element*)weights, size, bias, columns.begin, columns.end, out, width);
  }

  // A stage's base product and what its experts add, in this thread's columns.
  void adapted_product(int index, int stage, const void* weights, const float* bias, Share columns, float* out, int64_t width) {
    route(index, stage);
    int64_t size;
    const Element* x = stage_input(stage, size);
    base_product(x, tokens, weights, size, bias, columns, out, width);
    count(MOA_PART_BASE);
    shrink(index, stage);
    expand(index, stage, columns);
  }

  void add_product_to_residual(int index, int stage, const void* weights, const float* bias) {
    const Share columns = share_of(hidden / kPanel, thread, threads);
    adapted_product(index, stage, weights, bias, columns, at.out, hidden);
    add_to_residual(columns);
    meet();
  }

  void add_to_residual(Share columns) {
    for (int64_t row = 0; row < tokens; row++)
      for (int64_t k = columns.begin * kPanel; k < columns.end * kPanel; k += kLanes) {
        float* x = at.x + row * hidden + k;
        f_store(x, f_add(f_load(x), f_load(at.out + row * hidden + k)));
      }
  }

  void multiply_gates(Share pairs) {
    for (int64_t row = 0; row < tokens; row++)
      for (int64_t pair = pairs.begin; pair < pairs.end; pair++) {
        const float* gate = at.gate_up + row * 2 * inner + pair * 2 * kPanel;
        for (int lane = 0; lane < kPanel; lane += kLanes)
          N::store((Element*)at.inner + row * inner + pair * kPanel + lane,
                   f_mul(f_silu(f_load(gate + lane)), f_load(gate + kPanel + lane)));
      }
  }

  // -- attention

  int64_t key_page_stride() const { return model.kv_heads * page.keys<N>(); }
  int64_t value_page_stride() const { return model.kv_heads * page.values(); }

  void fill_cache(int index, const MoaLayer& layer) {
    const int size = model.head_dim, half = size / 2;
    Element* keys = (Element*)step.cache.keys + index * step.cache.num_pages * key_page_stride();
    Element* values = (Element*)step.cache.values + index * step.cache.num_pages * value_page_stride();
    // Pages are filled by one thread each: a page's first token clears it.
    for (int64_t row = 0; row < tokens; row++) {
      const int64_t own_page = batch.spans[at.token_span[row]].pages[at.token_index[row] / kPage];
      if (own_page % threads != thread) continue;
      float* q = at.qkv + row * fused;
      const float *cosines = at.cosines + row * half, *sines = at.sines + row * half;
      for (int head = 0; head < model.heads; head++) {
        if (layer.q_norm != nullptr) head_norm(q + head * size, layer.q_norm, size, model.eps);
        rotate(q + head * size, cosines, sines, half);
      }
      for (int head = 0; head < model.kv_heads; head++) {
        float* k = q + query + head * size;
        const float* v = q + query + key + head * size;
        if (layer.k_norm != nullptr) head_norm(k, layer.k_norm, size, model.eps);
        rotate(k, cosines, sines, half);
        Element *narrow_key = (Element*)scratch, *narrow_value = narrow_key + padded(size, kLanes);
        narrow<N>(k, narrow_key, padded(size, kLanes));
        narrow<N>(v, narrow_value, padded(size, kLanes));
        append<N>(narrow_key, narrow_value, page, at.token_index[row] % kPage, keys + own_page * key_page_stride() + head * page.keys<N>(),
                  values + own_page * value_page_stride() + head * page.values());
      }
    }
  }

  void attention(int index) {
    const Element* keys = (const Element*)step.cache.keys + index * step.cache.num_pages * key_page_stride();
    const Element* values = (const Element*)step.cache.values + index * step.cache.num_pages * value_page_stride();
    const int group = model.heads / model.kv_heads;
    const int64_t width = page.value_width(), q_stride = padded(model.head_dim, kLanes);
    const int64_t heads_width = model.heads * width;
    const auto pages_of = [this](int64_t row) { return Pages{batch.spans[at.token_span[row]].pages}; };
    const auto sight_of = [this](int64_t row) { return Sight{batch.seen_until[row], batch.seen_from[row], at.token_index[row]}; };
    const auto key_head = [&](int head) { return keys + head * page.keys<N>(); };
    const auto value_head = [&](int head) { return values + head * page.values(); };
    Element* q = (Element*)scratch;
    for (int64_t row = rows().begin; row < rows().end;) {
#if defined(__AMX_BF16__)
      if constexpr (N::kIsOnTiles) {
        const int together = group < kTile ? group : kTile;  // heads of a tile, and the tokens of it
        int count = 1;
        while (count < kTile / together && row + count < rows().end && at.token_span[row + count] == at.token_span[row]) count++;
        Sight sights[kTile];
        for (int member = 0; member < count; member++) sights[member] = sight_of(row + member);
        float* const found = scratch + kTile * q_stride;
        const PromptTile prompt = prompt_tile(index, row, count, found + kTile * width);
        float* const scores = found + kTile * width + kTile * prompt.weights_stride();
        for_head_tiles([&](int kv_head, int head, int heads) {
          const Element* queries = narrow_queries(row, count, head, heads);
          attend_tile(count, heads, queries, q_stride, key_head(kv_head), value_head(kv_head), key_page_stride(), value_page_stride(), pages_of(row),
                      sights, page, nullptr, 0, scores, found);
          for (int member = 0; member < count; member++)
            memcpy(at.heads + (row + member) * heads_width + head * width, found + member * heads * width, (size_t)(heads * width) * sizeof(float));
          if (prompt.is_wanted) add_prompt_tile(prompt, row, count, kv_head, head, heads, queries, scores, found);
        });
        row += count;
        continue;
      }
#endif
      for (int head = 0; head < model.kv_heads; head++) {
        for (int member = 0; member < group; member++)
          narrow_head(at.qkv + row * fused + (head * group + member) * model.head_dim, q + member * q_stride);
        attend_group<N>(group, q, q_stride, key_head(head), value_head(head), key_page_stride(), value_page_stride(), pages_of(row), sight_of(row),
                        page, nullptr, scratch + group * q_stride, at.heads + row * heads_width + head * group * width);
      }
      row++;
    }
    if constexpr (!N::kIsOnTiles) add_prompts(index);
    for (int64_t row = rows().begin; row < rows().end; row++) join_heads(at.heads + row * heads_width, (Element*)at.mixed + row * query);
  }

#if defined(__AMX_BF16__)
  // Calls do(kv head, first head, heads) for heads that share a kv head and fit into a tile.
  template <class Do>
  void for_head_tiles(Do work) const {
    const int group = model.heads / model.kv_heads;
    for (int kv_head = 0; kv_head < model.kv_heads; kv_head++)
      for (int first = 0; first < group; first += kTile) work(kv_head, kv_head * group + first, group - first < kTile ? group - first : kTile);
  }

  // (count * heads, padded head) in `scratch`: the queries of some heads of tokens one after the other.
  const Element* narrow_queries(int64_t row, int count, int head, int heads) const {
    Element* q = (Element*)scratch;
    for (int member = 0; member < count * heads; member++)
      narrow_head(at.qkv + (row + member / heads) * fused + (head + member % heads) * model.head_dim, q + member * padded(model.head_dim, kLanes));
    return q;
  }

  // The prompt that some tokens of a sequence have, and how much each of them wants of its rows.
  struct PromptTile {
    const uint8_t* blob;
    const MoaPrompt* prompt;
    const float* weights;  // (tokens, weights_stride)
    bool is_wanted;

    int num_pages() const { return prompt == nullptr ? 0 : (prompt->num_rows + kPage - 1) / kPage; }
    int64_t weights_stride() const { return num_pages() * kPage; }
  };

  PromptTile prompt_tile(int index, int64_t row, int count, float* weights) const {
    PromptTile tile = {};
    for (int number = 0; number < batch.num_segments && tile.prompt == nullptr; number++) {
      const MoaSegment& segment = batch.segments[number];
      if (row < segment.start || row >= segment.end) continue;
      tile = {segment.adapter, &adapter_layer(segment, index).prompt, weights, false};
      for (int member = 0; member < count && tile.prompt->num_rows > 0; member++)
        tile.is_wanted |= prompt_weights(tile.blob, *tile.prompt, row + member, weights + member * tile.weights_stride());
    }
    return tile;
  }

  // While the queries are there.
  void add_prompt_tile(const PromptTile& tile, int64_t row, int num_tokens, int kv_head, int head, int heads, const Element* queries, float* scores,
                       float* found) {
    count(MOA_PART_ATTENTION);
    const uint16_t *keys = (const uint16_t*)(tile.blob + tile.prompt->keys_at), *values = (const uint16_t*)(tile.blob + tile.prompt->values_at);
    const int64_t key_stride = page.keys<Bfloat16>(), value_stride = page.values();
    Sight sights[kTile];
    for (Sight& sight : sights) sight = {0, 0, tile.prompt->num_rows - 1};
    attend_tile(num_tokens, heads, queries, padded(model.head_dim, kLanes), keys + kv_head * tile.num_pages() * key_stride,
                values + kv_head * tile.num_pages() * value_stride, key_stride, value_stride, Pages{nullptr}, sights, page,
                tile.weights, tile.weights_stride(), scores, found);
    for (int member = 0; member < num_tokens; member++)
      add_to_heads(tile.blob, *tile.prompt, row + member, head, heads, found + member * heads * page.value_width());
    count(MOA_PART_EXPERTS);
  }
#endif

  // A head's queries in the model's format; what stands behind them in the row is another head's and meets nothing.
  void narrow_head(const float* from, Element* to) const {
    float padded_head[kLanes];
    int d = 0;
    for (; d + kLanes <= model.head_dim; d += kLanes) N::store(to + d, f_load(from + d));
    if (d == model.head_dim) return;
    memset(padded_head, 0, sizeof(padded_head));
    memcpy(padded_head, from + d, (size_t)(model.head_dim - d) * sizeof(float));
    N::store(to + d, f_load(padded_head));
  }

  // Heads of padded width, one after the other without the padding.
  void join_heads(float* heads, Element* out) const {
    const int64_t width = page.value_width();
    const int size = model.head_dim;
    if (width != size)
      for (int head = 1; head < model.heads; head++) memmove(heads + head * size, heads + head * width, (size_t)size * sizeof(float));
    const int64_t end = (int64_t)model.heads * size;
    if (end != query) {
      float tail[kPanel] = {};
      const int64_t whole = end / kLanes * kLanes;
      narrow<N>(heads, out, whole);
      memcpy(tail, heads + whole, (size_t)(end - whole) * sizeof(float));
      narrow<N>(tail, out + whole, query - whole);
    } else {
      narrow<N>(heads, out, query);
    }
  }

  void add_prompts(int index) {
    bool is_any = false;
    for (int number = 0; number < batch.num_segments; number++) {
      const MoaSegment& segment = batch.segments[number];
      const MoaPrompt& prompt = adapter_layer(segment, index).prompt;
      if (prompt.num_rows == 0) continue;
      if (!is_any) count(MOA_PART_ATTENTION);
      is_any = true;
      const int64_t begin = segment.start > rows().begin ? segment.start : rows().begin, end = segment.end < rows().end ? segment.end : rows().end;
      add_prompt(segment.adapter, prompt, begin, end);
    }
    if (is_any) count(MOA_PART_EXPERTS);
  }

  // The gates of a prompt's rows for a token, on whole pages; false where all are 0.
  bool prompt_weights(const uint8_t* blob, const MoaPrompt& prompt, int64_t token, float* weights) const {
    const int32_t* row_gates = (const int32_t*)(blob + prompt.row_gates_at);
    const float* gates = at.gates + token * at.gate_stride;
    const int end = (int)padded(prompt.num_rows, kPage);
    for (int place = 0; place < end; place++) weights[place] = place < prompt.num_rows ? gates[prompt.outer] * gates[row_gates[place]] : 0.0f;
    return gates[prompt.outer] != 0;
  }

  // heads += head gate * what a token's heads found in the prompt, for `heads` heads from `head` on.
  void add_to_heads(const uint8_t* blob, const MoaPrompt& prompt, int64_t token, int head, int heads, const float* found) const {
    const float* head_gate = (const float*)(blob + prompt.head_gate_at);
    const int64_t width = page.value_width();
    float* place = at.heads + (token * model.heads + head) * width;
    for (int member = 0; member < heads; member++) {
      const F16 gate = f_set(head_gate[head + member]);
      for (int64_t d = member * width; d < (member + 1) * width; d += kLanes) f_store(place + d, f_fma(f_load(found + d), gate, f_load(place + d)));
    }
  }

  void add_prompt(const uint8_t* blob, const MoaPrompt& prompt, int64_t begin, int64_t end) {
    const int group = model.heads / model.kv_heads, num_pages = (prompt.num_rows + kPage - 1) / kPage;
    const int64_t width = page.value_width(), q_stride = padded(model.head_dim, kLanes);
    const float *keys = (const float*)(blob + prompt.keys_at), *values = (const float*)(blob + prompt.values_at);
    float *q = scratch, *weights = q + group * q_stride, *found = weights + num_pages * kPage, *scores = found + group * width;
    for (int64_t row = begin; row < end; row++) {
      if (!prompt_weights(blob, prompt, row, weights)) continue;
      for (int head = 0; head < model.kv_heads; head++) {
        memset(q, 0, (size_t)(group * q_stride) * sizeof(float));
        for (int member = 0; member < group; member++)
          memcpy(q + member * q_stride, at.qkv + row * fused + (head * group + member) * model.head_dim, (size_t)model.head_dim * sizeof(float));
        attend_group<Float32>(
            group, q, q_stride, keys + head * num_pages * page.keys<Float32>(), values + head * num_pages * page.values(), page.keys<Float32>(),
            page.values(), Pages{nullptr}, Sight{0, 0, prompt.num_rows - 1}, page, weights, scores, found);
        add_to_heads(blob, prompt, row, head * group, group, found);
      }
    }
  }

  // -- adapters

  const MoaAdapterLayer& adapter_layer(const MoaSegment& segment, int index) const {
    const MoaAdapter* adapter = (const MoaAdapter*)segment.adapter;
    return ((const MoaAdapterLayer*)(segment.adapter + adapter->layers_at))[index];
  }

  // The input of a stage: rows in the model's format, and their width.
  const Element* stage_input(int stage, int64_t& width) const {
    const void* const inputs[MOA_NUM_STAGES] = {at.normed, at.mixed, at.normed, at.inner};
    const int64_t widths[MOA_NUM_STAGES] = {hidden, query, hidden, inner};
    width = widths[stage];
    return (const Element*)inputs[stage];
  }

  Section section(int target) const {
    const int q = (int)(query / kPanel), k = (int)(key / kPanel), d = (int)(hidden / kPanel), f = (int)(inner / kPanel);
    const Section sections[] = {
        {at.qkv, fused, 0, 1, q},         {at.qkv, fused, q, 1, k},     {at.qkv, fused, q + k, 1, k},
        {at.out, hidden, 0, 1, d},        {at.gate_up, 2 * inner, 0, 2, f}, {at.gate_up, 2 * inner, 1, 2, f},
        {at.out, hidden, 0, 1, d},
    };
    return sections[target];
  }

  bool has_any(int index, int stage, const int32_t (MoaAdapterLayer::*ends)[MOA_NUM_STAGES]) const {
    for (int number = 0; number < batch.num_segments; number++) {
      const MoaAdapterLayer& layer = adapter_layer(batch.segments[number], index);
      if ((layer.*ends)[stage] > (stage > 0 ? (layer.*ends)[stage - 1] : 0)) return true;
    }
    return false;
  }

  float weight(int64_t token, const MoaExpert& expert) const {
    const float* gates = at.gates + token * at.gate_stride;
    return gates[expert.outer] != 0 ? gates[expert.outer] * gates[expert.inner] : 0.0f;
  }

  void route(int index, int stage) {
    if (!has_any(index, stage, &MoaAdapterLayer::router_end)) return;
    int tile = 0;
    for (int number = 0; number < batch.num_segments; number++) {
      const MoaSegment& segment = batch.segments[number];
      const MoaAdapterLayer& layer = adapter_layer(segment, index);
      const MoaRouter* routers = (const MoaRouter*)(segment.adapter + layer.routers_at);
      for (int router = stage > 0 ? layer.router_end[stage - 1] : 0; router < layer.router_end[stage]; router++) {
        if (routers[router].source == MOA_READS_POOLED) {
          if (tile++ % threads == thread) route_pooled(segment, routers[router], index);
          continue;
        }
        for (int token = segment.start; token < segment.end; token += kTileTokens)
          if (tile++ % threads == thread) route_tile(segment, routers[router], stage, token, segment.end);
      }
    }
    meet();
    count(MOA_PART_ROUTER);
  }

  // Where routers write what they said of a token; NULL where nobody asked.
  float* trace_of(const MoaSegment& segment, int token) const {
    const int row = segment.trace == nullptr ? -1 : segment.trace_row[token - segment.start];
    return row < 0 ? nullptr : segment.trace + (int64_t)row * ((const MoaAdapter*)segment.adapter)->trace_width;
  }

  // Behind what routers and experts of the adapter need: room for a tile's inputs.
  float* input_room(const MoaSegment& segment) const { return scratch + ((const MoaAdapter*)segment.adapter)->scratch_width; }

  void route_rows(const MoaSegment& segment, const MoaRouter& router, int count, const float* const* x, float* const* out, int64_t width) {
    const uint8_t* rows = segment.adapter + router.rows_at;
    if (router.row_format == MOA_ROWS_FLOAT32)
      dots<Float32>(count, x, (const float*)rows, width, router.num_rows, out);
    else
      dots<Widened>(count, x, (const uint16_t*)rows, width, router.num_rows, out);
  }

  void route_tile(const MoaSegment& segment, const MoaRouter& router, int stage, int first, int end) {
    const int count = end - first < kTileTokens ? end - first : kTileTokens;
    const int64_t room = padded(router.num_rows, kLanes) + kLanes;
    float *out = scratch, *rest = scratch + kTileTokens * room;
    multiply_router_rows(segment, router, stage, first, count, input_room(segment), out, room);
    for (int member = 0; member < count; member++) {
      float* gates = at.gates + (int64_t)(first + member) * at.gate_stride + router.first_gate;
      finish_route(router, rule_of(router, segment.rules), segment.adapter, out + member * room, rest, gates, gates[router.outputs],
                   trace_of(segment, first + member));
    }
  }

  // out (count, room): the tile's products with the router's rows. Products of two bfloat16 numbers are exact in float32, so AMX may
  // compute them; float32 inputs or rows need products of float32.
  void multiply_router_rows(const MoaSegment& segment, const MoaRouter& router, int stage, int first, int count, float* inputs, float* out,
                            int64_t room) {
    int64_t width;
    const Element* rows = stage_input(stage, width) + first * width;
    if constexpr (N::kIsOnTiles) {
      const Element* router_rows = (const Element*)(segment.adapter + router.rows_at);
      if (router.row_format == MOA_ROWS_TILES) return tile_product<N>(count, nullptr, 0, rows, width, router_rows, router.num_rows, out, room);
    }
    for (int done = 0; done < count; done += kTogether) {
      const int members = count - done < kTogether ? count - done : kTogether;
      const float* x[kTogether];
      float* place[kTogether];
      for (int member = 0; member < members; member++) {
        place[member] = out + (done + member) * room;
        if (router.source == MOA_READS_RESIDUAL) {
          x[member] = at.x + (int64_t)(first + done + member) * hidden;
          continue;
        }
        const Element* own = rows + (done + member) * width;
        for (int64_t k = 0; k < width; k += kLanes) f_store(inputs + member * width + k, N::load_float(own + k));
        x[member] = inputs + member * width;
      }
      route_rows(segment, router, members, x, place, width);
    }
  }

  // Of a sequence in a layer, and its scores `pooled_width` behind them.
  float* pooled_gates(const MoaSegment& segment, int row, int index) const {
    return segment.pooled_gates + ((int64_t)row * model.num_layers + index) * 2 * segment.pooled_width;
  }

  // Instance level: a sequence's gates come from the mean of its prompt, once, and stay with it.
  void route_pooled(const MoaSegment& segment, const MoaRouter& router, int index) {
    const int64_t room = padded(router.num_rows, kLanes) + kLanes;
    float *mean = scratch + room, *rest = mean + hidden;
    for (int row = 0; row < segment.num_pooled; row++) {
      const int32_t *span = segment.pooled_spans + 2 * row;
      if (span[0] < 0) continue;
      for (int64_t k = 0; k < hidden; k += kLanes) {
        F16 sum = f_zero();
        for (int token = span[0]; token < span[1]; token++) sum = f_add(sum, f_load(at.x + (int64_t)(segment.start + token) * hidden + k));
        f_store(mean + k, f_div(sum, f_set((float)(span[1] - span[0]))));
      }
      const float* x[1] = {mean};
      float* out[1] = {scratch};
      route_rows(segment, router, 1, x, out, hidden);
      float* gates = pooled_gates(segment, row, index);
      float threshold;
      finish_route(router, rule_of(router, segment.rules), segment.adapter, scratch, rest, gates, threshold, nullptr);
      memcpy(gates + segment.pooled_width, rest, (size_t)router.outputs * sizeof(float));  // finish_route leaves the scores there
    }
    const MoaRule& rule = rule_of(router, segment.rules);
    const float threshold = rule.has_threshold ? rule.threshold : 0.0f;
    for (int token = segment.start; token < segment.end; token++) {
      const int row = segment.pooled_row[token - segment.start];
      const float *gates = pooled_gates(segment, row, index), *scores = gates + segment.pooled_width;
      float* out = at.gates + (int64_t)token * at.gate_stride + router.first_gate;
      memcpy(out, gates, (size_t)router.outputs * sizeof(float));
      out[router.outputs] = threshold;
      float* trace = trace_of(segment, token);
      if (trace == nullptr) continue;
      float* place = trace + router.trace_at;
      for (int e = 0; e < router.outputs; e++) {
        place[e] = scores[e];
        place[router.outputs + 1 + e] = gates[e] != 0 ? 1.0f : 0.0f;
        place[2 * router.outputs + 1 + e] = gates[e];
      }
      place[router.outputs] = threshold;
    }
  }

  struct Tile {
    const MoaSegment& segment;
    const Element* input;  // (count, width)
    int64_t width;
    int first, count;
  };

  using Shrink = void (Step::*)(const MoaGroup&, const Tile&, int&);

  void shrink(int index, int stage) {
    if (!has_any(index, stage, &MoaAdapterLayer::shrink_end)) return;
    static constexpr Shrink kShrinks[MOA_NUM_SHRINKS] = {&Step::shrink_each<false>, &Step::shrink_shared<false>, &Step::shrink_each<true>,
                                                         &Step::shrink_shared<true>};
    int64_t width;
    const Element* input = stage_input(stage, width);
    int number_of_work = 0;
    for (int number = 0; number < batch.num_segments; number++) {
      const MoaSegment& segment = batch.segments[number];
      const MoaAdapterLayer& layer = adapter_layer(segment, index);
      const MoaGroup* groups = (const MoaGroup*)(segment.adapter + layer.groups_at);
      const int begin = stage > 0 ? layer.shrink_end[stage - 1] : 0;
      for (int first = segment.start; first < segment.end && begin < layer.shrink_end[stage]; first += kTileTokens) {
        const int count = segment.end - first < kTileTokens ? segment.end - first : kTileTokens;
        const Tile tile = {segment, input + first * width, width, first, count};
        for (int group = begin; group < layer.shrink_end[stage]; group++)
          (this->*kShrinks[groups[group].shrink])(groups[group], tile, number_of_work);
      }
    }
    meet();
    count(MOA_PART_EXPERTS);
  }

  bool is_mine(int& number_of_work) const { return number_of_work++ % threads == thread; }

  // Which of a tile's tokens need the expert, in `list`, counted from its first.
  int list_active(int first, int count, const MoaExpert& expert) const {
    int num_listed = 0;
    for (int member = 0; member < count; member++)
      if (weight(first + member, expert) != 0) list[num_listed++] = member;
    return num_listed;
  }

  // (tile, room) in `scratch`: the listed tokens' products with A; silu(A u + bias) for a parallel adapter.
  template <bool kSilu>
  void low_rank(const MoaExpert& expert, const Tile& tile, int num_listed, int64_t room) {
    const uint8_t* blob = tile.segment.adapter;
    for (int place = 0; place < num_listed; place++) memset(scratch + list[place] * room, 0, (size_t)room * sizeof(float));
    const Element* a = (const Element*)(blob + expert.a_at);
    tile_product<N>(tile.count, list, num_listed, tile.input, tile.width, a, expert.rank, scratch, room);
    if constexpr (kSilu) {
      const float* bias = (const float*)(blob + expert.a_bias_at);
      for (int place = 0; place < num_listed; place++) {
        float* low = scratch + list[place] * room;
        for (int64_t r = 0; r < room; r += kLanes) {
          const F16 sum = f_add(f_load(low + r), f_keep_lanes(f_load(bias + r), 0, expert.rank - (int)r, 0.0f));
          f_store(low + r, f_silu(sum));
        }
      }
    }
  }

  void store_coefficients(const MoaExpert& expert, const Tile& tile, int num_listed, int64_t room) const {
    for (int place = 0; place < num_listed; place++) {
      const int64_t token = tile.first + list[place];
      Element* out = (Element*)at.coefficients + token * at.coefficient_stride + expert.coefficients_at;
      const F16 scale = f_set(weight(token, expert) * expert.scale);
      for (int64_t r = 0; r < room; r += kLanes) N::store(out + r, f_mul(f_load(scratch + list[place] * room + r), scale));
    }
    if constexpr (N::kIsOnTiles) {  // tiles have no holes: the others of the tile add 0
      for (int place = 0, member = 0; member < tile.count; member++) {
        if (place < num_listed && list[place] == member) {
          place++;
          continue;
        }
        memset((Element*)at.coefficients + (tile.first + member) * at.coefficient_stride + expert.coefficients_at, 0, room * sizeof(Element));
      }
    }
  }

  template <bool kSilu>
  void shrink_each(const MoaGroup& group, const Tile& tile, int& number_of_work) {
    const MoaExpert* experts = (const MoaExpert*)(tile.segment.adapter + group.experts_at);
    for (int e = 0; e < group.num_experts; e++) {
      if (!is_mine(number_of_work)) continue;
      const int num_listed = list_active(tile.first, tile.count, experts[e]);
      if (num_listed == 0) continue;
      const int64_t room = padded(experts[e].rank, kLanes);
      low_rank<kSilu>(experts[e], tile, num_listed, room);
      store_coefficients(experts[e], tile, num_listed, room);
    }
  }

  template <bool kSilu>
  void shrink_shared(const MoaGroup& group, const Tile& tile, int& number_of_work) {
    if (!is_mine(number_of_work)) return;
    const MoaExpert* experts = (const MoaExpert*)(tile.segment.adapter + group.experts_at);
    const int64_t room = padded(experts[0].rank, kLanes);
    int num_listed = 0;
    for (int member = 0; member < tile.count; member++)
      for (int e = 0; e < group.num_experts; e++)
        if (weight(tile.first + member, experts[e]) != 0) {
          list[num_listed++] = member;
          break;
        }
    if (num_listed == 0) return;
    low_rank<kSilu>(experts[0], tile, num_listed, room);
    for (int e = 0; e < group.num_experts; e++) store_coefficients(experts[e], tile, list_active(tile.first, tile.count, experts[e]), room);
  }

  void expand(int index, int stage, Share columns) {
    if (!has_any(index, stage, &MoaAdapterLayer::expand_end)) return;
    for (int number = 0; number < batch.num_segments; number++) {
      const MoaSegment& segment = batch.segments[number];
      const MoaAdapterLayer& layer = adapter_layer(segment, index);
      const MoaGroup* groups = (const MoaGroup*)(segment.adapter + layer.groups_at);
      for (int group = stage > 0 ? layer.expand_end[stage - 1] : 0; group < layer.expand_end[stage]; group++)
        expand_group(segment, groups[group], columns);
    }
    count(MOA_PART_EXPERTS);
  }

  void expand_group(const MoaSegment& segment, const MoaGroup& group, Share columns) {
    const Section whole = section(group.target);
    const int begin = section_place(whole, columns.begin), end = section_place(whole, columns.end);
    const MoaExpert* experts = (const MoaExpert*)(segment.adapter + group.experts_at);
    for (int first = segment.start; first < segment.end && begin < end; first += kTileTokens) {
      Section own = whole;
      own.out += first * whole.row_stride;
      const int count = segment.end - first < kTileTokens ? segment.end - first : kTileTokens;
      Expansion<N> sums(count, at.coefficient_stride, own, begin, end);
      for (int e = 0; e < group.num_experts; e++) {
        const int num_listed = list_active(first, count, experts[e]);
        if (num_listed == 0) continue;
        const Element* c = (const Element*)at.coefficients + first * at.coefficient_stride + experts[e].coefficients_at;
        sums.add(list, num_listed, c, (const Element*)(segment.adapter + experts[e].b_at), experts[e].rank);
      }
      sums.finish();
      add_biases(segment, group, first, count, own, begin, end);
    }
  }

  void add_biases(const MoaSegment& segment, const MoaGroup& group, int first, int count, const Section& own, int begin, int end) {
    const MoaExpert* experts = (const MoaExpert*)(segment.adapter + group.experts_at);
    for (int e = 0; e < group.num_experts; e++) {
      if (experts[e].out_bias_at == 0) continue;
      const int num_listed = list_active(first, count, experts[e]);
      for (int place = 0; place < num_listed; place++) scratch[place] = weight(first + list[place], experts[e]);
      add_bias(list, num_listed, scratch, (const float*)(segment.adapter + experts[e].out_bias_at), own, begin, end);
    }
  }

  // Totals for metrics. One thread adds them up in the order of the tokens; a row that overflows must not turn them into NaN for good.
  // Gates change only after the next layer's norms, where all threads meet.
  void count_routing(int index) {
    for (int number = 0; number < batch.num_segments; number++) {
      const MoaSegment& segment = batch.segments[number];
      if (segment.selected == nullptr || number % threads != thread) continue;
      const MoaAdapterLayer& layer = adapter_layer(segment, index);
      const MoaRouter* routers = (const MoaRouter*)(segment.adapter + layer.routers_at);
      for (int router = 0; router < layer.router_end[MOA_NUM_STAGES - 1]; router++) {
        if (routers[router].counters_at == 0) continue;
        for (int first = segment.start; first < segment.end; first += kTileTokens)
          count_tile(segment, routers[router], index, first, segment.end - first < kTileTokens ? segment.end - first : kTileTokens);
      }
    }
  }

  void count_tile(const MoaSegment& segment, const MoaRouter& router, int index, int first, int count) {
    const int32_t* columns = (const int32_t*)(segment.adapter + router.counters_at);
    const float* gates = at.gates + (int64_t)first * at.gate_stride + router.first_gate;
    for (int place = 0; place < router.num_counters; place++) {
      const int64_t cell = (int64_t)index * segment.counters_width + router.first_counter + place;
      int num_active = 0;
      for (int member = 0; member < count; member++) {
        const float gate = gates[member * at.gate_stride + columns[place]];
        num_active += gate != 0;
        if (gate == 0 || !(gate - gate == 0)) continue;
        segment.selected[cell] += 1;
        segment.gate_sum[cell] += gate;
      }
      // Tiles have no holes: there an expert is computed for all tokens of a tile, or for none.
      const bool is_for_all = N::kIsOnTiles && num_active > 0;
      segment.computed[cell] += is_for_all ? count : num_active;
      for (int member = 0; member < count && segment.evaluations != nullptr; member++)
        segment.evaluations[first + member - segment.start] += is_for_all || gates[member * at.gate_stride + columns[place]] != 0;
    }
    for (int member = 0; member < count && router.threshold_share != 0; member++) {
      const float threshold = gates[member * at.gate_stride + router.outputs];
      if (threshold - threshold == 0) segment.thresholds[index] += threshold * router.threshold_share;
    }
  }
};

}  // namespace

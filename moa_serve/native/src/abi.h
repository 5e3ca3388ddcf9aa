// The C interface of the native step: plain structs and functions, called through ctypes (moa_serve/native/library.py mirrors them).
//
// Sizes that are "padded" are rounded up to a panel of 32 columns; what stands in the padding is zero. Offsets (`_at`) count bytes
// from the beginning of the blob that holds the struct, so that a blob can be written to disk and used wherever it lies. 0 means absent.
#pragma once
#include <stdint.h>

#define MOA_API extern "C" __attribute__((visibility("default")))

enum MoaDtype : int32_t { MOA_BFLOAT16 = 0, MOA_FLOAT32 = 1 };

// How the base's matrices stand: in the model's dtype, or in eight bits with scales (int8.h), which bfloat16 alone computes with.
enum MoaBaseFormat : int32_t { MOA_BASE_PLAIN = 0, MOA_BASE_INT8 = 1 };

// Where in a decoder layer something is read. The order is that of computation.
enum MoaStage : int32_t {
  MOA_STAGE_ATTENTION = 0,  // the normed input of Q, K, V
  MOA_STAGE_OUTPUT = 1,     // the heads' outputs, input of O
  MOA_STAGE_FFN = 2,        // the normed input of GATE and UP
  MOA_STAGE_DOWN = 3,       // silu(gate) * up, input of DOWN
  MOA_NUM_STAGES = 4,
};

// What a router reads.
enum MoaSource : int32_t {
  MOA_READS_STAGE = 0,     // the input of its stage
  MOA_READS_RESIDUAL = 1,  // the residual stream before the attention norm
  MOA_READS_POOLED = 2,    // the mean of the residual over a sequence's whole prompt
};

enum MoaShrink : int32_t {
  MOA_SHRINK_LINEAR = 0,         // c_e = w_e * scale * A_e u
  MOA_SHRINK_LINEAR_SHARED = 1,  // one A for all experts of the group (HydraLoRA)
  MOA_SHRINK_SILU = 2,           // c_e = w_e * silu(A_e u + a_bias) (parallel adapter)
  MOA_SHRINK_SILU_SHARED = 3,
  MOA_NUM_SHRINKS = 4,
};

// Sections of the fused outputs that an expert may add to.
enum MoaTarget : int32_t {
  MOA_TARGET_Q = 0,
  MOA_TARGET_K = 1,
  MOA_TARGET_V = 2,
  MOA_TARGET_O = 3,
  MOA_TARGET_GATE = 4,
  MOA_TARGET_UP = 5,
  MOA_TARGET_DOWN = 6,
};

// How rows that are multiplied with a token stand.
enum MoaRowFormat : int32_t {
  MOA_ROWS_BFLOAT16 = 0,  // (rows, padded in)
  MOA_ROWS_FLOAT32 = 1,
  MOA_ROWS_TILES = 2,  // bfloat16 for AMX: sixteen rows (the last ones fewer) after the other, each [padded in / 2][rows][2]
};

// How a router's scores become weights; moa_serve/adapter/rules.py has the formulas. Outputs are bits.
struct MoaRule {
  uint64_t disabled, forced;
  int32_t has_threshold;
  int32_t is_function;  // the threshold is `threshold` times the sigmoid of the router's last row
  int32_t subtracts;
  int32_t top_k;  // 0: no limit
  int32_t renormalises;
  float threshold;
};

// A router: float32 arithmetic whatever the model computes in. Its rows are [w1: hidden | w3: hidden | threshold] for a SwiGLU net and
// [logits: outputs | threshold] for a linear one.
struct MoaRouter {
  int64_t rows_at;
  int64_t row_bias_at;  // (num_rows,) float32
  int64_t w2_at;        // (outputs, hidden rounded up to 16) float32; SwiGLU only
  int64_t w2_bias_at;   // (outputs,) float32
  int32_t row_format;  // bfloat16 where that holds them exactly
  int32_t num_rows;
  int32_t hidden;  // 0: a linear net
  int32_t outputs;
  int32_t source;
  int32_t is_softmax;
  int32_t number;  // of the adapter's routers: its place among a segment's rules
  int32_t first_gate;  // column of the token's row of gates, and behind them the threshold; column 0 is the constant 1
  int32_t trace_at;    // floats before it in a token's trace: scores, threshold, selected, gates
  int32_t first_counter, num_counters;  // cells of the layer's row of counters
  int64_t counters_at;  // (num_counters,) int32: the output that each of them counts; 0: none does
  float threshold_share;  // of the layer's mean threshold: one over its counted routers
  int32_t unused;
  MoaRule rule;  // the adapter's own
};

struct MoaExpert {
  int64_t a_at;         // rank rows in the adapter's format, or tiles where the instruction set has them
  int64_t a_bias_at;    // (rank rounded up to 16,) float32
  int64_t b_at;         // packed panels of (padded out, rank)
  int64_t out_bias_at;  // (padded out,) float32
  float scale;
  int32_t rank;  // rounded up to 2 in bfloat16
  int32_t outer, inner;  // gate columns; their product is the expert's weight
  int32_t coefficients_at;  // column of the token's row of coefficients
  int32_t unused;
};

struct MoaGroup {
  int64_t experts_at;  // MoaExpert[num_experts]
  int32_t num_experts;
  int32_t shrink;
  int32_t target;
  int32_t unused;
};

struct MoaPrompt {
  int64_t keys_at;       // (kv_heads, pages) of K pages, float32, or bfloat16 where the instruction set has tiles
  int64_t values_at;
  int64_t head_gate_at;  // (heads,) float32
  int64_t row_gates_at;  // (num_rows,) int32 gate columns
  int32_t num_rows;      // 0: no prompt
  int32_t outer;
};

struct MoaAdapterLayer {
  int64_t routers_at, groups_at;
  MoaPrompt prompt;
  int32_t router_end[MOA_NUM_STAGES];  // routers are sorted by stage; these are the ends
  int32_t shrink_end[MOA_NUM_STAGES];  // groups whose input stage is over
  int32_t expand_end[MOA_NUM_STAGES];  // groups that have been added; a parallel adapter reads at FFN and is added at DOWN
};

// The head of an adapter's blob.
struct MoaAdapter {
  int64_t layers_at;  // MoaAdapterLayer[num_layers]
  int64_t num_bytes;
  int32_t num_layers;
  int32_t num_gates;         // columns of a token's row of gates, at most over layers
  int32_t num_coefficients;  // likewise of coefficients
  int32_t trace_width;       // floats of a token's trace, all layers
  int32_t scratch_width;     // floats that a router or a shrink needs beside its inputs
  int32_t most_prompt_rows;
  int32_t dtype;
  int32_t unused;
};

struct MoaLayer {
  const float *attention_norm, *qkv_bias, *q_norm, *k_norm, *o_bias, *ffn_norm, *gate_up_bias, *down_bias;
  const void *qkv, *o, *gate_up, *down;  // packed panels
};

struct MoaModel {
  const MoaLayer* layers;
  const float* norm;
  const void* embed;       // (vocab, padded hidden) rows, or the packed head where the two are tied
  const void* head;
  const float* inverse_frequencies;  // (head_dim / 2,)
  float eps;
  int32_t dtype;
  int32_t num_layers, hidden, inner, vocab, heads, kv_heads, head_dim;
  int32_t embed_is_head;  // otherwise `embed` is in the model's dtype
  int32_t base_format;    // of qkv, o, gate_up, down and head
};

// One sequence's part in a step.
struct MoaSpan {
  const int32_t* pages;
  int32_t start, count;  // its tokens in the batch, one after the other
  int32_t computed;      // tokens of it that are in the cache already
  int32_t unused;
};

struct MoaSegment {
  const uint8_t* adapter;  // blob
  const MoaRule* rules;    // of each of the adapter's routers, instead of its own; or NULL
  int32_t start, end;
  // instance level: a gate row for each sequence, computed here where `pooled_spans` has one; NULL for token-level adapters
  const int32_t* pooled_row;    // (end - start,)
  const int32_t* pooled_spans;  // (rows, 2), tokens of the segment, or -1
  float* pooled_gates;          // (rows, num_layers, 2, pooled_width), gates and scores
  int32_t num_pooled, pooled_width;
  float* trace;              // (rows, trace_width), what the routers said of some tokens, or NULL
  const int32_t* trace_row;  // (end - start,) the row of each token, or -1
  int32_t* evaluations;      // (end - start,) experts that were computed for each token are added, or NULL; only with the counters below
  double *selected, *gate_sum, *computed;  // (num_layers, counters_width) or NULL
  double* thresholds;                      // (num_layers,)
  int32_t counters_width, unused;
};

struct MoaBatch {
  const int32_t* token_ids;   // (T,)
  const int32_t* positions;   // (T,) for the rotation
  const int32_t* seen_until;  // (T,) a token sees indices [0, seen_until) and [seen_from, its own] of its sequence
  const int32_t* seen_from;
  const MoaSpan* spans;
  const MoaSegment* segments;
  const int32_t* logit_rows;  // (N,) tokens
  float* logits;              // (N, padded vocab)
  int32_t num_tokens, num_spans, num_segments, num_logits;
};

// What the library can run on this machine, best first; a name is "amx", "avx512_bf16", "avx512" or "avx2".
MOA_API const char* moa_instruction_sets();
// Digest of the sources that the library was compiled from, then the names of the instruction sets that the compiler did not know.
MOA_API const char* moa_stamp();
// sizeof of each struct that crosses the interface, in the order of their declaration; a mirror that drifted is found at loading.
MOA_API int32_t moa_struct_sizes(int64_t* sizes, int32_t capacity);

struct MoaEngine;

// `model` and what it points to must outlive the engine, but for the structs themselves, which are copied. `keys` and `values` are the
// pages of all layers. NULL: the instruction set cannot run here, or memory is short.
MOA_API MoaEngine* moa_engine_new(const MoaModel* model, const char* instruction_set, int32_t num_threads, void* keys, void* values,
                                  int64_t num_pages);
MOA_API void moa_engine_delete(MoaEngine* engine);
// 0, or -1 where memory for the step's buffers is short; then nothing has changed.
MOA_API int32_t moa_engine_step(MoaEngine* engine, const MoaBatch* batch);
// Threads that the next step uses, and ticks of the time stamp counter by part since the last call: base, router, experts, attention, head.
MOA_API int32_t moa_engine_threads(const MoaEngine* engine);
MOA_API void moa_engine_ticks(MoaEngine* engine, uint64_t* ticks);
// Layers computed since the engine was made; may be asked from any thread while a step runs: a step that is long and one that is stuck differ.
MOA_API int64_t moa_engine_layers_done(const MoaEngine* engine);
// Bytes of a page of one layer: keys and values of all kv heads.
MOA_API void moa_page_bytes(const MoaModel* model, int64_t* key_bytes, int64_t* value_bytes);

// Adds up `count` floats with the widest loads, as fast as memory gives them: what a step's bandwidth is measured against.
MOA_API int32_t moa_probe_read(const char* instruction_set, const float* data, int64_t count, float* sum);

// Single operations, each as the step uses it, on one thread; for tests.
MOA_API int32_t moa_op_exp(const char* instruction_set, const float* x, float* y, int64_t count);
MOA_API int32_t moa_op_product(const char* instruction_set, int32_t dtype, const void* x, int32_t rows, int64_t size, const void* weights,
                               const float* bias, int64_t out, float* y);
// y of a base in eight bits; `weights` as `MOA_BASE_INT8` has them.
MOA_API int32_t moa_op_int8_product(const char* instruction_set, const void* x, int32_t rows, int64_t size, const void* weights,
                                    const float* bias, int64_t out, float* y);
MOA_API int32_t moa_op_norm(const char* instruction_set, int32_t dtype, const float* x, const float* weight, int32_t rows, int64_t size,
                            float eps, void* y);
// Routes `rows` tokens of x (rows, padded size) float32 with the router at `router_at` of a blob, by its own rule where `rules` is NULL; trace (rows, 3 * outputs + 1).
MOA_API int32_t moa_op_route(const char* instruction_set, const uint8_t* blob, int64_t router_at, const MoaRule* rules, const float* x,
                             int32_t rows, int64_t size, float* gates, float* trace);
// y (rows, padded out) += B (weights * scale * (A x)) for one expert.
MOA_API int32_t moa_op_expert(const char* instruction_set, int32_t dtype, const uint8_t* blob, int64_t expert_at, const void* x, int32_t rows,
                              int64_t size, const float* weights, int64_t out, float* y);

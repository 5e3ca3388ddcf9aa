// What a step works on: the model, the batch, the cache and the buffers. No vector types, so that library.cpp may include it.
#pragma once
#include <atomic>

#include "abi.h"
#include "team.h"

// Private to each file that includes them, so that no code compiled for one instruction set serves for another (isa.h).
namespace {

constexpr int kLanes = 16;       // float32 numbers of a vector, whatever registers it takes
constexpr int kPanel = 32;       // columns of a packed weight that one tile computes: two vectors
constexpr int kPage = 16;        // tokens of a KV page: the lanes of a vector
constexpr int kTileTokens = 16;  // neighbouring tokens of a segment that a router or an expert looks at together

inline int64_t padded(int64_t size, int64_t to = kPanel) { return (size + to - 1) / to * to; }

}  // namespace

struct MoaCache {
  void *keys, *values;
  int64_t num_pages;
};

// What a part of a step costs, in ticks of the time stamp counter of the first thread.
enum MoaPart { MOA_PART_BASE, MOA_PART_ROUTER, MOA_PART_EXPERTS, MOA_PART_ATTENTION, MOA_PART_HEAD, MOA_NUM_PARTS };

// Buffers of a step, sized for its tokens by `MoaEngine::reserve` in library.cpp; the contents are only meaningful within a step.
struct MoaBuffers {
  float *x, *qkv, *heads, *gate_up, *out;  // (T, width)
  void *normed, *mixed, *inner, *logit_rows;  // (T, width) in the model's format
  float *cosines, *sines;                   // (T, head_dim / 2)
  float* gates;                             // (T, gate_stride), column 0 is 1
  void* coefficients;                       // (T, coefficient_stride) in the model's format
  float* scratch;                           // (threads, scratch_stride)
  int32_t* lists;                           // (threads, T)
  int32_t* token_span;                      // (T,) which span a token belongs to
  int32_t* token_index;                     // (T,) its place in its sequence
  int64_t gate_stride, coefficient_stride, scratch_stride;
};

struct MoaStep {
  const MoaModel* model;
  const MoaBatch* batch;
  MoaCache cache;
  MoaBuffers buffers;
  Team* team;
  uint64_t ticks[MOA_NUM_PARTS];
  std::atomic<int64_t>* layers_done;  // of the engine since it was made; others may read it while the step runs
};

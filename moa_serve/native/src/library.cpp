// The C interface: picks the kernels that the processor can run, owns the buffers of a step, and runs it on the team.
#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <string>
#include <vector>

#include "abi.h"
#include "kernels.h"
#include "step_types.h"
#include "team.h"

#ifndef MOA_STAMP
#define MOA_STAMP "unstamped"
#endif

// A set that the compiler does not know is left out, and its table is at NULL.
extern const MoaKernels moa_kernels_amx __attribute__((weak)), moa_kernels_avx512_bf16 __attribute__((weak));
extern const MoaKernels moa_kernels_avx512 __attribute__((weak)), moa_kernels_avx2 __attribute__((weak));

namespace {

constexpr int64_t kAlignment = 64;

struct InstructionSet {
  const char* name;
  const MoaKernels* kernels;
  bool is_here;
};

// Whether there are AMX tiles for bfloat16, and Linux lets this process use them: it has to be asked, once.
bool may_use_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Conversion of 16-bit floats, which every processor with AVX2 has; GCC 10 cannot be asked for it by name.
bool has_half_floats() {
  constexpr unsigned kF16c = 1u << 29;
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & kF16c) != 0;
}

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_half_floats();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    std::vector<InstructionSet> known = {
        {"amx", &moa_kernels_amx, avx512_bf16 && may_use_amx()},
        {"avx512_bf16", &moa_kernels_avx512_bf16, avx512_bf16},
        {"avx512", &moa_kernels_avx512, avx512},
        {"avx2", &moa_kernels_avx2, avx2},
    };
    for (InstructionSet& set : known) set.is_here = set.is_here && set.kernels != nullptr;
    return known;
  }();
  return sets;
}

// The table of a set, or of the next that computes in this format; NULL where the processor cannot run it.
const MoaKernels* kernels_of(const char* name, int32_t dtype = MOA_BFLOAT16) {
  bool is_found = false;
  for (const InstructionSet& set : instruction_sets()) {
    is_found = is_found || (set.is_here && strcmp(set.name, name) == 0);
    if (is_found && set.is_here && set.kernels->steps[dtype] != nullptr) return set.kernels;
  }
  return nullptr;
}

int64_t element_bytes(int32_t dtype) { return dtype == MOA_FLOAT32 ? 4 : 2; }

// Memory that only grows, aligned to cache lines, with a line of room behind it for loads that run over the end of a row.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(memory_); }

  template <class T>
  T* reserve(int64_t count, int64_t bytes_each = sizeof(T)) {
    const int64_t wanted = padded(count * bytes_each, kAlignment) + 4 * kAlignment;
    if (wanted > size_) {
      free(memory_);
      size_ = 0;
      memory_ = aligned_alloc(kAlignment, (size_t)wanted);
      if (memory_ == nullptr) throw std::bad_alloc();
      memset(memory_, 0, (size_t)wanted);
      size_ = wanted;
    }
    return (T*)memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

struct Buffers {
  Buffer x, qkv, heads, gate_up, out, normed, mixed, inner, logit_rows, cosines, sines, gates, coefficients, scratch, lists, token_span, token_index;
};

}  // namespace

// How many threads a step uses: all of them, until neighbours take a core away; then one less for a while, and longer each time.
class Threads {
 public:
  explicit Threads(int most) : most_(most), now_(most) {}

  int now() const { return now_; }

  // `lost_share` of the last step in which the thread that lost most was ready and had no core. All wait for it at barriers: with n
  // threads, one that loses more than 1 / n of its time costs more than it brings.
  void observe(double lost_share) {
    pressure_ += (lost_share - pressure_) / kSteps;
    if (now_ > 1 && pressure_ > kWorth / now_) {
      now_--, pressure_ = 0, calm_steps_ = 0, steps_to_wait_ = patience_;
      patience_ = std::min(2 * patience_, kLongest);
      return;
    }
    if (now_ < most_ && --steps_to_wait_ <= 0) now_++, pressure_ = 0, steps_to_wait_ = patience_;
    if (++calm_steps_ >= kLongest) patience_ = kShortest;
  }

 private:
  static constexpr double kWorth = 0.4;  // below 1: a barrier itself costs more when somebody comes late
  static constexpr int kSteps = 8, kShortest = 64, kLongest = 1024;  // that a share is averaged over; that a thread is left out
  const int most_;
  int now_;
  double pressure_ = 0;     // the average of lost shares
  int patience_ = kShortest;  // steps for which the next thread that leaves stays away
  int steps_to_wait_ = 0;     // until one more thread is tried again
  int calm_steps_ = 0;        // since one left
};

struct MoaEngine {
  MoaModel model;
  std::vector<MoaLayer> layers;
  const MoaKernels* kernels;
  Team* team;
  MoaCache cache;
  Threads threads;
  Buffers buffers;
  uint64_t ticks[MOA_NUM_PARTS] = {};
  std::atomic<int64_t> layers_done{0};

  void reserve(const MoaBatch& batch, MoaBuffers& at) {
    const int64_t tokens = batch.num_tokens, threads = team_size(team), bytes = element_bytes(model.dtype);
    const int64_t hidden = padded(model.hidden), inner = padded(model.inner), query = padded((int64_t)model.heads * model.head_dim);
    const int64_t key = padded((int64_t)model.kv_heads * model.head_dim), head = padded(model.head_dim, kLanes);
    at.x = buffers.x.reserve<float>(tokens * hidden);
    at.qkv = buffers.qkv.reserve<float>(tokens * (query + 2 * key));
    at.heads = buffers.heads.reserve<float>(tokens * model.heads * head);
    at.gate_up = buffers.gate_up.reserve<float>(tokens * 2 * inner);
    at.out = buffers.out.reserve<float>(tokens * hidden);
    at.normed = buffers.normed.reserve<char>(tokens * hidden, bytes);
    at.mixed = buffers.mixed.reserve<char>(tokens * query, bytes);
    at.inner = buffers.inner.reserve<char>(tokens * inner, bytes);
    at.logit_rows = buffers.logit_rows.reserve<char>((int64_t)batch.num_logits * hidden, bytes);
    at.cosines = buffers.cosines.reserve<float>(tokens * model.head_dim / 2);
    at.sines = buffers.sines.reserve<float>(tokens * model.head_dim / 2);
    at.token_span = buffers.token_span.reserve<int32_t>(tokens);
    at.token_index = buffers.token_index.reserve<int32_t>(tokens);
    int64_t longest = 0;
    for (int number = 0; number < batch.num_spans; number++) {
      const MoaSpan& span = batch.spans[number];
      for (int token = 0; token < span.count; token++) {
        at.token_span[span.start + token] = number;
        at.token_index[span.start + token] = span.computed + token;
      }
      longest = std::max<int64_t>(longest, span.computed + span.count);
    }
    int64_t gates = 1, coefficients = kLanes, rows = 0, adapter_scratch = 0;
    for (int number = 0; number < batch.num_segments; number++) {
      const MoaAdapter& adapter = *(const MoaAdapter*)batch.segments[number].adapter;
      gates = std::max<int64_t>(gates, adapter.num_gates);
      coefficients = std::max<int64_t>(coefficients, adapter.num_coefficients);
      adapter_scratch = std::max<int64_t>(adapter_scratch, adapter.scratch_width);
      rows = std::max<int64_t>(rows, adapter.most_prompt_rows);
    }
    at.gate_stride = padded(gates, kLanes);
    at.coefficient_stride = coefficients;
    at.gates = buffers.gates.reserve<float>(tokens * at.gate_stride);
    at.coefficients = buffers.coefficients.reserve<char>(tokens * coefficients, bytes);
    const int64_t group = model.heads / model.kv_heads, queries = group * head;
    const int64_t by_heads = std::max(queries + 4 * padded(longest, kPage), 2 * queries + 5 * padded(rows, kPage));
    const int64_t by_tiles = 32 * head + 16 * padded(rows, kPage) + 16 * std::max(padded(longest, kPage), padded(rows, kPage));
    const int64_t attention = std::max(by_heads, by_tiles);
    const int64_t routing = 4 * std::max({hidden, inner, query}) + adapter_scratch;
    at.scratch_stride = padded(std::max({attention, routing, tokens}) + kLanes, kLanes);
    at.scratch = buffers.scratch.reserve<float>(threads * at.scratch_stride);
    at.lists = buffers.lists.reserve<int32_t>(threads * tokens);
  }
};

const char* moa_instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const InstructionSet& set : instruction_sets())
      if (set.is_here) joined += (joined.empty() ? "" : ",") + std::string(set.name);
    return joined;
  }();
  return names.c_str();
}

const char* moa_stamp() { return MOA_STAMP; }

int32_t moa_struct_sizes(int64_t* sizes, int32_t capacity) {
  const int64_t all[] = {sizeof(MoaRule),   sizeof(MoaRouter), sizeof(MoaExpert), sizeof(MoaGroup), sizeof(MoaPrompt),  sizeof(MoaAdapterLayer), sizeof(MoaAdapter),
                         sizeof(MoaLayer),  sizeof(MoaModel),  sizeof(MoaSpan),  sizeof(MoaSegment), sizeof(MoaBatch)};
  const int32_t count = (int32_t)(sizeof(all) / sizeof(all[0]));
  for (int32_t i = 0; i < std::min(count, capacity); i++) sizes[i] = all[i];
  return count;
}

MoaEngine* moa_engine_new(const MoaModel* model, const char* instruction_set, int32_t num_threads, void* keys, void* values, int64_t num_pages) {
  const MoaKernels* kernels = kernels_of(instruction_set, model->dtype);
  if (kernels == nullptr || num_threads < 1 || (model->base_format == MOA_BASE_INT8 && model->dtype != MOA_BFLOAT16)) return nullptr;
  try {
    MoaEngine* engine = new MoaEngine{*model, {model->layers, model->layers + model->num_layers}, kernels, team_new(num_threads),
                                      {keys, values, num_pages}, Threads(num_threads), {}, {}};
    engine->model.layers = engine->layers.data();
    return engine;
  } catch (...) {  // no exception may cross into C
    return nullptr;
  }
}

void moa_engine_delete(MoaEngine* engine) {
  if (engine == nullptr) return;
  team_delete(engine->team);
  delete engine;
}

int32_t moa_engine_step(MoaEngine* engine, const MoaBatch* batch) {
  MoaStep step = {&engine->model, batch, engine->cache, {}, engine->team, {}, &engine->layers_done};
  try {
    engine->reserve(*batch, step.buffers);
  } catch (...) {
    return -1;
  }
  team_run(engine->team, engine->threads.now(), engine->kernels->steps[engine->model.dtype], &step);
  engine->threads.observe(team_lost_share(engine->team));
  for (int part = 0; part < MOA_NUM_PARTS; part++) engine->ticks[part] += step.ticks[part];
  return 0;
}

int32_t moa_engine_threads(const MoaEngine* engine) { return engine->threads.now(); }

int64_t moa_engine_layers_done(const MoaEngine* engine) { return engine->layers_done.load(std::memory_order_relaxed); }

void moa_engine_ticks(MoaEngine* engine, uint64_t* ticks) {
  for (int part = 0; part < MOA_NUM_PARTS; part++) ticks[part] = engine->ticks[part], engine->ticks[part] = 0;
}

void moa_page_bytes(const MoaModel* model, int64_t* key_bytes, int64_t* value_bytes) {
  const int64_t bytes = element_bytes(model->dtype), heads = model->kv_heads;
  *key_bytes = heads * padded(model->head_dim, model->dtype == MOA_FLOAT32 ? 1 : 2) * kPage * bytes;
  *value_bytes = heads * padded(model->head_dim, kLanes) * kPage * bytes;
}

int32_t moa_probe_read(const char* instruction_set, const float* data, int64_t count, float* sum) {
  const MoaKernels* kernels = kernels_of(instruction_set);
  if (kernels == nullptr) return -1;
  *sum = kernels->read(data, count);
  return 0;
}

int32_t moa_op_exp(const char* instruction_set, const float* x, float* y, int64_t count) {
  const MoaKernels* kernels = kernels_of(instruction_set);
  if (kernels == nullptr) return -1;
  kernels->exp(x, y, count);
  return 0;
}

int32_t moa_op_product(const char* instruction_set, int32_t dtype, const void* x, int32_t rows, int64_t size, const void* weights,
                       const float* bias, int64_t out, float* y) {
  const MoaKernels* kernels = kernels_of(instruction_set, dtype);
  if (kernels == nullptr) return -1;
  kernels->product[dtype](x, rows, size, weights, bias, out, y);
  return 0;
}

int32_t moa_op_int8_product(const char* instruction_set, const void* x, int32_t rows, int64_t size, const void* weights, const float* bias,
                            int64_t out, float* y) {
  const MoaKernels* kernels = kernels_of(instruction_set);
  if (kernels == nullptr) return -1;
  kernels->int8_product(x, rows, size, weights, bias, out, y);
  return 0;
}

int32_t moa_op_norm(const char* instruction_set, int32_t dtype, const float* x, const float* weight, int32_t rows, int64_t size, float eps,
                    void* y) {
  const MoaKernels* kernels = kernels_of(instruction_set, dtype);
  if (kernels == nullptr) return -1;
  kernels->norm[dtype](x, weight, rows, size, eps, y);
  return 0;
}

int32_t moa_op_route(const char* instruction_set, const uint8_t* blob, int64_t router_at, const MoaRule* rules, const float* x, int32_t rows,
                     int64_t size, float* gates, float* trace) {
  const MoaKernels* kernels = kernels_of(instruction_set);
  if (kernels == nullptr) return -1;
  kernels->route(blob, router_at, rules, x, rows, size, gates, trace);
  return 0;
}

int32_t moa_op_expert(const char* instruction_set, int32_t dtype, const uint8_t* blob, int64_t expert_at, const void* x, int32_t rows,
                      int64_t size, const float* weights, int64_t out, float* y) {
  const MoaKernels* kernels = kernels_of(instruction_set, dtype);
  if (kernels == nullptr) return -1;
  kernels->expert[dtype](blob, expert_at, x, rows, size, weights, out, y);
  return 0;
}

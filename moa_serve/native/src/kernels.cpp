// Compiled once for each instruction set, with MOA_TABLE naming the table that it fills. What only adds instructions for bfloat16 to
// another set is compiled with MOA_BFLOAT16_ONLY: for float32, it would be the other's code once more.
#include "kernels.h"

#include "step.h"

namespace {

template <class N>
void run_step(void* argument, int thread, int num_threads) {
  Step<N>(*(MoaStep*)argument, thread, num_threads).run();
}

float read_all(const float* data, int64_t count) {
  constexpr int kSums = 8;  // so that no addition waits for the one before
  F16 sums[kSums];
  for (F16& sum : sums) sum = f_zero();
  for (int64_t i = 0; i + kSums * kLanes <= count; i += kSums * kLanes)
    for (int n = 0; n < kSums; n++) sums[n] = f_add(sums[n], f_load(data + i + n * kLanes));
  for (int n = 1; n < kSums; n++) sums[0] = f_add(sums[0], sums[n]);
  return f_sum(sums[0]);
}

void exp_all(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) f_store(y + i, f_exp(f_load(x + i)));
}

template <class N>
void product(const void* x, int32_t rows, int64_t size, const void* weights, const float* bias, int64_t out, float* y) {
  using Element = typename N::Element;
  gemm<N>((const Element*)x, size, rows, (const Element*)weights, size, bias, 0, out / kPanel, y, out);
  end_products();
}

void int8_product(const void* x, int32_t rows, int64_t size, const void* weights, const float* bias, int64_t out, float* y) {
  gemm_int8((const uint16_t*)x, size, rows, (const uint8_t*)weights, size, bias, 0, out / kPanel, y, out);
  end_products();
}

template <class N>
void norm(const float* x, const float* weight, int32_t rows, int64_t size, float eps, void* y) {
  const int64_t width = padded(size);
  for (int64_t row = 0; row < rows; row++) rms_norm<N>(x + row * width, weight, size, eps, (typename N::Element*)y + row * width);
}

constexpr int kMostTestRank = 256;

void route(const uint8_t* blob, int64_t router_at, const MoaRule* rules, const float* x, int32_t rows, int64_t size, float* gates, float* trace) {
  const MoaRouter& router = *(const MoaRouter*)(blob + router_at);
  const int64_t room = padded(router.num_rows, kLanes) + kLanes;
  static thread_local float products[kTogether * (kMostTestRank + 2 * kLanes)], rest[2 * kMostTestRank];
  for (int row = 0; row < rows; row += kTogether) {
    const int count = rows - row < kTogether ? rows - row : kTogether;
    const float* inputs[kTogether];
    float* out[kTogether];
    for (int member = 0; member < count; member++) inputs[member] = x + (row + member) * size, out[member] = products + member * room;
    if (router.row_format == MOA_ROWS_FLOAT32)
      dots<Float32>(count, inputs, (const float*)(blob + router.rows_at), size, router.num_rows, out);
    else
      dots<Widened>(count, inputs, (const uint16_t*)(blob + router.rows_at), size, router.num_rows, out);
    for (int member = 0; member < count; member++) {
      float threshold;
      finish_route(router, rule_of(router, rules), blob, out[member], rest, gates + (int64_t)(row + member) * router.outputs, threshold,
                   trace + (int64_t)(row + member) * (3 * router.outputs + 1) - router.trace_at);
    }
  }
}

template <class N>
void expert(const uint8_t* blob, int64_t expert_at, const void* x, int32_t rows, int64_t size, const float* weights, int64_t out, float* y) {
  using Element = typename N::Element;
  const MoaExpert& expert = *(const MoaExpert*)(blob + expert_at);
  alignas(64) static thread_local float low[kTileTokens * kMostTestRank];
  alignas(64) static thread_local Element coefficients[kTileTokens * kMostTestRank];
  const int64_t room = padded(expert.rank, kLanes);
  for (int first = 0; first < rows; first += kTileTokens) {
    const int count = rows - first < kTileTokens ? rows - first : kTileTokens;
    int32_t listed[kTileTokens];
    int num_listed = 0;
    for (int row = 0; row < count; row++)
      if (weights[first + row] != 0) listed[num_listed++] = row;
    memset(low, 0, sizeof(low));
    memset(coefficients, 0, sizeof(coefficients));
    const Element *input = (const Element*)x + first * size, *a = (const Element*)(blob + expert.a_at);
    tile_product<N>(count, listed, num_listed, input, size, a, expert.rank, low, room);
    for (int place = 0; place < num_listed; place++) {
      const F16 scale = f_set(weights[first + listed[place]] * expert.scale);
      for (int64_t r = 0; r < room; r += kLanes) N::store(coefficients + listed[place] * room + r, f_mul(f_load(low + listed[place] * room + r), scale));
    }
    const Section section = {y + first * out, out, 0, 1, (int)(out / kPanel)};
    Expansion<N> sums(count, room, section, 0, section.panels);
    sums.add(listed, num_listed, coefficients, (const Element*)(blob + expert.b_at), expert.rank);
    sums.finish();
  }
}

}  // namespace

#if defined(MOA_BFLOAT16_ONLY)
#define MOA_BY_DTYPE(function) {function<Bfloat16>, nullptr}
#else
#define MOA_BY_DTYPE(function) {function<Bfloat16>, function<Float32>}
#endif

extern const MoaKernels MOA_TABLE;
const MoaKernels MOA_TABLE = {
    MOA_BY_DTYPE(run_step), read_all, exp_all, MOA_BY_DTYPE(product), int8_product, MOA_BY_DTYPE(norm), route, MOA_BY_DTYPE(expert),
};

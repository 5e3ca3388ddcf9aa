// What each instruction set brings: the same table, filled by kernels.cpp, which is compiled once for each. By MoaDtype, a set has
// functions for both formats or none for float32; then the next set's are used.
#pragma once
#include "abi.h"
#include "team.h"

struct MoaKernels {
  TeamWork steps[2];  // the argument is a MoaStep
  float (*read)(const float* data, int64_t count);
  void (*exp)(const float* x, float* y, int64_t count);
  void (*product[2])(const void* x, int32_t rows, int64_t size, const void* weights, const float* bias, int64_t out, float* y);
  void (*int8_product)(const void* x, int32_t rows, int64_t size, const void* weights, const float* bias, int64_t out, float* y);
  void (*norm[2])(const float* x, const float* weight, int32_t rows, int64_t size, float eps, void* y);
  void (*route)(const uint8_t* blob, int64_t router_at, const MoaRule* rules, const float* x, int32_t rows, int64_t size, float* gates, float* trace);
  void (*expert[2])(const uint8_t* blob, int64_t expert_at, const void* x, int32_t rows, int64_t size, const float* weights, int64_t out,
                    float* y);
};

extern const MoaKernels moa_kernels_amx, moa_kernels_avx512_bf16, moa_kernels_avx512, moa_kernels_avx2;

// The seam between the op and its kernels, which are compiled once per instruction set. Plain data and declarations
// only: this header is included by the AVX units, so it must not define anything (see vector_math.inc.h).
#pragma once

#include <cstdint>

namespace ssd_core::cpu {

// One call's options.
struct RowOptions {
  int64_t vocab;              // V
  const float* bias;          // (V,) or null
  const float* class_weight;  // (V,) or null
  double class_weight_sum;    // sum_j c_j, V without class weights
  float logit_scale;          // > 0
  float softcap;              // 0: none
  float temperature;          // > 0
  double label_smoothing;
  double z_loss;
};

// One row's target: the distinct ids of its support.
struct RowTarget {
  const int64_t* ids;     // (count,)
  const double* weights;  // (count,)
  float* values;          // (count,) workspace
  int64_t count;
  double weight_sum;    // S
  double tail;          // p_tail: mass on the ids outside the support, 0 without bucket
  double class_weight;  // c_y
};

struct RowResult {
  float loss;
  float nll;
  float lse;
};

// logits: (V,) float or bfloat16. row_scale null: forward only, logits are not written; else they become the gradient.
// scratch: (V,) or null, which is allowed for float logits if they may be written or nothing needs to be kept.
using RowKernel = RowResult (*)(
    const RowOptions& options, void* logits, const RowTarget& target, const float* row_scale, float* scratch);
using MapKernel = void (*)(const float* x, float* y, int64_t count);

struct RowKernels {
  RowKernel float32;
  RowKernel bfloat16;
  MapKernel exp;   // x <= 0
  MapKernel tanh;
};

namespace baseline {
extern const RowKernels row_kernels;
}
namespace avx2 {
extern const RowKernels row_kernels;
}
namespace avx512 {
extern const RowKernels row_kernels;
}

}  // namespace ssd_core::cpu

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
  double factor;              // of all of the loss but the z-loss
  // v = u + b, or tanh(cap_slope * (u + b)) with a softcap; z = slope * v
  float cap_slope;
  float slope;
};

// An id of a row's support.
struct TargetEntry {
  int64_t id;
  double weight;
  float value;  // v, found in the row
};

// What a pass over a row finds. If the target has a tail, without the support, whose v are replaced by -inf.
struct RowSums {
  float max;      // of v
  double sum;     // sum_j exp(slope * (v_j - max))
  double spread;  // sum_j c_j (max - v_j) of the whole row, only with label smoothing
};

// du_j = (mass * exp(slope * (v_j - max)) - uniform * c_j) [* (1 - v_j^2) with softcap]
struct RowGradient {
  float max;
  float mass;
  float uniform;
};

// logits: (V,) float or bfloat16. scratch: (V,), or null for float logits if they may be written or nothing needs to be
// kept; without softcap it then holds the exponentials if keep_exp, which the gradient reads.
using RowSumsKernel = RowSums (*)(
    const RowOptions& options, void* logits, TargetEntry* targets, int64_t count, bool tail, bool keep_exp,
    float* scratch);
// Overwrites the logits.
using RowGradientKernel = void (*)(const RowOptions& options, void* logits, const RowGradient& row, float* scratch);
using MapKernel = void (*)(const float* x, float* y, int64_t count);

struct RowKernels {
  RowSumsKernel float32_sums;
  RowSumsKernel bfloat16_sums;
  RowGradientKernel float32_gradient;
  RowGradientKernel bfloat16_gradient;
  MapKernel exp;    // x <= 0
  MapKernel expm1;  // x <= 0
  MapKernel log1p;  // -1 <= x <= 0
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

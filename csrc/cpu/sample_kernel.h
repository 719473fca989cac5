// The seam between sampling and its kernels, which are compiled once per instruction set. Plain data and declarations
// only, like row_kernels.h.
#pragma once

#include <cstdint>

namespace ssd_core::cpu {

constexpr int64_t kSampleBlock = 256;  // logits that share a maximum: what lies below a threshold is not read again
constexpr int kMassBins = 1024;

// Of a row z (V,), x = slope * (z - max).
struct SampleSums {
  float max;        // -inf or finite; +inf as it is; a NaN is passed over and shows in the sums
  double sum;       // sum_j exp(z_j - max), to 2e-35 for each j
  double spread;    // sum_j exp(z_j - max) (max - z_j), likewise
  double tempered;  // sum_j exp(x_j)
};

// Tokens among which the draw looks for those that can still win. Noise: Philox4x32-10 of (seed, position, id).
struct Rivals {
  const float* values;  // (count,) logits
  const int32_t* ids;   // (count,), or null: 0, 1, ...
  int64_t count;
  float max;
  float slope;  // 1 / temperature
  uint64_t seed;
  uint64_t position;
};

struct SampleKernels {
  void (*widen_bfloat16)(const void* x, int64_t count, float* y);
  void (*widen_float16)(const void* x, int64_t count, float* y);
  // block_max: the maximum of every kSampleBlock logits.
  SampleSums (*sums)(const float* z, int64_t count, float slope, float* block_max);
  // sum_j exp((z_j - max) * factor), in float64 throughout.
  double (*mass)(const float* z, int64_t count, float max, double factor);
  // The same by bins of z: bin b holds floor((max - z) * scale) = b, the last one all that is farther below.
  void (*masses)(const float* z, int64_t count, float max, double factor, float scale, double* by_bin);
  int (*bin)(float z, float max, float scale);
  // The ids, counted from `first`, whose logit is at least the threshold, in order; returns how many. Writes on for up
  // to 16 places.
  int (*reaching)(const float* z, int64_t count, float threshold, int32_t first, int32_t* ids);
  // The first place from begin on whose v, a lower bound of its exponential noise, is at most exp(x) * ratio; count if
  // there is none. With ratio = exp(-best) (1 + 1e-4), which covers the rounding of exp(x), whoever is passed over
  // scores less than best.
  int64_t (*next_rival)(const Rivals& rivals, int64_t begin, float ratio);
};

namespace baseline {
extern const SampleKernels sample_kernels;
}
namespace avx2 {
extern const SampleKernels sample_kernels;
}
namespace avx512 {
extern const SampleKernels sample_kernels;
}

}  // namespace ssd_core::cpu

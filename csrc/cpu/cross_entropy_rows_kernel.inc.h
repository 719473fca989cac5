// Kernels of cross_entropy_rows_, included once per instruction set with SSD_CORE_ISA naming the namespace.
//
// A row stays in cache through its passes: values and maximum; exponentials and their sum; gradient.
// Names: u raw logits, v = u + b without softcap, tanh((u + b) logit_scale / softcap) with it, z = slope * v.
// Exponents are slope * (v - max v): exact differences, so a large common offset costs nothing.

namespace ssd_core::cpu {
namespace SSD_CORE_ISA {
namespace {

#include "vector_math.inc.h"

// Float32 accumulators run over at most this many elements; float64 ones add up the blocks.
constexpr int64_t kBlock = 1024;

template <class T, bool kBias, bool kSoftcap>
SSD_CORE_INLINE float row_value(const T* u, const float* bias, float cap_slope, int64_t j) {
  float v = to_float(u[j]);
  if constexpr (kBias) {
    v += bias[j];
  }
  if constexpr (kSoftcap) {
    v = tanh_any(v * cap_slope);
  }
  return v;
}

// max_j v_j, optionally storing v (which may be u itself). A NaN is passed over; it shows in the sum of exponentials.
// The lanes are spelt out: NaN rules keep clang from vectorising a float maximum as a reduction.
template <class T, bool kBias, bool kSoftcap, bool kStore>
float load_row(const T* u, const float* bias, float cap_slope, float* v, int64_t n) {
  const auto load = [=](int64_t j) __attribute__((always_inline)) {
    const float x = row_value<T, kBias, kSoftcap>(u, bias, cap_slope, j);
    if constexpr (kStore) {
      v[j] = x;
    }
    return x;
  };
  constexpr int kLanes = 32;
  float max[kLanes];
  for (float& lane : max) {
    lane = -__builtin_inff();
  }
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      max[lane] = larger(load(j + lane), max[lane]);
    }
  }
  for (; j < n; ++j) {
    max[0] = larger(load(j), max[0]);
  }
  for (const float lane : max) {
    max[0] = larger(lane, max[0]);
  }
  return max[0];
}

// sum_j term(j): float32 within a block, float64 across blocks.
template <class Term>
SSD_CORE_INLINE double blocked_sum(int64_t n, const Term& term) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) {
      sum += term(j);
    }
    total += sum;
  }
  return total;
}

// sum_j exp(slope * (v_j - max)), optionally storing the terms (e may be v itself).
template <bool kStore>
double exp_sum(const float* v, float max, float slope, float* e, int64_t n) {
  return blocked_sum(n, [=](int64_t j) __attribute__((always_inline)) {
    const float x = exp_nonpositive(slope * (v[j] - max));
    if constexpr (kStore) {
      e[j] = x;
    }
    return x;
  });
}

// sum_j c_j (max - v_j), c = 1 without class weights.
template <bool kClassWeight>
double spread_sum(const float* v, float max, const float* class_weight, int64_t n) {
  return blocked_sum(n, [=](int64_t j) __attribute__((always_inline)) {
    const float x = max - v[j];
    return kClassWeight ? class_weight[j] * x : x;
  });
}

// x: e_j without softcap, v_j with it (keeping both would take another scratch row). du may be x itself.
template <class T, bool kSoftcap, bool kClassWeight>
void gradient_row(const float* x, const RowOptions& options, const RowGradient& row, T* du) {
  const int64_t n = options.vocab;
  const float max = row.max, slope = options.slope, mass = row.mass, uniform = row.uniform;
  const float* class_weight = options.class_weight;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float e = kSoftcap ? exp_nonpositive(slope * (x[j] - max)) : x[j];
    float g = mass * e - (kClassWeight ? uniform * class_weight[j] : uniform);
    if constexpr (kSoftcap) {
      g *= 1.0f - x[j] * x[j];
    }
    store(du + j, g);
  }
}

// Run-time flags to template arguments.
template <class T>
float load_row(const T* u, const float* bias, bool softcap, float cap_slope, float* v, bool write, int64_t n) {
  if (softcap) {
    return bias ? load_row<T, true, true, true>(u, bias, cap_slope, v, n)
                : load_row<T, false, true, true>(u, bias, cap_slope, v, n);
  }
  if (bias) {
    return load_row<T, true, false, true>(u, bias, cap_slope, v, n);
  }
  return write ? load_row<T, false, false, true>(u, bias, cap_slope, v, n)
               : load_row<T, false, false, false>(u, bias, cap_slope, v, n);
}

inline float* as_floats(float* p) {
  return p;
}

inline float* as_floats(bfloat16*) {
  return nullptr;  // bfloat16 rows always come with scratch
}

template <class T>
RowSums row_sums(
    const RowOptions& options, void* logits, TargetEntry* targets, int64_t count, bool tail, bool keep_exp,
    float* scratch) {
  const int64_t n = options.vocab;
  T* u = static_cast<T*>(logits);
  float* v = scratch ? scratch : as_floats(u);
  const bool softcap = options.softcap > 0;

  float max = load_row(u, options.bias, softcap, options.cap_slope, v, scratch != nullptr, n);
  double spread = 0;
  if (options.label_smoothing > 0) {
    spread = options.class_weight ? spread_sum<true>(v, max, options.class_weight, n)
                                  : spread_sum<false>(v, max, nullptr, n);
  }
  for (int64_t k = 0; k < count; ++k) {
    targets[k].value = v[targets[k].id];
  }
  // The mass off the support is a sum of its own, exact however small it is.
  if (tail) {
    for (int64_t k = 0; k < count; ++k) {
      v[targets[k].id] = -__builtin_inff();
    }
    max = load_row<float, false, false, false>(v, nullptr, 0.0f, nullptr, n);
  }
  const double sum = keep_exp && !softcap ? exp_sum<true>(v, max, options.slope, v, n)
                                          : exp_sum<false>(v, max, options.slope, nullptr, n);
  return {max, sum, spread};
}

template <class T>
void row_gradient(const RowOptions& options, void* logits, const RowGradient& row, float* scratch) {
  T* u = static_cast<T*>(logits);
  const float* x = scratch ? scratch : as_floats(u);
  const bool weighted = options.label_smoothing > 0 && options.class_weight;
  if (options.softcap > 0) {
    weighted ? gradient_row<T, true, true>(x, options, row, u) : gradient_row<T, true, false>(x, options, row, u);
  } else {
    weighted ? gradient_row<T, false, true>(x, options, row, u) : gradient_row<T, false, false>(x, options, row, u);
  }
}

template <float (*kFunction)(float)>
void map(const float* x, float* y, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    y[j] = kFunction(x[j]);
  }
}

}  // namespace

extern const RowKernels row_kernels = {
    row_sums<float>, row_sums<bfloat16>, row_gradient<float>, row_gradient<bfloat16>, map<exp_nonpositive<float>>,
    map<expm1_nonpositive<float>>, map<log1p_nonpositive<float>>, map<tanh_any<float>>};

}  // namespace SSD_CORE_ISA
}  // namespace ssd_core::cpu

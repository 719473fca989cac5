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

SSD_CORE_INLINE float larger(float x, float max) {  // max if x is NaN
  return x > max ? x : max;
}

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

struct GradientTerms {
  float max, slope;     // with softcap: e_j = exp(slope * (v_j - max))
  float mass, uniform;  // du_j = (mass * e_j - uniform * c_j) * (1 - v_j^2 with softcap)
  const float* class_weight;
};

// x: e_j without softcap, v_j with it (keeping both would take another scratch row). du may be x itself.
template <class T, bool kSoftcap, bool kClassWeight>
void gradient_row(const float* x, const GradientTerms& terms, T* du, int64_t n) {
  const float max = terms.max, slope = terms.slope, mass = terms.mass, uniform = terms.uniform;
  const float* class_weight = terms.class_weight;
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

template <class T>
void gradient_row(const float* x, const GradientTerms& terms, bool softcap, T* du, int64_t n) {
  if (softcap) {
    terms.class_weight ? gradient_row<T, true, true>(x, terms, du, n) : gradient_row<T, true, false>(x, terms, du, n);
  } else {
    terms.class_weight ? gradient_row<T, false, true>(x, terms, du, n) : gradient_row<T, false, false>(x, terms, du, n);
  }
}

inline float* as_floats(float* p) {
  return p;
}

inline float* as_floats(bfloat16*) {
  return nullptr;  // bfloat16 rows always come with scratch
}

// Scalars of a row are float64: they cost nothing, and a loss is a difference of them.
template <class T>
RowResult row_kernel(
    const RowOptions& options, void* logits, const RowTarget& target, const float* row_scale, float* scratch) {
  const int64_t n = options.vocab;
  T* u = static_cast<T*>(logits);
  float* v = scratch ? scratch : as_floats(u);
  const bool softcap = options.softcap > 0;
  const bool tail = target.tail > 0;
  const bool smooth = options.label_smoothing > 0;
  const bool keep_exp = row_scale && !softcap;
  const float input_slope = options.logit_scale / options.temperature;
  const float slope = softcap ? options.softcap / options.temperature : input_slope;
  const float cap_slope = softcap ? options.logit_scale / options.softcap : 0.0f;

  const float max = load_row(u, options.bias, softcap, cap_slope, v, scratch != nullptr, n);
  double spread = 0;
  if (smooth) {
    spread = slope * (options.class_weight ? spread_sum<true>(v, max, options.class_weight, n)
                                           : spread_sum<false>(v, max, nullptr, n));
  }
  for (int64_t k = 0; k < target.count; ++k) {
    target.values[k] = v[target.ids[k]];
  }

  // With a tail the support is taken out of the row, so that the mass off the support is a sum of its own, exact
  // however small it is. dense_max and dense_sum describe the exponentials that the gradient pass reads.
  float dense_max = max;
  if (tail) {
    for (int64_t k = 0; k < target.count; ++k) {
      v[target.ids[k]] = -__builtin_inff();
    }
    dense_max = load_row<float, false, false, false>(v, nullptr, 0.0f, nullptr, n);
  }
  const double dense_sum =
      keep_exp ? exp_sum<true>(v, dense_max, slope, v, n) : exp_sum<false>(v, dense_max, slope, nullptr, n);
  double sum = dense_sum;
  double dense_shift = 1;  // exp(slope * (dense_max - max))
  if (tail) {
    dense_shift = __builtin_exp(slope * (static_cast<double>(dense_max) - max));
    sum = dense_sum * dense_shift;
    for (int64_t k = 0; k < target.count; ++k) {
      sum += exp_nonpositive(slope * (target.values[k] - max));
    }
  }
  const double log_sum = __builtin_log(sum);
  const double lse = static_cast<double>(slope) * max + log_sum;

  // nll = sum_k w_k (m - z_k) + S log sum_j exp(z_j - m): right under a large common offset.
  double nll = target.weight_sum * log_sum;
  for (int64_t k = 0; k < target.count; ++k) {
    nll += target.weights[k] * slope * (static_cast<double>(max) - target.values[k]);
  }
  if (tail) {  // + p_tail (lse - lse_off)
    nll += target.tail * (slope * (static_cast<double>(max) - dense_max) + log_sum - __builtin_log(dense_sum));
  }
  const double sharp = target.class_weight * (1 - options.label_smoothing);  // factor of nll
  const double uniform = options.label_smoothing / n;
  double loss = sharp * nll;
  if (smooth) {  // + eps/V sum_j c_j (lse - z_j)
    loss += uniform * (options.class_weight_sum * log_sum + spread);
  }
  if (options.z_loss != 0) {
    loss += options.z_loss * lse * lse;
  }
  const RowResult result = {static_cast<float>(loss), static_cast<float>(nll), static_cast<float>(lse)};
  if (!row_scale) {
    return result;
  }

  // dloss/dz_j = common q_j - uniform c_j - (on the support: sharp w_j; off it: sharp p_tail exp(z_j - lse_off))
  const double scale = static_cast<double>(*row_scale) * input_slope;
  const double z_term = options.z_loss != 0 ? 2 * options.z_loss * lse : 0;
  const double common = sharp * (target.weight_sum + target.tail) + uniform * options.class_weight_sum + z_term;
  const double mass = common * dense_shift / sum - (tail ? sharp * target.tail / dense_sum : 0);
  const GradientTerms terms = {
      dense_max, slope, static_cast<float>(scale * mass), static_cast<float>(scale * uniform),
      smooth ? options.class_weight : nullptr};
  gradient_row(v, terms, softcap, u, n);
  for (int64_t k = 0; k < target.count; ++k) {
    const float x = target.values[k];
    const double q = exp_nonpositive(slope * (x - max)) / sum;
    const double c = terms.class_weight ? terms.class_weight[target.ids[k]] : 1.0f;
    const double chain = softcap ? scale * (1.0f - x * x) : scale;
    store(u + target.ids[k], static_cast<float>(chain * (common * q - uniform * c - sharp * target.weights[k])));
  }
  return result;
}

void exp_kernel(const float* x, float* y, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    y[j] = exp_nonpositive(x[j]);
  }
}

void tanh_kernel(const float* x, float* y, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    y[j] = tanh_any(x[j]);
  }
}

}  // namespace

extern const RowKernels row_kernels = {row_kernel<float>, row_kernel<bfloat16>, exp_kernel, tanh_kernel};

}  // namespace SSD_CORE_ISA
}  // namespace ssd_core::cpu

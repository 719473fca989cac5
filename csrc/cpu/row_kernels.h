// The seam between the ops on rows of logits and their kernels, which are compiled once per instruction set. Plain data
// and declarations only: this header is included by the AVX units, so it must not define anything (see
// vector_math.inc.h).
#pragma once

#include <cstdint>

#include "divergences.h"

namespace ssd_core::cpu {

// -- a row's loss: see cross_entropy_terms.h

// One call's options.
struct RowOptions {
  int64_t vocab;              // V, of all ranks that share it
  int64_t first, own;         // of this rank's ids: the first, and how many; those of targets are relative to the first
  const float* class_weight;  // (own,) or null
  double class_weight_sum;    // sum_j c_j, V without class weights
  double logit_scale;         // > 0
  double softcap;             // 0: none
  double temperature;         // > 0
  double label_smoothing;
  double z_loss;
  double factor;              // of all of the loss but the z-loss
  // v = u, or tanh(cap_slope * u) with a softcap; z = slope * v
  float cap_slope;
  float slope;
};

// An id of a row's support.
struct TargetEntry {
  int64_t id;
  double weight;
  float value;  // v, found in the row
};

// What a pass over a row finds.
struct RowSums {
  float max;      // of v
  double sum;     // sum_j exp(slope * (v_j - max))
  double spread;  // sum_j w_j (max - v_j), of the whole row if the support stays out of the sums; see RowWeights
};

// mass * exp(slope * (v_j - max)) - uniform * c_j [* (1 - v_j^2) with softcap]
struct RowGradient {
  float max;
  float mass;
  float uniform;
};

// -- passes over rows

enum class Element { kFloat32, kBfloat16, kFloat16, kFloat64 };

// One row of a tensor. Past its end v is -inf.
struct RowView {
  const void* data;
  Element element;
  int64_t count;
  float cap_slope;  // v = u, or tanh(cap_slope * u) if it is not 0
};

// w_j = c_j, or c_j (sharp y_j + even) with class probabilities y.
struct RowWeights {
  const float* class_weight;  // (V,), null: 1
  const RowView* probs;       // y, null: none
  float sharp;
  float even;
};

struct SumsQuery {
  float slope;
  float other_slope;           // of a second sum; 0: none
  const RowWeights* weights;   // null: no spread
  TargetEntry* entries;        // (count,) by ascending id: their values are found
  int64_t count;
  bool off_support;            // entries of weight > 0 stay out of the sums
  bool entropy;
};

struct Sums {
  RowSums row;
  double other_sum;     // at the other slope
  double weight;        // sum_j w_j
  double plain_spread;  // sum_j y_j (max - v_j)
  double plain_weight;  // sum_j y_j
  double below;         // sum_j e_j slope (max - v_j), for entropy
  int64_t argmax;       // of v, the lowest id of several; a NaN is the largest
};

// factor * exp(slope * (v_j - max))
struct Exponential {
  float slope;
  float max;
  float factor;
};

// The value of an id, in place of what a pass computes or on top of it.
struct RowPatch {
  int64_t id;
  float value;
};

// What a pass may add to a row's gradient, and where it ends.
struct RowRest {
  const Exponential* other;   // null: none
  const RowWeights* weights;  // null: none; - weight_factor * w_j
  float weight_factor;
  float cap;                  // not 0: the gradient goes on to u, times (1 - v_j^2)
  const RowPatch* patches;    // (patch_count,) by ascending id
  int64_t patch_count;
  bool patches_add;
  void* out;
  Element element;
};

// The gradient of factors on log q_y (but for its own term at y) and on the entropy:
// -q_j (on_logprob + on_entropy (log q_j + entropy)), with 0 log 0 = 0.
struct LogprobSlope {
  float on_logprob;
  float on_entropy;
  float log_sum;
  float entropy;
};

// A teacher's row and a student's, each to at most V columns of its own.
struct Pair {
  RowView teacher;
  RowView student;
  float teacher_slope;
  float student_slope;
  float other_slope;          // of a second sum of the student's; 0: none
  const RowWeights* weights;  // null: no spread of the student
  TargetEntry* entries;       // as in SumsQuery, of the student
  int64_t count;
  Divergence kind;
  float beta;
  float rest;                 // 1 - beta
};

struct PairSums {
  RowSums teacher;
  Sums student;
  double cross;  // of a KL: sum_j of its side's e_j times the difference of the exponents, that side's first
};

struct PairNorm {
  float teacher_max;
  float student_max;
  float teacher_factor;  // 1 / sum
  float student_factor;
  float log_ratio;       // log of the teacher's sum over the student's
};

struct PairTerms {
  double value;
  double own;  // sum of the pulls
};

struct RowKernels {
  Sums (*sums)(const RowView& row, const SumsQuery& query);
  // softmax and its logarithm: exponential, or slope * (v_j - max) - log_sum
  void (*exponential)(const RowView& row, const Exponential& exponential, const RowRest& rest);
  void (*log_softmax)(const RowView& row, float slope, float max, float log_sum, const RowRest& rest);
  void (*logprob_gradient)(
      const RowView& row, const Exponential& probability, const LogprobSlope& slope, const RowRest& rest);
  PairSums (*pair_sums)(const Pair& pair);
  PairTerms (*pair_terms)(const Pair& pair, const PairNorm& norm);
  // factor * (pull_j - q_j own), by ids of the student
  void (*pair_gradient)(const Pair& pair, const PairNorm& norm, float factor, float own, const RowRest& rest);
  // of a softmax p from g: sum_j p_j g_j, then factor * p_j (g_j - sum); of its logarithm l: sum_j g_j, then
  // factor * (g_j - exp(l_j) sum)
  double (*softmax_backward_sum)(const RowView& grad, const RowView& out, bool log);
  void (*softmax_backward)(
      const RowView& grad, const RowView& out, bool log, float factor, float sum, const RowRest& rest);
  void (*exp)(const float* x, float* y, int64_t count);    // x <= 0
  void (*expm1)(const float* x, float* y, int64_t count);  // x <= 0
  void (*log1p)(const float* x, float* y, int64_t count);  // -1 <= x <= 0
  void (*tanh)(const float* x, float* y, int64_t count);
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

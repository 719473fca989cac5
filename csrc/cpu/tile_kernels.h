// The seam between the fused losses of a head and their kernels, which are compiled once per instruction set. Plain
// data and declarations only, like row_kernels.h.
//
// Operands are made of 32-bit words: a float32, or two bfloat16 that are neighbours along the summed dimension. Tokens
// stand side by side in the lanes of a *panel*, vocabulary ids below each other. So a reduction over the vocabulary is
// a loop without shuffles, and a token's sums have the same order whatever its neighbours.
#pragma once

#include <cstdint>

#include "divergences.h"

namespace ssd_core::cpu {

// c (m, panel) = [c +] a (m, k words) b (k words, panel): strides of a and b in bytes, of c in floats. The products
// of a c_ij are summed in the order of k, whatever m, and then added: a long sum comes in parts and keeps its digits.
// `a_places` (m,): which rows of a they are; null: 0 and so on.
using Gemm = void (*)(
    const void* a, int64_t a_row, int64_t a_col, const void* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
    int64_t k, bool add, const int64_t* a_places);

// From raw outputs u to exponents: slope * (v - max v), v = u + b, or tanh((u + b) * cap_slope) with a softcap.
struct TileOptions {
  bool softcap;
  float cap_slope;
  float slope;
  bool keep_values;  // v in float32, where they are; otherwise exp(slope * (v - max of the tile)), as words
};

// One panel's lanes, (panel,) each, x = slope * (v - max):
// du = ((factor + slope_term * x) * e^x + second * exp(second_slope * (v - max)) + addend - uniform * c_j)
//      [* (1 - v^2) with softcap]. Null: 0. What follows `uniform` is for values only.
struct TileGradient {
  const float* max;      // of values; of kept exponentials, factor is relative to what they are
  const float* factor;   // with an addend it may be null, too
  const float* uniform = nullptr;
  const float* slope_term = nullptr;
  const float* second = nullptr;
  float second_slope = 0.0f;
  const float* addend = nullptr;  // (rows, panel)
};

// A student's and a teacher's v, and which divergence. Of each lane: what exponents are relative to, log p =
// slope * (v - max) - log_sum. For the sums of a KL, whose terms are linear in masses, log sums are null: 0.
struct TilePair {
  Divergence kind;
  float beta;
  float student_slope, teacher_slope;
  const float *student_max, *teacher_max;
  const float *student_log_sum, *teacher_log_sum;
};

// What is kept of a tile is overwritten by its gradient, in the layout that d_input's product reads.
struct TileKernels {
  int64_t panel;
  Gemm gemm;
  // Words along the rows of w (rows, width), each word's elements below each other: out (words of rows, width), a
  // product's transposed a. w_row in bytes, out_row in words; w_places as a product's.
  void (*transposed_words)(
      const void* w, int64_t w_row, int64_t rows, int64_t width, uint32_t* out, int64_t out_row,
      const int64_t* w_places);
  // u (rows, panel) -> v in place (rows even), max (panel,) over v; a NaN is passed over.
  void (*values)(float* u, int64_t rows, const float* bias, const TileOptions&, float* max);
  // exp(slope * (v - max)): their sum (panel,), and the words to `kept`, unless it is null or v are what is kept.
  void (*exponentials)(const float* v, int64_t rows, const float* max, const TileOptions&, void* kept, float* sum);
  // sum_j e^x x with x = slope * (v_j - max), and the first j of v_j = max, (panel,) each.
  void (*moments)(const float* v, int64_t rows, const float* max, float slope, float* sum, int32_t* first);
  // sum_j c_j (max - v_j), (panel,); c null: 1.
  void (*spread)(const float* v, int64_t rows, const float* max, const float* class_weight, float* sum);
  // Of v (rows, panel) of both: sums of exponentials, and of the terms of a KL.
  void (*kl_sums)(
      const float* student, const float* teacher, int64_t rows, const TilePair&, float* student_sum,
      float* teacher_sum, float* value);
  // A JSD's pulls (see divergences.inc.h) in place of the teacher's v, and sums of its terms, value and pulls.
  void (*jsd_pulls)(
      const float* student, float* teacher, int64_t rows, const TilePair&, float* value, float* own);
  // scale * (pull - q * own), (rows, panel); `teacher`: of a JSD its pulls
  void (*pair_slopes)(
      const float* student, const float* teacher, int64_t rows, const TilePair&, const float* own, const float* scale,
      float* out);
  // The gradient in place of what was kept, and once more by rows of the vocabulary, for d_weight's product.
  void (*gradient)(
      void* kept, int64_t rows, const float* class_weight, const TileGradient&, const TileOptions&, void* by_row,
      int64_t by_row_stride);
  // Of elements (rows, n): sums of each column, and of each row the sum of those whose mask (n,) is 1. Both are added
  // to; n a multiple of the panel.
  void (*masked_sums)(
      const void* by_row, int64_t rows, int64_t by_row_stride, int64_t n, const float* mask, float* column_sums,
      float* row_sums);
};

// kernels of float32 words, and of bfloat16 pairs (null gemm: the instruction set has no such product)
namespace baseline {
extern const TileKernels float32_tiles;
}
namespace avx2 {
extern const TileKernels float32_tiles;
}
namespace avx512 {
extern const TileKernels float32_tiles;
}
namespace avx512bf16 {
extern const TileKernels bfloat16_tiles;
extern const TileKernels bfloat16_wide_tiles;  // for what keeps values
}

}  // namespace ssd_core::cpu

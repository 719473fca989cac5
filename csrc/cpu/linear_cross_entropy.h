#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "ranks.h"

namespace ssd_core::cpu {

// Cross-entropy of a linear head in chunks of `rows` tokens and, if `columns` < V, of the vocabulary; the formulas are
// those of logit_rows.h, u = input weight^T.
//
// -> loss, nll, lse (M,) float32 and, with row_scale, the gradients of sum_i row_scale_i loss_i that `needs` asks for
// (input, weight, bias; undefined otherwise), those of weight and bias in float32 if keep_float32.
//
// Over ranks that share the vocabulary (see ranks.h) weight, bias, class_weight, dense and vocab_order are of this
// rank's ids, which begin at vocab_start; those in `ids` are of the whole. `rows` is the same on all ranks; d_input is
// float32 and this rank's part, and so are the bounds.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(
    const at::Tensor& input,                        // (N, D)
    const at::Tensor& weight,                       // (V, D) float32, bfloat16 or float16
    const std::optional<at::Tensor>& bias,          // (V,)
    const at::Tensor& ids,                          // (N, K) int64
    const std::optional<at::Tensor>& probs,         // (N, K) float32; none: hard labels, K = 1
    const std::optional<at::Tensor>& dense,         // (N, V) class probabilities, in place of ids
    const std::optional<at::Tensor>& class_weight,  // (V,) float32, of hard labels and class probabilities
    const std::optional<at::Tensor>& index,         // (M,) int64 rows that count; none: all
    const std::optional<at::Tensor>& row_scale,     // (M,) float32; none: no gradients
    at::ScalarType dtype,                           // that products are taken in
    std::array<bool, 3> needs,
    bool keep_float32,
    int64_t rows,
    int64_t columns,
    double logit_scale,
    double softcap,
    double temperature,
    double label_smoothing,
    double z_loss,
    bool bucket,
    double grad_filter,         // bounds on the softmax mass that products leave out: see grad_filter.h; 0: exact
    double grad_filter_weight,
    const std::optional<at::Tensor>& vocab_order,  // (V,) int64; none: by mean probability
    int64_t held_bytes,                            // of active gradient that may wait
    const Ranks::Gather& gather,                   // empty: this is the whole vocabulary
    int64_t vocab_start);

// Bytes that it holds at most: see head_bytes.
int64_t linear_cross_entropy_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, int64_t support, at::ScalarType dtype, bool softcap,
    bool smoothing, bool dense, bool cast);

}  // namespace ssd_core::cpu

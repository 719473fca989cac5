#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "ranks.h"

namespace ssd_core::cpu {

// Log-probability of given ids and entropy of a linear head, in chunks as linear_cross_entropy; z as there.
//
//   logprob = z_y - lse(z),  entropy = lse(z) - sum_j q_j z_j,  q = softmax(z)
//
// -> logprob, entropy, lse, argmax (M,) float32 (of equal maxima the lowest id) and, with row_scale, the gradients of
// sum_i (row_scale_i0 logprob_i + row_scale_i1 entropy_i).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logprob(
    const at::Tensor& input,                     // (N, D)
    const at::Tensor& weight,                    // (V, D) float32, bfloat16 or float16
    const std::optional<at::Tensor>& bias,       // (V,)
    const at::Tensor& ids,                       // (N,) int64
    const std::optional<at::Tensor>& index,      // (M,) int64 rows that count; none: all
    const std::optional<at::Tensor>& row_scale,  // (M, 2) float32; none: no gradients
    at::ScalarType dtype,                        // that products are taken in
    std::array<bool, 3> needs,
    bool keep_float32,
    int64_t rows,
    int64_t columns,
    double logit_scale,
    double softcap,
    double temperature,
    const Ranks::Gather& gather,  // empty: this is the whole vocabulary; otherwise as in linear_cross_entropy
    int64_t vocab_start);

// Bytes that it holds at most: see head_bytes.
int64_t linear_logprob_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, at::ScalarType dtype, bool cast);

}  // namespace ssd_core::cpu

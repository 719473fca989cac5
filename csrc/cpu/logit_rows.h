// The ops on rows of logits that are there. Logits (N, V), and whatever else has V columns, are float32, bfloat16 or
// float16 (teachers and class probabilities also float64) of any strides. `index` (M,) int64 ascending names the rows
// that count, none: all. Statistics are float32; gradients have the logits' dtype, are contiguous, and 0 in other rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "row_kernels.h"

namespace ssd_core::cpu {

// The kernels of the active instruction set.
const RowKernels& active_row_kernels();

// softmax(logits / temperature) of each row, or its logarithm, and what they make of a gradient.
at::Tensor softmax_rows(const at::Tensor& logits, double temperature, bool log);
at::Tensor softmax_rows_backward(const at::Tensor& grad, const at::Tensor& out, double temperature, bool log);

// (loss, nll, lse) (3, M) and, with row_scale, the gradient of sum_i row_scale_i loss_i with respect to the logits u.
//
//   z_j  = s(logit_scale * u_j) / temperature,  s(x) = softcap * tanh(x / softcap), identity if softcap = 0
//   nll  = S lse(z) - sum_k w_k z[a_k],  S = sum_k w_k;  with bucket + p_tail (lse - lse_off), p_tail = max(0, 1 - S),
//          lse_off over the ids outside the support (p_tail = 0 if there are none)
//   loss = c_y (1 - label_smoothing) nll + label_smoothing / V sum_j c_j (lse - z_j) + z_loss lse^2
//
// With class probabilities y, in place of ids: nll = sum_j y_j (lse - z_j), loss = sum_j w_j (lse - z_j) + z_loss lse^2
// with w_j = c_j ((1 - label_smoothing) y_j + label_smoothing / V), where a weight of 0 makes a term 0.
//
// Entries of probability 0 are skipped, whatever their id; ids may repeat. A NaN or +inf logit makes its row NaN
// (softcap bounds the inf), -inf has probability 0. If p_tail > 0 and all logits off the support are -inf, nll is NaN.
std::tuple<at::Tensor, std::optional<at::Tensor>> cross_entropy_rows(
    const at::Tensor& logits,                       // (N, V)
    const at::Tensor& ids,                          // (N, K) int32 or int64; with class probabilities not looked at
    const std::optional<at::Tensor>& probs,         // (N, K) float32; none: hard labels, K = 1
    const std::optional<at::Tensor>& dense,         // (N, V) class probabilities
    const std::optional<at::Tensor>& class_weight,  // (V,) float32, not with probs
    const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& row_scale,     // (M,) float32
    double logit_scale,
    double softcap,
    double temperature,
    double label_smoothing,
    double z_loss,
    bool bucket);

// (logprob of ids, entropy, lse, argmax) (4, M), of the logits z; with row_scale the gradient of sum_i
// (row_scale_i0 logprob_i + row_scale_i1 entropy_i).
std::tuple<at::Tensor, std::optional<at::Tensor>> logprob_rows(
    const at::Tensor& logits,                     // (N, V)
    const at::Tensor& ids,                        // (N,) int64
    const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& row_scale,   // (M, 2) float32
    double logit_scale,
    double softcap,
    double temperature);

// (loss, divergence, nll, lse) (4, M) and the gradient of sum_i row_scale_i loss_i:
//
//   loss = (1 - ce_weight) divergence + ce_weight cross-entropy of labels + z_loss lse^2
//
// The divergence is at the temperature, the rest at 1, left out (0) without with_ce; see distill_terms.h.
std::tuple<at::Tensor, std::optional<at::Tensor>> distill_rows(
    const at::Tensor& logits,                         // (N, V)
    const std::optional<at::Tensor>& ids,             // (N, K) int32 or int64
    const std::optional<at::Tensor>& probs,           // (N, K) float32
    const std::optional<at::Tensor>& teacher_logits,  // (N, V'), in place of ids and probs
    const std::optional<at::Tensor>& labels,          // (N,) int64
    const std::optional<at::Tensor>& class_weight,    // (V,) float32, of the cross-entropy
    const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& row_scale,       // (M,) float32
    const std::string& divergence,
    double beta,
    const std::string& tail,
    bool temperature_squared,
    double ce_weight,
    bool with_ce,
    double logit_scale,
    double softcap,
    double temperature,
    double label_smoothing,
    double z_loss);

}  // namespace ssd_core::cpu

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "cross_entropy_rows_kernel.h"

namespace ssd_core::cpu {

// The kernels of the active instruction set.
const RowKernels& active_row_kernels();

// Rows of raw logits u -> (loss, nll, lse), each (R,) float32. With row_scale, u is overwritten by the gradient of
// sum_i row_scale_i loss_i with respect to u.
//
//   z_j  = s(logit_scale * (u_j + bias_j)) / temperature,  s(x) = softcap * tanh(x / softcap), identity if softcap = 0
//   nll  = S lse(z) - sum_k w_k z[a_k],  S = sum_k w_k;  with bucket + p_tail (lse - lse_off), p_tail = max(0, 1 - S),
//          lse_off over the ids outside the support (p_tail = 0 if there are none)
//   loss = c_y (1 - label_smoothing) nll + label_smoothing / V sum_j c_j (lse - z_j) + z_loss lse^2
//
// Entries of probability 0 are skipped, whatever their id; ids may repeat. A NaN or +inf logit makes its row NaN
// (softcap bounds the inf), -inf has probability 0. If p_tail > 0 and all logits off the support are -inf, nll is NaN.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_rows_(
    at::Tensor& logits,                             // (R, V) float32 or bfloat16, unit stride along V
    const std::optional<at::Tensor>& bias,          // (V,) float32
    const at::Tensor& ids,                          // (R, K) int64
    const std::optional<at::Tensor>& probs,         // (R, K) float32; none: hard labels, K = 1
    const std::optional<at::Tensor>& class_weight,  // (V,) float32, hard labels only
    const std::optional<at::Tensor>& row_scale,     // (R,) float32; none: logits are only read
    double logit_scale,
    double softcap,
    double temperature,
    double label_smoothing,
    double z_loss,
    bool bucket);

}  // namespace ssd_core::cpu

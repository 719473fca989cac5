#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "ranks.h"

namespace ssd_core::cpu {

// A divergence from a teacher to a linear head, in chunks as linear_cross_entropy, and the cross-entropy that goes with
// it. Formulas: ssd_core/reference/distill.py.
//
//   loss = (1 - ce_weight) [temperature^2] divergence + ce_weight cross_entropy(labels) + z_loss lse^2
//
// the latter two at temperature 1, and only with_ce. -> loss, divergence, nll, lse (M,) float32 and the gradients.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_distill(
    const at::Tensor& input,                          // (N, D)
    const at::Tensor& weight,                         // (V, D) float32, bfloat16 or float16
    const std::optional<at::Tensor>& bias,            // (V,)
    const std::optional<at::Tensor>& ids,             // (N, K) int64 of a sparse teacher
    const std::optional<at::Tensor>& probs,           // (N, K) float32
    const std::optional<at::Tensor>& teacher_logits,  // (N, V')
    const std::optional<at::Tensor>& teacher_input,   // (N, D')
    const std::optional<at::Tensor>& teacher_weight,  // (V', D')
    const std::optional<at::Tensor>& teacher_bias,    // (V',)
    const std::optional<at::Tensor>& labels,          // (N,) int64
    const std::optional<at::Tensor>& class_weight,    // (V,) float32
    const std::optional<at::Tensor>& index,           // (M,) int64 rows that count; none: all
    const std::optional<at::Tensor>& row_scale,       // (M,) float32; none: no gradients
    at::ScalarType dtype,                             // that products are taken in
    std::array<bool, 3> needs,
    bool keep_float32,
    int64_t rows,
    int64_t columns,
    double logit_scale,
    double softcap,
    double temperature,
    double teacher_logit_scale,
    double teacher_softcap,
    const std::string& divergence,
    double beta,
    const std::string& tail,
    bool temperature_squared,
    bool with_ce,
    double ce_weight,
    double label_smoothing,
    double z_loss,
    const Ranks::Gather& gather,  // empty: this is the whole vocabulary; otherwise as in linear_cross_entropy
    int64_t vocab_start);

// Bytes that it holds at most: see head_bytes. `support`: ids of a sparse teacher, 0: a dense one, whose hidden states
// have length `teacher_hidden`, 0: its logits are given.
int64_t linear_distill_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, int64_t support, int64_t teacher_hidden,
    at::ScalarType dtype, bool cast);

}  // namespace ssd_core::cpu

#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "sample_kernel.h"

namespace ssd_core::cpu {

// One draw per row: (token (B,) int64; logprob, sampling_logprob, kept_mass, entropy (B,) float32; support ids (B, K)
// int32 and probs (B, K) float32, 0 beyond a row's support, K the largest one). What is drawn, and what is recorded, is
// defined in ssd_core/reference/sample.py. Throws std::invalid_argument, a ValueError, for a row without a distribution.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sample(
    const at::Tensor& logits,     // (B, V) float32, bfloat16 or float16
    const at::Tensor& seeds,      // (B,) int64
    const at::Tensor& positions,  // (B,) int64
    double temperature,           // 0: greedy
    int64_t top_k,                // at most V; 0: all
    double top_p,
    double min_p,
    int64_t support_limit);       // K is at most this

}  // namespace ssd_core::cpu

// The order of the vocabulary that makes the gradient filter's tiles, if the caller has none.
#pragma once

#include <ATen/core/Tensor.h>

#include "cross_entropy_terms.h"
#include "linear_head.h"

namespace ssd_core::cpu {

// (V,) int64: ids by descending mean probability over the call's first 128 tokens, ties by id.
at::Tensor vocab_order(const HeadCall& call, const at::Tensor& bias, const RowOptions& options);

}  // namespace ssd_core::cpu

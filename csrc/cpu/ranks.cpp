#include "ranks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sub.h>

#include <utility>

namespace ssd_core::cpu {

Ranks::Ranks(Gather gather, int64_t first, int64_t own) : gather_(std::move(gather)), first_(first), vocab_(own) {
  if (!alone()) {
    const at::Tensor all = this->gather(at::scalar_tensor(own, at::TensorOptions(at::kDouble)).reshape({1}));
    count_ = all.size(0);
    vocab_ = static_cast<int64_t>(all.sum().item<double>());
  }
}

at::Tensor Ranks::relative(const at::Tensor& ids) const {
  return first_ == 0 || !ids.defined() ? ids : at::sub(ids, first_);
}

RowOptions Ranks::shared(RowOptions options) const {
  options.first = first_;
  options.vocab = vocab_;
  options.class_weight_sum = options.class_weight ? sum(options.class_weight_sum) : static_cast<double>(vocab_);
  return options;
}

at::Tensor Ranks::gather(const at::Tensor& x) const {
  const at::Tensor all = gather_(x);
  TORCH_CHECK(
      all.scalar_type() == at::kDouble && all.dim() == 2 && all.size(1) == x.size(0),
      "gather: expected float64 (ranks, ", x.size(0), "), got ", all.toString(), " ", all.sizes());
  return all.contiguous();
}

void Ranks::add(double* x, int64_t n) const {
  if (alone()) {
    return;
  }
  const at::Tensor mine = at::empty({n}, at::TensorOptions(at::kDouble));
  std::copy_n(x, n, mine.mutable_data_ptr<double>());
  const at::Tensor all = gather(mine);
  const double* from = all.const_data_ptr<double>();
  std::fill_n(x, n, 0.0);
  for (int64_t r = 0; r < count_; ++r, from += n) {
    for (int64_t k = 0; k < n; ++k) {
      x[k] += from[k];
    }
  }
}

double Ranks::sum(double x) const {
  add(&x, 1);
  return x;
}

// As finish_panels has it; gathering takes as much again as its result. Ids relative to this rank's; a bit of each id.
int64_t ranks_bytes(int64_t tokens, int64_t rows, int64_t vocab, int64_t support, int64_t ranks) {
  constexpr int64_t kFields = 12;  // of whatever is found of a token, and class weights
  return rows * (kFields + support) * 8 * (2 + 2 * ranks) + tokens * support * 8 + vocab * ranks / 8;
}

}  // namespace ssd_core::cpu

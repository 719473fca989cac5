#include "cross_entropy_rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cross_entropy_terms.h"
#include "isa.h"

namespace ssd_core::cpu {

const RowKernels& active_row_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::row_kernels;
    case Isa::kAvx2:
      return avx2::row_kernels;
#endif
    default:
      return baseline::row_kernels;
  }
}

namespace {

// Rows x columns below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

void check_tensor(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
  TORCH_CHECK(x.scalar_type() == dtype, name, ": expected ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK(x.sizes() == sizes, name, ": expected shape ", sizes, ", got ", x.sizes());
}

// The tensor, checked and contiguous; undefined if absent.
at::Tensor optional_tensor(
    const char* name, const std::optional<at::Tensor>& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  if (!x.has_value() || !x->defined()) {
    return {};
  }
  check_tensor(name, *x, dtype, sizes);
  return x->contiguous();
}

const float* data_or_null(const at::Tensor& x) {
  return x.defined() ? x.const_data_ptr<float>() : nullptr;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_rows_(
    at::Tensor& logits,
    const std::optional<at::Tensor>& bias,
    const at::Tensor& ids,
    const std::optional<at::Tensor>& probs,
    const std::optional<at::Tensor>& class_weight,
    const std::optional<at::Tensor>& row_scale,
    double logit_scale,
    double softcap,
    double temperature,
    double label_smoothing,
    double z_loss,
    bool bucket) {
  const bool is_bfloat16 = logits.scalar_type() == at::kBFloat16;
  TORCH_CHECK(
      is_bfloat16 || logits.scalar_type() == at::kFloat,
      "logits: expected Float or BFloat16, got ", logits.scalar_type());
  TORCH_CHECK(logits.dim() == 2, "logits: expected shape (R, V), got ", logits.sizes());
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  TORCH_CHECK(vocab > 0, "logits: expected at least one column, got shape ", logits.sizes());
  TORCH_CHECK(
      logits.stride(1) == 1 || vocab == 1, "logits: expected stride 1 in the last dimension, got ", logits.strides());
  TORCH_CHECK(ids.dim() == 2, "ids: expected shape (R, K), got ", ids.sizes());
  const int64_t width = ids.size(1);
  check_tensor("ids", ids, at::kLong, {rows, width});
  const at::Tensor ids_c = ids.contiguous();
  const at::Tensor bias_c = optional_tensor("bias", bias, at::kFloat, {vocab});
  const at::Tensor probs_c = optional_tensor("probs", probs, at::kFloat, {rows, width});
  const at::Tensor class_weight_c = optional_tensor("class_weight", class_weight, at::kFloat, {vocab});
  const at::Tensor row_scale_c = optional_tensor("row_scale", row_scale, at::kFloat, {rows});
  TORCH_CHECK(probs_c.defined() || width == 1, "ids: expected one id per row without probs, got K = ", width);
  TORCH_CHECK(
      !class_weight_c.defined() || !probs_c.defined(),
      "class_weight: expected hard labels (probs absent), got probs of shape ", probs_c.sizes());
  TORCH_CHECK(
      !row_scale_c.defined() || rows < 2 || logits.stride(0) >= vocab,
      "logits: expected rows that do not overlap when row_scale is given, got strides ", logits.strides());
  RowOptions options = row_options(vocab, class_weight_c, logit_scale, softcap, temperature, label_smoothing, z_loss);
  options.bias = data_or_null(bias_c);

  const int64_t* id_data = ids_c.const_data_ptr<int64_t>();
  const float* prob_data = data_or_null(probs_c);
  const float* scale_data = data_or_null(row_scale_c);
  check_ids(id_data, prob_data, rows, width, vocab);
  const RowKernels& kernels = active_row_kernels();
  const RowSumsKernel sums = is_bfloat16 ? kernels.bfloat16_sums : kernels.float32_sums;
  const RowGradientKernel gradient = is_bfloat16 ? kernels.bfloat16_gradient : kernels.float32_gradient;

  const auto result_options = logits.options().dtype(at::kFloat);
  at::Tensor loss = at::empty({rows}, result_options);
  at::Tensor nll = at::empty({rows}, result_options);
  at::Tensor lse = at::empty({rows}, result_options);
  float* loss_data = loss.mutable_data_ptr<float>();
  float* nll_data = nll.mutable_data_ptr<float>();
  float* lse_data = lse.mutable_data_ptr<float>();

  // Float32 rows serve as their own workspace where they may be written, and where nothing but reading is needed.
  const bool keeps_values = options.bias || softcap > 0 || bucket;
  const bool needs_scratch = is_bfloat16 || (keeps_values && !scale_data);
  // Reading must not count as writing (copy-on-write tensors); without row_scale the kernel only reads.
  void* logit_start = scale_data ? logits.mutable_data_ptr() : const_cast<void*>(logits.const_data_ptr());
  char* logit_data = static_cast<char*>(logit_start);
  const int64_t row_bytes = logits.stride(0) * static_cast<int64_t>(logits.element_size());

  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / vocab), [&](int64_t begin, int64_t end) {
    TargetReader reader(width, vocab);
    const std::unique_ptr<float[]> scratch(needs_scratch ? new float[vocab] : nullptr);
    for (int64_t i = begin; i < end; ++i) {
      const RowTarget target =
          reader.read(id_data + i * width, prob_data ? prob_data + i * width : nullptr, options, bucket);
      char* row = logit_data + i * row_bytes;
      const RowSums found =
          sums(options, row, target.entries, target.count, target.tail > 0, scale_data != nullptr, scratch.get());
      const RowTerms terms = finish_row(options, found, target, scale_data ? scale_data[i] : 0.0f);
      loss_data[i] = terms.loss;
      nll_data[i] = terms.nll;
      lse_data[i] = terms.lse;
      if (!scale_data) {
        continue;
      }
      gradient(options, row, terms.gradient, scratch.get());
      for (int64_t k = 0; k < target.count; ++k) {
        const float g = target_gradient(options, terms, target.entries[k]);
        if (is_bfloat16) {
          reinterpret_cast<c10::BFloat16*>(row)[target.entries[k].id] = g;
        } else {
          reinterpret_cast<float*>(row)[target.entries[k].id] = g;
        }
      }
    }
  });
  return {loss, nll, lse};
}

namespace {

// Shapes only, for torch.compile and fake tensors.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_rows_meta(
    at::Tensor& logits,
    const std::optional<at::Tensor>&,
    const at::Tensor&,
    const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&,
    double,
    double,
    double,
    double,
    double,
    bool) {
  const auto result = [&] { return at::empty_symint({logits.sym_size(0)}, logits.options().dtype(at::kFloat)); };
  return {result(), result(), result()};
}

}  // namespace

TORCH_LIBRARY_IMPL(ssd_core, CPU, m) {
  m.impl("cross_entropy_rows_", &cross_entropy_rows_);
}

TORCH_LIBRARY_IMPL(ssd_core, Meta, m) {
  m.impl("cross_entropy_rows_", &cross_entropy_rows_meta);
}

}  // namespace ssd_core::cpu

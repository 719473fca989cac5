#include "linear_distill.h"

#include "dense_distill_pass.h"
#include "sparse_distill_pass.h"

namespace ssd_core::cpu {

int64_t linear_distill_bytes(
    int64_t rows, int64_t columns, int64_t vocab, int64_t hidden, int64_t support, int64_t teacher_hidden,
    at::ScalarType dtype, bool cast) {
  const int64_t tiles = divide_up(vocab, kTile), dense = support == 0;
  const int64_t statistics = (tiles + 1) * 4 * (dense ? 10 : 6) + (9 + 12) * 4;
  const int64_t row = statistics + HeadTargets::row_bytes(support + 1) + static_cast<int64_t>(sizeof(RowTerms)) +
      static_cast<int64_t>(sizeof(SupportTerms)) + 8;
  const int64_t thread = dense ? (3 * kTile + 2 * tiles) * kMaxPanel * 4 : 0;
  return head_bytes(rows, columns, vocab, hidden, dtype, true, cast, dense ? 4 : 0) + rows * row + tiles * 32 +
      vocab / 8 + counted_threads() * thread + teacher_bytes(rows, teacher_hidden);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_distill(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ids,
    const std::optional<at::Tensor>& probs,
    const std::optional<at::Tensor>& teacher_logits,
    const std::optional<at::Tensor>& teacher_input,
    const std::optional<at::Tensor>& teacher_weight,
    const std::optional<at::Tensor>& teacher_bias,
    const std::optional<at::Tensor>& labels,
    const std::optional<at::Tensor>& class_weight,
    const std::optional<at::Tensor>& index,
    const std::optional<at::Tensor>& row_scale,
    at::ScalarType dtype,
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
    const Ranks::Gather& gather,
    int64_t vocab_start) {
  const at::Tensor bias_given = value_or_undefined(bias), tokens = contiguous_or_undefined(index);
  const at::Tensor weights = paired_class_weights(class_weight);
  const int64_t vocab = weight.size(0);
  const Ranks ranks(gather, vocab_start, vocab);
  DistillGiven given = {
      bias_given.defined() ? bias_given.to(at::kFloat).contiguous() : bias_given,
      labels.has_value() && labels->defined() ? ranks.relative(*labels).unsqueeze(-1) : at::Tensor(),
      contiguous_or_undefined(row_scale),
      ranks.shared(row_options(vocab, at::Tensor(), logit_scale, softcap, temperature, 0, 0)),
      ranks.shared(row_options(vocab, weights, logit_scale, softcap, 1, label_smoothing, z_loss)),
      measure_of(divergence, beta, temperature, temperature_squared, ce_weight),
      with_ce,
      ranks};
  given.ce_options.factor = ce_weight;
  HeadCall call = {
      input, weight, bias_given, tokens, dtype, given.scaled(), needs, keep_float32, rows, columns};
  call.shared = !ranks.alone();
  const auto results = [&](DistillPass& pass) {
    const HeadGradients gradients = run_head(call, pass);
    return std::make_tuple(
        pass.result(0), pass.result(1), pass.result(2), pass.result(3), gradients.input, gradients.weight,
        gradients.bias);
  };
  if (ids.has_value() && ids->defined()) {
    const at::Tensor support = ranks.relative(*ids);
    SparseDistillPass pass(given, support, *probs, tail_of(tail), call.count());
    return results(pass);
  }
  Teacher teacher(
      value_or_undefined(teacher_logits), value_or_undefined(teacher_input), value_or_undefined(teacher_weight),
      value_or_undefined(teacher_bias), teacher_logit_scale, teacher_softcap, temperature);
  DenseDistillPass pass(given, teacher, call.count());
  return results(pass);
}

}  // namespace ssd_core::cpu

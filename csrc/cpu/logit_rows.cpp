#include "logit_rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cross_entropy_terms.h"
#include "distill_terms.h"
#include "head_operands.h"
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

using Given = std::optional<at::Tensor>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows x columns below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

// Rows whose elements do not lie side by side are copied, so many bytes at a time.
constexpr int64_t kHeldBytes = 2 << 20;

Element element_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kBFloat16:
      return Element::kBfloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      return Element::kFloat64;
  }
}

void check_rows(const char* name, const at::Tensor& x, bool wide) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || (wide && dtype == at::kDouble),
      name, ": expected Float, BFloat16 or Half", wide ? " or Double" : "", ", got ", dtype);
  TORCH_CHECK(
      x.dim() == 2 && x.size(1) > 0, name, ": expected shape (N, V) with at least one column, got ", x.sizes());
}

void check_tensor(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
  TORCH_CHECK(x.scalar_type() == dtype, name, ": expected ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK(x.sizes() == sizes, name, ": expected shape ", sizes, ", got ", x.sizes());
}

bool there(const Given& x) {
  return x.has_value() && x->defined();
}

// The tensor, checked and contiguous; undefined if absent.
at::Tensor checked(const char* name, const Given& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  if (!there(x)) {
    return {};
  }
  check_tensor(name, *x, dtype, sizes);
  return x->contiguous();
}

const float* floats(const at::Tensor& x) {
  return x.defined() ? x.const_data_ptr<float>() : nullptr;
}

// One thread's way to the rows of a tensor.
class RowReader {
 public:
  explicit RowReader(const at::Tensor& x, float cap_slope = 0)
      : x_(x), cap_slope_(cap_slope), direct_(x.stride(1) == 1 || x.size(1) == 1) {}

  RowView operator()(int64_t i) {
    const int64_t row_bytes = x_.size(1) * x_.element_size();
    if (direct_) {
      const auto* data = static_cast<const char*>(x_.const_data_ptr());
      return view(data + i * x_.stride(0) * x_.element_size());
    }
    if (i < first_ || i >= first_ + count_) {
      const int64_t most = std::max<int64_t>(1, kHeldBytes / row_bytes);
      if (!held_.defined()) {
        held_ = at::empty({most, x_.size(1)}, x_.options());
      }
      first_ = i;
      count_ = std::min(most, x_.size(0) - i);
      held_.narrow(0, 0, count_).copy_(x_.narrow(0, i, count_));
    }
    return view(static_cast<const char*>(held_.const_data_ptr()) + (i - first_) * row_bytes);
  }

 private:
  RowView view(const char* data) const { return {data, element_of(x_), x_.size(1), cap_slope_}; }

  const at::Tensor& x_;
  float cap_slope_;
  bool direct_;
  at::Tensor held_;  // rows first_ to first_ + count_
  int64_t first_ = 0, count_ = 0;
};

// Which rows count.
class Rows {
 public:
  Rows(const at::Tensor& logits, const Given& index) : all_(logits.size(0)), vocab_(logits.size(1)) {
    if (there(index)) {
      TORCH_CHECK(index->dim() == 1, "index: expected shape (M,), got ", index->sizes());
      index_ = checked("index", index, at::kLong, index->sizes());
      const int64_t* data = index_.const_data_ptr<int64_t>();
      for (int64_t k = 0; k < index_.numel(); ++k) {
        TORCH_CHECK_INDEX(
            data[k] >= (k ? data[k - 1] + 1 : 0) && data[k] < all_,
            "index: expected ascending rows below N = ", all_, ", got ", data[k], " in place ", k);
      }
    }
  }

  int64_t count() const { return index_.defined() ? index_.numel() : all_; }
  int64_t operator[](int64_t k) const {
    return k < 0 ? -1 : k >= count() ? all_ : index_.defined() ? index_.const_data_ptr<int64_t>()[k] : k;
  }

  // body(begin, end) on ranges of them, one for each thread.
  template <class Body>
  void each(const Body& body) const {
    at::parallel_for(0, count(), std::max<int64_t>(1, kGrain / vocab_), body);
  }

 private:
  int64_t all_, vocab_;
  at::Tensor index_;
};

// Where a gradient, or a result like the logits, is written.
class RowWriter {
 public:
  RowWriter(const at::Tensor& logits, const Rows& rows)
      : rows_(rows), out_(empty(logits.sizes(), logits.options())), element_(element_of(out_)) {
    if (rows.count() == 0) {
      out_.zero_();
    }
    data_ = static_cast<char*>(out_.mutable_data_ptr());
  }

  // The k-th row that counts, made the place that a pass writes to; others before it, and after the last, become 0.
  void open(int64_t k, RowRest& rest) const {
    const int64_t bytes = out_.size(1) * out_.element_size(), i = rows_[k], before = rows_[k - 1] + 1;
    std::memset(data_ + before * bytes, 0, (i - before) * bytes);
    if (k + 1 == rows_.count()) {
      std::memset(data_ + (i + 1) * bytes, 0, (out_.size(0) - i - 1) * bytes);
    }
    rest.out = data_ + i * bytes;
    rest.element = element_;
  }

  // A row that is 0 but for its patches.
  void write_patches(const RowRest& rest) const {
    std::memset(rest.out, 0, out_.size(1) * out_.element_size());
    for (int64_t p = 0; p < rest.patch_count; ++p) {
      const auto [id, value] = rest.patches[p];
      switch (element_) {
        case Element::kBfloat16:
          static_cast<c10::BFloat16*>(rest.out)[id] = value;
          break;
        case Element::kFloat16:
          static_cast<c10::Half*>(rest.out)[id] = value;
          break;
        default:
          static_cast<float*>(rest.out)[id] = value;
      }
    }
  }

  const at::Tensor& tensor() const { return out_; }

 private:
  const Rows& rows_;
  at::Tensor out_;
  Element element_;
  char* data_;
};

std::optional<RowWriter> writer_if(bool wanted, const at::Tensor& logits, const Rows& rows) {
  return wanted ? std::optional<RowWriter>(std::in_place, logits, rows) : std::nullopt;
}

Given written(const std::optional<RowWriter>& writer) {
  return writer ? Given(writer->tensor()) : std::nullopt;
}

// (N, K) ids and probabilities of any strides, a row at a time.
class Supports {
 public:
  Supports(const at::Tensor& ids, const Given& probs, const Rows& rows, int64_t n, int64_t vocab) : ids_(ids) {
    const bool integers = ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt;
    TORCH_CHECK(ids.device().is_cpu(), "ids: expected a CPU tensor, got ", ids.device());
    TORCH_CHECK(integers, "ids: expected Int or Long, got ", ids.scalar_type());
    TORCH_CHECK(
        ids.dim() == 2 && ids.size(0) == n, "ids: expected shape (", n, ", K), got ", ids.sizes());
    if (there(probs)) {
      check_tensor("probs", *probs, at::kFloat, ids.sizes());
      probs_ = *probs;
    } else {
      TORCH_CHECK(ids.size(1) == 1, "ids: expected one id per row without probs, got K = ", ids.size(1));
    }
    Row row;
    for (int64_t k = 0; k < rows.count(); ++k) {
      read(rows[k], row);
      for (int64_t c = 0; c < width(); ++c) {
        const int64_t id = row.ids[c];
        TORCH_CHECK_INDEX(
            (probs_.defined() && row.probs[c] == 0) || (id >= 0 && id < vocab),
            "ids: expected 0 <= id < V = ", vocab, ", got ", id, " in row ", rows[k], ", column ", c);
      }
    }
  }

  struct Row {
    std::vector<int64_t> ids;
    std::vector<float> probs;
  };

  int64_t width() const { return ids_.size(1); }

  void read(int64_t i, Row& row) const {
    const auto copy = [&](const auto* from, const at::Tensor& x, auto& to) {
      to.resize(width());
      for (int64_t c = 0; c < width(); ++c) {
        to[c] = from[i * x.stride(0) + c * x.stride(1)];
      }
    };
    ids_.scalar_type() == at::kLong ? copy(ids_.const_data_ptr<int64_t>(), ids_, row.ids)
                                    : copy(ids_.const_data_ptr<int32_t>(), ids_, row.ids);
    if (probs_.defined()) {
      copy(probs_.const_data_ptr<float>(), probs_, row.probs);
    }
  }

  RowTarget target(int64_t i, Row& row, TargetReader& reader, const RowOptions& options, bool bucket) const {
    read(i, row);
    return reader.read(row.ids.data(), probs_.defined() ? row.probs.data() : nullptr, options, bucket);
  }

 private:
  const at::Tensor& ids_;
  at::Tensor probs_;
};

at::Tensor new_results(int64_t count, const Rows& rows, const at::Tensor& logits) {
  return at::empty({count, rows.count()}, logits.options().dtype(at::kFloat));
}

}  // namespace

// -- softmax

at::Tensor softmax_rows(const at::Tensor& logits, double temperature, bool log) {
  check_rows("logits", logits, false);
  const RowOptions options = row_options(logits.size(1), {}, 1, 0, temperature, 0, 0);
  const RowKernels& kernels = active_row_kernels();
  const Rows rows(logits, std::nullopt);
  const RowWriter out(logits, rows);
  SumsQuery query = {};
  query.slope = options.slope;
  rows.each([&](int64_t begin, int64_t end) {
    RowReader reader(logits);
    RowRest rest = {};
    for (int64_t i = begin; i < end; ++i) {
      const RowView row = reader(i);
      const RowSums found = kernels.sums(row, query).row;
      out.open(i, rest);
      if (log) {
        kernels.log_softmax(row, options.slope, found.max, static_cast<float>(std::log(found.sum)), rest);
      } else {
        kernels.exponential(row, {query.slope, found.max, static_cast<float>(1 / found.sum)}, rest);
      }
    }
  });
  return out.tensor();
}

at::Tensor softmax_rows_backward(const at::Tensor& grad, const at::Tensor& out, double temperature, bool log) {
  check_rows("out", out, false);
  check_rows("grad", grad, true);
  TORCH_CHECK(grad.sizes() == out.sizes(), "grad: expected shape ", out.sizes(), ", got ", grad.sizes());
  const RowKernels& kernels = active_row_kernels();
  const Rows rows(out, std::nullopt);
  const RowWriter d_logits(out, rows);
  rows.each([&](int64_t begin, int64_t end) {
    RowReader grads(grad), outs(out);
    RowRest rest = {};
    for (int64_t i = begin; i < end; ++i) {
      const RowView g = grads(i), p = outs(i);
      const auto sum = static_cast<float>(kernels.softmax_backward_sum(g, p, log));
      d_logits.open(i, rest);
      kernels.softmax_backward(g, p, log, static_cast<float>(1 / temperature), sum, rest);
    }
  });
  return d_logits.tensor();
}

// -- cross-entropy

std::tuple<at::Tensor, Given> cross_entropy_rows(
    const at::Tensor& logits,
    const at::Tensor& ids,
    const Given& probs,
    const Given& dense,
    const Given& class_weight,
    const Given& index,
    const Given& row_scale,
    double logit_scale,
    double softcap,
    double temperature,
    double label_smoothing,
    double z_loss,
    bool bucket) {
  check_rows("logits", logits, false);
  const int64_t vocab = logits.size(1);
  const at::Tensor class_weight_c = checked("class_weight", class_weight, at::kFloat, {vocab});
  TORCH_CHECK(
      !class_weight_c.defined() || !there(probs),
      "class_weight: expected hard labels or class probabilities, got sparse ones");
  if (there(dense)) {
    check_rows("dense", *dense, true);
    TORCH_CHECK(dense->sizes() == logits.sizes(), "dense: expected shape ", logits.sizes(), ", got ", dense->sizes());
  }
  const RowOptions options =
      row_options(vocab, class_weight_c, logit_scale, softcap, temperature, label_smoothing, z_loss);
  const Rows rows(logits, index);
  std::optional<Supports> supports;
  if (!there(dense)) {
    supports.emplace(ids, probs, rows, logits.size(0), vocab);
  }
  const at::Tensor scale = checked("row_scale", row_scale, at::kFloat, {rows.count()});
  const std::optional<RowWriter> d_logits = writer_if(scale.defined(), logits, rows);
  const at::Tensor results = new_results(3, rows, logits);
  float* result = results.mutable_data_ptr<float>();
  const RowKernels& kernels = active_row_kernels();

  rows.each([&](int64_t begin, int64_t end) {
    RowReader reader(logits, options.cap_slope);
    std::optional<RowReader> dense_reader;
    if (there(dense)) {
      dense_reader.emplace(*dense);
    }
    TargetReader targets(supports ? supports->width() : 0, vocab);
    Supports::Row buffer;
    std::vector<RowPatch> patches;
    for (int64_t k = begin; k < end; ++k) {
      const float row_factor = scale.defined() ? floats(scale)[k] : 0.0f;
      const RowView row = reader(rows[k]);
      RowView dense_row = {};
      RowTarget target = {};
      RowWeights weights = {options.class_weight, nullptr, 0, 0};
      SumsQuery query = {};
      query.slope = options.slope;
      if (dense_reader) {
        dense_row = (*dense_reader)(rows[k]);
        weights.probs = &dense_row;
        weights.sharp = static_cast<float>(1 - label_smoothing);
        weights.even = static_cast<float>(label_smoothing / static_cast<double>(vocab));
      } else {
        target = supports->target(rows[k], buffer, targets, options, bucket);
        query.entries = target.entries;
        query.count = target.count;
        query.off_support = target.tail > 0;
      }
      const bool weighted = dense_reader || label_smoothing > 0;
      query.weights = weighted ? &weights : nullptr;
      const Sums found = kernels.sums(row, query);
      const RowTerms terms = dense_reader ? finish_dense_row(options, found, row_factor)
                                          : finish_row(options, found.row, target, row_factor);
      result[k] = terms.loss;
      result[rows.count() + k] = terms.nll;
      result[2 * rows.count() + k] = terms.lse;
      if (!d_logits) {
        continue;
      }
      patches.clear();
      for (int64_t e = 0; e < target.count; ++e) {
        patches.push_back({target.entries[e].id, target_gradient(options, terms, target.entries[e])});
      }
      RowRest rest = {};
      rest.weights = query.weights;
      rest.weight_factor = terms.gradient.uniform;
      rest.cap = options.cap_slope;
      rest.patches = patches.data();
      rest.patch_count = target.count;
      d_logits->open(k, rest);
      kernels.exponential(row, {query.slope, terms.gradient.max, terms.gradient.mass}, rest);
    }
  });
  return {results, written(d_logits)};
}

// -- log-probability

std::tuple<at::Tensor, Given> logprob_rows(
    const at::Tensor& logits,
    const at::Tensor& ids,
    const Given& index,
    const Given& row_scale,
    double logit_scale,
    double softcap,
    double temperature) {
  check_rows("logits", logits, false);
  const int64_t vocab = logits.size(1);
  TORCH_CHECK(ids.dim() == 1, "ids: expected shape (N,), got ", ids.sizes());
  const at::Tensor column = ids.unsqueeze(1);
  const RowOptions options = row_options(vocab, {}, logit_scale, softcap, temperature, 0, 0);
  const Rows rows(logits, index);
  const Supports supports(column, std::nullopt, rows, logits.size(0), vocab);
  const at::Tensor scale = checked("row_scale", row_scale, at::kFloat, {rows.count(), 2});
  const std::optional<RowWriter> d_logits = writer_if(scale.defined(), logits, rows);
  const at::Tensor results = new_results(4, rows, logits);
  float* result = results.mutable_data_ptr<float>();
  const RowKernels& kernels = active_row_kernels();

  rows.each([&](int64_t begin, int64_t end) {
    RowReader reader(logits, options.cap_slope);
    Supports::Row buffer;
    for (int64_t k = begin; k < end; ++k) {
      const RowView row = reader(rows[k]);
      supports.read(rows[k], buffer);
      TargetEntry entry = {buffer.ids[0], 1.0, 0.0f};
      SumsQuery query = {};
      query.slope = options.slope;
      query.entries = &entry;
      query.count = 1;
      query.entropy = true;
      const Sums found = kernels.sums(row, query);
      const double log_sum = std::log(found.row.sum), slope = options.slope;
      const double logprob = slope * (static_cast<double>(entry.value) - found.row.max) - log_sum;
      const double entropy = log_sum + found.below / found.row.sum;
      const double each[] = {
          logprob, entropy, slope * found.row.max + log_sum, static_cast<double>(found.argmax)};
      for (int64_t r = 0; r < 4; ++r) {
        result[r * rows.count() + k] = static_cast<float>(each[r]);
      }
      if (!d_logits) {
        continue;
      }
      const double chain = options.logit_scale / options.temperature, q = std::exp(logprob);
      const double on_logprob = chain * floats(scale)[2 * k], on_entropy = chain * floats(scale)[2 * k + 1];
      double own = on_logprob * (1 - q) - (q == 0 ? 0 : on_entropy * q * (logprob + entropy));
      if (options.softcap > 0) {
        own *= 1 - static_cast<double>(entry.value) * entry.value;
      }
      const RowPatch patch = {entry.id, static_cast<float>(own)};
      RowRest rest = {};
      rest.cap = options.cap_slope;
      rest.patches = &patch;
      rest.patch_count = 1;
      d_logits->open(k, rest);
      kernels.logprob_gradient(
          row, {query.slope, found.row.max, static_cast<float>(1 / found.row.sum)},
          {static_cast<float>(on_logprob), static_cast<float>(on_entropy), static_cast<float>(log_sum),
           static_cast<float>(entropy)},
          rest);
    }
  });
  return {results, written(d_logits)};
}

// -- distillation

namespace {

struct DistillCall {
  Measure measure;
  Tail tail;
  RowOptions soft;  // at the divergence's temperature
  RowOptions ce;    // at 1
  bool with_ce;

  // Of a second sum, where both temperatures matter.
  float other_slope() const { return with_ce && soft.slope != ce.slope ? ce.slope : 0; }
  // from d value / dz to what a row of this scale adds to its gradient
  double chain(float row_scale) const { return row_scale * measure.factor * soft.logit_scale / soft.temperature; }
};

// A row's results, and what its gradient adds to that of the divergence.
struct DistillRow {
  double value;
  RowTerms ce;  // 0 without

  void report(const DistillCall& call, float* result, int64_t count) const {
    result[0] = static_cast<float>(call.measure.factor * value + ce.loss);
    result[count] = static_cast<float>(call.measure.reported * value);
    result[2 * count] = ce.nll;
    result[3 * count] = ce.lse;
  }
};

// The cross-entropy of a row against its label; without a label nll is 0.
RowTerms ce_terms(const DistillCall& call, const RowSums& found, TargetEntry* label, float row_scale) {
  const double weight = label && call.ce.class_weight ? call.ce.class_weight[label->id] : 1.0;
  return finish_row(call.ce, found, {label, label ? 1 : 0, label ? 1.0 : 0.0, 0.0, weight}, row_scale);
}

// Sums of the whole row at temperature 1, from those off the support.
RowSums whole_row(const DistillCall& call, const Sums& off, const RowTarget& target) {
  const double slope = call.ce.slope;
  RowSums whole = {off.row.max, call.other_slope() != 0 ? off.other_sum : off.row.sum, off.row.spread};
  if (call.tail == Tail::kSupport) {
    return whole;  // the support was not left out
  }
  const TargetEntry* end = target.entries + target.count;
  for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
    whole.max = entry->value > whole.max ? entry->value : whole.max;
  }
  whole.sum = whole.sum == 0 ? 0 : whole.sum * std::exp(slope * (static_cast<double>(off.row.max) - whole.max));
  for (const TargetEntry* entry = target.entries; entry != end; ++entry) {
    whole.sum += std::exp(slope * (static_cast<double>(entry->value) - whole.max));
  }
  return whole;
}

// One thread's rows against a sparse teacher.
class SparseDistill {
 public:
  SparseDistill(const DistillCall& call, const RowKernels& kernels, const Supports& supports)
      : call_(call), kernels_(kernels), supports_(supports), reader_(supports.width(), call.soft.vocab) {}

  DistillRow find(const RowView& row, int64_t i, const int64_t* label, float row_scale) {
    target_ = supports_.target(i, buffer_, reader_, call_.soft, true);
    ids_.assign(target_.entries, target_.entries + target_.count);
    if (label) {
      const auto place =
          std::find_if(ids_.begin(), ids_.end(), [&](const TargetEntry& entry) { return entry.id >= *label; });
      if (place == ids_.end() || place->id != *label) {
        ids_.insert(place, {*label, 0.0, 0.0f});
      }
    }
    const RowWeights weights = {call_.ce.class_weight, nullptr, 0, 0};
    Sums found = {};
    if (call_.tail == Tail::kSupport && !call_.with_ce) {
      for (TargetEntry& entry : ids_) {
        entry.value = value_at(row, entry.id);
      }
    } else {
      SumsQuery query = {};
      query.slope = call_.soft.slope;
      query.other_slope = call_.other_slope();
      query.weights = call_.with_ce && call_.ce.label_smoothing > 0 ? &weights : nullptr;
      query.entries = ids_.data();
      query.count = static_cast<int64_t>(ids_.size());
      query.off_support = call_.tail != Tail::kSupport;
      found = kernels_.sums(row, query);
    }
    label_ = nullptr;
    TargetEntry* entry = target_.entries;
    for (TargetEntry& id : ids_) {
      if (id.weight > 0) {
        (entry++)->value = id.value;
      }
      label_ = label && id.id == *label ? &id : label_;
    }
    off_max_ = found.row.max == -kInfinity ? 0 : found.row.max;
    terms_ = support_terms(call_.measure, call_.tail, call_.soft.slope, found.row, target_);
    DistillRow result = {terms_.value, {}};
    if (call_.with_ce) {
      TargetEntry one = label_ ? *label_ : TargetEntry{};
      one.weight = 1;
      result.ce = ce_terms(call_, whole_row(call_, found, target_), label_ ? &one : nullptr, row_scale);
    }
    return result;
  }

  void gradient(const RowView& row, const DistillRow& of, float row_scale, RowRest& rest, const RowWriter& out) {
    const double chain = call_.chain(row_scale), slope = call_.soft.slope;
    const bool everywhere = call_.tail != Tail::kSupport;
    patches_.clear();
    for (const TargetEntry& id : ids_) {
      double g = 0;
      if (id.weight > 0) {
        g = support_slope(call_.measure, terms_, slope, id);
      } else if (everywhere) {
        g = terms_.off * std::exp(slope * (static_cast<double>(id.value) - off_max_));
      }
      g *= chain * (call_.soft.softcap > 0 ? 1 - static_cast<double>(id.value) * id.value : 1);
      if (call_.with_ce) {
        TargetEntry entry = id;
        entry.weight = &id == label_ ? 1 : 0;
        g += target_gradient(call_.ce, of.ce, entry);
      }
      patches_.push_back({id.id, static_cast<float>(g)});
    }
    rest.patches = patches_.data();
    rest.patch_count = static_cast<int64_t>(patches_.size());
    const Exponential soft = {call_.soft.slope, off_max_, static_cast<float>(chain * terms_.off)};
    const Exponential ce = {call_.ce.slope, of.ce.gradient.max, of.ce.gradient.mass};
    if (everywhere) {
      rest.other = call_.with_ce ? &ce : nullptr;
      kernels_.exponential(row, soft, rest);
    } else if (call_.with_ce) {
      kernels_.exponential(row, ce, rest);
    } else {
      out.write_patches(rest);
    }
  }

 private:
  float value_at(const RowView& row, int64_t id) const {
    static constexpr int64_t kBytes[] = {4, 2, 2, 8};  // of each Element
    const RowView one = {
        static_cast<const char*>(row.data) + id * kBytes[static_cast<int>(row.element)], row.element, 1,
        row.cap_slope};
    TargetEntry entry = {};
    SumsQuery query = {};
    query.entries = &entry;
    query.count = 1;
    kernels_.sums(one, query);
    return entry.value;
  }

  const DistillCall& call_;
  const RowKernels& kernels_;
  const Supports& supports_;
  TargetReader reader_;
  Supports::Row buffer_;
  RowTarget target_ = {};
  std::vector<TargetEntry> ids_;  // the support, and the label with weight 0 if it is not in there
  const TargetEntry* label_ = nullptr;
  std::vector<RowPatch> patches_;
  SupportTerms terms_ = {};
  float off_max_ = 0;
};

// One thread's rows against a teacher's logits.
class DenseDistill {
 public:
  DenseDistill(const DistillCall& call, const RowKernels& kernels, const at::Tensor& teacher)
      : call_(call), kernels_(kernels), teacher_(teacher) {}

  DistillRow find(const RowView& row, int64_t i, const int64_t* label, float row_scale) {
    const RowWeights weights = {call_.ce.class_weight, nullptr, 0, 0};
    label_ = {label ? *label : 0, 1.0, 0.0f};
    pair_ = {};
    pair_.teacher = teacher_(i);
    pair_.student = row;
    pair_.teacher_slope = static_cast<float>(1 / call_.soft.temperature);
    pair_.student_slope = call_.soft.slope;
    pair_.other_slope = call_.other_slope();
    pair_.weights = call_.with_ce && call_.ce.label_smoothing > 0 ? &weights : nullptr;
    pair_.entries = &label_;
    pair_.count = label ? 1 : 0;
    pair_.kind = call_.measure.kind;
    pair_.beta = static_cast<float>(call_.measure.beta);
    pair_.rest = static_cast<float>(1 - call_.measure.beta);
    const PairSums found = kernels_.pair_sums(pair_);
    const RowSums& student = found.student.row;
    const double log_ratio = std::log(found.teacher.sum) - std::log(student.sum);
    norm_ = {
        found.teacher.max, student.max, static_cast<float>(1 / found.teacher.sum),
        static_cast<float>(1 / student.sum), static_cast<float>(log_ratio)};
    DistillRow result = {};
    switch (pair_.kind) {
      case Divergence::kForwardKl:
        result.value = found.cross / found.teacher.sum - log_ratio;
        own_ = -1;
        break;
      case Divergence::kReverseKl:
        result.value = own_ = found.cross / student.sum + log_ratio;
        break;
      default: {
        const PairTerms terms = kernels_.pair_terms(pair_, norm_);
        result.value = terms.value;
        own_ = terms.own;
      }
    }
    if (call_.with_ce) {
      const double sum = call_.other_slope() != 0 ? found.student.other_sum : student.sum;
      result.ce = ce_terms(call_, {student.max, sum, student.spread}, label ? &label_ : nullptr, row_scale);
    }
    return result;
  }

  void gradient(const RowView&, const DistillRow& of, float row_scale, RowRest& rest, const RowWriter&) {
    const Exponential ce = {call_.ce.slope, of.ce.gradient.max, of.ce.gradient.mass};
    const double v = label_.value;
    const RowPatch patch = {
        label_.id, static_cast<float>(-of.ce.scale * of.ce.sharp * (call_.ce.softcap > 0 ? 1 - v * v : 1))};
    if (call_.with_ce) {
      rest.other = &ce;
      rest.patches = &patch;
      rest.patch_count = pair_.count;
      rest.patches_add = true;
    }
    kernels_.pair_gradient(
        pair_, norm_, static_cast<float>(call_.chain(row_scale)), static_cast<float>(own_), rest);
  }

 private:
  const DistillCall& call_;
  const RowKernels& kernels_;
  RowReader teacher_;
  TargetEntry label_ = {};
  Pair pair_ = {};
  PairNorm norm_ = {};
  double own_ = 0;
};

}  // namespace

std::tuple<at::Tensor, Given> distill_rows(
    const at::Tensor& logits,
    const Given& ids,
    const Given& probs,
    const Given& teacher_logits,
    const Given& labels,
    const Given& class_weight,
    const Given& index,
    const Given& row_scale,
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
    double z_loss) {
  check_rows("logits", logits, false);
  const int64_t n = logits.size(0), vocab = logits.size(1);
  const at::Tensor class_weight_c = checked("class_weight", class_weight, at::kFloat, {vocab});
  const at::Tensor labels_c = checked("labels", labels, at::kLong, {n});
  DistillCall call = {
      measure_of(divergence, beta, temperature, temperature_squared, ce_weight), tail_of(tail),
      row_options(vocab, {}, logit_scale, softcap, temperature, 0, 0),
      row_options(vocab, class_weight_c, logit_scale, softcap, 1, label_smoothing, z_loss), with_ce};
  call.ce.factor = ce_weight;
  const Rows rows(logits, index);
  if (labels_c.defined()) {
    Supports(labels_c.unsqueeze(1), std::nullopt, rows, n, vocab);  // checks them
  }
  std::optional<Supports> supports;
  if (there(ids)) {
    supports.emplace(*ids, probs, rows, n, vocab);
  } else {
    TORCH_CHECK(there(teacher_logits), "teacher_logits: expected a tensor without ids, got none");
    check_rows("teacher_logits", *teacher_logits, true);
    TORCH_CHECK(
        teacher_logits->size(0) == n, "teacher_logits: expected ", n, " rows, got ", teacher_logits->size(0));
  }
  const at::Tensor scale = checked("row_scale", row_scale, at::kFloat, {rows.count()});
  const std::optional<RowWriter> d_logits = writer_if(scale.defined(), logits, rows);
  const at::Tensor results = new_results(4, rows, logits);
  float* result = results.mutable_data_ptr<float>();
  const RowKernels& kernels = active_row_kernels();
  const int64_t* label_data = labels_c.defined() && with_ce ? labels_c.const_data_ptr<int64_t>() : nullptr;
  const RowWeights weights = {call.ce.class_weight, nullptr, 0, 0};

  const auto run = [&](auto pass, int64_t begin, int64_t end) {
    RowReader reader(logits, call.soft.cap_slope);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = rows[k];
      const float row_factor = scale.defined() ? floats(scale)[k] : 0.0f;
      const RowView row = reader(i);
      const DistillRow found = pass.find(row, i, label_data ? label_data + i : nullptr, row_factor);
      found.report(call, result + k, rows.count());
      if (d_logits) {
        RowRest rest = {};
        if (with_ce && found.ce.gradient.uniform != 0) {
          rest.weights = &weights;
          rest.weight_factor = found.ce.gradient.uniform;
        }
        rest.cap = call.soft.cap_slope;
        d_logits->open(k, rest);
        pass.gradient(row, found, row_factor, rest, *d_logits);
      }
    }
  };
  rows.each([&](int64_t begin, int64_t end) {
    if (supports) {
      run(SparseDistill(call, kernels, *supports), begin, end);
    } else {
      run(DenseDistill(call, kernels, *teacher_logits), begin, end);
    }
  });
  return {results, written(d_logits)};
}

}  // namespace ssd_core::cpu

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cross_entropy_terms.h"
#include "distill_terms.h"
#include "logit_rows.h"
#include "row_access.h"

namespace ssd_core::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

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

// Sums of the whole row at temperature 1, from what was found: off the support, where the divergence looks beyond it.
RowSums whole_row(const DistillCall& call, const Sums& found, const RowTarget& target) {
  const double sum = call.other_slope() != 0 ? found.other_sum : found.row.sum;
  const RowSums row = {found.row.max, sum, found.row.spread};
  return call.tail == Tail::kSupport ? row : with_support(row, call.ce.slope, target);
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

// How the ops on given logits come to a row: checked arguments, rows of any strides, which of them count, supports; and
// where the results go.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cross_entropy_terms.h"
#include "head_operands.h"
#include "row_kernels.h"

namespace ssd_core::cpu {

using Given = std::optional<at::Tensor>;

// Rows x columns below which a second thread costs more than it brings.
constexpr int64_t kGrain = 16384;

// Rows whose elements do not lie side by side are copied, so many bytes at a time.
constexpr int64_t kHeldBytes = 2 << 20;

inline Element element_of(const at::Tensor& x) {
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

inline void check_rows(const char* name, const at::Tensor& x, bool wide) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || (wide && dtype == at::kDouble),
      name, ": expected Float, BFloat16 or Half", wide ? " or Double" : "", ", got ", dtype);
  TORCH_CHECK(
      x.dim() == 2 && x.size(1) > 0, name, ": expected shape (N, V) with at least one column, got ", x.sizes());
}

inline void check_tensor(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
  TORCH_CHECK(x.scalar_type() == dtype, name, ": expected ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK(x.sizes() == sizes, name, ": expected shape ", sizes, ", got ", x.sizes());
}

inline bool there(const Given& x) {
  return x.has_value() && x->defined();
}

// The tensor, checked and contiguous; undefined if absent.
inline at::Tensor checked(const char* name, const Given& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  if (!there(x)) {
    return {};
  }
  check_tensor(name, *x, dtype, sizes);
  return x->contiguous();
}

inline const float* floats(const at::Tensor& x) {
  return x.defined() ? x.const_data_ptr<float>() : nullptr;
}

// One thread's way to the rows of a tensor; it asks for none from `end` on.
class RowReader {
 public:
  explicit RowReader(const at::Tensor& x, float cap_slope = 0) : RowReader(x, cap_slope, x.size(0)) {}
  RowReader(const at::Tensor& x, float cap_slope, int64_t end)
      : x_(x), cap_slope_(cap_slope), end_(end), direct_(x.stride(1) == 1 || x.size(1) == 1) {}

  RowView operator()(int64_t i) {
    const int64_t row_bytes = x_.size(1) * x_.element_size();
    if (direct_) {
      const auto* data = static_cast<const char*>(x_.const_data_ptr());
      return view(data + i * x_.stride(0) * x_.element_size());
    }
    if (i < first_ || i >= first_ + count_) {
      const int64_t most = std::max<int64_t>(1, kHeldBytes / row_bytes);
      if (!held_.defined()) {
        held_ = at::empty({std::min(most, end_ - i), x_.size(1)}, x_.options());
      }
      first_ = i;
      count_ = std::min(most, end_ - i);
      held_.narrow(0, 0, count_).copy_(x_.narrow(0, i, count_));
    }
    return view(static_cast<const char*>(held_.const_data_ptr()) + (i - first_) * row_bytes);
  }

 private:
  RowView view(const char* data) const { return {data, element_of(x_), x_.size(1), cap_slope_}; }

  const at::Tensor& x_;
  float cap_slope_;
  int64_t end_;
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
      : rows_(rows), out_(at::empty(logits.sizes(), logits.options())), element_(element_of(out_)) {
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

inline std::optional<RowWriter> writer_if(bool wanted, const at::Tensor& logits, const Rows& rows) {
  return wanted ? std::optional<RowWriter>(std::in_place, logits, rows) : std::nullopt;
}

inline Given written(const std::optional<RowWriter>& writer) {
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

inline at::Tensor new_results(int64_t count, const Rows& rows, const at::Tensor& logits) {
  return at::empty({count, rows.count()}, logits.options().dtype(at::kFloat));
}

}  // namespace ssd_core::cpu

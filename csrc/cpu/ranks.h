// The ranks that share a vocabulary: each holds some of the ids, and what it finds of its own becomes what all of them
// have. They merge the same numbers in the same order, so that results are the same on all ranks, bit for bit.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "head_targets.h"
#include "linear_head.h"

namespace ssd_core::cpu {

class Ranks {
 public:
  // (n,) float64 of this rank -> (ranks, n) of all of them, in their order
  using Gather = std::function<at::Tensor(const at::Tensor&)>;

  // This rank holds `own` ids from `first` on; `gather` empty: all there are.
  Ranks(Gather gather, int64_t first, int64_t own);

  bool alone() const { return !gather_; }
  int64_t count() const { return count_; }
  // Ids as this rank counts them.
  at::Tensor relative(const at::Tensor& ids) const;
  // Of this rank's ids -> of all.
  RowOptions shared(RowOptions options) const;

  // (n,) float64 -> (ranks, n)
  at::Tensor gather(const at::Tensor& x) const;
  // x (n,) of all ranks, summed in their order.
  void add(double* x, int64_t n) const;
  double sum(double x) const;

 private:
  Gather gather_;
  int64_t first_, vocab_, count_ = 1;
};

// What every rank has found of one token.
template <class Found>
class OfRanks {
 public:
  OfRanks(const double* first, int64_t ranks, int64_t stride) : first_(first), ranks_(ranks), stride_(stride) {}

  template <class Function>
  void each(const Function& function) const {
    for (int64_t r = 0; r < ranks_; ++r) {
      Found found;
      std::memcpy(&found, first_ + r * stride_, sizeof found);
      function(found);
    }
  }

  template <class Function>
  double sum(const Function& of) const {
    double total = 0;
    each([&](const Found& found) { total += of(found); });
    return total;
  }

  template <class Function>
  double max(const Function& of) const {
    double most = -kInfinity;
    each([&](const Found& found) { most = std::max(most, of(found)); });
    return most;
  }

 private:
  const double* first_;
  int64_t ranks_, stride_;
};

// exp(slope * (max - largest)), by which sums relative to a rank's max become relative to the largest.
inline double rebased(double slope, double max, double largest) {
  return max == -kInfinity ? 0 : std::exp(slope * (max - largest));
}

template <class Found>
Exponentials merged(const OfRanks<Found>& all, Exponentials Found::*part, double slope) {
  const double max = all.max([&](const Found& found) { return (found.*part).max; });
  return {max, all.sum([&](const Found& found) {
            return (found.*part).sum * rebased(slope, (found.*part).max, max);
          })};
}

template <class Found>
Spread merged(const OfRanks<Found>& all, Spread Found::*part) {
  const double max = all.max([&](const Found& found) { return (found.*part).max; });
  const double sum = all.sum([&](const Found& found) {
    const Spread& own = found.*part;
    return own.sum + (own.max == -kInfinity ? 0 : own.weight * (max - own.max));
  });
  return {max, all.sum([&](const Found& found) { return (found.*part).weight; }), sum};
}

// The tokens of a chunk, a panel at a time: find(p, found) what its tiles say of each lane; merge(i, mine, all) what
// those of all ranks say of token i; finish(p, found). All ranks then have the values of `targets`.
template <class Found, class Find, class Merge, class Finish>
void finish_panels(
    const Ranks& ranks, const Chunk& chunk, int64_t panel, std::initializer_list<HeadTargets*> targets,
    const Find& find, const Merge& merge, const Finish& finish) {
  static_assert(std::is_trivially_copyable_v<Found> && sizeof(Found) % sizeof(double) == 0);
  constexpr auto kFields = static_cast<int64_t>(sizeof(Found) / sizeof(double));
  std::vector<Found> mine(ranks.alone() ? 0 : chunk.panels * panel);
  at::parallel_for(0, chunk.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Found found[kMaxPanel] = {};
      find(p, found);
      if (ranks.alone()) {
        finish(p, found);
      } else {
        std::copy_n(found, panel, mine.begin() + p * panel);
      }
    }
  });
  if (ranks.alone()) {
    return;
  }
  int64_t stride = chunk.n * kFields;
  for (const HeadTargets* some : targets) {
    stride += some->known();
  }
  at::Tensor told = at::empty({stride}, at::TensorOptions(at::kDouble));
  double* out = told.mutable_data_ptr<double>();
  std::memcpy(out, mine.data(), chunk.n * sizeof(Found));
  out += chunk.n * kFields;
  for (const HeadTargets* some : targets) {
    some->tell(out);
    out += some->known();
  }
  const at::Tensor gathered = ranks.gather(told);
  const double* all = gathered.const_data_ptr<double>();
  const double* at = all + chunk.n * kFields;
  for (HeadTargets* some : targets) {
    some->learn(at, ranks.count(), stride);
    at += some->known();
  }
  at::parallel_for(0, chunk.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = p * panel; i < std::min((p + 1) * panel, chunk.n); ++i) {
        mine[i] = merge(i, mine[i], OfRanks<Found>(all + i * kFields, ranks.count(), stride));
      }
      finish(p, mine.data() + p * panel);
    }
  });
}

// Bytes that a call over so many ranks, each with `vocab` ids at most, holds beyond that of one; `support` ids of a
// token, `tokens` of which there are results.
int64_t ranks_bytes(int64_t tokens, int64_t rows, int64_t vocab, int64_t support, int64_t ranks);

}  // namespace ssd_core::cpu

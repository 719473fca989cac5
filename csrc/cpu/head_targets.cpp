#include "head_targets.h"

#include <cmath>
#include <limits>

namespace ssd_core::cpu {

void HeadTargets::read(
    const Chunk& chunk, const Grid& grid, const at::Tensor& ids, const at::Tensor& probs, const RowOptions& options,
    bool bucket) {
  const at::Tensor ids_c = chunk.of(ids).contiguous();
  const at::Tensor probs_c = probs.defined() ? chunk.of(probs).contiguous() : probs;
  const int64_t width = ids_c.size(1), n = chunk.n;
  const int64_t* id_data = ids_c.const_data_ptr<int64_t>();
  const float* prob_data = probs_c.defined() ? probs_c.const_data_ptr<float>() : nullptr;
  check_ids(id_data, prob_data, n, width, options.vocab, options.first);
  TargetReader reader(width, options.vocab);
  own_ = options.own;
  entries.clear();
  token.clear();
  rows.clear();
  entries.reserve(n * width);  // rows point into it
  tile_first.assign(grid.tiles + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    RowTarget target = reader.read(id_data + i * width, prob_data ? prob_data + i * width : nullptr, options, bucket);
    entries.insert(entries.end(), target.entries, target.entries + target.count);
    target.entries = entries.data() + entries.size() - target.count;
    token.insert(token.end(), target.count, static_cast<int32_t>(i));
    rows.push_back(target);
  }
  int64_t found = 0;
  for (const TargetEntry& entry : entries) {
    if (is_own(entry)) {
      ++tile_first[entry.id / kTile + 1];
      ++found;
    }
  }
  for (int64_t t = 0; t < grid.tiles; ++t) {
    tile_first[t + 1] += tile_first[t];
  }
  by_tile.resize(found);
  std::vector<int64_t> next(tile_first.begin(), tile_first.end() - 1);
  for (size_t e = 0; e < entries.size(); ++e) {
    if (is_own(entries[e])) {
      by_tile[next[entries[e].id / kTile]++] = static_cast<int32_t>(e);
    }
  }
}

void HeadTargets::tell(double* out) const {
  for (const TargetEntry& entry : entries) {
    *out++ = is_own(entry) ? entry.value : std::numeric_limits<double>::quiet_NaN();
  }
  for (const RowTarget& row : rows) {
    *out++ = row.class_weight;
  }
}

void HeadTargets::learn(const double* all, int64_t ranks, int64_t stride) {
  const auto first = [&] {
    const double* at = all++;
    for (int64_t r = 1; r < ranks && std::isnan(*at); ++r) {
      at += stride;
    }
    return *at;
  };
  for (TargetEntry& entry : entries) {
    entry.value = static_cast<float>(first());
  }
  for (RowTarget& row : rows) {
    row.class_weight = first();
  }
}

}  // namespace ssd_core::cpu

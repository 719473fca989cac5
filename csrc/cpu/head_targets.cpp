#include "head_targets.h"

namespace ssd_core::cpu {

void HeadTargets::read(
    const Chunk& chunk, const Grid& grid, const at::Tensor& ids, const at::Tensor& probs, const RowOptions& options,
    bool bucket) {
  const at::Tensor ids_c = chunk.of(ids).contiguous();
  const at::Tensor probs_c = probs.defined() ? chunk.of(probs).contiguous() : probs;
  const int64_t width = ids_c.size(1), n = chunk.n;
  const int64_t* id_data = ids_c.const_data_ptr<int64_t>();
  const float* prob_data = probs_c.defined() ? probs_c.const_data_ptr<float>() : nullptr;
  check_ids(id_data, prob_data, n, width, grid.vocab);
  TargetReader reader(width, grid.vocab);
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
  for (const TargetEntry& entry : entries) {
    ++tile_first[entry.id / kTile + 1];
  }
  for (int64_t t = 0; t < grid.tiles; ++t) {
    tile_first[t + 1] += tile_first[t];
  }
  by_tile.resize(entries.size());
  std::vector<int64_t> next(tile_first.begin(), tile_first.end() - 1);
  for (size_t e = 0; e < entries.size(); ++e) {
    by_tile[next[entries[e].id / kTile]++] = static_cast<int32_t>(e);
  }
}

}  // namespace ssd_core::cpu

#include "vocab_order.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace ssd_core::cpu {

namespace {

constexpr int64_t kOrderRows = 128;

// Adds up each id's probabilities.
class ProbabilitySums : public RowPass {
 public:
  ProbabilitySums(const at::Tensor& bias, const RowOptions& options)
      : bias_(bias), options_{options.softcap > 0, options.cap_slope, options.slope, options.softcap > 0} {}

  std::vector<float> sums;  // (V,)

  bool keeps_values() const override { return options_.keep_values; }

  void allocate(const Grid& grid, const Words& words) override {
    grid_ = grid;
    words_ = words;
    tiles_.allocate(grid);
    sums.assign(grid.vocab, 0.0f);
    max_.resize(grid.panels * grid.panel);
    factor_.resize(grid.panels * grid.panel);
  }

  void open(const Chunk& chunk) override {
    chunk_ = chunk;
    tiles_.open(grid_);
  }

  void look(const Block& block, float* u, void* kept, bool again, char*) override {
    const float* bias = bias_.defined() ? bias_.const_data_ptr<float>() + block.first : nullptr;
    const int64_t even = divide_up(block.rows, 2) * 2;
    float unused[2 * kMaxPanel];
    float* max = again ? unused : tiles_.max.of(block.panel, block.tile);
    float* sum = again ? unused + grid_.panel : tiles_.sum.of(block.panel, block.tile);
    words_.kernels->values(u, block.rows, bias, options_, max);
    std::fill(u + block.rows * grid_.panel, u + even * grid_.panel, -kInfinity);
    words_.kernels->exponentials(u, even, max, options_, kept, sum);
  }

  void finish() override {
    std::vector<double> sum(grid_.panel);
    for (int64_t p = 0; p < chunk_.panels; ++p) {
      tiles_.finish(words_, options_.slope, p, max_.data() + p * grid_.panel, sum.data());
      for (int64_t lane = 0; lane < grid_.panel; ++lane) {
        factor_[p * grid_.panel + lane] = static_cast<float>(1 / sum[lane]);
      }
    }
  }

  void gradient(const Block& block, void* kept, char* by_row, int64_t row_bytes) override {
    float factor[kMaxPanel], mask[kMaxPanel], unused[kMaxPanel] = {};
    const float* shift = tiles_.max.of(block.panel, block.tile);
    for (int64_t lane = 0; lane < grid_.panel; ++lane) {
      const int64_t i = block.panel * grid_.panel + lane;
      factor[lane] = factor_[i] * (options_.keep_values ? 1.0f : shift[lane]);
      mask[lane] = i < chunk_.n ? 1.0f : 0.0f;
    }
    TileOptions plain = options_;
    plain.softcap = false;  // probabilities, not a gradient
    words_.kernels->gradient(
        kept, divide_up(block.rows, 2) * 2, nullptr, {max_.data() + block.panel * grid_.panel, factor}, plain, by_row,
        row_bytes);
    words_.kernels->masked_sums(by_row, block.rows, row_bytes, grid_.panel, mask, unused, sums.data() + block.first);
  }

 private:
  const at::Tensor& bias_;
  TileOptions options_;
  Grid grid_;
  Words words_;
  Chunk chunk_;
  TileExponentials tiles_;
  std::vector<float> max_, factor_;
};

}  // namespace

at::Tensor vocab_order(const HeadCall& call, const at::Tensor& bias, const RowOptions& options) {
  const int64_t count = std::min(kOrderRows, call.count()), vocab = call.weight.size(0);
  const at::Tensor index = call.index.defined() ? call.index.slice(0, 0, count) : call.index;
  const at::Tensor input = call.index.defined() ? call.input : call.input.slice(0, 0, count);
  const HeadCall some = {input,  call.weight, call.bias, index, call.dtype, true, {false, false, false},
                         false, std::min(kOrderRows, call.rows), call.columns};
  ProbabilitySums pass(bias, options);
  run_head(some, pass);
  // Keys of one number each: probabilities are not negative, so their bits order as they do.
  std::vector<uint64_t> keys(vocab);
  for (int64_t id = 0; id < vocab; ++id) {
    uint32_t bits;
    const float sum = pass.sums[id] >= 0 ? pass.sums[id] : 0.0f;  // a NaN has no place
    std::memcpy(&bits, &sum, sizeof bits);
    keys[id] = static_cast<uint64_t>(~bits) << 32 | static_cast<uint64_t>(id);
  }
  std::sort(keys.begin(), keys.end());
  at::Tensor order = at::empty({vocab}, at::TensorOptions(at::kLong));
  int64_t* out = order.mutable_data_ptr<int64_t>();
  for (int64_t k = 0; k < vocab; ++k) {
    out[k] = static_cast<int64_t>(keys[k] & 0xffffffffu);
  }
  return order;
}

}  // namespace ssd_core::cpu

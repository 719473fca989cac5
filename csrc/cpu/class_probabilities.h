// Cross-entropy of a linear head against class probabilities, (N, V) as logits are.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cross_entropy_terms.h"
#include "linear_head.h"
#include "ranks.h"
#include "teacher.h"

namespace ssd_core::cpu {

// A target of w_j (N, V) has nll = sum_j w_j (lse - z_j) and, with class weights c and label smoothing,
//
//   loss = sum_j c_j ((1 - eps) w_j + eps / V) (lse - z_j) + z_loss lse^2
class ClassProbabilityPass : public RowPass {
 public:
  // bias (V,) float32 or undefined; row_scale (M,) float32 or undefined
  ClassProbabilityPass(
      const at::Tensor& probabilities, const at::Tensor& bias, const at::Tensor& row_scale, const RowOptions& options,
      const Ranks& ranks, int64_t count);

  at::Tensor loss, nll, lse;

  bool keeps_values() const override { return true; }
  int64_t more_kept() const override { return sizeof(float); }
  void allocate(const Grid& grid, const Words& words) override;
  void open(const Chunk& chunk) override;
  int64_t scratch() const override { return kTile * kMaxPanel * 4; }
  void look(const Block& block, float* u, void* kept, bool again, char* scratch) override;
  void finish() override;
  void gradient(const Block& block, void* kept, char* by_row, int64_t row_bytes) override;

 private:
  // Lanes of a panel, by what they hold.
  enum Lane { kMax, kFactor, kUniform, kScale, kLanes };
  float* lanes(int64_t panel, Lane lane) { return lanes_.data() + (panel * kLanes + lane) * grid_.panel; }
  const float* class_weight(const Block& block) const {
    return options_.class_weight ? options_.class_weight + block.first : nullptr;
  }
  struct Found {
    Exponentials row;
    Spread spread, target, plain;  // of smoothing; with weights c_j w_j, w_j
  };
  void find(int64_t p, Found* found) const;
  void finish_token(int64_t p, int64_t lane, const Found& found);

  Teacher targets_;  // read as a teacher's logits are
  const at::Tensor& bias_;
  const at::Tensor& row_scale_;
  const RowOptions& options_;
  const Ranks& ranks_;
  TileOptions tile_options_;
  Grid grid_;
  Words words_;
  Chunk chunk_;
  TileExponentials tiles_;
  TileSpread spread_;
  // of each tile: sum_j c_j w_j (max - v_j) and sum_j c_j w_j; the same without c
  TileNumbers max_, below_, mass_, plain_below_, plain_mass_;
  std::vector<float> lanes_;
};

}  // namespace ssd_core::cpu

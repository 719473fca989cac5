// A dense teacher's logits, a block at a time: given, or made of its hidden states.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "head_operands.h"
#include "linear_head.h"

namespace ssd_core::cpu {

class Teacher {
 public:
  // Either logits (N, V') of any floating dtype, or input (N, D') with weight (V', D') and bias (V',) or undefined.
  Teacher(
      const at::Tensor& logits, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
      double logit_scale, double softcap, double temperature);

  int64_t vocab() const { return input_.defined() ? weight_tensor_.size(0) : logits_.size(1); }
  float slope() const { return options_.slope; }
  void allocate(const Grid& grid);
  void open(const Chunk& chunk);
  int64_t scratch() const;  // bytes of a thread
  void open_tile(int64_t tile, char* scratch) const;
  // v (rows, panel) of a block, -inf beyond its own vocabulary, and its max (panel,).
  void values(const Block& block, float* v, float* max, const char* scratch) const;

 private:
  int64_t own(int64_t tile) const { return std::clamp<int64_t>(vocab() - tile * kTile, 0, kTile); }

  at::Tensor logits_, input_, weight_tensor_, bias_;
  TileOptions options_;
  Words words_;
  std::optional<Weight> weight_;
  Grid grid_;
  Chunk chunk_;
  at::Tensor by_token_;  // hidden states of the chunk
};

// Bytes that it holds for `rows` tokens of hidden states of length `hidden`, 0: logits are given.
int64_t teacher_bytes(int64_t rows, int64_t hidden);

}  // namespace ssd_core::cpu

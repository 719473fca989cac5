#include "teacher.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>

namespace ssd_core::cpu {

namespace {

// (rows, panel) of the ids that begin at row_of(lane); 0 where there is no token.
template <class RowOf>
void read_block(const RowOf& row_of, int64_t column, int64_t n, int64_t rows, int64_t panel, float* out) {
  constexpr int64_t kStep = 16;  // ids of one token at a time: whole cache lines of both
  for (int64_t j0 = 0; j0 < rows; j0 += kStep) {
    const int64_t step = std::min(kStep, rows - j0);
    for (int64_t lane = 0; lane < panel; ++lane) {
      const auto* x = row_of(lane < n ? lane : 0);
      for (int64_t j = j0; j < j0 + step; ++j) {
        out[j * panel + lane] = lane < n ? static_cast<float>(x[j * column]) : 0.0f;
      }
    }
  }
}

}  // namespace

Teacher::Teacher(
    const at::Tensor& logits, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
    double logit_scale, double softcap, double temperature)
    : logits_(logits), input_(input), weight_tensor_(weight),
      bias_(bias.defined() ? bias.to(at::kFloat).contiguous() : bias),
      options_{
          softcap > 0, static_cast<float>(softcap > 0 ? logit_scale / softcap : 0),
          static_cast<float>((softcap > 0 ? softcap : logit_scale) / temperature), true} {
  if (input.defined()) {
    // a float64 teacher is read in float32
    const at::ScalarType dtype = input.scalar_type() == at::kDouble ? at::kFloat : input.scalar_type();
    words_ = words_of(dtype, true);
    weight_.emplace(weight_tensor_, dtype, words_, at::Tensor());
  } else {
    words_ = words_of(at::kFloat, true);
  }
}

void Teacher::allocate(const Grid& grid) {
  grid_ = grid;
  if (input_.defined()) {
    const int64_t words = grid.panels * words_.words(input_.size(1)) * grid.panel;
    by_token_ = at::empty({std::max<int64_t>(words, 1) * 4}, at::TensorOptions(at::kByte));
  }
}

void Teacher::open(const Chunk& chunk) {
  chunk_ = chunk;
  if (input_.defined()) {
    const at::Tensor x = chunk.of(input_).to(words_.pairs ? at::kBFloat16 : at::kFloat).contiguous();
    pack_by_token(
        static_cast<const char*>(x.const_data_ptr()), chunk.n, input_.size(1), words_,
        static_cast<uint32_t*>(by_token_.mutable_data_ptr()));
  }
}

int64_t Teacher::scratch() const {
  return weight_ ? weight_->scratch() + static_cast<int64_t>(sizeof(Weight::Rows)) : 0;
}

void Teacher::open_tile(int64_t tile, char* scratch) const {
  if (weight_ && own(tile) > 0) {
    const Weight::Rows rows = weight_->tile(tile * kTile, own(tile), scratch + sizeof(Weight::Rows));
    std::memcpy(scratch, &rows, sizeof rows);
  }
}

void Teacher::values(const Block& block, float* v, float* max, const char* scratch) const {
  const int64_t rows = own(block.tile), panel = grid_.panel, first = block.panel * panel;
  if (weight_ && rows > 0) {
    Weight::Rows weight;
    std::memcpy(&weight, scratch, sizeof weight);
    const int64_t depth = words_.words(input_.size(1));
    const char* tokens = static_cast<const char*>(by_token_.const_data_ptr()) + block.panel * depth * panel * 4;
    multiply_tokens(words_, weight, tokens, depth, rows, v);
  } else if (rows > 0) {
    const int64_t n = std::min(panel, chunk_.n - first);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits_.scalar_type(), "teacher", [&] {
      const int64_t row = logits_.stride(0), column = logits_.stride(1);
      const auto* data = logits_.const_data_ptr<scalar_t>() + block.first * column;
      if (chunk_.index.defined()) {
        const int64_t* places = chunk_.index.const_data_ptr<int64_t>() + first;
        read_block(
            [&](int64_t lane) { return data + places[lane] * row; }, column, n, rows, panel, v);
      } else {
        read_block(
            [&](int64_t lane) { return data + (chunk_.begin + first + lane) * row; }, column, n, rows, panel, v);
      }
    });
  }
  const float* bias = bias_.defined() ? bias_.const_data_ptr<float>() + block.first : nullptr;
  words_.kernels->values(v, rows, bias, options_, max);
  std::fill(v + rows * panel, v + block.rows * panel, -kInfinity);
}

int64_t teacher_bytes(int64_t rows, int64_t hidden) {
  return hidden == 0 ? 0 : rows * (hidden + 1) * 4 * 2 + counted_threads() * kTile * (hidden + 1) * 4;
}

}  // namespace ssd_core::cpu

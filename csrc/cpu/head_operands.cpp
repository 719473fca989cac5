#include "head_operands.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "isa.h"

namespace ssd_core::cpu {

namespace {

constexpr int64_t kDepth = 640;  // words that a product sums in one go: a panel of so many stays in cache

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor x = at::empty(sizes, options);
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const auto end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + x.nbytes()) / kHuge * kHuge;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may fail
  }
#endif
  return x;
}

at::Tensor paired_class_weights(const std::optional<at::Tensor>& class_weight) {
  if (!class_weight.has_value() || !class_weight->defined()) {
    return {};
  }
  return at::constant_pad_nd(*class_weight, {0, 1}).slice(0, 0, class_weight->size(0));
}

Words words_of(at::ScalarType dtype, bool softcap) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::kAvx512Bf16:
      if (dtype == at::kBFloat16) {
        return {softcap ? &avx512bf16::bfloat16_wide_tiles : &avx512bf16::bfloat16_tiles, &avx512::float32_tiles, true,
                softcap};
      }
      [[fallthrough]];
    case Isa::kAvx512:
      return {&avx512::float32_tiles, &avx512::float32_tiles, false, true};
    case Isa::kAvx2:
      return {&avx2::float32_tiles, &avx2::float32_tiles, false, true};
    default:
      break;
  }
#endif
  return {&baseline::float32_tiles, &baseline::float32_tiles, false, true};
}

namespace {

template <class To, class From>
To converted(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else {
    return static_cast<To>(static_cast<float>(x));
  }
}

// (rows, columns) of any strides -> rows of `stride` elements, zeros behind the columns. By way of dtype Product, which
// products are taken in.
template <class To, class Product, class From>
void pack(const From* x, int64_t row, int64_t column, int64_t rows, int64_t columns, To* out, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, x += row, out += stride) {
    if (column == 1) {  // in vectors
      for (int64_t k = 0; k < columns; ++k) {
        out[k] = converted<To>(converted<Product>(x[k]));
      }
    } else {
      for (int64_t k = 0; k < columns; ++k) {
        out[k] = converted<To>(converted<Product>(x[k * column]));
      }
    }
    std::fill(out + columns, out + stride, To(0));
  }
}

}  // namespace

Weight::Weight(const at::Tensor& weight, at::ScalarType dtype, const Words& words, const at::Tensor& order)
    : weight_(weight), dtype_(dtype), words_(words), order_(order), hidden_(weight.size(1)) {
  const at::ScalarType compute = words.pairs ? at::kBFloat16 : at::kFloat;
  direct_ = weight.scalar_type() == compute && dtype == compute && weight.stride(1) == 1 &&
      !(words.pairs && hidden_ % 2);
}

Weight::Rows Weight::tile(int64_t first, int64_t count, char* scratch) const {
  const int64_t* ids = order_.defined() ? order_.const_data_ptr<int64_t>() + first : nullptr;
  if (direct_) {
    const int64_t row = weight_.stride(0) * weight_.element_size();
    return {static_cast<const char*>(weight_.const_data_ptr()) + (ids ? 0 : first * row), row, ids};
  }
  const int64_t stride = words_.words(hidden_) * 4;
  if (!ids) {
    put(first, count, scratch, stride);
  }
  for (int64_t j = 0; ids && j < count; ++j) {
    constexpr int64_t kAhead = 6;
    fetch(first + j + kAhead, std::min(first + j + kAhead + 1, first + count));
    put(ids[j], 1, scratch + j * stride, stride);
  }
  return {scratch, stride, nullptr};
}

void Weight::fetch(int64_t first, int64_t last) const {
  constexpr int64_t kLine = 64;
  if (weight_.stride(1) != 1) {
    return;
  }
  const int64_t* ids = order_.const_data_ptr<int64_t>();
  const int64_t element = weight_.element_size();
  for (int64_t j = first; j < last; ++j) {
    const char* row = static_cast<const char*>(weight_.const_data_ptr()) + ids[j] * weight_.stride(0) * element;
    for (int64_t at = 0; at < hidden_ * element; at += kLine) {
      __builtin_prefetch(row + at, 0, 2);
    }
  }
}

// Rows of the weight as words, `stride` bytes apart.
void Weight::put(int64_t first, int64_t count, char* out, int64_t stride) const {
  const char* data =
      static_cast<const char*>(weight_.const_data_ptr()) + first * weight_.stride(0) * weight_.element_size();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, weight_.scalar_type(), "weight", [&] {
        const auto* x = reinterpret_cast<const scalar_t*>(data);
        const auto to = [&](auto product) {
          using Product = decltype(product);
          const int64_t row = weight_.stride(0), column = weight_.stride(1);
          if (words_.pairs) {
            pack<c10::BFloat16, Product>(
                x, row, column, count, hidden_, reinterpret_cast<c10::BFloat16*>(out), stride / 2);
          } else {
            pack<float, Product>(x, row, column, count, hidden_, reinterpret_cast<float*>(out), stride / 4);
          }
        };
        dtype_ == at::kBFloat16 ? to(c10::BFloat16()) : dtype_ == at::kHalf ? to(c10::Half()) : to(0.0f);
      });
}

void multiply_tokens(
    const Words& words, const Weight::Rows& weight, const char* tokens, int64_t depth, int64_t rows, float* u) {
  const int64_t panel = words.kernels->panel, block = divide_up(depth, divide_up(depth, kDepth));
  for (int64_t k = 0; k < depth; k += block) {
    words.kernels->gemm(
        weight.data + k * 4, weight.row, 4, tokens + k * panel * 4, panel * 4, u, panel, rows,
        std::min(block, depth - k), k > 0, weight.places);
  }
}

void store_word_element(const Words& words, char* rows, int64_t row, int64_t lane, float value) {
  const int64_t panel = words.kernels->panel;
  if (!words.pairs) {
    reinterpret_cast<float*>(rows)[row * panel + lane] = value;
  } else {
    const int64_t pair = row / 2 * (words.wide ? 2 : 1) * panel + lane;
    reinterpret_cast<c10::BFloat16*>(rows)[2 * pair + row % 2] = value;
  }
}

void store_gradient(
    const Words& words, char* kept, char* by_row, int64_t row_bytes, int64_t row, int64_t lane, float value) {
  store_word_element(words, kept, row, lane, value);
  char* to = by_row + row * row_bytes;
  if (words.pairs) {
    reinterpret_cast<c10::BFloat16*>(to)[lane] = value;
  } else {
    reinterpret_cast<float*>(to)[lane] = value;
  }
}

void store_floats(const at::Tensor& to, int64_t at, const float* from, int64_t count, bool add) {
  if (to.scalar_type() == at::kFloat) {
    float* out = to.mutable_data_ptr<float>() + at;
    for (int64_t k = 0; k < count; ++k) {
      out[k] = from[k] + (add ? out[k] : 0.0f);
    }
  } else if (to.scalar_type() == at::kBFloat16) {
    auto* out = reinterpret_cast<uint16_t*>(to.mutable_data_ptr<c10::BFloat16>() + at);
    for (int64_t k = 0; k < count; ++k) {  // to nearest even; without a branch, in vectors
      uint32_t bits;
      std::memcpy(&bits, from + k, sizeof bits);
      const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      out[k] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
  } else {
    std::copy_n(from, count, to.mutable_data_ptr<c10::Half>() + at);
  }
}

void pack_by_token(const char* x, int64_t n, int64_t hidden, const Words& words, uint32_t* out) {
  const int64_t panel = words.kernels->panel, depth = words.words(hidden);
  at::parallel_for(0, divide_up(n, panel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      uint32_t* to = out + p * depth * panel;
      for (int64_t lane = 0; lane < panel; ++lane) {
        const int64_t i = p * panel + lane;
        for (int64_t k = 0; k < depth; ++k) {
          uint32_t word = 0;
          if (i < n) {
            const int64_t bytes = words.pairs && 2 * k + 1 == hidden ? 2 : 4;
            std::memcpy(&word, x + i * hidden * words.element() + k * 4, bytes);
          }
          to[k * panel + lane] = word;
        }
      }
    }
  });
}

void pack_by_coordinate(const char* x, int64_t n, int64_t hidden, const Words& words, uint32_t* out, int64_t depth) {
  const int64_t panel = words.kernels->panel;
  const auto at_16 = [&](int64_t i, int64_t d) -> uint32_t {
    uint16_t half = 0;
    if (i < n) {
      std::memcpy(&half, x + (i * hidden + d) * 2, 2);
    }
    return half;
  };
  at::parallel_for(0, divide_up(hidden, panel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      const int64_t width = std::min(panel, hidden - q * panel);
      for (int64_t k = 0; k < depth; ++k) {
        uint32_t* to = out + (q * depth + k) * panel;
        std::fill(to, to + panel, 0);
        if (words.pairs) {
          for (int64_t lane = 0; lane < width; ++lane) {
            const int64_t d = q * panel + lane;
            to[lane] = at_16(2 * k, d) | at_16(2 * k + 1, d) << 16;
          }
        } else if (k < n) {
          std::memcpy(to, x + (k * hidden + q * panel) * 4, width * 4);
        }
      }
    }
  });
}

}  // namespace ssd_core::cpu

#include "head_operands.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace ssd_core::cpu {

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
  return static_cast<To>(static_cast<float>(x));
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

Weight::Weight(const at::Tensor& weight, at::ScalarType dtype, const Words& words)
    : weight_(weight), dtype_(dtype), words_(words), hidden_(weight.size(1)) {
  const at::ScalarType compute = words.pairs ? at::kBFloat16 : at::kFloat;
  direct_ = weight.scalar_type() == compute && weight.stride(1) == 1 && !(words.pairs && hidden_ % 2);
}

Weight::Rows Weight::tile(int64_t first, int64_t count, char* scratch) const {
  const int64_t item = weight_.element_size();
  const char* data = static_cast<const char*>(weight_.const_data_ptr()) + first * weight_.stride(0) * item;
  if (direct_) {
    return {data, weight_.stride(0) * item};
  }
  const int64_t stride = words_.words(hidden_) * 4 / words_.element();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, weight_.scalar_type(), "weight", [&] {
        const auto* x = reinterpret_cast<const scalar_t*>(data);
        const auto to = [&](auto product) {
          using Product = decltype(product);
          if (words_.pairs) {
            pack<c10::BFloat16, Product>(
                x, weight_.stride(0), weight_.stride(1), count, hidden_, reinterpret_cast<c10::BFloat16*>(scratch),
                stride);
          } else {
            pack<float, Product>(
                x, weight_.stride(0), weight_.stride(1), count, hidden_, reinterpret_cast<float*>(scratch), stride);
          }
        };
        dtype_ == at::kBFloat16 ? to(c10::BFloat16()) : dtype_ == at::kHalf ? to(c10::Half()) : to(0.0f);
      });
  return {scratch, stride * words_.element()};
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

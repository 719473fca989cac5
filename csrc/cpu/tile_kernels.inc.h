// Kernels of tile_kernels.h, included once per instruction set, with SSD_CORE_ISA naming the namespace,
// SSD_CORE_VECTOR_BYTES the width of its vectors, and SSD_CORE_BFLOAT16 defined where it multiplies bfloat16 pairs.

namespace ssd_core::cpu {
namespace SSD_CORE_ISA {
namespace {

#include "vector_math.inc.h"

#include "divergences.inc.h"

// -- products

// The block of c that stays in registers, kRows x kPanel, as large as they allow.
constexpr int kRows = 6;
constexpr int kVectors = SSD_CORE_PANEL_VECTORS;
constexpr int kPanel = kVectors * kLanes;

struct Float32Words {
  template <class Row>
  static void transposed(const Row& row, int64_t rows, int64_t width, uint32_t* out, int64_t out_row) {
    for (int64_t j = 0; j < rows; ++j) {
      __builtin_memcpy(out + j * out_row, row(j), width * sizeof(float));
    }
  }

  static SSD_CORE_INLINE Vec add_product(Vec c, const char* a, Vec b) {
    float x;
    __builtin_memcpy(&x, a, sizeof x);
    return c + x * b;
  }
};

#ifdef SSD_CORE_BFLOAT16
struct Bfloat16Pairs {
  template <class Row>
  static void transposed(const Row& row, int64_t rows, int64_t width, uint32_t* out, int64_t out_row) {
    for (int64_t j = 0; j < rows; j += 2, out += out_row) {
      const auto* even = reinterpret_cast<const uint16_t*>(row(j));
      if (j + 1 < rows) {
        const auto* odd = reinterpret_cast<const uint16_t*>(row(j + 1));
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) {
          out[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
        }
      } else {
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) {
          out[d] = even[d];
        }
      }
    }
  }

  static SSD_CORE_INLINE Vec add_product(Vec c, const char* a, Vec b) {
    int x;
    __builtin_memcpy(&x, a, sizeof x);
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(x), (__m512bh)b);
  }
};
#endif

// What is added to is wanted at the end only, and often in no cache.
template <int kM>
SSD_CORE_INLINE void fetch_block(const float* c, int64_t c_row) {
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      __builtin_prefetch(c + i * c_row + j * kLanes, 1);
    }
  }
}

template <class Words, int kM, bool kAdd>
SSD_CORE_INLINE void multiply_rows(
    const char* const* a, int64_t a_col, const char* b, int64_t b_row, float* c, int64_t c_row, int64_t k) {
  Vec sum[kM][kVectors] = {};
  if constexpr (kAdd) {
    fetch_block<kM>(c, c_row);
  }
  for (int64_t l = 0, at = 0; l < k; ++l, at += a_col) {
    Vec x[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      x[j] = load(b + j * sizeof(Vec));
    }
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] = Words::add_product(sum[i][j], a[i] + at, x[j]);
      }
    }
    b += b_row;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      float* out = c + i * c_row + j * kLanes;
      keep(out, kAdd ? load(out) + sum[i][j] : sum[i][j]);
    }
  }
}

template <class Words, bool kAdd>
void multiply(
    const char* a, int64_t a_row, int64_t a_col, const char* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
    int64_t k, const int64_t* a_places) {
  int64_t i = 0;
  const auto rows = [&]<int kM>() __attribute__((always_inline)) {
    const char* row[kM];
    for (int j = 0; j < kM; ++j) {
      row[j] = a + (a_places ? a_places[i + j] : i + j) * a_row;
    }
    multiply_rows<Words, kM, kAdd>(row, a_col, b, b_row, c + i * c_row, c_row, k);
  };
  for (; i + kRows <= m; i += kRows) {
    rows.template operator()<kRows>();
  }
  switch (m - i) {
    case 5: return rows.template operator()<5>();
    case 4: return rows.template operator()<4>();
    case 3: return rows.template operator()<3>();
    case 2: return rows.template operator()<2>();
    case 1: return rows.template operator()<1>();
    default: return;
  }
}

template <class Words>
void gemm(
    const void* a, int64_t a_row, int64_t a_col, const void* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
    int64_t k, bool add, const int64_t* a_places) {
  const auto product = add ? multiply<Words, true> : multiply<Words, false>;
  product(
      static_cast<const char*>(a), a_row, a_col, static_cast<const char*>(b), b_row, c, c_row, m, k, a_places);
}

template <class Words>
void transposed_words(
    const void* w, int64_t w_row, int64_t rows, int64_t width, uint32_t* out, int64_t out_row,
    const int64_t* w_places) {
  const auto row = [=](int64_t j) { return static_cast<const char*>(w) + (w_places ? w_places[j] : j) * w_row; };
  Words::transposed(row, rows, width, out, out_row);
}

// -- two rows of the vocabulary, at one vector of lanes: what is kept of them, and their gradient

// Float32 is kept, and the gradient is float32.
struct Float32Rows {
  using Element = float;
  static constexpr int64_t kBytes = 2 * kPanel * sizeof(float);

  static SSD_CORE_INLINE void put(char* kept, Vec x0, Vec x1) {
    keep(kept, x0);
    keep(kept + kBytes / 2, x1);
  }
  static SSD_CORE_INLINE void get(const char* kept, Vec& x0, Vec& x1) {
    x0 = load(kept);
    x1 = load(kept + kBytes / 2);
  }
  static SSD_CORE_INLINE void put_gradient(char* kept, char* row0, char* row1, Vec g0, Vec g1) {
    put(kept, g0, g1);
    keep(row0, g0);
    keep(row1, g1);
  }
};

#ifdef SSD_CORE_BFLOAT16
SSD_CORE_INLINE __m512i paired(__m512i halves) {  // 16 of row 0, then 16 of row 1 -> side by side
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16,
      0);
  return _mm512_permutexvar_epi16(order, halves);
}

// Bfloat16 pairs are kept, or with kWide float32; the gradient is bfloat16 pairs.
template <bool kWide>
struct Bfloat16Rows {
  using Element = bfloat16;
  static constexpr int64_t kBytes = kPanel * (kWide ? 2 * sizeof(float) : sizeof(float));

  static SSD_CORE_INLINE void put(char* kept, Vec x0, Vec x1) {
    if constexpr (kWide) {
      Float32Rows::put(kept, x0, x1);
    } else {
      keep(kept, paired((__m512i)_mm512_cvtne2ps_pbh((__m512)x1, (__m512)x0)));
    }
  }
  static SSD_CORE_INLINE void get(const char* kept, Vec& x0, Vec& x1) {
    if constexpr (kWide) {
      Float32Rows::get(kept, x0, x1);
    } else {
      const Bits pair = load_bits(kept);
      x0 = float_of(pair << 16);
      x1 = float_of(pair & 0xffff0000u);
    }
  }
  static SSD_CORE_INLINE void put_gradient(char* kept, char* row0, char* row1, Vec g0, Vec g1) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)g1, (__m512)g0);
    keep(kept, paired(halves));
    keep(row0, _mm512_castsi512_si256(halves));
    keep(row1, _mm512_extracti64x4_epi64(halves, 1));
  }
};
#endif

// -- from raw outputs to exponentials, and to the gradient

template <bool kBias, bool kSoftcap>
void values_of(float* u, int64_t rows, const float* bias, float cap_slope, float* max) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    Vec most = all_lanes(-__builtin_inff());
    float* x = u + lane;
    for (int64_t j = 0; j < rows; ++j, x += kPanel) {
      Vec v = load(x);
      if constexpr (kBias) {
        v += bias[j];
      }
      if constexpr (kSoftcap) {
        v = tanh_any(v * cap_slope);
      }
      if constexpr (kBias || kSoftcap) {
        keep(x, v);
      }
      most = larger(v, most);
    }
    keep(max + lane, most);
  }
}

void values(float* u, int64_t rows, const float* bias, const TileOptions& options, float* max) {
  const auto run = options.softcap ? (bias ? values_of<true, true> : values_of<false, true>)
                                   : (bias ? values_of<true, false> : values_of<false, false>);
  run(u, rows, bias, options.cap_slope, max);
}

template <class Rows, bool kKeep>
void exponentials_of(const float* v, int64_t rows, const float* max, float slope, char* kept, float* sum) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    const Vec most = load(max + lane);
    const Vec shift = pick(most == all_lanes(-__builtin_inff()), Vec{}, most);  // if all of the tile is -inf
    Vec sum0{}, sum1{};
    const float* x = v + lane;
    char* out = kept + lane * sizeof(float);
    for (int64_t j = 0; j < rows; j += 2, x += 2 * kPanel, out += Rows::kBytes) {
      const Vec v0 = load(x), v1 = load(x + kPanel);
      const Vec e0 = exp_nonpositive(v0 - shift, slope), e1 = exp_nonpositive(v1 - shift, slope);
      sum0 += e0;
      sum1 += e1;
      if constexpr (kKeep) {
        Rows::put(out, e0, e1);
      }
    }
    keep(sum + lane, sum0 + sum1);
  }
}

template <class Rows>
void exponentials(const float* v, int64_t rows, const float* max, const TileOptions& options, void* kept, float* sum) {
  const auto run = kept && !options.keep_values ? exponentials_of<Rows, true> : exponentials_of<Rows, false>;
  run(v, rows, max, options.slope, static_cast<char*>(kept), sum);
}

void moments(const float* v, int64_t rows, const float* max, float slope, float* sum, int32_t* first) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    const Vec most = load(max + lane);
    const Vec shift = pick(most == all_lanes(-__builtin_inff()), Vec{}, most);
    Vec total{};
    Mask place{};
    for (int64_t j = rows - 1; j >= 0; --j) {
      const Vec value = load(v + j * kPanel + lane), e = exp_nonpositive(value - shift, slope);
      total += pick(e == Vec{}, Vec{}, e * (slope * (value - shift)));  // 0 log 0 = 0; a NaN stays
      place = value == most ? (Mask{} + static_cast<int32_t>(j)) : place;
    }
    keep(sum + lane, total);
    keep(first + lane, place);
  }
}

void spread(const float* v, int64_t rows, const float* max, const float* class_weight, float* sum) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    const Vec most = load(max + lane);
    const Vec top = pick(most == all_lanes(-__builtin_inff()), Vec{}, most);
    Vec total{};
    for (int64_t j = 0; j < rows; ++j) {
      const Vec x = top - load(v + j * kPanel + lane);
      total += class_weight ? class_weight[j] * x : x;
    }
    keep(sum + lane, total);
  }
}

// -- a student beside a teacher

struct TilePairAt {  // a vector of lanes
  Vec student_max, teacher_max;

  TilePairAt(const TilePair& pair, int lane)
      : student_max(finite(load(pair.student_max + lane))), teacher_max(finite(load(pair.teacher_max + lane))) {}

  static SSD_CORE_INLINE Vec finite(Vec max) { return pick(max == all_lanes(-__builtin_inff()), Vec{}, max); }
};

template <class Function>
SSD_CORE_INLINE void each_pair(
    const float* student, const float* teacher, int64_t rows, const TilePair& pair, int lane,
    const Function& function) {
  const TilePairAt at(pair, lane);
  const Vec student_log_sum = load(pair.student_log_sum + lane), teacher_log_sum = load(pair.teacher_log_sum + lane);
  for (int64_t j = 0; j < rows; ++j) {
    const Vec log_q = pair.student_slope * (load(student + j * kPanel + lane) - at.student_max) - student_log_sum;
    const Vec log_p = pair.teacher_slope * (load(teacher + j * kPanel + lane) - at.teacher_max) - teacher_log_sum;
    const Vec q = exp_nonpositive(log_q, 1.0f), p = exp_nonpositive(log_p, 1.0f);
    function(j, p, q, log_p, log_q);
  }
}

template <Divergence kKind>
void kl_sums_of(
    const float* student, const float* teacher, int64_t rows, const TilePair& pair, float* student_sum,
    float* teacher_sum, float* value) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    const TilePairAt at(pair, lane);
    Vec qs{}, ps{}, values{};
    for (int64_t j = 0; j < rows; ++j) {
      const Vec y = load(student + j * kPanel + lane) - at.student_max;
      const Vec x = load(teacher + j * kPanel + lane) - at.teacher_max;
      const Vec q = exp_nonpositive(y, pair.student_slope), p = exp_nonpositive(x, pair.teacher_slope);
      const Vec log_q = pair.student_slope * y, log_p = pair.teacher_slope * x;
      qs += q;
      ps += p;
      values += divergence_term<kKind>(some_mass(p, log_p), some_mass(q, log_q), log_p - log_q, 0.0f, 1.0f).value;
    }
    keep(student_sum + lane, qs);
    keep(teacher_sum + lane, ps);
    keep(value + lane, values);
  }
}

void kl_sums(
    const float* student, const float* teacher, int64_t rows, const TilePair& pair, float* student_sum,
    float* teacher_sum, float* value) {
  const auto run = pair.kind == Divergence::kForwardKl ? kl_sums_of<Divergence::kForwardKl>
                                                       : kl_sums_of<Divergence::kReverseKl>;
  run(student, teacher, rows, pair, student_sum, teacher_sum, value);
}

void jsd_pulls(const float* student, float* teacher, int64_t rows, const TilePair& pair, float* value, float* own) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    Vec values{}, pulls{};
    each_pair(student, teacher, rows, pair, lane, [&](int64_t j, Vec p, Vec q, Vec log_p, Vec log_q) {
      const auto term = divergence_term<Divergence::kJsd>(p, q, log_p - log_q, pair.beta, 1.0f - pair.beta);
      values += term.value;
      pulls += term.pull;
      keep(teacher + j * kPanel + lane, term.pull);
    });
    keep(value + lane, values);
    keep(own + lane, pulls);
  }
}

template <Divergence kKind>
void kl_slopes_of(
    const float* student, const float* teacher, int64_t rows, const TilePair& pair, const float* own,
    const float* scale, float* out) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    const Vec own_sum = load(own + lane), factor = load(scale + lane);
    each_pair(student, teacher, rows, pair, lane, [&](int64_t j, Vec p, Vec q, Vec log_p, Vec log_q) {
      const auto term = divergence_term<kKind>(p, q, log_p - log_q, pair.beta, 1.0f - pair.beta);
      keep(out + j * kPanel + lane, factor * (term.pull - q * own_sum));
    });
  }
}

void jsd_slopes(
    const float* student, const float* pulls, int64_t rows, const TilePair& pair, const float* own, const float* scale,
    float* out) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    const Vec own_sum = load(own + lane), factor = load(scale + lane), log_sum = load(pair.student_log_sum + lane);
    const TilePairAt at(pair, lane);
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t place = j * kPanel + lane;
      const Vec q = exp_nonpositive(pair.student_slope * (load(student + place) - at.student_max) - log_sum, 1.0f);
      keep(out + place, factor * (load(pulls + place) - q * own_sum));
    }
  }
}

void pair_slopes(
    const float* student, const float* teacher, int64_t rows, const TilePair& pair, const float* own,
    const float* scale, float* out) {
  const auto run = pair.kind == Divergence::kForwardKl ? kl_slopes_of<Divergence::kForwardKl>
      : pair.kind == Divergence::kReverseKl            ? kl_slopes_of<Divergence::kReverseKl>
                                                       : jsd_slopes;
  run(student, teacher, rows, pair, own, scale, out);
}

// -- the gradient

template <class Rows, bool kValues, bool kSoftcap, bool kUniform, bool kMore>
void gradient_of(
    char* kept, int64_t rows, const float* class_weight, const TileGradient& terms, float slope, char* by_row,
    int64_t by_row_stride) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    const auto lanes = [=](const float* x) __attribute__((always_inline)) { return x ? load(x + lane) : Vec{}; };
    const Vec factor = kMore ? lanes(terms.factor) : load(terms.factor + lane);
    const Vec uniform = kUniform ? load(terms.uniform + lane) : Vec{};
    const Vec max = kValues ? load(terms.max + lane) : Vec{};
    const Vec slope_term = kMore ? lanes(terms.slope_term) : Vec{};
    const Vec second = kMore ? lanes(terms.second) : Vec{};
    const float* addend = kMore && terms.addend ? terms.addend + lane : nullptr;
    char* at = kept + lane * sizeof(float);
    char* row = by_row + lane * sizeof(typename Rows::Element);
    const auto gradient_at = [=](Vec v, int64_t j) __attribute__((always_inline)) {
      Vec g;
      if constexpr (!kValues) {
        g = factor * v;
      } else {
        const Vec below = v - max;
        if constexpr (!kMore) {
          g = factor * exp_nonpositive(below, slope);
        } else {
          g = Vec{};
          if (terms.factor) {
            const Vec e = exp_nonpositive(below, slope);
            g = pick(e == Vec{}, factor * e, (factor + slope_term * (slope * below)) * e);  // a NaN factor stays
          }
          if (terms.second) {
            g += second * exp_nonpositive(v - max, terms.second_slope);
          }
          if (addend) {
            g += load(addend + j * kPanel);
          }
        }
      }
      if constexpr (kUniform) {
        g -= class_weight ? uniform * class_weight[j] : uniform;
      }
      if constexpr (kSoftcap) {
        g *= 1.0f - v * v;
      }
      return g;
    };
    for (int64_t j = 0; j < rows; j += 2, at += Rows::kBytes, row += 2 * by_row_stride) {
      Vec x0, x1;
      Rows::get(at, x0, x1);
      Rows::put_gradient(at, row, row + by_row_stride, gradient_at(x0, j), gradient_at(x1, j + 1));
    }
  }
}

template <class Rows, bool kSoftcap>
auto gradient_of_values(const TileGradient& terms) {
  const bool more = terms.slope_term || terms.second || terms.addend;
  return terms.uniform ? (more ? gradient_of<Rows, true, kSoftcap, true, true>
                               : gradient_of<Rows, true, kSoftcap, true, false>)
                       : (more ? gradient_of<Rows, true, kSoftcap, false, true>
                               : gradient_of<Rows, true, kSoftcap, false, false>);
}

template <class Rows>
void gradient(
    void* kept, int64_t rows, const float* class_weight, const TileGradient& terms, const TileOptions& options,
    void* by_row, int64_t by_row_stride) {
  auto run = terms.uniform ? gradient_of<Rows, false, false, true, false>
                           : gradient_of<Rows, false, false, false, false>;
  if (options.keep_values) {
    run = options.softcap ? gradient_of_values<Rows, true>(terms) : gradient_of_values<Rows, false>(terms);
  }
  run(static_cast<char*>(kept), rows, class_weight, terms, options.slope, static_cast<char*>(by_row), by_row_stride);
}

template <class Rows>
void masked_sums(
    const void* by_row, int64_t rows, int64_t by_row_stride, int64_t n, const float* mask, float* column_sums,
    float* row_sums) {
  using Element = typename Rows::Element;
  for (int64_t j = 0; j < rows; ++j) {
    const auto* row = reinterpret_cast<const Element*>(static_cast<const char*>(by_row) + j * by_row_stride);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const float g = to_float(row[i]);
      column_sums[i] += g;
      sum += mask[i] != 0 ? g : 0.0f;
    }
    row_sums[j] += sum;
  }
}

template <class Words, class Rows>
constexpr TileKernels tiles() {
  return {kPanel,  gemm<Words>, transposed_words<Words>, values,           exponentials<Rows>,
          moments, spread,      kl_sums,                jsd_pulls,        pair_slopes,
          gradient<Rows>, masked_sums<Rows>};
}

}  // namespace

#ifdef SSD_CORE_BFLOAT16
extern const TileKernels bfloat16_tiles = tiles<Bfloat16Pairs, Bfloat16Rows<false>>();
extern const TileKernels bfloat16_wide_tiles = tiles<Bfloat16Pairs, Bfloat16Rows<true>>();
#else
extern const TileKernels float32_tiles = tiles<Float32Words, Float32Rows>();
#endif

}  // namespace SSD_CORE_ISA
}  // namespace ssd_core::cpu

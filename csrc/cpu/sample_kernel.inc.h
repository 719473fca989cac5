// Kernels of sample_kernel.h, included once per instruction set, with SSD_CORE_ISA naming the namespace and
// SSD_CORE_VECTOR_BYTES the width of its vectors.

namespace ssd_core::cpu {
namespace SSD_CORE_ISA {
namespace {

#include "vector_math.inc.h"

// -- e^x in float64

// For x <= 0, within 2.3e-16 (20 million tried); 0 below -708, where results turn subnormal. As exp_nonpositive.
SSD_CORE_INLINE double exp64(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.4426950408889634 + kRound;
  const double n = shifted - kRound;
  double r = x - n * 0.693147180369123816490;  // 32 significant bits
  r = r - n * 1.90821492927058770002e-10;
  // Taylor up to r^13: |r| <= log(2) / 2 leaves 4e-18.
  double q = r * (1.0 / 6227020800) + 1.0 / 479001600;
  q = q * r + 1.0 / 39916800;
  q = q * r + 1.0 / 3628800;
  q = q * r + 1.0 / 362880;
  q = q * r + 1.0 / 40320;
  q = q * r + 1.0 / 5040;
  q = q * r + 1.0 / 720;
  q = q * r + 1.0 / 120;
  q = q * r + 1.0 / 24;
  q = q * r + 1.0 / 6;
  q = q * r + 0.5;
  q = q * (r * r) + r;
  const uint64_t power = (__builtin_bit_cast(uint64_t, shifted) << 52) + 0x3ff0000000000000u;
  const double y = __builtin_bit_cast(double, power) * (1 + q);
  return x < -708 ? 0 : y;
}

// -- a row's maximum and sums

// A float32 lane runs over 128 logits before float64 adds it up.
constexpr int64_t kSpan = 128 * kLanes;
static_assert(kSpan % kSampleBlock == 0);

// What lies farther below the maximum counts as if it lay here: e^-80 is nothing beside the maximum's 1.
constexpr float kFarthest = -80.0f;

SSD_CORE_INLINE float largest_lane(Vec x) {
  float lanes[kLanes];
  keep(lanes, x);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int lane = 0; lane < half; ++lane) {
      lanes[lane] = larger(lanes[lane + half], lanes[lane]);
    }
  }
  return lanes[0];
}

SSD_CORE_INLINE double lanes_sum(Vec x) {
  float lanes[kLanes];
  keep(lanes, x);
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += lanes[lane];
  }
  return sum;
}

// The last vector of a row, -inf beyond its end.
SSD_CORE_INLINE Vec load_last(const float* x, int64_t count) {
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = lane < count ? x[lane] : -__builtin_inff();
  }
  return load(lanes);
}

// f(x) for each vector of a row's part, while what lies `ahead` of it is on its way into the cache.
template <class Function>
SSD_CORE_INLINE void each_vector(const float* x, int64_t count, int64_t ahead, const Function& f) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    if (ahead && j % 16 == 0) {
      __builtin_prefetch(x + j + ahead);
    }
    f(load(x + j));
  }
  if (j < count) {
    f(load_last(x + j, count - j));
  }
}

template <bool kTempered>
SampleSums sums_of(const float* z, int64_t count, float slope, float* block_max) {
  SampleSums row{-__builtin_inff(), 0, 0, 0};
  for (int64_t begin = 0; begin < count; begin += kSpan) {
    const int64_t end = begin + kSpan < count ? begin + kSpan : count;
    float max = row.max;
    for (int64_t block = begin; block < end; block += kSampleBlock) {
      Vec most = all_lanes(-__builtin_inff());
      each_vector(z + block, block + kSampleBlock < end ? kSampleBlock : end - block, 0,
                  [&](Vec x) __attribute__((always_inline)) { most = larger(x, most); });
      const float found = largest_lane(most);
      block_max[block / kSampleBlock] = found;
      max = larger(found, max);
    }
    // Sums over what came before refer to its maximum.
    if (max > row.max && row.sum > 0) {
      const double up = static_cast<double>(max) - row.max;
      const double shrink = exp64(-up);
      row.spread = shrink * (row.spread + up * row.sum);
      row.sum *= shrink;
      row.tempered *= exp64(-up * slope);
    }
    row.max = max;

    const bool some = max > -__builtin_inff();
    const Vec shift = all_lanes(some ? max : 0.0f), farthest = all_lanes(kFarthest);
    Vec sum{}, spread{}, tempered{};
    each_vector(z + begin, end - begin, kSpan, [&](Vec x) __attribute__((always_inline)) {
      const Vec d = x - shift, near = pick(farthest > d, farthest, d);
      const Vec e = exp_product(near, 1.0f).value;
      sum += e;
      spread -= e * near;
      if constexpr (kTempered) {
        tempered += exp_nonpositive(d, slope);
      }
    });
    const double taken = some ? 1 : 0;  // a NaN among -inf shows even so
    row.sum += taken * lanes_sum(sum);
    row.spread += taken * lanes_sum(spread);
    row.tempered += kTempered ? taken * lanes_sum(tempered) : 0;
  }
  if constexpr (!kTempered) {
    row.tempered = row.sum;
  }
  return row;
}

SampleSums sums(const float* z, int64_t count, float slope, float* block_max) {
  return slope == 1 ? sums_of<false>(z, count, slope, block_max) : sums_of<true>(z, count, slope, block_max);
}

// -- masses in float64

double mass(const float* z, int64_t count, float max, double factor) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    sum += exp64((static_cast<double>(z[j]) - max) * factor);
  }
  return sum;
}

// A difference and a product only: nothing that an instruction set could fuse and round differently.
SSD_CORE_INLINE int bin_of(float z, float max, float scale) {
  const float place = (max - z) * scale;
  return static_cast<int>(place < kMassBins - 1 ? place : kMassBins - 1);
}

int bin(float z, float max, float scale) {
  return bin_of(z, max, scale);
}

void masses(const float* z, int64_t count, float max, double factor, float scale, double* by_bin) {
  constexpr int kCopies = 4;  // neighbours often meet in a bin: each adds to a copy of its own
  double part[kCopies][kMassBins] = {};
  for (int64_t begin = 0; begin < count; begin += kSampleBlock) {
    const int64_t n = count - begin < kSampleBlock ? count - begin : kSampleBlock;
    const float* x = z + begin;
    double weight[kSampleBlock];
    int place[kSampleBlock];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      place[j] = bin_of(x[j], max, scale);
    }
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      weight[j] = exp64((static_cast<double>(x[j]) - max) * factor);
    }
    for (int64_t j = 0; j < n; ++j) {
      part[j % kCopies][place[j]] += weight[j];
    }
  }
  for (int b = 0; b < kMassBins; ++b) {
    by_bin[b] = (part[0][b] + part[1][b]) + (part[2][b] + part[3][b]);
  }
}

// -- what reaches a threshold

// Bit i: lane i holds.
SSD_CORE_INLINE uint32_t lane_bits(Mask mask) {
#if !defined(__x86_64__)
  int32_t lanes[kLanes];
  keep(lanes, mask);
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    bits |= (lanes[lane] & 1u) << lane;
  }
  return bits;
#elif SSD_CORE_VECTOR_BYTES == 64
  return static_cast<uint16_t>(__builtin_ia32_cvtd2mask512(mask));
#elif SSD_CORE_VECTOR_BYTES == 32
  return __builtin_ia32_movmskps256((Vec)mask);
#else
  return __builtin_ia32_movmskps((Vec)mask);
#endif
}

// Without a branch on what the logits are.
int reaching(const float* z, int64_t count, float threshold, int32_t first, int32_t* ids) {
  int found = 0;
  int64_t j = 0;
#if defined(__x86_64__) && SSD_CORE_VECTOR_BYTES == 64
  Mask lanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = first + lane;
  }
  for (; j + kLanes <= count; j += kLanes) {
    const uint32_t bits = lane_bits(load(z + j) >= threshold);
    keep(ids + found, __builtin_ia32_compresssi512_mask(lanes + static_cast<int32_t>(j), Mask{}, bits));
    found += __builtin_popcount(bits);
  }
#endif
  for (; j < count; ++j) {
    ids[found] = first + static_cast<int32_t>(j);
    found += z[j] >= threshold;
  }
  return found;
}

// -- noise

using Wide = uint64_t __attribute__((vector_size(SSD_CORE_VECTOR_BYTES)));

// The products of each lane's low word. GCC multiplies all 64 bits unless it is told.
SSD_CORE_INLINE Wide word_product(Wide x, uint32_t factor) {
#if defined(__x86_64__) && !defined(__clang__)
  const Mask a = (Mask)x, b = (Mask)(Wide{} + factor);
#if SSD_CORE_VECTOR_BYTES == 64
  using Signed = long long __attribute__((vector_size(SSD_CORE_VECTOR_BYTES)));
  return (Wide)__builtin_ia32_pmuludq512_mask(a, b, Signed{}, -1);
#elif SSD_CORE_VECTOR_BYTES == 32
  return (Wide)__builtin_ia32_pmuludq256(a, b);
#else
  return (Wide)__builtin_ia32_pmuludq128(a, b);
#endif
#else
  return (x & 0xffffffffu) * factor;
#endif
}

constexpr int kRounds = 10;

struct PhiloxKeys {  // of each round, in every lane
  Wide k0[kRounds];
  Wide k1[kRounds];
};

// The second word of Philox4x32-10, of counters (position, id): what decides v but for its last 32 bits. Words lie in
// 64-bit lanes, whose upper halves are never looked at.
SSD_CORE_INLINE Wide philox_second(Wide id, uint64_t position, const PhiloxKeys& keys) {
  Wide c0 = Wide{} + (position & 0xffffffffu), c1 = Wide{} + (position >> 32), c2 = id, c3{};
#pragma GCC unroll 10
  for (int round = 0; round < kRounds; ++round) {
    const Wide p0 = word_product(c0, 0xd2511f53u), p1 = word_product(c2, 0xcd9e8d57u);
    c0 = (p1 >> 32) ^ c1 ^ keys.k0[round];
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ keys.k1[round];
    c3 = p0;
  }
  return c1;
}

int64_t next_rival(const Rivals& rivals, int64_t begin, float ratio) {
  constexpr int kVectors = 8;  // looked at together
  PhiloxKeys keys;
  for (int round = 0; round < kRounds; ++round) {
    keys.k0[round] = Wide{} + (static_cast<uint32_t>(rivals.seed) + round * 0x9e3779b9u);
    keys.k1[round] = Wide{} + (static_cast<uint32_t>(rivals.seed >> 32) + round * 0xbb67ae85u);
  }
  Bits lane_ids;
  for (int lane = 0; lane < kLanes; ++lane) {
    lane_ids[lane] = lane;
  }
  const float max = rivals.max, slope = rivals.slope;
  const uint64_t position = rivals.position;
  // v rounded down to 24 bits is exact in float32. -inf has exp(x) = 0.
  const auto can_win = [&](Vec z, Bits ids) __attribute__((always_inline)) {
    const Vec bound = exp_nonpositive(z - max, slope) * (ratio * 16777216.0f);
    const Bits even = (Bits)philox_second((Wide)ids, position, keys);
    const Bits odd = (Bits)philox_second((Wide)ids >> 32, position, keys);
    const Bits high = (Bits)((Wide)even & 0xffffffffu) | (Bits)((Wide)odd << 32);
    return __builtin_convertvector((Mask)(high >> 8), Vec) <= bound;
  };

  int64_t j = begin;
  for (; j + kVectors * kLanes <= rivals.count; j += kVectors * kLanes) {
    Mask hits[kVectors];
    Mask any{};
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = j + i * kLanes;
      const Bits ids = rivals.ids ? load_bits(rivals.ids + at) : lane_ids + static_cast<uint32_t>(at);
      hits[i] = can_win(load(rivals.values + at), ids);
      any |= hits[i];
    }
    if (lane_bits(any)) {
      int i = 0;
      while (!lane_bits(hits[i])) {
        ++i;
      }
      return j + i * kLanes + __builtin_ctz(lane_bits(hits[i]));
    }
  }
  for (; j < rivals.count; j += kLanes) {
    const int64_t rest = rivals.count - j;
    uint32_t ids[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      ids[lane] = rivals.ids ? (lane < rest ? rivals.ids[j + lane] : 0) : static_cast<uint32_t>(j + lane);
    }
    const uint32_t bits = lane_bits(can_win(load_last(rivals.values + j, rest), load_bits(ids)));
    if (bits) {
      const int64_t place = j + __builtin_ctz(bits);
      return place < rivals.count ? place : rivals.count;
    }
  }
  return rivals.count;
}

// -- to float32

void widen_bfloat16(const void* x, int64_t count, float* y) {
  const auto* in = static_cast<const bfloat16*>(x);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    y[j] = to_float(in[j]);
  }
}

// The exponent's bias changes by a product, which is exact, and which makes subnormal numbers normal.
void widen_float16(const void* x, int64_t count, float* y) {
  const auto* in = static_cast<const uint16_t*>(x);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t half = in[j];
    const float magnitude = float_of((half & 0x7fffu) << 13) * 0x1p112f;
    const uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;  // inf and NaN
    y[j] = float_of(bits_of(magnitude) | special | (half & 0x8000u) << 16);
  }
}

}  // namespace

extern const SampleKernels sample_kernels = {
    widen_bfloat16, widen_float16, sums, mass, masses, bin, reaching, next_rival};

}  // namespace SSD_CORE_ISA
}  // namespace ssd_core::cpu

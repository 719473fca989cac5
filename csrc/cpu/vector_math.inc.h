// exp, expm1, log1p, tanh and conversions of 16 bits, of a float in loops that the compiler vectorises and of a Vec:
// branch-free, no calls, float32 throughout.
//
// Included inside a per-ISA, anonymous namespace by the kernel units, after their target pragma. Neither this file nor
// its includer may include a standard header with inline functions: the AVX-512 unit's copy of such a function could be
// the one that the linker keeps for the whole extension, and then the baseline path runs AVX-512 instructions.

#ifndef SSD_CORE_VECTOR_MATH
#define SSD_CORE_VECTOR_MATH

#include "vectors.inc.h"

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

SSD_CORE_INLINE float to_float(float x) {
  return x;
}

SSD_CORE_INLINE float to_float(double x) {
  return static_cast<float>(x);
}

SSD_CORE_INLINE float to_float(bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

// The exponent is counted from another start, and the largest one is kept for inf and NaN. Subnormal numbers become
// normal ones, by a sum in their own unit: that holds also where the processor takes subnormal float32 for 0.
SSD_CORE_INLINE float to_float(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 112u << 23 : 0u;
  const float normal = float_of(magnitude + (112u << 23) + special);
  const float small = float_of(magnitude + (113u << 23)) - 0x1p-14f;
  return float_of(bits_of(magnitude < 0x00800000u ? small : normal) | sign);
}

SSD_CORE_INLINE void store(float* p, float x) {
  *p = x;
}

// Round to nearest even. A NaN is replaced: the rounding carry could turn its payload into an infinity.
SSD_CORE_INLINE void store(bfloat16* p, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// To nearest even, subnormal numbers by a sum in their own unit; from 65520 on to infinity.
SSD_CORE_INLINE void store(float16* p, float x) {
  const uint32_t sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) ^ sign;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? small : normal;
  p->bits = static_cast<uint16_t>(half | sign >> 16);
}

constexpr float kLog2E = 1.44269504088896341f;

// log(2) in two parts (Cody and Waite); the first has 9 significant bits, so n times it is exact.
constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440054690583e-4f;

// Adding it rounds to an integer, and leaves in the low bits of the sum that integer plus 127: the exponent of 2^n.
constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23 + 127

// e^x = 2^n e^r with n = round(x log2(e)), |r| <= log(2)/2, split so that callers can subtract the 1 exactly.
template <class F>
struct ExpParts {
  F scale;  // 2^n
  F n;
  F expm1;  // e^r - 1
};

// For -126 log(2) <= x <= 0. NaN gives NaN in expm1.
template <class F>
SSD_CORE_INLINE ExpParts<F> exp_parts(F x) {
  const F shifted = x * kLog2E + kRound;
  const F n = shifted - kRound;
  F r = x - n * kLog2High;
  r = r - n * kLog2Low;
  // e^r = 1 + r + r^2 Q(r), Q a minimax polynomial (Remez on the relative error of e^r: 3.1e-9).
  F q = 1.3814467238262296e-3f * r + 8.368780836462975e-3f;
  q = q * r + 4.166839271783829e-2f;
  q = q * r + 1.666651964187622e-1f;
  q = q * r + 4.999999403953552e-1f;
  return {float_of(bits_of(shifted) << 23), n, q * (r * r) + r};
}

// e^x for x <= 0, within 1.1 ulp (all float32 tried); 0 below -86.99, before results turn subnormal. NaN propagates.
template <class F>
SSD_CORE_INLINE F exp_nonpositive(F x) {
  const ExpParts<F> e = exp_parts(x);
  return pick(e.n < -125.5f, F{}, e.scale * e.expm1 + e.scale);
}

// e^(slope * d) = 2^n 2^f, n = round(d * slope2), slope2 = slope log2(e), for -126 log(2) <= slope * d <= 0.
template <class F>
struct ExpProduct {
  F value, n;
};

// Fewer operations than exp_nonpositive(x), x = slope * d, as f needs no parts of log(2). The relative error is within
// 1.2e-7 + 1.4e-7 |x| (1.5e-8 |x| with slope 1), and 6e-8 |x| more where the compiler does not fuse product and
// difference; what made d has rounded x by 6e-8 |x| already. NaN propagates.
template <class F>
SSD_CORE_INLINE ExpProduct<F> exp_product(F d, float slope) {
  const float slope2 = slope * kLog2E;
  const F shifted = d * slope2 + kRound;
  const F n = shifted - kRound;
  const F f = d * slope2 - n;
  // 2^f = 1 + f P(f), P a minimax polynomial (relative error of 2^f: 1.6e-8).
  F p = 1.5353361959569156e-4f * f + 1.3398873852565885e-3f;
  p = p * f + 9.61843691766262e-3f;
  p = p * f + 5.5503323674201965e-2f;
  p = p * f + 2.4022647738456726e-1f;
  p = p * f + 6.931471824645996e-1f;
  const F scale = float_of(bits_of(shifted) << 23);
  return {scale * (p * f) + scale, n};
}

// The same for all d <= 0: 0 below slope * d = -86.99.
template <class F>
SSD_CORE_INLINE F exp_nonpositive(F d, float slope) {
  const ExpProduct<F> e = exp_product(d, slope);
  return pick(e.n < -125.5f, F{}, e.value);
}

// e^x - 1 for x <= 0, within 1 ulp (all float32 tried). NaN propagates, -inf gives -1.
template <class F>
SSD_CORE_INLINE F expm1_nonpositive(F x) {
  const ExpParts<F> e = exp_parts(pick(x < -40.0f, F{} - 40.0f, x));  // rounds to -1 well before
  return e.scale * e.expm1 + (e.scale - 1.0f);
}

// log(1 + x) for -1 <= x <= 0, within 1 ulp (all float32 tried). NaN propagates, -1 gives -inf.
template <class F>
SSD_CORE_INLINE F log1p_nonpositive(F x) {
  // 1 + x = 2^k (1 + s) with sqrt(1/2) <= 1 + s < sqrt(2) but for the rounding of 1 + x, which only chooses k.
  const auto shifted = bits_of(1.0f + x) + (0x3f800000u - 0x3f3504f3u);
  const F k = float_of((shifted >> 23) | 0x4b000000u) - (8388608.0f + 127.0f);
  const F scale = float_of(0x7f000000u - (shifted & 0x7f800000u));  // 2^-k
  const F s = x * scale + (scale - 1.0f);
  // log(1 + s) = s - s^2 / 2 + s^3 P(s), P a minimax polynomial (relative error of the logarithm: 5.8e-9).
  F p = -7.634507864713669e-2f * s + 1.2761594355106354e-1f;
  p = p * s + -1.3160187005996704e-1f;
  p = p * s + 1.4201755821704865e-1f;
  p = p * s + -1.6623356938362122e-1f;
  p = p * s + 2.0001226663589478e-1f;
  p = p * s + -2.500081956386566e-1f;
  p = p * s + 3.333333134651184e-1f;
  const F square = s * s;
  const F y = k * kLog2High + (s + (square * (p * s - 0.5f) + k * kLog2Low));
  return pick(x == -1.0f, F{} - __builtin_inff(), y);
}

// tanh(x) = -E / (2 + E) with E = e^(-2|x|) - 1, within 2.6 ulp and 1.5e-7 (all float32 tried). NaN propagates,
// +-inf gives +-1.
template <class F>
SSD_CORE_INLINE F tanh_any(F x) {
  const auto sign = bits_of(x) & 0x80000000u;
  const F expm1 = expm1_nonpositive(-2.0f * float_of(bits_of(x) ^ sign));
  const F y = -expm1 / (2.0f + expm1);
  return float_of(bits_of(y) | sign);
}

#endif

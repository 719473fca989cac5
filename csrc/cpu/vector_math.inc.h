// exp, tanh and bfloat16 conversions for loops that the compiler vectorises: branch-free, no calls, float32 throughout.
//
// Included inside a per-ISA, anonymous namespace by the kernel units, after their target pragma. Neither this file nor
// its includer may include a standard header with inline functions: the AVX-512 unit's copy of such a function could be
// the one that the linker keeps for the whole extension, and then the baseline path runs AVX-512 instructions.

#define SSD_CORE_INLINE inline __attribute__((always_inline))

struct bfloat16 {
  uint16_t bits;
};

SSD_CORE_INLINE float to_float(float x) {
  return x;
}

SSD_CORE_INLINE float to_float(bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
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

// e^x = 2^n e^r with n = round(x log2(e)), |r| <= log(2)/2, split so that callers can subtract the 1 exactly.
struct ExpParts {
  float scale;  // 2^n
  float expm1;  // e^r - 1
};

// For -126 log(2) <= x <= 0. NaN gives NaN in expm1.
SSD_CORE_INLINE ExpParts exp_parts(float x) {
  // Adding 1.5 * 2^23 rounds to an integer, and leaves that integer in the low bits of the sum.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  // log(2) in two parts (Cody and Waite); the first has 9 significant bits, so n times it is exact.
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440054690583e-4f;
  // e^r = 1 + r + r^2 Q(r), Q a minimax polynomial (Remez on the relative error of e^r: 3.1e-9).
  float q = 1.3814467238262296e-3f;
  q = q * r + 8.368780836462975e-3f;
  q = q * r + 4.166839271783829e-2f;
  q = q * r + 1.666651964187622e-1f;
  q = q * r + 4.999999403953552e-1f;
  const uint32_t exponent = (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f800000u;
  return {__builtin_bit_cast(float, exponent), q * (r * r) + r};
}

// e^x for x <= 0, within 1.1 ulp (all float32 tried); 0 below -87.33, where results turn subnormal. NaN propagates.
SSD_CORE_INLINE float exp_nonpositive(float x) {
  const ExpParts e = exp_parts(x);
  const float y = e.scale * (1.0f + e.expm1);
  return x < -87.33f ? 0.0f : y;
}

// tanh(x) = -E / (2 + E) with E = e^(-2|x|) - 1, within 2.6 ulp and 1.5e-7 (all float32 tried). NaN propagates,
// +-inf gives +-1.
SSD_CORE_INLINE float tanh_any(float x) {
  const uint32_t sign = __builtin_bit_cast(uint32_t, x) & 0x80000000u;
  float w = -2.0f * __builtin_fabsf(x);
  w = w < -40.0f ? -40.0f : w;  // E rounds to -1 well before
  const ExpParts e = exp_parts(w);
  const float expm1 = e.scale * e.expm1 + (e.scale - 1.0f);
  const float y = -expm1 / (2.0f + expm1);
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, y) | sign);
}

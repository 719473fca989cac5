// Vectors as values, in the compilers' own extension: the same source for every instruction set. Included like
// vector_math.inc.h, which it precedes.

#define SSD_CORE_INLINE inline __attribute__((always_inline))

constexpr int kLanes = SSD_CORE_VECTOR_BYTES / 4;

using Vec = float __attribute__((vector_size(SSD_CORE_VECTOR_BYTES)));
using Bits = uint32_t __attribute__((vector_size(SSD_CORE_VECTOR_BYTES)));
using Mask = int32_t __attribute__((vector_size(SSD_CORE_VECTOR_BYTES)));

SSD_CORE_INLINE Vec load(const void* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

SSD_CORE_INLINE Bits load_bits(const void* p) {
  Bits x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class T>
SSD_CORE_INLINE void keep(void* p, T x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// One or many, by their type.
template <class F>
SSD_CORE_INLINE F at(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

SSD_CORE_INLINE Vec all_lanes(float x) {
  return x - Vec{};  // a broadcast: x - 0
}

SSD_CORE_INLINE Vec pick(Mask mask, Vec x, Vec y) {
  return mask ? x : y;
}

SSD_CORE_INLINE float pick(bool mask, float x, float y) {
  return mask ? x : y;
}

template <class F>
SSD_CORE_INLINE F larger(F x, F max) {  // max if x is NaN
  return pick(x > max, x, max);
}

SSD_CORE_INLINE Bits bits_of(Vec x) {
  return (Bits)x;
}

SSD_CORE_INLINE uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

SSD_CORE_INLINE Vec float_of(Bits x) {
  return (Vec)x;
}

SSD_CORE_INLINE float float_of(uint32_t x) {
  return __builtin_bit_cast(float, x);
}

// Kernels of row_kernels.h, included once per instruction set with SSD_CORE_ISA naming the namespace.
//
// A pass takes a row in blocks that stay in the first-level cache as float32, whatever the row's elements: load and
// maximum, then one short loop per thing wanted. Passes keep nothing but a row's scalars: a second one reads the row
// again, from the second-level cache, and computes its exponentials again, which costs less than storing them.
// Exponents are slope * (v - max v): exact differences, so a large common offset costs nothing.

namespace ssd_core::cpu {
namespace SSD_CORE_ISA {
namespace {

#include "vector_math.inc.h"

#include "divergences.inc.h"

// Float32 accumulators run over at most this many elements; float64 ones add up the blocks.
constexpr int64_t kBlock = 2048;

constexpr float kInfinity = __builtin_inff();

using Block = float[kBlock];

SSD_CORE_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// -- blocks

template <class T>
SSD_CORE_INLINE void convert(const void* data, int64_t begin, float* v, int64_t n) {
  const T* u = static_cast<const T*>(data) + begin;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    v[j] = to_float(u[j]);
  }
}

// v of columns begin to begin + n: where the row holds them just so, or else in the buffer.
const float* load(const RowView& row, int64_t begin, float* buffer, int64_t n) {
  const int64_t own = row.count < begin ? 0 : smaller(n, row.count - begin);
  switch (row.element) {
    case Element::kFloat32:
      if (own == n && row.cap_slope == 0) {
        return static_cast<const float*>(row.data) + begin;
      }
      convert<float>(row.data, begin, buffer, own);
      break;
    case Element::kBfloat16:
      convert<bfloat16>(row.data, begin, buffer, own);
      break;
    case Element::kFloat16:
      convert<float16>(row.data, begin, buffer, own);
      break;
    case Element::kFloat64:
      convert<double>(row.data, begin, buffer, own);
      break;
  }
  if (row.cap_slope != 0) {
    const float slope = row.cap_slope;
#pragma omp simd
    for (int64_t j = 0; j < own; ++j) {
      buffer[j] = tanh_any(slope * buffer[j]);
    }
  }
  for (int64_t j = own; j < n; ++j) {
    buffer[j] = -kInfinity;
  }
  return buffer;
}

// body.operator()<F>(j) for vectors of columns, and for single ones where n is no multiple of them.
template <class Body>
SSD_CORE_INLINE void each(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    body.template operator()<Vec>(j);
  }
  for (; j < n; ++j) {
    body.template operator()<float>(j);
  }
}

// A block's sum. Its lanes are added up in float64, where a large one does not swallow the small ones.
struct Sum {
  Vec lanes = {};
  float last = 0;

  SSD_CORE_INLINE void add(Vec x) { lanes += x; }
  SSD_CORE_INLINE void add(float x) { last += x; }
  SSD_CORE_INLINE double total() const {
    double total = last;
    for (int lane = 0; lane < kLanes; ++lane) {
      total += lanes[lane];
    }
    return total;
  }
};

// A NaN is passed over; it shows in the sum of exponentials. The lanes are spelt out: NaN rules keep compilers from
// vectorising a float maximum as a reduction.
float max_of(const float* v, int64_t n) {
  constexpr int kWays = 4 * kLanes;
  float max[kWays];
  for (float& lane : max) {
    lane = -kInfinity;
  }
  int64_t j = 0;
  for (; j + kWays <= n; j += kWays) {
#pragma omp simd
    for (int lane = 0; lane < kWays; ++lane) {
      max[lane] = larger(v[j + lane], max[lane]);
    }
  }
  for (; j < n; ++j) {
    max[0] = larger(v[j], max[0]);
  }
  for (int ways = kWays / 2; ways > 0; ways /= 2) {
#pragma omp simd
    for (int lane = 0; lane < ways; ++lane) {
      max[lane] = larger(max[lane + ways], max[lane]);
    }
  }
  return max[0];
}

template <class T>
SSD_CORE_INLINE void store_to(const float* g, void* data, int64_t begin, int64_t n) {
  T* out = static_cast<T*>(data) + begin;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    store(out + j, g[j]);
  }
}

// w of columns begin to begin + n; y (the probabilities) of the same, if there are any.
void load_weights(const RowWeights& weights, int64_t begin, float* w, float* y, int64_t n) {
  const float* c = weights.class_weight ? weights.class_weight + begin : nullptr;
  if (!weights.probs) {
    for (int64_t j = 0; j < n; ++j) {
      w[j] = c ? c[j] : 1.0f;
    }
    return;
  }
  const float* probs = load(*weights.probs, begin, y, n);
  for (int64_t j = 0; j < n; ++j) {
    y[j] = probs[j];
    const float t = weights.sharp * y[j] + weights.even;
    w[j] = c ? c[j] * t : t;
  }
}

// -- sums

// Exponentials are summed relative to the running maximum. When that rises, by `rise` in v, sums so far shrink.
struct Running {
  float max = -kInfinity;
  float shift = 0;  // the maximum, 0 while there is none: exp(-inf - 0) = 0
  float rise = 0;

  SSD_CORE_INLINE void raise(float top) {
    rise = 0;
    if (top > max) {
      rise = max == -kInfinity ? 0 : top - max;
      shift = max = top;
    }
  }
  SSD_CORE_INLINE double factor(float slope) const { return exp_nonpositive(-rise, slope); }
};

double sum_of(const float* x, int64_t n) {
  Sum sum;
  each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) { sum.add(at<F>(x + j)); });
  return sum.total();
}

double exp_sum(const float* v, float slope, float shift, int64_t n) {
  Sum sum;
  each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) {
    sum.add(exp_nonpositive(at<F>(v + j) - shift, slope));
  });
  return sum.total();
}

// sum_j w_j (shift - v_j)
double spread_sum(const float* w, const float* v, float shift, int64_t n) {
  Sum sum;
  each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) {
    sum.add(expected(at<F>(w + j), shift - at<F>(v + j)));
  });
  return sum.total();
}

// Entries by ascending id, a block's at a time.
struct Entries {
  TargetEntry* const entries;
  const int64_t count;
  int64_t first = 0, next = 0;

  // Those in a block are given their values.
  void find(const float* v, int64_t begin, int64_t n) {
    for (first = next; next < count && entries[next].id < begin + n; ++next) {
      entries[next].value = v[entries[next].id - begin];
    }
  }

  // The block without those of the support, which are -inf, in the buffer.
  const float* off_support(const float* v, int64_t begin, float* buffer, int64_t n) const {
    if (first == next) {
      return v;
    }
    if (v != buffer) {
      __builtin_memcpy(buffer, v, n * sizeof(float));
    }
    for (int64_t k = first; k < next; ++k) {
      if (entries[k].weight > 0) {
        buffer[entries[k].id - begin] = -kInfinity;
      }
    }
    return buffer;
  }

  // In a block that is off_support's.
  void restore(float* buffer, int64_t begin) const {
    for (int64_t k = first; k < next; ++k) {
      buffer[entries[k].id - begin] = entries[k].value;
    }
  }
};

// What both kinds of passes find of a student's block.
struct StudentSums {
  Sums found = {};
  Running running;

  SSD_CORE_INLINE void spread(const RowWeights& weights, int64_t begin, const float* v, int64_t n) {
    Block w, y;
    load_weights(weights, begin, w, y, n);
    found.row.spread += found.weight * running.rise + spread_sum(w, v, running.shift, n);
    found.weight += sum_of(w, n);
    if (weights.probs) {
      found.plain_spread += found.plain_weight * running.rise + spread_sum(y, v, running.shift, n);
      found.plain_weight += sum_of(y, n);
    }
  }
};

Sums sums(const RowView& row, const SumsQuery& query) {
  const float slope = query.slope;
  StudentSums student;
  Sums& found = student.found;
  Running& running = student.running;
  Entries entries = {query.entries, query.count};
  Block buffer;
  for (int64_t begin = 0; begin < row.count; begin += kBlock) {
    const int64_t n = smaller(kBlock, row.count - begin);
    const float* v = load(row, begin, buffer, n);
    entries.find(v, begin, n);
    if (query.off_support) {
      v = entries.off_support(v, begin, buffer, n);
    }
    const float top = max_of(v, n);
    if (query.entropy && top > running.max) {
      int64_t j = 0;
      while (v[j] != top) {
        ++j;
      }
      found.argmax = begin + j;
    }
    running.raise(top);
    const float shift = running.shift;
    if (query.entropy) {
      const double before = found.row.sum;
      const double factor = running.factor(slope);
      Sum mass, below;
      each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) {
        const F d = at<F>(v + j) - shift, e = exp_nonpositive(d, slope);
        mass.add(e);
        below.add(expected(e, -d));
      });
      found.below = factor * (found.below + slope * running.rise * before) + slope * below.total();
      found.row.sum = factor * before + mass.total();
    } else {
      found.row.sum = running.factor(slope) * found.row.sum + exp_sum(v, slope, shift, n);
    }
    if (query.other_slope != 0) {
      found.other_sum =
          running.factor(query.other_slope) * found.other_sum + exp_sum(v, query.other_slope, shift, n);
    }
    if (query.weights) {
      if (query.off_support) {
        entries.restore(buffer, begin);
      }
      student.spread(*query.weights, begin, v, n);
    }
  }
  found.row.max = running.max;
  if (query.weights && query.off_support) {  // the spread is one of the whole row, below its maximum
    float max = running.max;
    for (int64_t k = 0; k < query.count; ++k) {
      max = larger(query.entries[k].value, max);
    }
    found.row.spread += found.weight * (max - running.shift);
  }
  if (query.entropy && found.row.sum != found.row.sum) {  // a NaN is the largest
    for (int64_t begin = 0; begin < row.count; begin += kBlock) {
      const int64_t n = smaller(kBlock, row.count - begin);
      const float* v = load(row, begin, buffer, n);
      for (int64_t j = 0; j < n; ++j) {
        if (v[j] != v[j]) {
          found.argmax = begin + j;
          return found;
        }
      }
    }
  }
  return found;
}

// -- what ends a block of a gradient

// The next patch that is not behind the block: passes go through a row once.
struct Rest {
  const RowRest& rest;
  int64_t next = 0;

  // Where a block's gradient is made: in its place, if that is float32.
  SSD_CORE_INLINE float* place(int64_t begin, float* buffer) const {
    return rest.element == Element::kFloat32 ? static_cast<float*>(rest.out) + begin : buffer;
  }

  SSD_CORE_INLINE void finish(float* g, const float* v, int64_t begin, int64_t n) {
    if (rest.other) {
      const Exponential other = *rest.other;
      each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) {
        keep(g + j, at<F>(g + j) + other.factor * exp_nonpositive(at<F>(v + j) - other.max, other.slope));
      });
    }
    if (rest.weights) {
      Block w, y;
      load_weights(*rest.weights, begin, w, y, n);
      const float factor = rest.weight_factor;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        g[j] -= factor * w[j];
      }
    }
    if (rest.cap != 0) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        g[j] *= 1.0f - v[j] * v[j];
      }
    }
    for (; next < rest.patch_count && rest.patches[next].id < begin + n; ++next) {
      const RowPatch& patch = rest.patches[next];
      float& value = g[patch.id - begin];
      value = rest.patches_add ? value + patch.value : patch.value;
    }
    switch (rest.element) {
      case Element::kBfloat16:
        return store_to<bfloat16>(g, rest.out, begin, n);
      case Element::kFloat16:
        return store_to<float16>(g, rest.out, begin, n);
      default:
        return;  // it is in its place
    }
  }
};

// value(v_j) of each of a row's v, then what the rest adds.
template <class Value>
SSD_CORE_INLINE void map_row(const RowView& row, const RowRest& given, const Value& value) {
  Rest rest{given};
  Block v_buffer, g_buffer;
  for (int64_t begin = 0; begin < row.count; begin += kBlock) {
    const int64_t n = smaller(kBlock, row.count - begin);
    const float* v = load(row, begin, v_buffer, n);
    float* g = rest.place(begin, g_buffer);
    each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) { keep(g + j, value(at<F>(v + j))); });
    rest.finish(g, v, begin, n);
  }
}

void exponential(const RowView& row, const Exponential& of, const RowRest& rest) {
  const auto [slope, max, factor] = of;
  map_row(row, rest, [=](auto v) __attribute__((always_inline)) {
    return factor * exp_nonpositive(v - max, slope);
  });
}

void log_softmax(const RowView& row, float slope, float max, float log_sum, const RowRest& rest) {
  map_row(row, rest, [=](auto v) __attribute__((always_inline)) { return slope * (v - max) - log_sum; });
}

void logprob_gradient(const RowView& row, const Exponential& of, const LogprobSlope& to, const RowRest& rest) {
  const auto [slope, max, factor] = of;
  const auto [on_logprob, on_entropy, log_sum, entropy] = to;
  map_row(row, rest, [=](auto v) __attribute__((always_inline)) {
    const auto below = slope * (v - max);
    const auto q = factor * exp_nonpositive(v - max, slope);
    return -expected(q, on_logprob + on_entropy * (below - log_sum + entropy));
  });
}

// -- a teacher and a student

template <Divergence kKind>
PairSums pair_sums_of(const Pair& pair) {
  constexpr bool kForward = kKind == Divergence::kForwardKl;
  constexpr bool kCross = kKind != Divergence::kJsd;
  const float t_slope = pair.teacher_slope, s_slope = pair.student_slope;
  const int64_t count = pair.teacher.count > pair.student.count ? pair.teacher.count : pair.student.count;
  StudentSums student;
  PairSums found = {};
  Running teacher;
  Entries entries = {pair.entries, pair.count};
  Block t_buffer, s_buffer;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = smaller(kBlock, count - begin);
    const float* t = load(pair.teacher, begin, t_buffer, n);
    const float* s = load(pair.student, begin, s_buffer, n);
    teacher.raise(max_of(t, n));
    student.running.raise(max_of(s, n));
    entries.find(s, begin, n);
    const float t_shift = teacher.shift, s_shift = student.running.shift;
    const double t_factor = teacher.factor(t_slope), s_factor = student.running.factor(s_slope);
    double& t_sum = found.teacher.sum;
    double& s_sum = student.found.row.sum;
    if constexpr (kCross) {
      // The exponents' difference so far is now less by the risen maximum of the one side and more by the other's.
      const double difference = (kForward ? -1 : 1) * (t_slope * teacher.rise - s_slope * student.running.rise);
      if (found.cross != kInfinity) {
        found.cross = (kForward ? t_factor : s_factor) * (found.cross + difference * (kForward ? t_sum : s_sum));
      }
    }
    Sum t_block, s_block, cross;
    each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) {
      const F x = at<F>(t + j) - t_shift, y = at<F>(s + j) - s_shift;
      const F p = exp_nonpositive(x, t_slope), q = exp_nonpositive(y, s_slope);
      t_block.add(p);
      s_block.add(q);
      if constexpr (kCross) {
        const F log_p = t_slope * x, log_q = s_slope * y;
        cross.add(kForward ? expected(some_mass(p, log_p), log_p - log_q)
                           : expected(some_mass(q, log_q), log_q - log_p));
      }
    });
    t_sum = t_factor * t_sum + t_block.total();
    s_sum = s_factor * s_sum + s_block.total();
    found.cross += cross.total();
    if (pair.other_slope != 0) {
      student.found.other_sum = student.running.factor(pair.other_slope) * student.found.other_sum +
          exp_sum(s, pair.other_slope, s_shift, n);
    }
    const int64_t own = smaller(n, pair.student.count - begin);
    if (pair.weights && own > 0) {
      student.spread(*pair.weights, begin, s, own);
    }
  }
  found.student = student.found;
  found.student.row.max = student.running.max;
  found.teacher.max = teacher.max;
  return found;
}

PairSums pair_sums(const Pair& pair) {
  switch (pair.kind) {
    case Divergence::kForwardKl:
      return pair_sums_of<Divergence::kForwardKl>(pair);
    case Divergence::kReverseKl:
      return pair_sums_of<Divergence::kReverseKl>(pair);
    default:
      return pair_sums_of<Divergence::kJsd>(pair);
  }
}

template <class F>
struct PairElement {
  DivergenceTerm<F> term;
  F q;
};

template <Divergence kKind, class F>
SSD_CORE_INLINE PairElement<F> pair_element(
    F t, F s, float t_slope, float s_slope, const PairNorm& norm, float beta, float rest) {
  const F x = t - norm.teacher_max, y = s - norm.student_max;
  const F p = norm.teacher_factor * exp_nonpositive(x, t_slope);
  const F q = norm.student_factor * exp_nonpositive(y, s_slope);
  return {divergence_term<kKind>(p, q, t_slope * x - s_slope * y - norm.log_ratio, beta, rest), q};
}

// Of JSD, whose terms are not linear in the masses: of normalised ones.
PairTerms pair_terms(const Pair& pair, const PairNorm& given) {
  const PairNorm norm = given;
  const float t_slope = pair.teacher_slope, s_slope = pair.student_slope, beta = pair.beta, rest = pair.rest;
  const int64_t count = pair.teacher.count > pair.student.count ? pair.teacher.count : pair.student.count;
  PairTerms found = {};
  Block t_buffer, s_buffer;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = smaller(kBlock, count - begin);
    const float* t = load(pair.teacher, begin, t_buffer, n);
    const float* s = load(pair.student, begin, s_buffer, n);
    Sum value, own;
    each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) {
      const auto term =
          pair_element<Divergence::kJsd>(at<F>(t + j), at<F>(s + j), t_slope, s_slope, norm, beta, rest).term;
      value.add(term.value);
      own.add(term.pull);
    });
    found.value += value.total();
    found.own += own.total();
  }
  return found;
}

template <Divergence kKind>
void pair_gradient_of(const Pair& pair, const PairNorm& given, float factor, float own, const RowRest& to) {
  const PairNorm norm = given;
  const float t_slope = pair.teacher_slope, s_slope = pair.student_slope, beta = pair.beta, rest = pair.rest;
  Rest ending{to};
  Block t_buffer, s_buffer, g_buffer;
  for (int64_t begin = 0; begin < pair.student.count; begin += kBlock) {
    const int64_t n = smaller(kBlock, pair.student.count - begin);
    const float* t = load(pair.teacher, begin, t_buffer, n);
    const float* s = load(pair.student, begin, s_buffer, n);
    float* g = ending.place(begin, g_buffer);
    each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) {
      const auto [term, q] = pair_element<kKind>(at<F>(t + j), at<F>(s + j), t_slope, s_slope, norm, beta, rest);
      keep(g + j, factor * (term.pull - q * own));
    });
    ending.finish(g, s, begin, n);
  }
}

void pair_gradient(const Pair& pair, const PairNorm& norm, float factor, float own, const RowRest& rest) {
  switch (pair.kind) {
    case Divergence::kForwardKl:
      return pair_gradient_of<Divergence::kForwardKl>(pair, norm, factor, own, rest);
    case Divergence::kReverseKl:
      return pair_gradient_of<Divergence::kReverseKl>(pair, norm, factor, own, rest);
    default:
      return pair_gradient_of<Divergence::kJsd>(pair, norm, factor, own, rest);
  }
}

// -- a softmax's gradient

double softmax_backward_sum(const RowView& grad, const RowView& out, bool log) {
  double total = 0;
  Block g_buffer, p_buffer;
  for (int64_t begin = 0; begin < out.count; begin += kBlock) {
    const int64_t n = smaller(kBlock, out.count - begin);
    const float* g = load(grad, begin, g_buffer, n);
    if (log) {
      total += sum_of(g, n);
    } else {
      const float* p = load(out, begin, p_buffer, n);
      Sum sum;
      each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) { sum.add(at<F>(g + j) * at<F>(p + j)); });
      total += sum.total();
    }
  }
  return total;
}

void softmax_backward(
    const RowView& grad, const RowView& out, bool log, float factor, float sum, const RowRest& to) {
  Rest rest{to};
  Block g_buffer, p_buffer, d_buffer;
  for (int64_t begin = 0; begin < out.count; begin += kBlock) {
    const int64_t n = smaller(kBlock, out.count - begin);
    const float* g = load(grad, begin, g_buffer, n);
    const float* p = load(out, begin, p_buffer, n);
    float* d = rest.place(begin, d_buffer);
    if (log) {
      each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) {
        keep(d + j, factor * (at<F>(g + j) - exp_nonpositive(at<F>(p + j)) * sum));
      });
    } else {
      each(n, [&]<class F>(int64_t j) __attribute__((always_inline)) {
        keep(d + j, factor * (at<F>(p + j) * (at<F>(g + j) - sum)));
      });
    }
    rest.finish(d, p, begin, n);
  }
}

template <float (*kFunction)(float)>
void map(const float* x, float* y, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    y[j] = kFunction(x[j]);
  }
}

}  // namespace

extern const RowKernels row_kernels = {
    sums, exponential, log_softmax, logprob_gradient, pair_sums, pair_terms, pair_gradient, softmax_backward_sum,
    softmax_backward, map<exp_nonpositive<float>>, map<expm1_nonpositive<float>>, map<log1p_nonpositive<float>>,
    map<tanh_any<float>>};

}  // namespace SSD_CORE_ISA
}  // namespace ssd_core::cpu

#include "sample.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "row_access.h"

namespace ssd_core::cpu {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kSlack = 1e-12;  // of top_p, as in the definition

const SampleKernels& active_sample_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::sample_kernels;
    case Isa::kAvx2:
      return avx2::sample_kernels;
#endif
    default:
      return baseline::sample_kernels;
  }
}

// -- the order of tokens (logit descending, id ascending) as the order of integers

uint32_t ordered(float x) {
  const auto bits = std::bit_cast<uint32_t>(x + 0.0f);  // -0 equals 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float unordered(uint32_t rank) {
  return std::bit_cast<float>(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}

// A larger key is a token that comes earlier.
uint64_t key_of(float value, int64_t id) {
  return static_cast<uint64_t>(ordered(value)) << 32 | static_cast<uint32_t>(~id);
}

// Below the keys of all tokens with this logit, above those of all lesser ones.
uint64_t below_keys(float value) {
  return static_cast<uint64_t>(ordered(value)) << 32;
}

float value_of(uint64_t key) {
  return unordered(static_cast<uint32_t>(key >> 32));
}

int32_t id_of(uint64_t key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

// The least float up to max of which `holds` says yes, as it does from there on.
template <class Predicate>
float least(float max, const Predicate& holds) {
  uint32_t no = ordered(-kInfinity) - 1, yes = ordered(max);
  while (yes - no > 1) {
    const uint32_t middle = no + (yes - no) / 2;
    (holds(unordered(middle)) ? yes : no) = middle;
  }
  return unordered(yes);
}

// A factor of differences of logits: neither 0 nor infinity, which give NaN with the other.
float within_float32(double factor) {
  return static_cast<float>(std::clamp(factor, double{std::numeric_limits<float>::min()}, 1e30));
}

// -- noise

// Exp(1) noise of a token: -log1p(-v), v = (x + 1/2) 2^-64, x the first two words of Philox4x32-10.
double exponential(uint64_t seed, uint64_t position, uint32_t id) {
  uint32_t c0 = position, c1 = position >> 32, c2 = id, c3 = 0, k0 = seed, k1 = seed >> 32;
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xd2511f53u, p1 = static_cast<uint64_t>(c2) * 0xcd9e8d57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = p1;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = p0;
  }
  const double v = c1 * 0x1p-32 + (c0 + 0.5) * 0x1p-64;
  return -std::log1p(-std::min(v, 1 - 0x1p-53));
}

// -- one row

struct Options {
  int64_t vocab;
  double temperature;
  int64_t top_k;
  double top_p;
  double min_p;
  int64_t support_limit;
};

struct Draw {
  int64_t token;
  float logprob, sampling_logprob, kept_mass, entropy;
};

// Draws from one row after another; a thread's workspace.
class RowSampler {
 public:
  RowSampler(const SampleKernels& kernels, const Options& options)
      : kernels_(kernels),
        options_(options),
        slope_(within_float32(1 / options.temperature)),
        factor_(std::min(1 / options.temperature, 1e300)),
        block_max_((options.vocab + kSampleBlock - 1) / kSampleBlock) {}

  // How many tokens its support has, 0 if the row has no distribution. ids, probs: (support_limit,), filled that far.
  int64_t draw(const float* logits, uint64_t seed, uint64_t position, Draw& draw, int32_t* ids, float* probs) {
    logits_ = logits;
    sums_ = kernels_.sums(logits, options_.vocab, options_.temperature > 0 ? slope_ : 1.0f, block_max_.data());
    if (!std::isfinite(sums_.max) || std::isnan(sums_.sum)) {
      return 0;
    }
    draw.entropy = static_cast<float>(std::log(sums_.sum) + sums_.spread / sums_.sum);
    if (options_.temperature == 0) {
      gather(below_keys(-kInfinity), 1);
      draw.token = ids[0] = id_of(keys_[0]);
      probs[0] = draw.kept_mass = 1;
      draw.sampling_logprob = 0;
      draw.logprob = static_cast<float>(-std::log(sums_.sum));
      return 1;
    }

    const int64_t heavy = keep();
    const std::span<const uint64_t> support(keys_.data(), heavy);
    const uint64_t token = winner(support, seed, position);
    const int64_t recorded = record(support, token, ids, probs);
    draw.token = id_of(token);
    draw.logprob = static_cast<float>(double{value_of(token)} - sums_.max - std::log(sums_.sum));
    draw.sampling_logprob = static_cast<float>(tempered(value_of(token)) - std::log(kept_));
    draw.kept_mass = static_cast<float>(std::min(kept_ / total_, 1.0));
    return recorded;
  }

 private:
  double tempered(float value) const {
    return (double{value} - sums_.max) / options_.temperature;
  }

  double weight(float value) const {
    return std::exp(tempered(value));
  }

  double weight(std::span<const uint64_t> keys) const {
    double sum = 0;
    for (const uint64_t key : keys) {
      sum += weight(value_of(key));
    }
    return sum;
  }

  // keys_: those of the row above `bound`, and of these the `most` largest; in no order.
  void gather(uint64_t bound, int64_t most) {
    const auto blocks = static_cast<int64_t>(block_max_.size());
    if (most <= blocks) {  // as many tokens reach the most-th largest maximum
      ranks_ = block_max_;
      std::nth_element(ranks_.begin(), ranks_.begin() + (most - 1), ranks_.end(), std::greater<>());
      bound = std::max(bound, below_keys(ranks_[most - 1]));
    }
    const auto room = static_cast<size_t>(2 * most + 16 * kSampleBlock);
    keys_.clear();
    keys_.reserve(std::min(room + kSampleBlock, static_cast<size_t>(options_.vocab)));  // only what is used is touched
    for (int64_t block = 0; block < blocks; ++block) {
      const float threshold = value_of(bound);
      if (block_max_[block] < threshold) {
        continue;
      }
      const int64_t begin = block * kSampleBlock, length = std::min(kSampleBlock, options_.vocab - begin);
      int32_t found[kSampleBlock + 16];
      const int count = kernels_.reaching(logits_ + begin, length, threshold, static_cast<int32_t>(begin), found);
      const size_t before = keys_.size();
      keys_.resize(before + count);
      uint64_t* end = keys_.data() + before;
      for (int i = 0; i < count; ++i) {
        *end = key_of(logits_[found[i]], found[i]);
        end += *end > bound;  // ties with the last of the largest so far are too late
      }
      keys_.resize(end - keys_.data());
      if (keys_.size() > room) {
        shrink(most);
        bound = keys_[most - 1];
      }
    }
    if (keys_.size() > static_cast<size_t>(most)) {
      shrink(most);
    }
  }

  // Leaves the `most` largest keys, the least of them last.
  void shrink(int64_t most) {
    std::nth_element(keys_.begin(), keys_.begin() + (most - 1), keys_.end(), std::greater<>());
    keys_.resize(most);
  }

  // What is kept: keys_, of which as many as are recorded come first in order; returns how many. Without truncation
  // (whole_) everything is kept, and keys_ holds the heaviest only.
  int64_t keep() {
    const float floor = least(sums_.max, [&](float value) {
      const double w = weight(value);
      return w > 0 && w >= options_.min_p;
    });
    whole_ = options_.top_k == 0 && options_.top_p == 1 && options_.min_p == 0;
    total_ = sums_.tempered;
    const uint64_t bound = below_keys(floor);
    if (options_.top_p < 1) {
      options_.top_k ? top_p_of_top_k() : top_p_of_all();
      std::erase_if(keys_, [=](uint64_t key) { return key < bound; });
    } else {
      gather(bound, whole_ ? options_.support_limit : options_.top_k ? options_.top_k : options_.vocab);
    }
    const auto count = static_cast<int64_t>(keys_.size()), heavy = std::min(count, options_.support_limit);
    std::partial_sort(keys_.begin(), keys_.begin() + heavy, keys_.end(), std::greater<>());
    return heavy;
  }

  void top_p_of_top_k() {
    gather(below_keys(-kInfinity), options_.top_k);
    cut(0, 0.0, (options_.top_p - kSlack) * weight(keys_));
  }

  // By bins of the logits: all of what lies above the bin that reaches the mass is kept, and some of that bin.
  void top_p_of_all() {
    // What weighs less than this is not kept even if all of the vocabulary does: the bins need not go farther.
    const double lightest = (1 - options_.top_p) * (1 - 1e-3) * sums_.tempered / options_.vocab;
    const float bin_scale = within_float32(kMassBins / (-std::log(lightest) * options_.temperature));
    double by_bin[kMassBins];
    kernels_.masses(logits_, options_.vocab, sums_.max, factor_, bin_scale, by_bin);
    total_ = 0;
    for (const double mass : by_bin) {
      total_ += mass;
    }
    const double target = (options_.top_p - kSlack) * total_;
    double ahead = 0;
    int last = 0;
    while (last < kMassBins - 1 && ahead + by_bin[last] < target) {
      ahead += by_bin[last++];
    }
    const auto reaches = [&](int bin) {
      return [=, this](float value) { return kernels_.bin(value, sums_.max, bin_scale) <= bin; };
    };
    gather(below_keys(least(sums_.max, reaches(last))), options_.vocab);
    size_t sure = 0;
    if (last > 0) {
      const uint64_t bound = below_keys(least(sums_.max, reaches(last - 1)));
      sure = std::partition(keys_.begin(), keys_.end(), [=](uint64_t key) { return key > bound; }) - keys_.begin();
    }
    cut(sure, ahead, target);
  }

  // Keeps the first `sure` keys, whose mass is `ahead`, and of the others those that less than `target` lies ahead of;
  // one at least. By halves, so that nothing is sorted but the last few.
  void cut(size_t sure, double ahead, double target) {
    const auto at = [&](size_t place) { return keys_.begin() + place; };
    size_t begin = sure, end = keys_.size();
    while (end - begin > 64) {
      const size_t middle = begin + (end - begin) / 2;
      std::nth_element(at(begin), at(middle), at(end), std::greater<>());
      const double mass = weight({at(begin), at(middle)});
      if (ahead + mass < target) {
        ahead += mass;
        begin = middle;
      } else {
        end = middle;
      }
    }
    std::sort(at(begin), at(end), std::greater<>());
    while (begin < end && ahead < target) {
      ahead += weight(value_of(keys_[begin++]));
    }
    keys_.resize(std::max<size_t>(begin, 1));
  }

  // function(values, ids, count) for one part of keys_ after the other, from `begin` on.
  template <class Function>
  void each_part(int64_t begin, const Function& function) const {
    constexpr int64_t kPart = 2048;
    float values[kPart];
    int32_t ids[kPart];
    for (const int64_t end = std::ssize(keys_); begin < end; begin += kPart) {
      const int64_t count = std::min(kPart, end - begin);
      for (int64_t i = 0; i < count; ++i) {
        values[i] = value_of(keys_[begin + i]);
        ids[i] = id_of(keys_[begin + i]);
      }
      function(values, ids, count);
    }
  }

  // The token of the highest score, and kept_. Noise of all that is kept is drawn, but only what can still win needs
  // logarithms.
  uint64_t winner(std::span<const uint64_t> support, uint64_t seed, uint64_t position) {
    double best = -std::numeric_limits<double>::infinity();
    uint64_t token = 0;
    const auto consider = [&](uint64_t key) {
      const double score = tempered(value_of(key)) - std::log(exponential(seed, position, id_of(key)));
      if (score > best || (score == best && id_of(key) < id_of(token))) {
        best = score;
        token = key;
      }
    };
    std::for_each(support.begin(), support.end(), consider);

    const auto consider_all = [&](const float* values, const int32_t* ids, int64_t count) {
      const Rivals rivals{values, ids, count, sums_.max, slope_, seed, position};
      const auto next = [&](int64_t j) {
        return kernels_.next_rival(rivals, j, static_cast<float>(std::exp(-best) * (1 + 1e-4)));
      };
      for (int64_t j = next(0); j < count; j = next(j + 1)) {
        consider(key_of(values[j], ids ? ids[j] : j));
      }
    };
    if (whole_) {
      kept_ = sums_.tempered;
      consider_all(logits_, nullptr, options_.vocab);
    } else {
      kept_ = weight(support);
      each_part(std::ssize(support), [&](const float* values, const int32_t* ids, int64_t count) {
        kept_ += kernels_.mass(values, count, sums_.max, factor_);
        consider_all(values, ids, count);
      });
    }
    return token;
  }

  // The soft target: what is kept, or its heaviest if the token is among them, or else the token alone.
  int64_t record(std::span<const uint64_t> support, uint64_t token, int32_t* ids, float* probs) const {
    if (std::find(support.begin(), support.end(), token) == support.end()) {
      ids[0] = id_of(token);
      probs[0] = 1;
      return 1;
    }
    const double mass = weight(support);
    int64_t count = 0;
    for (; count < std::ssize(support); ++count) {
      const auto prob = static_cast<float>(weight(value_of(support[count])) / mass);
      if (prob == 0) {  // so are all that follow
        break;
      }
      ids[count] = id_of(support[count]);
      probs[count] = prob;
    }
    return count;
  }

  const SampleKernels& kernels_;
  const Options& options_;
  const float slope_;    // 1 / temperature, in float32's range
  const double factor_;  // the same in float64's
  std::vector<float> block_max_, ranks_;
  std::vector<uint64_t> keys_;
  const float* logits_ = nullptr;
  SampleSums sums_{};
  double kept_ = 0, total_ = 0;  // masses of the kept and of all
  bool whole_ = false;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sample(
    const at::Tensor& logits,
    const at::Tensor& seeds,
    const at::Tensor& positions,
    double temperature,
    int64_t top_k,
    double top_p,
    double min_p,
    int64_t support_limit) {
  const at::ScalarType dtype = logits.scalar_type();
  check_rows("logits", logits, false);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  TORCH_CHECK(
      vocab <= std::numeric_limits<int32_t>::max(), "logits: expected at most 2^31 - 1 columns, got ", vocab);
  for (const auto& [name, x] : {std::pair{"seeds", seeds}, std::pair{"positions", positions}}) {
    TORCH_CHECK(
        x.device().is_cpu() && x.scalar_type() == at::kLong && x.sizes() == at::IntArrayRef{rows},
        name, ": expected a CPU tensor of Long, shape [", rows, "], got ", x.toString(), " ", x.sizes());
  }
  TORCH_CHECK(top_k >= 0 && top_k <= vocab, "top_k: expected 0 to V = ", vocab, ", got ", top_k);
  TORCH_CHECK(support_limit > 0, "support_limit: expected at least 1, got ", support_limit);
  const Options options{vocab, temperature, top_k, top_p, min_p, std::min(support_limit, vocab)};

  const auto floats = logits.options().dtype(at::kFloat);
  const at::Tensor token = at::empty({rows}, floats.dtype(at::kLong));
  const at::Tensor stats = at::empty({4, rows}, floats);
  const at::Tensor ids = at::zeros({rows, options.support_limit}, floats.dtype(at::kInt));
  const at::Tensor probs = at::zeros({rows, options.support_limit}, floats);
  auto* token_data = token.mutable_data_ptr<int64_t>();
  auto* stats_data = stats.mutable_data_ptr<float>();
  auto* ids_data = ids.mutable_data_ptr<int32_t>();
  auto* probs_data = probs.mutable_data_ptr<float>();
  const at::Tensor seeds_c = seeds.contiguous(), positions_c = positions.contiguous();
  const auto* seed_data = seeds_c.const_data_ptr<int64_t>();
  const auto* position_data = positions_c.const_data_ptr<int64_t>();

  const SampleKernels& kernels = active_sample_kernels();
  const auto widen = dtype == at::kBFloat16 ? kernels.widen_bfloat16 : kernels.widen_float16;
  std::vector<int64_t> counts(rows);
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / vocab), [&](int64_t begin, int64_t end) {
    RowSampler sampler(kernels, options);
    RowReader read(logits, 0, end);
    std::vector<float> wide(dtype == at::kFloat ? 0 : vocab);
    for (int64_t i = begin; i < end; ++i) {
      const void* row = read(i).data;
      if (dtype != at::kFloat) {
        widen(row, vocab, wide.data());
      }
      const float* values = dtype == at::kFloat ? static_cast<const float*>(row) : wide.data();
      Draw draw{};
      const int64_t at = i * options.support_limit;
      counts[i] = sampler.draw(values, seed_data[i], position_data[i], draw, ids_data + at, probs_data + at);
      token_data[i] = draw.token;
      stats_data[i] = draw.logprob;
      stats_data[rows + i] = draw.sampling_logprob;
      stats_data[2 * rows + i] = draw.kept_mass;
      stats_data[3 * rows + i] = draw.entropy;
    }
  });
  const auto [fewest, most] = std::minmax_element(counts.begin(), counts.end());
  if (rows > 0 && *fewest == 0) {
    throw std::invalid_argument(
        "logits: expected finite values or -inf, with a finite maximum, got NaN or inf");
  }
  const int64_t width = rows > 0 ? *most : 0;
  return {token, stats[0], stats[1], stats[2], stats[3], ids.narrow(1, 0, width), probs.narrow(1, 0, width)};
}

}  // namespace ssd_core::cpu

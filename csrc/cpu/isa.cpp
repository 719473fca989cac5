#include "isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>

namespace ssd_core::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<Isa> compiled_isas() {
#if defined(__x86_64__)
  return {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};
#else
  return {Isa::kBaseline};
#endif
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  // The lists name what the target pragmas of the kernels_*.cpp units enable.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    default:
      return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

namespace {

// Whether it is faster than the level below. Intel's cores multiply pairs of bfloat16 at half the rate of float32 (Emerald
// Rapids: 81 against 166 GFLOP/s a core), AMD's at twice the rate.
bool isa_pays(Isa isa) {
#if defined(__x86_64__)
  return isa != Isa::kAvx512Bf16 || !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

Isa select_isa() {
  const char* variable = std::getenv("SSD_CORE_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string supported;
  Isa best = Isa::kBaseline;
  for (const Isa isa : compiled_isas()) {
    if (!isa_supported(isa)) {
      continue;
    }
    if (wanted == isa_name(isa)) {
      return isa;
    }
    supported += std::string(supported.empty() ? "" : ", ") + isa_name(isa);
    best = isa_pays(isa) ? isa : best;
  }
  TORCH_CHECK(
      wanted.empty(), "SSD_CORE_CPU_ISA: expected one of {", supported, "} on this machine, got '", wanted, "'");
  return best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = select_isa();  // an exception leaves it unset: every call says what is wrong
  return isa;
}

}  // namespace ssd_core::cpu

#pragma once

#include <string>
#include <vector>

namespace ssd_core::cpu {

// Instruction-set levels, weakest first. Every kernel is compiled once per level.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

const char* isa_name(Isa isa);
std::vector<Isa> compiled_isas();  // what this build contains on this architecture
bool isa_supported(Isa isa);       // whether this machine runs it

// The fastest supported level, or the one that SSD_CORE_CPU_ISA names; read once, at first use.
// Throws when the variable names an unknown or unsupported level.
Isa active_isa();

}  // namespace ssd_core::cpu

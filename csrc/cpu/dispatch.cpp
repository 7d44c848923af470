#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "isa/isa.h"

namespace m3oe {
namespace {

// __builtin_cpu_supports reads cpuid and, through xgetbv, whether the operating system saves the registers.
std::vector<const Isa*> runnable() {
  std::vector<const Isa*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    sets.push_back(&isa_avx512());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&isa_avx2());
#endif
  sets.push_back(&isa_scalar());
  return sets;
}

const Isa& choose() {
  const std::vector<const Isa*> sets = runnable();
  const char* forced = std::getenv("M3OE_FAST_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return *sets.front();
  std::string names;
  for (const Isa* isa : sets) {
    if (std::string(isa->name) == forced) return *isa;
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw std::runtime_error("M3OE_FAST_CPU_ISA=" + std::string(forced) + " cannot run here; this processor offers " +
                           names);
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : runnable()) names.emplace_back(isa->name);
  return names;
}

const Isa& active_isa() {
  static const Isa& isa = choose();
  return isa;
}

template <>
const NetworkKernels<float>& active_kernels<float>() {
  return active_isa().network;
}

template <>
const NetworkKernels<double>& active_kernels<double>() {
  return network_kernels_double();
}

}  // namespace m3oe

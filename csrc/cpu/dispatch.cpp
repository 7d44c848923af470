#include "dispatch.h"

#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "isa/isa.h"

namespace m3oe {
namespace {

// Whether the set computes: iterates acc = 0.999 acc + 0.5 from acc = 0, 1, 2, ... and compares with the closed form.
bool self_test(const Isa& isa) {
  constexpr int64_t kIterations = 16;
  float sum = 0.5f;
  const int64_t flops = isa.fma_burst(kIterations, &sum);
  const int64_t lanes = isa.network.lanes;
  const int64_t chains = flops / (kIterations * lanes * 2);
  double expected = 0;
  for (int64_t chain = 0; chain < chains; ++chain) {
    double acc = static_cast<double>(chain);
    for (int64_t i = 0; i < kIterations; ++i) acc = acc * 0.999 + 0.5;
    expected += acc * static_cast<double>(lanes);
  }
  return std::abs(sum - expected) < 1e-4 * expected;
}

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
  std::erase_if(sets, [](const Isa* isa) { return !self_test(*isa); });
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

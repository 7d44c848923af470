#include "dispatch.h"

#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "isa/isa.h"
#include "tiles.h"

namespace m3oe {
namespace {

// Whether the set computes: iterates acc = 0.999 acc + 0.5 from acc = 0, 1, 2, ... and compares with the closed form.
bool self_test(const Isa& isa) {
  constexpr int64_t kIterations = 16;
  float sum = 0.5f;
  const int64_t flops = isa.fma_burst(kIterations, &sum);
  const int64_t lanes = isa.fp32.lanes;
  const int64_t chains = flops / (kIterations * lanes * 2);
  double expected = 0;
  for (int64_t chain = 0; chain < chains; ++chain) {
    double acc = static_cast<double>(chain);
    for (int64_t i = 0; i < kIterations; ++i) acc = acc * 0.999 + 0.5;
    expected += acc * static_cast<double>(lanes);
  }
  return std::abs(sum - expected) < 1e-4 * expected;
}

#if defined(__x86_64__)
bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// vdpbf16ps issues as often as a multiply-add on AMD, at half that rate on Intel: there fp32 is as fast without
// rounding.
bool has_fast_dot() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"); }
#endif

// The sets this process can run, best first. __builtin_cpu_supports reads cpuid and, through xgetbv, whether the
// operating system saves the registers; tiles need its permission besides.
std::vector<const Isa*> runnable() {
  std::vector<const Isa*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (supports_avx512() && __builtin_cpu_supports("avx512bf16") && tiles_permitted()) sets.push_back(&isa_amx());
  if (supports_avx512() && has_fast_dot()) sets.push_back(&isa_avx512_bf16());
  if (supports_avx512()) sets.push_back(&isa_avx512());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&isa_avx2());
#endif
  std::erase_if(sets, [](const Isa* isa) { return !self_test(*isa); });
  sets.push_back(&isa_scalar());
  return sets;
}

// Sets that run only where M3OE_FAST_CPU_ISA names them: they serve tests, not speed.
std::vector<const Isa*> on_request() {
  std::vector<const Isa*> sets;
#if defined(__x86_64__)
  if (supports_avx512() && __builtin_cpu_supports("avx512bf16")) sets.push_back(&isa_amx_emulated());
#endif
  return sets;
}

const Isa& choose() {
  const std::vector<const Isa*> sets = runnable();
  const char* forced = std::getenv("M3OE_FAST_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return *sets.front();
  for (const Isa* isa : on_request()) {
    if (std::string(isa->name) == forced) return *isa;
  }
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

bool computes_in(Precision precision) {
  const Isa& isa = active_isa();
  if (precision == Precision::kFp32) return true;
  return (precision == Precision::kBf16 ? isa.bf16 : isa.bf16x3).tile_forward != nullptr;
}

template <>
const NetworkKernels<float>& active_kernels<float>(Precision precision) {
  const Isa& isa = active_isa();
  if (precision == Precision::kFp32 || !computes_in(precision)) return isa.fp32;
  return precision == Precision::kBf16 ? isa.bf16 : isa.bf16x3;
}

template <>
const NetworkKernels<double>& active_kernels<double>(Precision) {
  return network_kernels_double();
}

}  // namespace m3oe

// A burst of independent fused multiply-adds in registers: the floating-point peak that benchmarks divide by.
#pragma once

#include <cstdint>

namespace m3oe {
namespace {

// Runs `iterations` steps of kChains multiply-adds and returns their FLOPs; `sink` keeps the result alive.
template <class S, int kChains>
int64_t fma_burst(int64_t iterations, float* sink) {
  typename S::Reg acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = S::set1(static_cast<float>(i));
  const auto a = S::set1(0.999f);
  const auto b = S::set1(*sink);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 32  // or gcc keeps the chains in memory and measures half the peak
    for (int i = 0; i < kChains; ++i) acc[i] = S::fma(acc[i], a, b);
  }
  for (int i = 1; i < kChains; ++i) acc[0] = S::add(acc[0], acc[i]);
  *sink = S::sum(acc[0]);
  return iterations * kChains * S::kLanes * 2;
}

}  // namespace
}  // namespace m3oe

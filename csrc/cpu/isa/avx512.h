// 16 floats a vector (AVX-512 F, BW, DQ, VL); shared by the sets that build on it. Register blocks of 6 rows x 64
// columns (24 accumulators). Only for files compiled with those flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "exp.h"

namespace m3oe {
namespace {

struct Avx512 {
  using T = float;
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kPanelVectors = 4;
  static constexpr int kNormRows = 4;
  static constexpr float kInfinity = __builtin_inff();
  // Accumulators stay below 32 registers, with room for NV vectors of B and one broadcast.
  static constexpr int block_rows(int vectors) { return vectors >= 4 ? 6 : vectors == 3 ? 8 : 12; }

  static Reg load(const T* p) { return _mm512_loadu_ps(p); }
  static void store(T* p, Reg v) { _mm512_storeu_ps(p, v); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(T v) { return _mm512_set1_ps(v); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  // max returns its second operand for a NaN, so NaN passes through as in PyTorch.
  static Reg relu(Reg v) { return _mm512_max_ps(zero(), v); }
  static Reg where_positive(Reg condition, Reg v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, zero(), _CMP_NLE_UQ), v);
  }
  static T sum(Reg v) { return _mm512_reduce_add_ps(v); }
  // The sums of R vectors, up to four; four together take half the shuffles of four times one. The order of the
  // additions is the same for any R: a row's result must not depend on how many rows are summed with it.
  template <int R>
  static void sums(const Reg (&v)[R], T* to) {
    static_assert(R <= 4);
    const auto half = [&](int i) { return i < R ? halves(v[i]) : _mm256_setzero_ps(); };
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half(0), half(1)), _mm256_hadd_ps(half(2), half(3)));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_mask_storeu_ps(to, (1 << R) - 1, four);
  }
  static __m256 halves(Reg v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
  static T sqrt(T v) { return __builtin_sqrtf(v); }

  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg round(Reg v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // v * 2^n for whole n.
  static Reg scale(Reg v, Reg n) { return _mm512_scalef_ps(v, n); }
  static Reg exp(Reg v) { return exp_by_parts<Avx512>(v); }
};

}  // namespace
}  // namespace m3oe

// AVX2 with FMA: 8 floats a vector, register blocks of 6 rows x 16 columns (12 accumulators).
// Compiled with its own flags; nothing here may be inlined elsewhere.
#include <immintrin.h>

#include "../engine/fma.h"
#include "../network_kernel.h"
#include "exp.h"
#include "isa.h"
#include "peak.h"

namespace m3oe {
namespace {

struct Avx2 {
  using T = float;
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kPanelVectors = 2;
  static constexpr int kNormRows = 2;
  static constexpr float kInfinity = __builtin_inff();
  static constexpr int block_rows(int vectors) { return vectors >= 2 ? 6 : 10; }

  static Reg load(const T* p) { return _mm256_loadu_ps(p); }
  static void store(T* p, Reg v) { _mm256_storeu_ps(p, v); }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(T v) { return _mm256_set1_ps(v); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  // max returns its second operand for a NaN, so NaN passes through as in PyTorch.
  static Reg relu(Reg v) { return _mm256_max_ps(zero(), v); }
  static Reg where_positive(Reg condition, Reg v) {
    return _mm256_and_ps(_mm256_cmp_ps(condition, zero(), _CMP_NLE_UQ), v);
  }
  static T sum(Reg v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  template <int R>
  static void sums(const Reg (&v)[R], T* to) {
    for (int i = 0; i < R; ++i) to[i] = sum(v[i]);
  }
  static T sqrt(T v) { return __builtin_sqrtf(v); }

  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg round(Reg v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // v * 2^n for whole n in the range of normal exponents.
  static Reg scale(Reg v, Reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static Reg exp(Reg v) { return exp_by_parts<Avx2>(v); }
};

}  // namespace

const Isa& isa_avx2() {
  static constexpr Isa kIsa{"avx2", network_kernels<FmaEngine<Avx2>>(), {}, {}, &fma_burst<Avx2, 12>};
  return kIsa;
}

}  // namespace m3oe

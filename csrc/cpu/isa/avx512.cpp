// AVX-512 (F, BW, DQ, VL): 16 floats a vector, register blocks of 6 rows x 64 columns (24 accumulators).
// Compiled with its own flags; nothing here may be inlined elsewhere.
#include <immintrin.h>

#include "../network_kernel.h"
#include "isa.h"
#include "peak.h"

namespace m3oe {
namespace {

struct Avx512 {
  using T = float;
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kPanelVectors = 4;
  static constexpr float kInfinity = __builtin_inff();
  // Accumulators stay below 32 registers, with room for NV vectors of B and one broadcast.
  static constexpr int block_rows(int vectors) { return vectors >= 4 ? 6 : vectors == 3 ? 8 : 12; }

  static Reg load(const T* p) { return _mm512_loadu_ps(p); }
  static void store(T* p, Reg v) { _mm512_storeu_ps(p, v); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(T v) { return _mm512_set1_ps(v); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  // max returns its second operand for a NaN, so NaN passes through as in PyTorch.
  static Reg relu(Reg v) { return _mm512_max_ps(zero(), v); }
  static Reg where_positive(Reg condition, Reg v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, zero(), _CMP_NLE_UQ), v);
  }
  static T sum(Reg v) { return _mm512_reduce_add_ps(v); }
  static T sqrt(T v) { return __builtin_sqrtf(v); }

  // exp by 2^n * p(r), |r| <= ln(2) / 2; polynomial of degree 6, about 1 ulp. NaN stays NaN.
  static Reg exp(Reg v) {
    v = _mm512_min_ps(set1(88.0f), _mm512_max_ps(set1(-87.3f), v));
    const Reg n = _mm512_roundscale_ps(_mm512_mul_ps(v, set1(1.44269504088896341f)),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Reg r = _mm512_fnmadd_ps(n, set1(0.693359375f), v);
    r = _mm512_fnmadd_ps(n, set1(-2.12194440e-4f), r);
    Reg p = set1(1.3888889e-3f);
    p = fma(p, r, set1(8.3333333e-3f));
    p = fma(p, r, set1(4.1666667e-2f));
    p = fma(p, r, set1(1.6666667e-1f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return _mm512_scalef_ps(p, n);
  }
};

}  // namespace

const Isa& isa_avx512() {
  static constexpr Isa kIsa{"avx512", network_kernels<Avx512>(), &fma_burst<Avx512, 24>};
  return kIsa;
}

}  // namespace m3oe

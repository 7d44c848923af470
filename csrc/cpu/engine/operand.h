// fp32 rows to words of two bf16, for the engines that multiply those (AVX512-BF16 instructions; see OperandFormat).
//
// Two arrangements. Rows: words [rows][k / 2], pairs along k, what a product reads on its left. Row pairs: words
// [rows / 2][n], word j of pair m holding column j of rows 2m and 2m + 1, what a sum over rows reads. Memory traffic:
// 4 bytes read and 2 (bf16x3: 4) written per element, within the first two cache levels.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace m3oe {
namespace {

// What rounding to bf16 leaves, itself to be rounded to bf16.
inline __m512 rounding_error(__m512 v) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  return _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
}

// bf16 of the 16 elements of `first`, then of `second`.
inline __m512i round_two(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}

// a [rows][k] -> words [rows][ld], zeros up to the next 32 elements of k. kLow: also the low parts, `low` words on.
template <bool kLow>
inline void words_of_rows(int64_t rows, int64_t k, const float* a, int64_t lda, float* words, int64_t ld, int64_t low) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = a + i * lda;
    float* to = words + i * ld;
    for (int64_t j = 0; j < k; j += 32) {
      // Beyond k a tile buffer may hold anything, and zero times NaN is NaN.
      const __m512 v0 = _mm512_maskz_loadu_ps(first_lanes(k - j), row + j);
      const __m512 v1 = _mm512_maskz_loadu_ps(first_lanes(k - j - 16), row + j + 16);
      _mm512_storeu_si512(to + j / 2, round_two(v0, v1));
      if constexpr (kLow) {
        _mm512_storeu_si512(to + j / 2 + low, round_two(rounding_error(v0), rounding_error(v1)));
      }
    }
  }
}

// a [rows][n_pad] -> words [pairs][ld] for whole vectors of columns, zeros for rows beyond `rows`. kLow as above.
template <bool kLow>
inline void words_of_pairs(int64_t rows, int64_t pairs, int64_t n_pad, const float* a, int64_t lda, float* words,
                           int64_t ld, int64_t low) {
  // Lane 2j takes bf16 j of the first row, lane 2j + 1 that of the second.
  alignas(64) static constexpr int16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  for (int64_t m = 0; m < pairs; ++m) {
    const __mmask16 has_first = 2 * m < rows ? 0xffff : 0;
    const __mmask16 has_second = 2 * m + 1 < rows ? 0xffff : 0;
    const float* first = a + 2 * m * lda;
    float* to = words + m * ld;
    for (int64_t j = 0; j < n_pad; j += 16) {
      const __m512 v0 = _mm512_maskz_loadu_ps(has_first, first + j);
      const __m512 v1 = _mm512_maskz_loadu_ps(has_second, first + lda + j);
      _mm512_storeu_si512(to + j, _mm512_permutexvar_epi16(interleave, round_two(v0, v1)));
      if constexpr (kLow) {
        _mm512_storeu_si512(to + j + low,
                            _mm512_permutexvar_epi16(interleave, round_two(rounding_error(v0), rounding_error(v1))));
      }
    }
  }
}

}  // namespace
}  // namespace m3oe

// The engine of AVX512-BF16 dot products: vdpbf16ps adds the two products of a pair of bf16 to an fp32 accumulator.
//
// Same register blocks and traffic as the fp32 engine (gemm_kernel.h) with a word of two bf16 in place of an element,
// so half the steps and half the bytes. Pays where vdpbf16ps issues as often as a multiply-add: AMD since Zen 4, not
// Intel, where it is half as fast as fp32 (dispatch.cpp asks for the vendor).
#pragma once

#include <immintrin.h>

#include "../gemm_kernel.h"
#include "../isa/avx512.h"
#include "operand.h"

namespace m3oe {
namespace {

// Multiplies words of two bf16; loads and broadcasts move their bits untouched.
struct DotWords : Avx512 {
  static Reg fma(Reg a, Reg b, Reg c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

struct DotEngine {
  using S = Avx512;
  using T = float;
  static constexpr OperandFormat kFormat{Operand::kBf16, 2, 1, 96};

  struct Session {};

  static constexpr int64_t kChunk = 12;

  struct Left {
    const float* words;
    int64_t ld, k;  // in words
    Left from(int64_t row) const { return {words + row * ld, ld, k}; }
  };

  struct Across {
    const float* words;
    int64_t ld, k, pairs;
  };

  static Left left(int64_t rows, int64_t k, const float* a, int64_t lda, float* room) {
    const int64_t ld = round_up(k, 32) / 2;
    words_of_rows<false>(rows, k, a, lda, room, ld, 0);
    return {room, ld, round_up(k, 2) / 2};
  }

  template <Init kInit>
  static void product(int64_t rows, const Left& a, int64_t n_pad, const float* packed, float* c, int64_t ldc,
                      const float* bias = nullptr, Part part = {}) {
    gemm<DotWords, kInit>(rows, a.k, n_pad, a.words, a.ld, packed, c, ldc, bias, part);
  }

  static Across across(int64_t rows, int64_t k, const float* a, int64_t lda, float* room) {
    const int64_t pairs = round_up(rows, 2) / 2;
    const int64_t ld = round_up(k, 16);
    words_of_pairs<false>(rows, pairs, ld, a, lda, room, ld, 0);
    return {room, ld, k, pairs};
  }

  static void outer(int64_t rows, const Across& a, int64_t n_pad, const float* b, int64_t ldb, float* c, int64_t ldc,
                    float* room) {
    words_of_pairs<false>(rows, a.pairs, n_pad, b, ldb, room, n_pad, 0);
    gemm_tn<DotWords>(a.pairs, a.k, n_pad, a.words, a.ld, room, n_pad, c, ldc);
  }
};

}  // namespace
}  // namespace m3oe

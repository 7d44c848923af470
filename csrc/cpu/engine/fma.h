// The engine of fused multiply-adds on elements as they are: fp32, and double on the portable set.
//
// An engine multiplies a tile's rows by packed weights (`product`) and accumulates weight gradients (`outer`). `left`
// turns rows of the tile into its operand format once for all products that share them; here there is nothing to do.
#pragma once

#include "../gemm_kernel.h"

namespace m3oe {
namespace {

template <class Vector>
struct FmaEngine {
  using S = Vector;
  using T = typename S::T;
  static constexpr OperandFormat kFormat{Operand::kElement, 1, 1, 96};

  struct Session {};  // nothing to set up around a tile

  struct Left {
    const T* a;
    int64_t ld, k;
  };

  // The rows a [rows][k], row stride lda, as the left operand of products. `room` is scratch memory that must live as
  // long as the result (TileLayout::operand).
  static Left left(int64_t, int64_t k, const T* a, int64_t lda, T*) { return {a, lda, k}; }

  // c [rows][n_pad] = a B: from zero, from a bias [n_pad], or added to what c holds.
  template <Init kInit>
  static void product(int64_t rows, const Left& a, int64_t n_pad, const T* packed, T* c, int64_t ldc,
                      const T* bias = nullptr) {
    gemm<S, kInit>(rows, a.k, n_pad, a.a, a.ld, packed, c, ldc, bias);
  }

  // c [k][n_pad] += a^T b with a [rows][k] and b [rows][n_pad].
  static void outer(int64_t rows, int64_t k, int64_t n_pad, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                    int64_t ldc, T* const (&)[2]) {
    gemm_tn<S>(rows, k, n_pad, a, lda, b, ldb, c, ldc);
  }
};

}  // namespace
}  // namespace m3oe

// The engine of fused multiply-adds on elements as they are: fp32, and double on the portable set.
//
// An engine multiplies a tile's rows by packed weights (`product`) and sums weight gradients over rows (`outer`).
// `left` and `across` turn rows of the tile into the format of the left operand once for all products that share them;
// here there is nothing to do. `room` is scratch memory that must live as long as the result (TileLayout::operand).
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

  static constexpr int64_t kChunk = 12;  // rows whose products are normalised while they are in L1

  struct Left {
    const T* a;
    int64_t ld, k;
    Left from(int64_t row) const { return {a + row * ld, ld, k}; }
  };
  using Across = Left;

  // The rows a [rows][k], row stride lda, as the left operand of products.
  static Left left(int64_t, int64_t k, const T* a, int64_t lda, T*) { return {a, lda, k}; }

  // The same as the left operand of sums over rows.
  static Across across(int64_t, int64_t k, const T* a, int64_t lda, T*) { return {a, lda, k}; }

  // c [rows][n_pad] = a B: from zero, from a bias [n_pad], or added to what c holds. B may be part of a packed matrix.
  template <Init kInit>
  static void product(int64_t rows, const Left& a, int64_t n_pad, const T* packed, T* c, int64_t ldc,
                      const T* bias = nullptr, Part part = {}) {
    gemm<S, kInit>(rows, a.k, n_pad, a.a, a.ld, packed, c, ldc, bias, part);
  }

  // c [k][n_pad] += a^T b with a [rows][k] and b [rows][n_pad].
  static void outer(int64_t rows, const Across& a, int64_t n_pad, const T* b, int64_t ldb, T* c, int64_t ldc, T*) {
    gemm_tn<S>(rows, a.k, n_pad, a.a, a.ld, b, ldb, c, ldc);
  }
};

}  // namespace
}  // namespace m3oe

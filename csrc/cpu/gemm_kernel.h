// GEMM micro-kernels on a vector type S (see isa/*.cpp): C = A B (+ C or bias) with B packed in column panels, and
// C += A^T B for weight gradients.
//
// Decomposition: a register block of MR rows x NV vectors; the K loop runs innermost with C in registers. A packed
// panel ([K][panel], 64 KiB at K = 256) is reused by every row block of the tile, so its traffic from L2 is one pass
// per row block: 256 B for MR * 64 FMAs = 21 B per cycle at peak, below what L2 sustains.
//
// Everything lies in an unnamed namespace: each instruction set must have its own copy (see network.h).
#pragma once

#include "network.h"

namespace m3oe {
namespace {

enum class Init { kZero, kBias, kAdd };

// Which rows of a packed matrix a product takes, in packed rows: k_count from `first` on, of `all`. Not set: all there
// are, k_count.
struct Part {
  int64_t first = 0, all = 0;
};

// C[MR][NV] of one register block. kBias: `bias` holds the NV vectors that every row starts from.
template <class S, int MR, int NV, Init kInit>
inline void gemm_block(const typename S::T* __restrict__ a, int64_t lda, int64_t k_count,
                       const typename S::T* __restrict__ b, typename S::T* __restrict__ c, int64_t ldc,
                       const typename S::T* __restrict__ bias) {
  using Reg = typename S::Reg;
  Reg acc[MR][NV];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) {
      acc[i][j] = kInit == Init::kBias ? S::load(bias + j * S::kLanes) : S::zero();
    }
  }
  for (int64_t k = 0; k < k_count; ++k) {
    Reg bv[NV];
    for (int j = 0; j < NV; ++j) bv[j] = S::load(b + k * NV * S::kLanes + j * S::kLanes);
    for (int i = 0; i < MR; ++i) {
      const Reg av = S::set1(a[i * lda + k]);
      for (int j = 0; j < NV; ++j) acc[i][j] = S::fma(av, bv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) {
      typename S::T* to = c + i * ldc + j * S::kLanes;
      S::store(to, kInit == Init::kAdd ? S::add(S::load(to), acc[i][j]) : acc[i][j]);
    }
  }
}

// The last rows of a panel: finds the block height at compile time.
template <class S, int MR, int NV, Init kInit>
inline void gemm_tail(int64_t rows, const typename S::T* a, int64_t lda, int64_t k_count, const typename S::T* b,
                      typename S::T* c, int64_t ldc, const typename S::T* bias) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      gemm_block<S, MR, NV, kInit>(a, lda, k_count, b, c, ldc, bias);
    } else {
      gemm_tail<S, MR - 1, NV, kInit>(rows, a, lda, k_count, b, c, ldc, bias);
    }
  }
}

template <class S, int NV, Init kInit>
inline void gemm_panel(int64_t rows, const typename S::T* a, int64_t lda, int64_t k_count, const typename S::T* b,
                       typename S::T* c, int64_t ldc, const typename S::T* bias) {
  constexpr int kRows = S::block_rows(NV);
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    gemm_block<S, kRows, NV, kInit>(a + i * lda, lda, k_count, b, c + i * ldc, ldc, bias);
  }
  gemm_tail<S, kRows - 1, NV, kInit>(rows - i, a + i * lda, lda, k_count, b, c + i * ldc, ldc, bias);
}

template <class S, Init kInit, int NV = S::kPanelVectors>
inline void gemm_panel_of(int64_t vectors, int64_t rows, const typename S::T* a, int64_t lda, int64_t k_count,
                          const typename S::T* b, typename S::T* c, int64_t ldc, const typename S::T* bias) {
  if constexpr (NV > 0) {
    if (vectors == NV) {
      gemm_panel<S, NV, kInit>(rows, a, lda, k_count, b, c, ldc, bias);
    } else {
      gemm_panel_of<S, kInit, NV - 1>(vectors, rows, a, lda, k_count, b, c, ldc, bias);
    }
  }
}

// C [rows][n_pad] = A [rows][k_count] B, from zero, from a bias [n_pad], or added to what C holds. Long reductions are
// cut into pieces that are summed from zero each: one chain of 2,000 multiply-adds loses digits that a BLAS keeps.
template <class S, Init kInit>
inline void gemm(int64_t rows, int64_t k_count, int64_t n_pad, const typename S::T* a, int64_t lda,
                 const typename S::T* packed, typename S::T* c, int64_t ldc, const typename S::T* bias = nullptr,
                 Part part = {}) {
  constexpr int64_t kPanel = S::kPanelVectors * S::kLanes;
  constexpr int64_t kPiece = 256;
  const int64_t panel_rows = part.all > 0 ? part.all : k_count;
  for (int64_t n = 0; n < n_pad; n += kPanel) {
    const int64_t width = n_pad - n < kPanel ? n_pad - n : kPanel;
    const int64_t vectors = width / S::kLanes;
    const typename S::T* panel = packed + n * panel_rows + part.first * width;
    const int64_t first = k_count < kPiece ? k_count : kPiece;
    gemm_panel_of<S, kInit>(vectors, rows, a, lda, first, panel, c + n, ldc, kInit == Init::kBias ? bias + n : nullptr);
    for (int64_t k = first; k < k_count; k += kPiece) {
      const int64_t piece = k_count - k < kPiece ? k_count - k : kPiece;
      gemm_panel_of<S, Init::kAdd>(vectors, rows, a + k, lda, piece, panel + k * width, c + n, ldc, nullptr);
    }
  }
}

// C [rows][n_pad] = A B, as a plain function.
template <class S>
void multiply(int64_t rows, int64_t k_count, int64_t n_pad, const typename S::T* a, int64_t lda,
              const typename S::T* packed, typename S::T* c, int64_t ldc) {
  gemm<S, Init::kZero>(rows, k_count, n_pad, a, lda, packed, c, ldc);
}

// C[MR][NV] += sum over rows m of A[m][0..MR) x B[m][0..NV). The tile's sum starts from zero and is added at the end: a
// chain through all rows of a batch would lose digits that sums of tile sums keep.
template <class S, int MR, int NV>
inline void gemm_tn_block(int64_t rows, const typename S::T* __restrict__ a, int64_t lda,
                          const typename S::T* __restrict__ b, int64_t ldb, typename S::T* __restrict__ c,
                          int64_t ldc) {
  using Reg = typename S::Reg;
  Reg acc[MR][NV];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) acc[i][j] = S::zero();
  }
  for (int64_t m = 0; m < rows; ++m) {
    Reg bv[NV];
    for (int j = 0; j < NV; ++j) bv[j] = S::load(b + m * ldb + j * S::kLanes);
    for (int i = 0; i < MR; ++i) {
      const Reg av = S::set1(a[m * lda + i]);
      for (int j = 0; j < NV; ++j) acc[i][j] = S::fma(av, bv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) {
      typename S::T* to = c + i * ldc + j * S::kLanes;
      S::store(to, S::add(S::load(to), acc[i][j]));
    }
  }
}

template <class S, int MR, int NV>
inline void gemm_tn_tail(int64_t k_left, int64_t rows, const typename S::T* a, int64_t lda, const typename S::T* b,
                         int64_t ldb, typename S::T* c, int64_t ldc) {
  if constexpr (MR > 0) {
    if (k_left == MR) {
      gemm_tn_block<S, MR, NV>(rows, a, lda, b, ldb, c, ldc);
    } else {
      gemm_tn_tail<S, MR - 1, NV>(k_left, rows, a, lda, b, ldb, c, ldc);
    }
  }
}

template <class S, int NV = S::kPanelVectors>
inline void gemm_tn_panel(int64_t vectors, int64_t rows, int64_t k_count, const typename S::T* a, int64_t lda,
                          const typename S::T* b, int64_t ldb, typename S::T* c, int64_t ldc) {
  if constexpr (NV > 0) {
    if (vectors != NV) return gemm_tn_panel<S, NV - 1>(vectors, rows, k_count, a, lda, b, ldb, c, ldc);
    constexpr int kRows = S::block_rows(NV);
    int64_t k = 0;
    for (; k + kRows <= k_count; k += kRows) {
      gemm_tn_block<S, kRows, NV>(rows, a + k, lda, b, ldb, c + k * ldc, ldc);
    }
    gemm_tn_tail<S, kRows - 1, NV>(k_count - k, rows, a + k, lda, b, ldb, c + k * ldc, ldc);
  }
}

// C [k_count][n_pad] += A^T B with A [rows][k_count], B [rows][n_pad]: a weight gradient over one tile.
template <class S>
inline void gemm_tn(int64_t rows, int64_t k_count, int64_t n_pad, const typename S::T* a, int64_t lda,
                    const typename S::T* b, int64_t ldb, typename S::T* c, int64_t ldc) {
  constexpr int64_t kPanel = S::kPanelVectors * S::kLanes;
  for (int64_t n = 0; n < n_pad; n += kPanel) {
    const int64_t width = n_pad - n < kPanel ? n_pad - n : kPanel;
    gemm_tn_panel<S>(width / S::kLanes, rows, k_count, a, lda, b + n, ldb, c + n, ldc);
  }
}

}  // namespace
}  // namespace m3oe

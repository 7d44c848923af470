// The engine of tile registers (AMX): products of bf16 operands, or bf16x3, where every operand is the sum of two bf16
// and the three larger of the four products are summed: hi hi + hi lo + lo hi. What is left out is below 2^-16 of a
// term.
//
// Decomposition: blocks of 32 x 32 of the result stay in four tile registers while k runs in steps of 32; per step 2
// tiles of the left operand and 2 of the right are loaded for 4 products, in bf16x3 4 and 4 for 12. A step reads 4 KiB
// (8 KiB) from L1/L2 for 64 (192) cycles of the unit.
//
// Weight gradients sum over rows: the left operand is transposed in blocks of 16 x 16 words, the right one is already
// in row pairs. Their sum over a tile of rows starts from zero and is added to memory at the end.
#pragma once

#include "../gemm_kernel.h"
#include "../isa/avx512.h"
#include "operand.h"
#include "tile_unit.h"

namespace m3oe {
namespace {

// to[j][i] = from[i][j] for 16 x 16 words.
inline void transpose_words(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m512 rows[16], pairs[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_ps(from + i * ld_from);
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // rows[4 q + s]: in each 128-bit lane l, column 4 l + s of rows 4 q .. 4 q + 3.
  for (int q = 0; q < 4; ++q) {
    const __m512d a = _mm512_castps_pd(pairs[4 * q]), b = _mm512_castps_pd(pairs[4 * q + 1]);
    const __m512d c = _mm512_castps_pd(pairs[4 * q + 2]), d = _mm512_castps_pd(pairs[4 * q + 3]);
    rows[4 * q] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    rows[4 * q + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    rows[4 * q + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    rows[4 * q + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int s = 0; s < 4; ++s) {
    const __m512 low01 = _mm512_shuffle_f32x4(rows[s], rows[4 + s], 0x88);  // lanes 0, 2 of q = 0 and 1
    const __m512 low23 = _mm512_shuffle_f32x4(rows[8 + s], rows[12 + s], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(rows[s], rows[4 + s], 0xdd);  // lanes 1, 3
    const __m512 high23 = _mm512_shuffle_f32x4(rows[8 + s], rows[12 + s], 0xdd);
    _mm512_storeu_ps(to + s * ld_to, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(to + (4 + s) * ld_to, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(to + (8 + s) * ld_to, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(to + (12 + s) * ld_to, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
}

// A number as a type, since the standard library must stay out of files with their own flags (see network.h).
template <int kValue>
struct Constant {
  constexpr int operator()() const { return kValue; }
};

template <class Unit, Operand kOperand>
struct TileEngine {
  using S = Avx512;
  using T = float;
  using Session = typename Unit::Session;
  static constexpr bool kLow = kOperand == Operand::kBf16x3;
  static constexpr OperandFormat kFormat{kOperand, 32, 32, 128};
  static constexpr int64_t kWord = sizeof(float);

  // Words of one operand: rows `ld` words apart, the low parts `low` words behind the high ones.
  struct Words {
    const float* words;
    int64_t ld, low;
    Words from(int64_t row, int64_t column) const { return {words + row * ld + column, ld, low}; }
  };

  static constexpr int64_t kChunk = 32;

  struct Left {
    Words words;
    int64_t k;  // in words, a multiple of 16
    Left from(int64_t row) const { return {words.from(row, 0), k}; }
  };

  struct Across {
    Words words;  // rows are columns of the tile
    int64_t k, pairs;
  };

  static Left left(int64_t rows, int64_t k, const float* a, int64_t lda, float* room) {
    const int64_t words = round_up(k, 32) / 2;
    const int64_t ld = words % 32 == 0 ? words + 16 : words;  // an odd number of cache lines: 16 rows in 16 sets
    const int64_t low = round_up(rows, 32) * ld;
    words_of_rows<kLow>(rows, k, a, lda, room, ld, low);
    return {{room, ld, low}, words};
  }

  // Registers: 0 to 3 the result, 4 and 5 the left operand, 6 and 7 the right one.
  template <int kRows, int kColumns>
  static void dots() {
    Unit::template dot<0, 4, 6>();
    if constexpr (kColumns == 2) Unit::template dot<1, 4, 7>();
    if constexpr (kRows == 2) Unit::template dot<2, 5, 6>();
    if constexpr (kRows == 2 && kColumns == 2) Unit::template dot<3, 5, 7>();
  }

  template <int kRows>
  static void load_left(const float* words, int64_t ld) {
    Unit::template load<4>(words, ld * kWord);
    if constexpr (kRows == 2) Unit::template load<5>(words + 16 * ld, ld * kWord);
  }

  template <int kColumns>
  static void load_right(const float* words, int64_t ld) {
    Unit::template load<6>(words, ld * kWord);
    if constexpr (kColumns == 2) Unit::template load<7>(words + 16, ld * kWord);
  }

  // result += a b over k words; a [32 rows][k], b [k][32 columns].
  template <int kRows, int kColumns>
  static void accumulate(const Words& a, const Words& b, int64_t k) {
    for (int64_t at = 0; at < k; at += 16) {
      const float* left = a.words + at;
      const float* right = b.words + at * b.ld;
      if constexpr (kLow) {
        load_left<kRows>(left + a.low, a.ld);
        load_right<kColumns>(right, b.ld);
        dots<kRows, kColumns>();
        load_left<kRows>(left, a.ld);
        dots<kRows, kColumns>();
        load_right<kColumns>(right + b.low, b.ld);
        dots<kRows, kColumns>();
      } else {
        load_left<kRows>(left, a.ld);
        load_right<kColumns>(right, b.ld);
        dots<kRows, kColumns>();
      }
    }
  }

  // body(register, row offset, column offset) for the registers of the result.
  template <int kRows, int kColumns, typename Body>
  static void each_result(const Body& body) {
    body(Constant<0>{}, 0, 0);
    if constexpr (kColumns == 2) body(Constant<1>{}, 0, 16);
    if constexpr (kRows == 2) body(Constant<2>{}, 16, 0);
    if constexpr (kRows == 2 && kColumns == 2) body(Constant<3>{}, 16, 16);
  }

  template <Init kInit, int kRows, int kColumns>
  static void product_block(const Words& a, const Words& b, int64_t k, float* c, int64_t ldc, const float* bias) {
    each_result<kRows, kColumns>([&](auto t, int64_t row, int64_t column) {
      if constexpr (kInit == Init::kZero) Unit::template zero<t()>();
      if constexpr (kInit == Init::kBias) Unit::template load<t()>(bias + column, 0);
      if constexpr (kInit == Init::kAdd) Unit::template load<t()>(c + row * ldc + column, ldc * kWord);
    });
    accumulate<kRows, kColumns>(a, b, k);
    each_result<kRows, kColumns>(
        [&](auto t, int64_t row, int64_t column) { Unit::template store<t()>(c + row * ldc + column, ldc * kWord); });
  }

  // Calls body with 1 or 2 tiles of rows and of columns as constants.
  template <typename Body>
  static void with_block(int64_t rows, int64_t columns, const Body& body) {
    using One = Constant<1>;
    using Two = Constant<2>;
    if (rows > 16) {
      columns > 16 ? body(Two{}, Two{}) : body(Two{}, One{});
    } else {
      columns > 16 ? body(One{}, Two{}) : body(One{}, One{});
    }
  }

  // Writes whole tiles: up to 31 rows more than `rows` (OperandFormat::row_align).
  template <Init kInit>
  static void product(int64_t rows, const Left& a, int64_t n_pad, const float* packed, float* c, int64_t ldc,
                      const float* bias = nullptr, Part part = {}) {
    constexpr int64_t kPanel = S::kPanelVectors * S::kLanes;
    const int64_t plane_rows = part.all > 0 ? part.all / planes(kOperand) : a.k;
    const int64_t panel_rows = plane_rows * planes(kOperand);
    for (int64_t n = 0; n < n_pad; n += 32) {
      const int64_t first = n / kPanel * kPanel;
      const int64_t width = n_pad - first < kPanel ? n_pad - first : kPanel;
      const Words b{packed + first * panel_rows + part.first * width + (n - first), width, plane_rows * width};
      for (int64_t i = 0; i < rows; i += 32) {
        with_block(rows - i, n_pad - n, [&](auto r, auto columns) {
          product_block<kInit, r(), columns()>(a.words.from(i, 0), b, a.k, c + i * ldc + n, ldc,
                                               kInit == Init::kBias ? bias + n : nullptr);
        });
      }
    }
  }

  static Across across(int64_t rows, int64_t k, const float* a, int64_t lda, float* room) {
    const int64_t pairs = round_up(rows, 32) / 2;
    const int64_t k_pad = round_up(k, 16);
    float* a_pairs = room + planes(kOperand) * k_pad * pairs;
    words_of_pairs<kLow>(rows, pairs, k_pad, a, lda, a_pairs, k_pad, pairs * k_pad);
    for (int64_t plane = 0; plane < planes(kOperand); ++plane) {
      for (int64_t i = 0; i < k_pad; i += 16) {
        for (int64_t m = 0; m < pairs; m += 16) {
          transpose_words(a_pairs + (plane * pairs + m) * k_pad + i, k_pad, room + (plane * k_pad + i) * pairs + m,
                          pairs);
        }
      }
    }
    return {{room, pairs, k_pad * pairs}, k, pairs};
  }

  static void outer(int64_t rows, const Across& a, int64_t n_pad, const float* b, int64_t ldb, float* c, int64_t ldc,
                    float* room) {
    words_of_pairs<kLow>(rows, a.pairs, n_pad, b, ldb, room, n_pad, a.pairs * n_pad);
    const Words right{room, n_pad, a.pairs * n_pad};
    for (int64_t n = 0; n < n_pad; n += 32) {
      for (int64_t i = 0; i < a.k; i += 32) {
        with_block(a.k - i, n_pad - n, [&](auto r, auto columns) {
          alignas(64) float sum[32 * 32];
          product_block<Init::kZero, r(), columns()>(a.words.from(i, 0), right.from(0, n), a.pairs, sum, 32, nullptr);
          const int64_t valid = a.k - i < 32 ? a.k - i : 32;
          for (int64_t row = 0; row < valid; ++row) {
            for (int64_t j = 0; j < 16 * columns(); j += 16) {
              float* to = c + (i + row) * ldc + n + j;
              S::store(to, S::add(S::load(to), S::load(sum + row * 32 + j)));
            }
          }
        });
      }
    }
  }
};

}  // namespace
}  // namespace m3oe

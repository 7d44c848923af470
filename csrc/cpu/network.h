// The network op on the CPU, as the instruction-set files see it: sizes, memory layouts and the kernel table.
//
// Torch-free, and free of the standard library's containers: everything included here is also compiled with the
// flags of an instruction set, and an inline function compiled for AVX-512 must never be the copy that the linker
// keeps for baseline code.
//
// Symbols as in the Python package: B rows, I input width, H representation width, D domains, T tasks, E experts,
// G gated experts (the first G of E), X expert width, Y tower width.
#pragma once

#include <cstdint>

namespace m3oe {

// One layer of all experts. Its tile buffers are [rows][ld] with expert e at column e * out_pad.
struct LayerSize {
  int64_t in, out, out_pad, ld;
};

// What the caller asks for; the sums, LayerNorm, softmax and loss are fp32 in all of them.
enum class Precision : int { kFp32, kBf16x3, kBf16 };

// What the products multiply: the elements themselves, elements rounded to bf16, or each split into two bf16 whose
// three larger products are summed (bf16x3: about 16 bits of mantissa).
enum class Operand : int { kElement, kBf16, kBf16x3 };

// How an engine wants its operands. A packed matrix of K rows has packed_rows(K) rows of words: one per k for kElement;
// else a word holds bf16(k) below bf16(k + 1), K is rounded up to `k_align` with zeros, and bf16x3 has all words of the
// high parts before those of the low parts.
struct OperandFormat {
  Operand operand;
  int64_t k_align;    // rows of a packed matrix
  int64_t row_align;  // rows of a tile buffer: products may write that many
  int64_t tile_rows;  // the tallest tile that suits the engine
};

namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Planes of words: two for the high and the low parts of bf16x3.
constexpr int64_t planes(Operand operand) { return operand == Operand::kBf16x3 ? 2 : 1; }

constexpr int64_t packed_rows(const OperandFormat& format, int64_t k) {
  if (format.operand == Operand::kElement) return k;
  return planes(format.operand) * round_up(k, format.k_align) / 2;
}

}  // namespace

// All widths; `*_pad` is rounded up to whole vectors, `ld_*` is the row stride of a tile buffer.
struct NetworkSize {
  int64_t inputs, hidden, domains, tasks, experts, gated, width, tower;
  bool representation;  // false: r = x and the star and skip tensors are empty
  bool star_linear;     // first term of the representation without LayerNorm and ReLU
  bool gate_detach;
  bool masked;      // a gate mask is given
  bool table_grad;  // the gradient of the table is wanted, for which every expert is computed
  int64_t inputs_pad, hidden_pad, gates_pad, width_pad, tower_pad;
  int64_t ld_input, ld_hidden, ld_gate, ld_width, ld_tower;
  int64_t depth;
  const LayerSize* layers;
  OperandFormat format;
};

// Offsets, in elements, of one expert layer inside a layout.
struct LayerOffsets {
  int64_t weight, weight_t, bias, gain, offset;
};

// Weights packed for the GEMM kernels: a common block, then one block per domain. A packed matrix [K][N] is a
// sequence of column panels, each [packed_rows(K)][panel width], N rounded up with zeros. `*_t` is the transposed
// matrix, for the gradient of its input. Matrices in front of a LayerNorm are centred over their outputs, so that the
// LayerNorm needs no mean pass. `used`: the experts that the domain's rows need, as runs of consecutive ones: their
// number, then first and end of each. The kernels compute no others.
struct PackLayout {
  int64_t star_gain, star_offset, skip_weight, skip_weight_t, skip_bias, skip_gain, skip_offset;
  const LayerOffsets* layers;
  int64_t common_size;
  int64_t star_weight, star_weight_t, star_bias, gate_weight, gate_weight_t, gate_bias, gate_mask, table, used;
  int64_t tower_weight, tower_weight_t, tower_vectors;  // per task; vectors: bias gain offset head
  int64_t head_bias;
  int64_t domain_size;
};

// One worker's private gradients: a common block, then one block per domain. Matrices are row-major with padded rows.
struct GradLayout {
  int64_t star_gain, star_offset, skip_weight, skip_bias, skip_gain, skip_offset;
  const LayerOffsets* layers;  // weight_t unused
  int64_t common_size;
  int64_t star_weight, star_bias, gate_weight, gate_bias, table;
  int64_t tower_weight, tower_vectors;
  int64_t head_bias;
  int64_t domain_size;
};

struct LayerBuffers {
  int64_t hat, out, rstd;
};

// One worker's tile: every intermediate of its rows. `hat` is a normalised pre-activation, kept for the
// backward pass; without one it is overwritten by the activation.
struct TileLayout {
  int64_t x, star_hat, star_rstd, skip_hat, skip_rstd, r;
  const LayerBuffers* layers;
  int64_t gate, coef, u, tower_hat, tower_rstd, h, logit;
  int64_t d_logit, d_h, d_u, d_coef, d_sums, d_gate, d_z[2], d_r, d_star, d_skip, d_x;
  int64_t operand[2];  // room for two operands in the engine's format
  int64_t size;
};

// Products of matrices of elements as they are.
template <typename T>
struct MatrixKernels {
  // c [rows][n_pad] = a B with a [rows][k] and B packed [k][n_pad].
  void (*product)(int64_t rows, int64_t k, int64_t n_pad, const T* a, int64_t lda, const T* packed, T* c, int64_t ldc);
  // c [k][n_pad] += a^T b with a [rows][k] and b [rows][n_pad].
  void (*outer)(int64_t rows, int64_t k, int64_t n_pad, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                int64_t ldc);
};

// What one engine offers for one element type.
template <typename T>
struct NetworkKernels {
  int64_t lanes;  // elements of a vector
  int64_t panel;  // columns of a packed panel, a multiple of lanes
  OperandFormat format;
  MatrixKernels<T> matrix;  // null in engines that round their operands

  // x -> logits for `rows` rows of domain d; `keep` leaves in the tile what tile_backward reads.
  void (*tile_forward)(const NetworkSize&, const PackLayout&, const T* pack, const TileLayout&, T* tile, int64_t d,
                       int64_t rows, bool keep);
  // values[0..n) -> 1 / (1 + exp(-value)); may touch the rest of the last vector.
  void (*sigmoid)(T* values, int64_t n);

  // d_logit -> gradients of every weight, added to `grad`, and d_x if asked for. Runs after tile_forward(keep). That of
  // the table only with size.table_grad.
  void (*tile_backward)(const NetworkSize&, const PackLayout&, const T* pack, const GradLayout&, T* grad,
                        const TileLayout&, T* tile, int64_t d, int64_t rows, bool input_grad);
};

// An instruction set: its kernels per precision, and a burst of independent fused multiply-adds that returns the FLOPs
// it did. A precision in which the set is no faster than in fp32 has no kernels (tile_forward is null).
struct Isa {
  const char* name;
  NetworkKernels<float> fp32, bf16, bf16x3;
  int64_t (*fma_burst)(int64_t iterations, float* sink);
};

}  // namespace m3oe

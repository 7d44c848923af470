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

// All widths; `*_pad` is rounded up to whole vectors, `ld_*` is the row stride of a tile buffer.
struct NetworkSize {
  int64_t inputs, hidden, domains, tasks, experts, gated, width, tower;
  bool representation;  // false: r = x and the star and skip tensors are empty
  bool star_linear;     // first term of the representation without LayerNorm and ReLU
  bool gate_detach;
  bool masked;  // a gate mask is given
  int64_t inputs_pad, hidden_pad, gates_pad, width_pad, tower_pad;
  int64_t ld_input, ld_hidden, ld_gate, ld_width, ld_tower;
  int64_t depth;
  const LayerSize* layers;
};

// Offsets, in elements, of one expert layer inside a layout.
struct LayerOffsets {
  int64_t weight, weight_t, bias, gain, offset;
};

// Weights packed for the GEMM kernels: a common block, then one block per domain. A packed matrix [K][N] is a
// sequence of column panels, each [K][panel width], N rounded up with zeros. `*_t` is the transposed matrix, for the
// gradient of its input. Matrices in front of a LayerNorm are centred over their outputs, so that the LayerNorm
// needs no mean pass.
struct PackLayout {
  int64_t star_gain, star_offset, skip_weight, skip_weight_t, skip_bias, skip_gain, skip_offset;
  const LayerOffsets* layers;
  int64_t common_size;
  int64_t star_weight, star_weight_t, star_bias, gate_weight, gate_weight_t, gate_bias, gate_mask, table;
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

// One worker's tile: every intermediate of up to `rows` rows. `hat` is a normalised pre-activation, kept for the
// backward pass; without one it is overwritten by the activation.
struct TileLayout {
  int64_t rows;
  int64_t x, star_hat, star_rstd, skip_hat, skip_rstd, r;
  const LayerBuffers* layers;
  int64_t gate, coef, u, tower_hat, tower_rstd, h, logit;
  int64_t d_logit, d_h, d_u, d_coef, d_sums, d_gate, d_z[2], d_r, d_star, d_skip, d_x;
  int64_t size;
};

// What one instruction set offers for one element type.
template <typename T>
struct NetworkKernels {
  int64_t lanes;  // elements of a vector
  int64_t panel;  // columns of a packed panel, a multiple of lanes

  // x -> logits for `rows` rows of domain d; `keep` leaves in the tile what tile_backward reads.
  void (*tile_forward)(const NetworkSize&, const PackLayout&, const T* pack, const TileLayout&, T* tile, int64_t d,
                       int64_t rows, bool keep);
  // d_logit -> gradients of every weight, added to `grad`, and d_x if asked for. Runs after tile_forward(keep).
  void (*tile_backward)(const NetworkSize&, const PackLayout&, const T* pack, const GradLayout&, T* grad,
                        const TileLayout&, T* tile, int64_t d, int64_t rows, bool input_grad);
};

// An instruction set: its kernels, and a burst of independent fused multiply-adds that returns the FLOPs it did.
struct Isa {
  const char* name;
  NetworkKernels<float> network;
  int64_t (*fma_burst)(int64_t iterations, float* sink);
};

}  // namespace m3oe

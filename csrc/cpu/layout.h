// The owner of every memory layout of one network call: sizes from the weight shapes, then offsets for packed weights,
// private gradients and tiles. Built per call in microseconds; holds no tensor memory.
#pragma once

#include <vector>

#include "network.h"

namespace m3oe {

// Shapes read off the weight tensors. hidden_widths: H, then the output width of every expert layer.
struct NetworkShape {
  int64_t inputs, domains, tasks, experts, gated, tower;
  std::vector<int64_t> widths;
  bool representation, star_linear, gate_detach, masked, table_grad;
};

class Layout {
 public:
  // `element_size` in bytes: row strides are odd multiples of a cache line, so that a column of a tile does not fall
  // into a few cache sets.
  Layout(const NetworkShape& shape, int64_t lanes, const OperandFormat& format, int64_t element_size, int64_t tile_rows,
         bool backward);
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;

  NetworkSize size;
  PackLayout pack;
  GradLayout grad;
  TileLayout tile;

  int64_t pack_elements() const { return pack.common_size + size.domains * pack.domain_size; }
  int64_t grad_elements() const { return grad.common_size + size.domains * grad.domain_size; }

 private:
  void plan_size(const NetworkShape& shape);
  void plan_pack(bool backward);
  void plan_grad();
  void plan_tile(int64_t tile_rows, bool backward);
  int64_t padded(int64_t n) const { return (n + lanes_ - 1) / lanes_ * lanes_; }
  // Of an expert: whole operands of the engine too, as a product over some of the experts begins and ends between two.
  int64_t expert_padded(int64_t n) const { return round_up(padded(n), size.format.k_align); }
  int64_t stride(int64_t n) const;
  int64_t packed(int64_t k, int64_t n_pad) const { return packed_rows(size.format, k) * n_pad; }

  int64_t lanes_;
  int64_t line_;  // elements of a cache line
  std::vector<LayerSize> layer_sizes_;
  std::vector<LayerOffsets> pack_layers_, grad_layers_;
  std::vector<LayerBuffers> tile_layers_;
};

}  // namespace m3oe

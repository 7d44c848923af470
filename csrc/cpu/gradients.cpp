#include "gradients.h"

#include <algorithm>

namespace m3oe {
namespace {

template <typename T>
struct PieceList {
  const Layout& layout;
  std::vector<GradPiece<T>> pieces;

  // A matrix of one block, in chunks of rows.
  void add(int64_t domain, int64_t from, int64_t rows, int64_t columns, int64_t stride, T* to) {
    constexpr int64_t kRows = 64;
    const GradLayout& g = layout.grad;
    if (domain >= 0) from += g.common_size + domain * g.domain_size;
    if (columns == 0) return;
    for (int64_t first = 0; first < rows; first += kRows) {
      pieces.push_back(
          {domain, from + first * stride, std::min(kRows, rows - first), columns, stride, to + first * columns});
    }
  }

  void expert_layer(int64_t l, const ExpertPointers<T*>& to) {
    const NetworkSize& s = layout.size;
    const LayerSize& layer = s.layers[l];
    const LayerOffsets& from = layout.grad.layers[l];
    for (int64_t e = 0; e < s.experts; ++e) {
      T* weight = to.weight + e * layer.in * layer.out;
      // The first layer of all experts is one wide matrix; deeper ones lie one after another.
      if (l == 0) {
        add(-1, from.weight + e * layer.out_pad, layer.in, layer.out, s.experts * layer.out_pad, weight);
      } else {
        add(-1, from.weight + e * layer.in * layer.out_pad, layer.in, layer.out, layer.out_pad, weight);
      }
    }
    add(-1, from.bias, s.experts, layer.out, layer.out_pad, to.bias);
    add(-1, from.gain, s.experts, layer.out, layer.out_pad, to.gain);
    add(-1, from.offset, s.experts, layer.out, layer.out_pad, to.offset);
  }

  void representation(const WeightPointers<T*>& to) {
    const NetworkSize& s = layout.size;
    const GradLayout& g = layout.grad;
    add(-1, g.star_gain, 1, s.hidden, s.hidden_pad, to.star_gain);
    add(-1, g.star_offset, 1, s.hidden, s.hidden_pad, to.star_offset);
    add(-1, g.skip_weight, s.inputs, s.hidden, s.hidden_pad, to.skip_weight);
    add(-1, g.skip_bias, 1, s.hidden, s.hidden_pad, to.skip_bias);
    add(-1, g.skip_gain, 1, s.hidden, s.hidden_pad, to.skip_gain);
    add(-1, g.skip_offset, 1, s.hidden, s.hidden_pad, to.skip_offset);
    for (int64_t d = 0; d < s.domains; ++d) {
      add(d, g.star_weight, s.inputs, s.hidden, s.hidden_pad, to.star_weight + d * s.inputs * s.hidden);
      add(d, g.star_bias, 1, s.hidden, s.hidden_pad, to.star_bias + d * s.hidden);
    }
  }

  void domain(int64_t d, const WeightPointers<T*>& to) {
    const NetworkSize& s = layout.size;
    const GradLayout& g = layout.grad;
    const int64_t gates = s.tasks * s.gated;
    add(d, g.gate_bias, 1, gates, gates, to.gate_bias + d * gates);
    add(d, g.table, 1, s.tasks * s.experts, 0, to.table + d * s.tasks * s.experts);
    add(d, g.head_bias, 1, s.tasks, 0, to.head_bias + d * s.tasks);
    for (int64_t t = 0; t < s.tasks; ++t) {
      const int64_t pair = d * s.tasks + t;
      const int64_t vectors = g.tower_vectors + t * 4 * s.tower_pad;
      add(d, g.gate_weight + t * s.gated, s.hidden, s.gated, s.gates_pad, to.gate_weight + pair * s.hidden * s.gated);
      add(d, g.tower_weight + t * s.width * s.tower_pad, s.width, s.tower, s.tower_pad,
          to.tower_weight + pair * s.width * s.tower);
      T* const targets[] = {to.tower_bias, to.tower_gain, to.tower_offset, to.head_weight};
      for (int64_t i = 0; i < 4; ++i) add(d, vectors + i * s.tower_pad, 1, s.tower, 0, targets[i] + pair * s.tower);
    }
  }
};

}  // namespace

template <typename T>
T* PrivateGrads<T>::open(int64_t w, int64_t d, const GradLayout& layout) {
  T* own = data + w * stride;
  unsigned char* flags = touched.data() + w * (domains + 1);
  if (!flags[0]) {
    std::fill_n(own, layout.common_size, T(0));
    flags[0] = 1;
  }
  if (!flags[1 + d]) {
    std::fill_n(own + layout.common_size + d * layout.domain_size, layout.domain_size, T(0));
    flags[1 + d] = 1;
  }
  return own;
}

template <typename T>
std::vector<GradPiece<T>> grad_pieces(const Layout& layout, const WeightPointers<T*>& grads) {
  PieceList<T> list{layout, {}};
  if (layout.size.representation) list.representation(grads);
  for (int64_t l = 0; l < layout.size.depth; ++l) list.expert_layer(l, grads.experts[l]);
  for (int64_t d = 0; d < layout.size.domains; ++d) list.domain(d, grads);
  return std::move(list.pieces);
}

template <typename T>
void sum_piece(const GradPiece<T>& piece, const PrivateGrads<T>& grads) {
  std::fill_n(piece.to, piece.rows * piece.columns, T(0));
  for (int64_t w = 0; w < grads.workers; ++w) {
    if (!grads.touched[w * (grads.domains + 1) + 1 + piece.domain]) continue;  // domain -1: flag 0
    const T* from = grads.data + w * grads.stride + piece.from;
    for (int64_t i = 0; i < piece.rows; ++i) {
      T* to = piece.to + i * piece.columns;
      for (int64_t j = 0; j < piece.columns; ++j) to[j] += from[i * piece.stride + j];
    }
  }
}

template struct PrivateGrads<float>;
template struct PrivateGrads<double>;
template std::vector<GradPiece<float>> grad_pieces(const Layout&, const WeightPointers<float*>&);
template std::vector<GradPiece<double>> grad_pieces(const Layout&, const WeightPointers<double*>&);
template void sum_piece(const GradPiece<float>&, const PrivateGrads<float>&);
template void sum_piece(const GradPiece<double>&, const PrivateGrads<double>&);

}  // namespace m3oe

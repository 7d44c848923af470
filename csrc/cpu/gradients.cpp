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
      add(-1, from.weight + e * layer.in * layer.out_pad, layer.in, layer.out, layer.out_pad,
          to.weight + e * layer.in * layer.out);
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
T* PrivateGrads<T>::open(int64_t w, int64_t tile, int64_t d) {
  if (tile > 0 && tile % kTilesPerLevel == 0) raise(w, d);
  zero_once(w, 0, d);
  return block(w, 0);
}

template <typename T>
void PrivateGrads<T>::zero_once(int64_t w, int64_t level, int64_t d) {
  unsigned char* touched = flags(w, level);
  T* own = block(w, level);
  if (!touched[0]) std::fill_n(own, layout_.common_size, T(0));
  if (!touched[1 + d]) std::fill_n(own + layout_.common_size + d * layout_.domain_size, layout_.domain_size, T(0));
  touched[0] = touched[1 + d] = 1;
}

// Moves the first level's common block and domain d to the second. Other domains stay: tiles are sorted by domain, so
// none of them has more than kTilesPerLevel tiles in the first.
template <typename T>
void PrivateGrads<T>::raise(int64_t w, int64_t d) {
  zero_once(w, 0, d);
  zero_once(w, 1, d);
  const auto move = [&](int64_t from, int64_t count) {
    T* low = block(w, 0) + from;
    T* high = block(w, 1) + from;
    for (int64_t i = 0; i < count; ++i) high[i] += low[i];
    std::fill_n(low, count, T(0));
  };
  move(0, layout_.common_size);
  move(layout_.common_size + d * layout_.domain_size, layout_.domain_size);
}

template <typename T>
void PrivateGrads<T>::sum(int64_t domain, int64_t from, int64_t count, T* to) const {
  std::fill_n(to, count, T(0));
  for (int64_t i = 0; i < workers_ * levels_; ++i) {
    if (!touched_[i * (domains_ + 1) + 1 + domain]) continue;  // domain -1: the common block's flag
    const T* own = memory_ + i * block_ + from;
    for (int64_t j = 0; j < count; ++j) to[j] += own[j];
  }
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
  for (int64_t i = 0; i < piece.rows; ++i) {
    grads.sum(piece.domain, piece.from + i * piece.stride, piece.columns, piece.to + i * piece.columns);
  }
}

template class PrivateGrads<float>;
template class PrivateGrads<double>;
template std::vector<GradPiece<float>> grad_pieces(const Layout&, const WeightPointers<float*>&);
template std::vector<GradPiece<double>> grad_pieces(const Layout&, const WeightPointers<double*>&);
template void sum_piece(const GradPiece<float>&, const PrivateGrads<float>&);
template void sum_piece(const GradPiece<double>&, const PrivateGrads<double>&);

}  // namespace m3oe

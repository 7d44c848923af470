#include "pack.h"

#include <algorithm>

namespace m3oe {
namespace {

// A matrix [K][blocks x n] in memory: block b starts at b * block_stride, its row k at k * row_stride, dense columns.
template <typename T>
struct Blocks {
  const T* data;
  int64_t rows, blocks, n, row_stride, block_stride;
  const T* row(int64_t b, int64_t k) const { return data + b * block_stride + k * row_stride; }
};

template <typename T>
T mean(const T* values, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  return static_cast<T>(sum / static_cast<double>(n));
}

template <typename T>
void copy_padded(const T* from, int64_t n, int64_t n_pad, T shift, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] - shift;
  std::fill(to + n, to + n_pad, T(0));
}

// Element (k, column) of a packed matrix with `k_count` rows and `n_total` padded columns.
template <typename T>
T* packed_at(T* packed, int64_t k_count, int64_t n_total, int64_t panel, int64_t k, int64_t column) {
  const int64_t first = column / panel * panel;
  const int64_t width = std::min(panel, n_total - first);
  return packed + first * k_count + k * width + (column - first);
}

// Packs [K][blocks x n_pad]: column b * n_pad + j holds column j of block b.
template <typename T>
void pack_matrix(const Blocks<T>& source, int64_t n_pad, int64_t n_total, int64_t panel, bool centre, T* packed) {
  std::fill(packed, packed + source.rows * n_total, T(0));
  for (int64_t b = 0; b < source.blocks; ++b) {
    for (int64_t k = 0; k < source.rows; ++k) {
      const T* row = source.row(b, k);
      const T shift = centre ? mean(row, source.n) : T(0);
      for (int64_t j = 0; j < source.n;) {
        const int64_t column = b * n_pad + j;
        const int64_t run = std::min(source.n - j, panel - column % panel);
        T* to = packed_at(packed, source.rows, n_total, panel, k, column);
        for (int64_t i = 0; i < run; ++i) to[i] = row[j + i] - shift;
        j += run;
      }
    }
  }
}

// Packs the transpose, [blocks x n_pad][K padded]: row b * n_pad + j holds column j of block b.
template <typename T>
void pack_transposed(const Blocks<T>& source, int64_t n_pad, int64_t k_pad, int64_t panel, T* packed) {
  const int64_t k_count = source.blocks * n_pad;
  std::fill(packed, packed + k_count * k_pad, T(0));
  for (int64_t b = 0; b < source.blocks; ++b) {
    for (int64_t first = 0; first < source.rows; first += panel) {
      const int64_t last = std::min(source.rows, first + panel);
      const int64_t width = std::min(panel, k_pad - first);
      T* to = packed + first * k_count + b * n_pad * width;
      for (int64_t k = first; k < last; ++k) {
        const T* row = source.row(b, k);
        for (int64_t j = 0; j < source.n; ++j) to[j * width + (k - first)] = row[j];
      }
    }
  }
}

template <typename T>
struct Packer {
  const WeightPointers<const T*>& w;
  const Layout& layout;
  int64_t panel;
  bool backward;
  T* packed;

  const NetworkSize& size() const { return layout.size; }

  // A LayerNorm's bias, gain and offset; the bias is centred like the weights in front of it.
  void vectors(const T* bias, const T* gain, const T* offset, int64_t n, int64_t n_pad, T* to_bias, T* to_gain,
               T* to_offset) const {
    copy_padded(bias, n, n_pad, mean(bias, n), to_bias);
    copy_padded(gain, n, n_pad, T(0), to_gain);
    copy_padded(offset, n, n_pad, T(0), to_offset);
  }

  void skip() const {
    const NetworkSize& s = size();
    const PackLayout& p = layout.pack;
    if (!s.representation) return;
    copy_padded(w.star_gain, s.hidden, s.hidden_pad, T(0), packed + p.star_gain);
    copy_padded(w.star_offset, s.hidden, s.hidden_pad, T(0), packed + p.star_offset);
    vectors(w.skip_bias, w.skip_gain, w.skip_offset, s.hidden, s.hidden_pad, packed + p.skip_bias, packed + p.skip_gain,
            packed + p.skip_offset);
    const Blocks<T> source{w.skip_weight, s.inputs, 1, s.hidden, s.hidden, 0};
    pack_matrix(source, s.hidden_pad, s.hidden_pad, panel, true, packed + p.skip_weight);
    if (backward) pack_transposed(source, s.hidden, s.inputs_pad, panel, packed + p.skip_weight_t);
  }

  void expert_layer(int64_t l) const {
    const NetworkSize& s = size();
    const LayerSize& layer = s.layers[l];
    const LayerOffsets& p = layout.pack.layers[l];
    const ExpertPointers<const T*>& e = w.experts[l];
    for (int64_t i = 0; i < s.experts; ++i) {
      const int64_t from = i * layer.out;
      const int64_t to = i * layer.out_pad;
      vectors(e.bias + from, e.gain + from, e.offset + from, layer.out, layer.out_pad, packed + p.bias + to,
              packed + p.gain + to, packed + p.offset + to);
    }
    if (l == 0) {
      const Blocks<T> source{e.weight, layer.in, s.experts, layer.out, layer.out, layer.in * layer.out};
      pack_matrix(source, layer.out_pad, s.experts * layer.out_pad, panel, true, packed + p.weight);
      if (backward) pack_transposed(source, layer.out_pad, s.hidden_pad, panel, packed + p.weight_t);
      return;
    }
    const int64_t in_pad = s.layers[l - 1].out_pad;
    for (int64_t i = 0; i < s.experts; ++i) {
      const Blocks<T> source{e.weight + i * layer.in * layer.out, layer.in, 1, layer.out, layer.out, 0};
      pack_matrix(source, layer.out_pad, layer.out_pad, panel, true, packed + p.weight + i * layer.in * layer.out_pad);
      if (backward) {
        pack_transposed(source, layer.out, in_pad, panel, packed + p.weight_t + i * layer.out * in_pad);
      }
    }
  }

  void domain(int64_t d, const bool* mask) const {
    const NetworkSize& s = size();
    const PackLayout& p = layout.pack;
    T* own = packed + p.common_size + d * p.domain_size;
    if (s.representation) {
      const T* bias = w.star_bias + d * s.hidden;
      const bool centre = !s.star_linear;
      copy_padded(bias, s.hidden, s.hidden_pad, centre ? mean(bias, s.hidden) : T(0), own + p.star_bias);
      const Blocks<T> source{w.star_weight + d * s.inputs * s.hidden, s.inputs, 1, s.hidden, s.hidden, 0};
      pack_matrix(source, s.hidden_pad, s.hidden_pad, panel, centre, own + p.star_weight);
      if (backward) pack_transposed(source, s.hidden, s.inputs_pad, panel, own + p.star_weight_t);
    }
    const int64_t gates = s.tasks * s.gated;
    const Blocks<T> gate{w.gate_weight + d * s.hidden * gates, s.hidden, s.tasks, s.gated, s.gated, s.hidden * s.gated};
    if (gates > 0) {
      pack_matrix(gate, s.gated, s.gates_pad, panel, false, own + p.gate_weight);
      copy_padded(w.gate_bias + d * gates, gates, s.gates_pad, T(0), own + p.gate_bias);
      if (backward && !s.gate_detach) pack_transposed(gate, s.gated, s.hidden_pad, panel, own + p.gate_weight_t);
    }
    for (int64_t j = 0; j < gates; ++j) own[p.gate_mask + j] = mask == nullptr || mask[d * gates + j] ? T(1) : T(0);
    std::copy_n(w.table + d * s.tasks * s.experts, s.tasks * s.experts, own + p.table);
    for (int64_t t = 0; t < s.tasks; ++t) tower(d * s.tasks + t, t, own);
    std::copy_n(w.head_bias + d * s.tasks, s.tasks, own + p.head_bias);
  }

  void tower(int64_t pair, int64_t t, T* own) const {
    const NetworkSize& s = size();
    const PackLayout& p = layout.pack;
    const int64_t from = pair * s.tower;
    T* to = own + p.tower_vectors + t * 4 * s.tower_pad;
    vectors(w.tower_bias + from, w.tower_gain + from, w.tower_offset + from, s.tower, s.tower_pad, to, to + s.tower_pad,
            to + 2 * s.tower_pad);
    copy_padded(w.head_weight + from, s.tower, s.tower_pad, T(0), to + 3 * s.tower_pad);
    const Blocks<T> source{w.tower_weight + from * s.width, s.width, 1, s.tower, s.tower, 0};
    pack_matrix(source, s.tower_pad, s.tower_pad, panel, true, own + p.tower_weight + t * s.width * s.tower_pad);
    if (backward) {
      pack_transposed(source, s.tower, s.width_pad, panel, own + p.tower_weight_t + t * s.tower * s.width_pad);
    }
  }
};

}  // namespace

template <typename T>
void pack_weights(int64_t job, const WeightPointers<const T*>& weights, const bool* mask, const Layout& layout,
                  int64_t panel, bool backward, T* packed) {
  const Packer<T> packer{weights, layout, panel, backward, packed};
  const int64_t depth = layout.size.depth;
  if (job < depth) {
    packer.expert_layer(job);
  } else if (job == depth) {
    packer.skip();
  } else {
    packer.domain(job - depth - 1, mask);
  }
}

template void pack_weights(int64_t, const WeightPointers<const float*>&, const bool*, const Layout&, int64_t, bool,
                           float*);
template void pack_weights(int64_t, const WeightPointers<const double*>&, const bool*, const Layout&, int64_t, bool,
                           double*);

}  // namespace m3oe

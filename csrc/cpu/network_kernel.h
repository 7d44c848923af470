// Forward and backward of the whole network for one tile of rows of one domain, on an engine E (engine/*.h) that
// multiplies matrices and its vector type S, which does the rest in the elements' own precision.
//
//   r   = [relu(LN(x M_d + m_d))] + relu(LN(x W_a + b_a))
//   z_e = relu(LN(r W_e + b_e)), any depth                     e < E
//   c_te = softmax_{e < G}(r G_dt + c_dt) + table[d, t, e]
//   u_t = sum_e c_te z_e
//   logit_t = w2_dt . relu(LN(u_t W1_dt + b1_dt)) + b2_dt
//
// Decomposition: one call per (tile, worker), no threads inside. Memory traffic: x in, logits out; every
// intermediate stays in the worker's tile (about 12 kB per row at the published sizes), the packed weights stream from
// L2/L3 once per tile.
//
// Padding: columns between a width and its `_pad` hold zeros wherever a vector operation reads them, because packed
// weights, biases and gains are zero there. Only the gradient of a pre-activation has other values in its padding; it
// is read through k_count (true width) or meets zero rows, and the padded columns of private gradients are dropped.
// (Zero times such a value is NaN only where the row's own gradient is not finite, so it stays in its row.)
#pragma once

#include "gemm_kernel.h"
#include "network.h"

namespace m3oe {
namespace {

template <class S>
inline typename S::T reciprocal_std(typename S::T sum_of_squares, int64_t n) {
  using T = typename S::T;
  constexpr T kEps = static_cast<T>(1e-5);
  return T(1) / S::sqrt(sum_of_squares / static_cast<T>(n) + kEps);
}

// relu(LN(pre)) of one centred row. kKeep: pre becomes the normalised row and *rstd its scale.
template <class S, bool kKeep, bool kAdd>
inline void norm_relu_row(typename S::T* pre, typename S::T* out, int64_t n, int64_t n_pad, const typename S::T* gain,
                          const typename S::T* offset, typename S::T* rstd) {
  using Reg = typename S::Reg;
  Reg squares = S::zero();
  for (int64_t v = 0; v < n_pad; v += S::kLanes) {
    const Reg p = S::load(pre + v);
    squares = S::fma(p, p, squares);
  }
  const typename S::T scale = reciprocal_std<S>(S::sum(squares), n);
  if constexpr (kKeep) *rstd = scale;
  const Reg scales = S::set1(scale);
  for (int64_t v = 0; v < n_pad; v += S::kLanes) {
    const Reg hat = S::mul(S::load(pre + v), scales);
    if constexpr (kKeep) S::store(pre + v, hat);
    Reg y = S::relu(S::fma(hat, S::load(gain + v), S::load(offset + v)));
    if constexpr (kAdd) y = S::add(y, S::load(out + v));
    S::store(out + v, y);
  }
}

// Gradient of relu(LN(.)) for one row: `grad` enters as d loss / d output and leaves as d loss / d pre-activation.
template <class S>
inline void norm_relu_backward_row(typename S::T* grad, const typename S::T* hat, typename S::T rstd, int64_t n,
                                   int64_t n_pad, const typename S::T* gain, const typename S::T* offset,
                                   typename S::T* d_bias, typename S::T* d_gain, typename S::T* d_offset) {
  using Reg = typename S::Reg;
  Reg sum = S::zero();
  Reg dot = S::zero();
  for (int64_t v = 0; v < n_pad; v += S::kLanes) {
    const Reg h = S::load(hat + v);
    const Reg w = S::load(gain + v);
    const Reg dy = S::where_positive(S::fma(h, w, S::load(offset + v)), S::load(grad + v));
    S::store(d_gain + v, S::fma(dy, h, S::load(d_gain + v)));
    S::store(d_offset + v, S::add(dy, S::load(d_offset + v)));
    const Reg g = S::mul(dy, w);
    S::store(grad + v, g);
    sum = S::add(sum, g);
    dot = S::fma(g, h, dot);
  }
  const auto count = static_cast<typename S::T>(n);
  const Reg mean = S::set1(S::sum(sum) / count);
  const Reg slope = S::set1(S::sum(dot) / count);
  const Reg scale = S::set1(rstd);
  for (int64_t v = 0; v < n_pad; v += S::kLanes) {
    const Reg centred = S::sub(S::load(grad + v), mean);
    const Reg d_pre = S::mul(scale, S::sub(centred, S::mul(S::load(hat + v), slope)));
    S::store(grad + v, d_pre);
    S::store(d_bias + v, S::add(d_pre, S::load(d_bias + v)));
  }
}

template <class E>
struct Tile {
  using S = typename E::S;
  using T = typename E::T;
  using Left = typename E::Left;

  const NetworkSize& size;
  const PackLayout& pack_layout;
  const TileLayout& layout;
  const T* common;  // packed weights that all domains share
  const T* own;     // packed weights of this tile's domain
  T* tile;
  int64_t rows;

  T* at(int64_t offset) const { return tile + offset; }
  int64_t packed(int64_t k) const { return packed_rows(size.format, k); }
  Left left(int64_t k, const T* a, int64_t lda, int which = 0) const {
    return E::left(rows, k, a, lda, at(layout.operand[which]));
  }
  const T* tower_vector(int64_t t, int64_t which) const {
    return own + pack_layout.tower_vectors + (t * 4 + which) * size.tower_pad;
  }

  template <bool kKeep>
  void representation() const {
    const NetworkSize& s = size;
    const Left x = left(s.inputs, at(layout.x), s.ld_input);
    E::template product<Init::kBias>(rows, x, s.hidden_pad, own + pack_layout.star_weight, at(layout.star_hat),
                                     s.ld_hidden, own + pack_layout.star_bias);
    E::template product<Init::kBias>(rows, x, s.hidden_pad, common + pack_layout.skip_weight, at(layout.skip_hat),
                                     s.ld_hidden, common + pack_layout.skip_bias);
    for (int64_t i = 0; i < rows; ++i) {
      T* r = at(layout.r) + i * s.ld_hidden;
      T* star = at(layout.star_hat) + i * s.ld_hidden;
      T* skip = at(layout.skip_hat) + i * s.ld_hidden;
      norm_relu_row<S, kKeep, false>(skip, r, s.hidden, s.hidden_pad, common + pack_layout.skip_gain,
                                     common + pack_layout.skip_offset, at(layout.skip_rstd) + i);
      if (s.star_linear) {
        for (int64_t v = 0; v < s.hidden_pad; v += S::kLanes)
          S::store(r + v, S::add(S::load(r + v), S::load(star + v)));
      } else {
        norm_relu_row<S, kKeep, true>(star, r, s.hidden, s.hidden_pad, common + pack_layout.star_gain,
                                      common + pack_layout.star_offset, at(layout.star_rstd) + i);
      }
    }
  }

  // Activations of layer l; they overwrite the pre-activations unless the backward pass needs those.
  T* activations(int64_t l, bool keep) const { return at(keep ? layout.layers[l].out : layout.layers[l].hat); }

  template <bool kKeep>
  void experts(const Left& r) const {
    for (int64_t l = 0; l < size.depth; ++l) {
      const LayerSize& layer = size.layers[l];
      const LayerOffsets& weights = pack_layout.layers[l];
      T* hat = at(layout.layers[l].hat);
      if (l == 0) {
        E::template product<Init::kBias>(rows, r, size.experts * layer.out_pad, common + weights.weight, hat, layer.ld,
                                         common + weights.bias);
      } else {
        const T* in = activations(l - 1, kKeep);
        for (int64_t e = 0; e < size.experts; ++e) {
          const Left z = left(layer.in, in + e * size.layers[l - 1].out_pad, size.layers[l - 1].ld, 1);
          E::template product<Init::kBias>(
              rows, z, layer.out_pad, common + weights.weight + e * packed(layer.in) * layer.out_pad,
              hat + e * layer.out_pad, layer.ld, common + weights.bias + e * layer.out_pad);
        }
      }
      T* out = activations(l, kKeep);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t e = 0; e < size.experts; ++e) {
          const int64_t column = e * layer.out_pad;
          norm_relu_row<S, kKeep, false>(hat + i * layer.ld + column, out + i * layer.ld + column, layer.out,
                                         layer.out_pad, common + weights.gain + column,
                                         common + weights.offset + column,
                                         at(layout.layers[l].rstd) + i * size.experts + e);
        }
      }
    }
  }

  // Gate probabilities [rows][T * G] into the gate buffer, coefficients [rows][T * E] into coef.
  void coefficients(const Left& r) const {
    const NetworkSize& s = size;
    const T* table = own + pack_layout.table;
    const T* mask = own + pack_layout.gate_mask;
    T* gate = at(layout.gate);
    if (s.gated > 0) {
      E::template product<Init::kBias>(rows, r, s.gates_pad, own + pack_layout.gate_weight, gate, s.ld_gate,
                                       own + pack_layout.gate_bias);
      for (int64_t i = 0; i < rows; ++i) shift_by_maximum(gate + i * s.ld_gate, mask);
      for (int64_t i = 0; i < rows * s.ld_gate; i += S::kLanes) S::store(gate + i, S::exp(S::load(gate + i)));
      for (int64_t i = 0; i < rows; ++i) normalise(gate + i * s.ld_gate, mask);
    }
    for (int64_t i = 0; i < rows; ++i) {
      T* coef = at(layout.coef) + i * s.tasks * s.experts;
      for (int64_t j = 0; j < s.tasks * s.experts; ++j) coef[j] = table[j];
      for (int64_t t = 0; t < s.tasks; ++t) {
        for (int64_t g = 0; g < s.gated; ++g) coef[t * s.experts + g] += gate[i * s.ld_gate + t * s.gated + g];
      }
    }
  }

  // Subtracts each task's largest score. The padding is zeroed too, since exp runs over whole vectors of the buffer.
  void shift_by_maximum(T* scores, const T* mask) const {
    for (int64_t t = 0; t < size.tasks; ++t) {
      T* score = scores + t * size.gated;
      T top = -S::kInfinity;
      for (int64_t g = 0; g < size.gated; ++g) {
        const bool open = !size.masked || mask[t * size.gated + g] != 0;
        // Written so that a NaN score stays the maximum and poisons this row's softmax, as in PyTorch.
        if (open && !(score[g] <= top)) top = score[g];
      }
      for (int64_t g = 0; g < size.gated; ++g) score[g] -= top;
    }
    for (int64_t j = size.tasks * size.gated; j < size.ld_gate; ++j) scores[j] = 0;
  }

  void normalise(T* weights, const T* mask) const {
    for (int64_t t = 0; t < size.tasks; ++t) {
      T* weight = weights + t * size.gated;
      T sum = 0;
      for (int64_t g = 0; g < size.gated; ++g) {
        if (size.masked && mask[t * size.gated + g] == 0) weight[g] = 0;
        sum += weight[g];
      }
      if (sum == 0) continue;  // every expert of this pair is masked
      for (int64_t g = 0; g < size.gated; ++g) weight[g] /= sum;
    }
  }

  template <bool kKeep>
  void fuse() const {
    const NetworkSize& s = size;
    const LayerSize& last = s.layers[s.depth - 1];
    const T* z = activations(s.depth - 1, kKeep);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t t = 0; t < s.tasks; ++t) {
        const T* coef = at(layout.coef) + (i * s.tasks + t) * s.experts;
        T* u = at(layout.u) + i * s.ld_width + t * s.width_pad;
        int64_t v = 0;
        for (; v + 4 * S::kLanes <= s.width_pad; v += 4 * S::kLanes) {
          mix<4>(z + i * last.ld + v, last.out_pad, coef, u + v);
        }
        for (; v < s.width_pad; v += S::kLanes) mix<1>(z + i * last.ld + v, last.out_pad, coef, u + v);
      }
    }
  }

  // u = sum_e coef[e] z[e] over NV vectors.
  template <int NV>
  void mix(const T* z, int64_t stride, const T* coef, T* u) const {
    typename S::Reg acc[NV];
    for (int j = 0; j < NV; ++j) acc[j] = S::zero();
    for (int64_t e = 0; e < size.experts; ++e) {
      const auto c = S::set1(coef[e]);
      for (int j = 0; j < NV; ++j) acc[j] = S::fma(c, S::load(z + e * stride + j * S::kLanes), acc[j]);
    }
    for (int j = 0; j < NV; ++j) S::store(u + j * S::kLanes, acc[j]);
  }

  template <bool kKeep>
  void towers() const {
    const NetworkSize& s = size;
    const int64_t h_offset = kKeep ? layout.h : layout.tower_hat;
    for (int64_t t = 0; t < s.tasks; ++t) {
      T* hat = at(layout.tower_hat) + t * s.tower_pad;
      const Left u = left(s.width, at(layout.u) + t * s.width_pad, s.ld_width);
      E::template product<Init::kBias>(rows, u, s.tower_pad,
                                       own + pack_layout.tower_weight + t * packed(s.width) * s.tower_pad, hat,
                                       s.ld_tower, tower_vector(t, 0));
      const T* head = tower_vector(t, 3);
      const T bias = own[pack_layout.head_bias + t];
      for (int64_t i = 0; i < rows; ++i) {
        T* h = at(h_offset) + i * s.ld_tower + t * s.tower_pad;
        norm_relu_row<S, kKeep, false>(hat + i * s.ld_tower, h, s.tower, s.tower_pad, tower_vector(t, 1),
                                       tower_vector(t, 2), at(layout.tower_rstd) + i * s.tasks + t);
        typename S::Reg dot = S::zero();
        for (int64_t v = 0; v < s.tower_pad; v += S::kLanes) dot = S::fma(S::load(h + v), S::load(head + v), dot);
        at(layout.logit)[i * s.tasks + t] = S::sum(dot) + bias;
      }
    }
  }

  template <bool kKeep>
  void forward() const {
    if (size.representation) representation<kKeep>();
    const Left r = left(size.hidden, at(layout.r), size.ld_hidden);
    coefficients(r);
    experts<kKeep>(r);
    fuse<kKeep>();
    towers<kKeep>();
  }
};

template <class E>
struct BackwardTile : Tile<E> {
  using Base = Tile<E>;
  using Base::at;
  using Base::common;
  using Base::layout;
  using Base::left;
  using Base::own;
  using Base::pack_layout;
  using Base::packed;
  using Base::rows;
  using Base::size;
  using typename Base::Left;
  using typename Base::S;
  using typename Base::T;

  const GradLayout& grad_layout;
  T* common_grad;
  T* own_grad;

  // c [k][n_pad] += a^T b over the tile's rows: a weight gradient.
  void outer(int64_t k, int64_t n_pad, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) const {
    T* const room[2] = {at(layout.operand[0]), at(layout.operand[1])};
    E::outer(rows, k, n_pad, a, lda, b, ldb, c, ldc, room);
  }

  // Vector gradients are summed over the tile first, in this scratch memory, and added to the worker's at its end: sums
  // of tile sums keep digits that one chain through all rows would lose.
  T* open_sums(int64_t n) const {
    T* sums = at(layout.d_sums);
    for (int64_t j = 0; j < n; ++j) sums[j] = 0;
    return sums;
  }

  static void add_sums(const T* sums, int64_t n, T* to) {
    for (int64_t j = 0; j < n; ++j) to[j] += sums[j];
  }

  // d_logit -> d_u, and the gradients of towers and heads.
  void towers() const {
    const NetworkSize& s = size;
    for (int64_t t = 0; t < s.tasks; ++t) {
      T* vectors = open_sums(4 * s.tower_pad);
      T* d_head = vectors + 3 * s.tower_pad;
      T d_bias = 0;
      const T* head = Base::tower_vector(t, 3);
      for (int64_t i = 0; i < rows; ++i) {
        const T d_logit = at(layout.d_logit)[i * s.tasks + t];
        d_bias += d_logit;
        const auto d = S::set1(d_logit);
        const int64_t column = i * s.ld_tower + t * s.tower_pad;
        T* d_h = at(layout.d_h) + column;
        const T* h = at(layout.h) + column;
        for (int64_t v = 0; v < s.tower_pad; v += S::kLanes) {
          S::store(d_head + v, S::fma(d, S::load(h + v), S::load(d_head + v)));
          S::store(d_h + v, S::mul(d, S::load(head + v)));
        }
        norm_relu_backward_row<S>(d_h, at(layout.tower_hat) + column, at(layout.tower_rstd)[i * s.tasks + t], s.tower,
                                  s.tower_pad, Base::tower_vector(t, 1), Base::tower_vector(t, 2), vectors,
                                  vectors + s.tower_pad, vectors + 2 * s.tower_pad);
      }
      own_grad[grad_layout.head_bias + t] += d_bias;
      add_sums(vectors, 4 * s.tower_pad, own_grad + grad_layout.tower_vectors + t * 4 * s.tower_pad);
      const T* d_pre = at(layout.d_h) + t * s.tower_pad;
      outer(s.width, s.tower_pad, at(layout.u) + t * s.width_pad, s.ld_width, d_pre, s.ld_tower,
            own_grad + grad_layout.tower_weight + t * s.width * s.tower_pad, s.tower_pad);
      E::template product<Init::kZero>(rows, left(s.tower, d_pre, s.ld_tower), s.width_pad,
                                       own + pack_layout.tower_weight_t + t * packed(s.tower) * s.width_pad,
                                       at(layout.d_u) + t * s.width_pad, s.ld_width);
    }
  }

  // d_u -> d_z of the last expert layer, gradients of the table, d_gate (gradient of the gate scores).
  void fusion() const {
    const NetworkSize& s = size;
    const LayerSize& last = s.layers[s.depth - 1];
    const int64_t pairs = s.tasks * s.experts;
    T* d_table = open_sums(pairs);
    for (int64_t i = 0; i < rows; ++i) {
      const T* z = at(layout.layers[s.depth - 1].out) + i * last.ld;
      const T* coef = at(layout.coef) + i * pairs;
      const T* d_u = at(layout.d_u) + i * s.ld_width;
      T* d_z = at(layout.d_z[(s.depth - 1) & 1]) + i * last.ld;
      T* d_coef = at(layout.d_coef);
      for (int64_t e = 0; e < s.experts; ++e) {
        for (int64_t t = 0; t < s.tasks; ++t) {
          auto dot = S::zero();
          for (int64_t v = 0; v < s.width_pad; v += S::kLanes) {
            dot = S::fma(S::load(d_u + t * s.width_pad + v), S::load(z + e * last.out_pad + v), dot);
          }
          d_coef[t * s.experts + e] = S::sum(dot);
        }
        for (int64_t v = 0; v < s.width_pad; v += S::kLanes) {
          auto sum = S::zero();
          for (int64_t t = 0; t < s.tasks; ++t) {
            sum = S::fma(S::set1(coef[t * s.experts + e]), S::load(d_u + t * s.width_pad + v), sum);
          }
          S::store(d_z + e * last.out_pad + v, sum);
        }
      }
      for (int64_t j = 0; j < pairs; ++j) d_table[j] += d_coef[j];
      softmax_backward(at(layout.gate) + i * s.ld_gate, d_coef, at(layout.d_gate) + i * s.ld_gate);
    }
    add_sums(d_table, pairs, own_grad + grad_layout.table);
  }

  void softmax_backward(const T* gate, const T* d_coef, T* d_gate) const {
    const NetworkSize& s = size;
    const T* mask = own + pack_layout.gate_mask;
    // Masked experts are skipped, not multiplied by zero: a NaN of another expert must not reach them.
    const auto open = [&](int64_t j) { return !s.masked || mask[j] != 0; };
    for (int64_t t = 0; t < s.tasks; ++t) {
      T dot = 0;
      for (int64_t g = 0; g < s.gated; ++g) {
        const int64_t j = t * s.gated + g;
        if (open(j)) dot += gate[j] * d_coef[t * s.experts + g];
      }
      for (int64_t g = 0; g < s.gated; ++g) {
        const int64_t j = t * s.gated + g;
        d_gate[j] = open(j) ? gate[j] * (d_coef[t * s.experts + g] - dot) : T(0);
      }
    }
    for (int64_t j = s.tasks * s.gated; j < s.gates_pad; ++j) d_gate[j] = 0;
  }

  // d_z of the last layer -> d_r; gradients of every expert layer.
  void experts() const {
    for (int64_t l = size.depth - 1; l >= 0; --l) {
      const LayerSize& layer = size.layers[l];
      const LayerOffsets& weights = pack_layout.layers[l];
      const LayerOffsets& grads = grad_layout.layers[l];
      const int64_t columns = size.experts * layer.out_pad;
      T* d_z = at(layout.d_z[l & 1]);
      T* sums = open_sums(3 * columns);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t e = 0; e < size.experts; ++e) {
          const int64_t column = e * layer.out_pad;
          norm_relu_backward_row<S>(d_z + i * layer.ld + column, at(layout.layers[l].hat) + i * layer.ld + column,
                                    at(layout.layers[l].rstd)[i * size.experts + e], layer.out, layer.out_pad,
                                    common + weights.gain + column, common + weights.offset + column, sums + column,
                                    sums + columns + column, sums + 2 * columns + column);
        }
      }
      add_sums(sums, columns, common_grad + grads.bias);
      add_sums(sums + columns, columns, common_grad + grads.gain);
      add_sums(sums + 2 * columns, columns, common_grad + grads.offset);
      if (l == 0) {
        outer(layer.in, columns, at(layout.r), size.ld_hidden, d_z, layer.ld, common_grad + grads.weight, columns);
        E::template product<Init::kZero>(rows, left(columns, d_z, layer.ld), size.hidden_pad, common + weights.weight_t,
                                         at(layout.d_r), size.ld_hidden);
      } else {
        deeper_layer(l, d_z);
      }
    }
  }

  void deeper_layer(int64_t l, const T* d_z) const {
    const LayerSize& layer = size.layers[l];
    const LayerSize& before = size.layers[l - 1];
    const T* in = at(layout.layers[l - 1].out);
    T* d_in = at(layout.d_z[(l - 1) & 1]);
    for (int64_t e = 0; e < size.experts; ++e) {
      outer(layer.in, layer.out_pad, in + e * before.out_pad, before.ld, d_z + e * layer.out_pad, layer.ld,
            common_grad + grad_layout.layers[l].weight + e * layer.in * layer.out_pad, layer.out_pad);
      E::template product<Init::kZero>(rows, left(layer.out, d_z + e * layer.out_pad, layer.ld), before.out_pad,
                                       common + pack_layout.layers[l].weight_t + e * packed(layer.out) * before.out_pad,
                                       d_in + e * before.out_pad, before.ld);
    }
  }

  void gates() const {
    const NetworkSize& s = size;
    if (s.gated == 0) return;
    const T* d_gate = at(layout.d_gate);
    outer(s.hidden, s.gates_pad, at(layout.r), s.ld_hidden, d_gate, s.ld_gate, own_grad + grad_layout.gate_weight,
          s.gates_pad);
    T* d_bias = open_sums(s.gates_pad);
    for (int64_t i = 0; i < rows; ++i) add_sums(d_gate + i * s.ld_gate, s.gates_pad, d_bias);
    add_sums(d_bias, s.gates_pad, own_grad + grad_layout.gate_bias);
    if (!s.gate_detach) {
      E::template product<Init::kAdd>(rows, left(s.tasks * s.gated, d_gate, s.ld_gate), s.hidden_pad,
                                      own + pack_layout.gate_weight_t, at(layout.d_r), s.ld_hidden);
    }
  }

  // d_r -> d_x; gradients of the star and skip layers.
  void representation(bool input_grad) const {
    const NetworkSize& s = size;
    const int64_t n = s.hidden_pad;
    T* sums = open_sums(6 * n);  // bias, gain, offset of the skip layer, then of the star layer
    for (int64_t i = 0; i < rows; ++i) {
      const T* d_r = at(layout.d_r) + i * s.ld_hidden;
      T* d_star = at(layout.d_star) + i * s.ld_hidden;
      T* d_skip = at(layout.d_skip) + i * s.ld_hidden;
      for (int64_t v = 0; v < s.hidden_pad; v += S::kLanes) {
        S::store(d_star + v, S::load(d_r + v));
        S::store(d_skip + v, S::load(d_r + v));
      }
      norm_relu_backward_row<S>(d_skip, at(layout.skip_hat) + i * s.ld_hidden, at(layout.skip_rstd)[i], s.hidden,
                                s.hidden_pad, common + pack_layout.skip_gain, common + pack_layout.skip_offset, sums,
                                sums + n, sums + 2 * n);
      if (s.star_linear) {
        add_sums(d_star, n, sums + 3 * n);
      } else {
        norm_relu_backward_row<S>(d_star, at(layout.star_hat) + i * s.ld_hidden, at(layout.star_rstd)[i], s.hidden,
                                  s.hidden_pad, common + pack_layout.star_gain, common + pack_layout.star_offset,
                                  sums + 3 * n, sums + 4 * n, sums + 5 * n);
      }
    }
    add_sums(sums, n, common_grad + grad_layout.skip_bias);
    add_sums(sums + n, n, common_grad + grad_layout.skip_gain);
    add_sums(sums + 2 * n, n, common_grad + grad_layout.skip_offset);
    add_sums(sums + 3 * n, n, own_grad + grad_layout.star_bias);
    add_sums(sums + 4 * n, n, common_grad + grad_layout.star_gain);
    add_sums(sums + 5 * n, n, common_grad + grad_layout.star_offset);
    outer(s.inputs, s.hidden_pad, at(layout.x), s.ld_input, at(layout.d_star), s.ld_hidden,
          own_grad + grad_layout.star_weight, s.hidden_pad);
    outer(s.inputs, s.hidden_pad, at(layout.x), s.ld_input, at(layout.d_skip), s.ld_hidden,
          common_grad + grad_layout.skip_weight, s.hidden_pad);
    if (!input_grad) return;
    E::template product<Init::kZero>(rows, left(s.hidden, at(layout.d_star), s.ld_hidden), s.inputs_pad,
                                     own + pack_layout.star_weight_t, at(layout.d_x), s.ld_input);
    E::template product<Init::kAdd>(rows, left(s.hidden, at(layout.d_skip), s.ld_hidden), s.inputs_pad,
                                    common + pack_layout.skip_weight_t, at(layout.d_x), s.ld_input);
  }

  void backward(bool input_grad) const {
    towers();
    fusion();
    experts();
    gates();
    if (size.representation) representation(input_grad);
  }
};

template <class E>
Tile<E> make_tile(const NetworkSize& size, const PackLayout& pack_layout, const typename E::T* pack,
                  const TileLayout& layout, typename E::T* tile, int64_t d, int64_t rows) {
  return {size, pack_layout, layout, pack, pack + pack_layout.common_size + d * pack_layout.domain_size, tile, rows};
}

template <class E>
void tile_forward(const NetworkSize& size, const PackLayout& pack_layout, const typename E::T* pack,
                  const TileLayout& layout, typename E::T* tile, int64_t d, int64_t rows, bool keep) {
  [[maybe_unused]] const typename E::Session session;
  const Tile<E> work = make_tile<E>(size, pack_layout, pack, layout, tile, d, rows);
  if (keep) {
    work.template forward<true>();
  } else {
    work.template forward<false>();
  }
}

template <class E>
void tile_backward(const NetworkSize& size, const PackLayout& pack_layout, const typename E::T* pack,
                   const GradLayout& grad_layout, typename E::T* grad, const TileLayout& layout, typename E::T* tile,
                   int64_t d, int64_t rows, bool input_grad) {
  [[maybe_unused]] const typename E::Session session;
  const BackwardTile<E> work{make_tile<E>(size, pack_layout, pack, layout, tile, d, rows), grad_layout, grad,
                             grad + grad_layout.common_size + d * grad_layout.domain_size};
  work.backward(input_grad);
}

template <class S>
void sigmoid(typename S::T* values, int64_t n) {
  const auto one = S::set1(1);
  for (int64_t i = 0; i < n; i += S::kLanes) {
    const auto e = S::exp(S::sub(S::zero(), S::load(values + i)));
    S::store(values + i, S::div(one, S::add(one, e)));
  }
}

template <class E>
constexpr NetworkKernels<typename E::T> network_kernels() {
  using S = typename E::S;
  return {S::kLanes, S::kPanelVectors * S::kLanes, E::kFormat, &tile_forward<E>, &sigmoid<S>, &tile_backward<E>};
}

}  // namespace
}  // namespace m3oe

// Forward and backward of the whole network for one tile of rows of one domain, on an engine E (engine/*.h) that
// multiplies matrices and its vector type S, which does the rest in the elements' own precision.
//
//   r   = [relu(LN(x M_d + m_d))] + relu(LN(x W_a + b_a))
//   z_e = relu(LN(r W_e + b_e)), any depth                     e < E
//   c_te = softmax_{e < G}(r G_dt + c_dt) + table[d, t, e]
//   u_t = sum_e c_te z_e
//   logit_t = w2_dt . relu(LN(u_t W1_dt + b1_dt)) + b2_dt
//
// Of the experts only those that the tile's domain uses are computed (PackLayout::used): a list per domain, no branch
// per row. What the others have in the tile's buffers is never written or read.
//
// Decomposition: one call per (tile, worker), no threads inside. Memory traffic: x in, logits out; every
// intermediate stays in the worker's tile (7.5 KB per row forward, 20 with backward, at the published sizes), the
// packed weights stream from L2/L3 once per tile.
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

// relu(LN(pre)) of R centred rows, `ld` elements apart in `pre` and `out`; several at once, so that their reductions
// overlap and gain and offset are read once. kKeep: pre becomes the normalised rows and rstd[i * rstd_stride] their
// scales.
template <class S, int R, bool kKeep, bool kAdd>
inline void norm_relu_block(typename S::T* pre, typename S::T* out, int64_t ld, int64_t n, int64_t n_pad,
                            const typename S::T* gain, const typename S::T* offset, typename S::T* rstd,
                            int64_t rstd_stride) {
  using Reg = typename S::Reg;
  Reg squares[R];
  for (int i = 0; i < R; ++i) squares[i] = S::zero();
  for (int64_t v = 0; v < n_pad; v += S::kLanes) {
    for (int i = 0; i < R; ++i) {
      const Reg p = S::load(pre + i * ld + v);
      squares[i] = S::fma(p, p, squares[i]);
    }
  }
  typename S::T sums[R];
  S::template sums<R>(squares, sums);
  Reg scales[R];
  for (int i = 0; i < R; ++i) {
    const typename S::T scale = reciprocal_std<S>(sums[i], n);
    if constexpr (kKeep) rstd[i * rstd_stride] = scale;
    scales[i] = S::set1(scale);
  }
  for (int64_t v = 0; v < n_pad; v += S::kLanes) {
    const Reg w = S::load(gain + v);
    const Reg b = S::load(offset + v);
    for (int i = 0; i < R; ++i) {
      const Reg hat = S::mul(S::load(pre + i * ld + v), scales[i]);
      if constexpr (kKeep) S::store(pre + i * ld + v, hat);
      Reg y = S::relu(S::fma(hat, w, b));
      if constexpr (kAdd) y = S::add(y, S::load(out + i * ld + v));
      S::store(out + i * ld + v, y);
    }
  }
}

template <class S, bool kKeep, bool kAdd>
inline void norm_relu(int64_t rows, typename S::T* pre, typename S::T* out, int64_t ld, int64_t n, int64_t n_pad,
                      const typename S::T* gain, const typename S::T* offset, typename S::T* rstd,
                      int64_t rstd_stride) {
  constexpr int kRows = S::kNormRows;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    norm_relu_block<S, kRows, kKeep, kAdd>(pre + i * ld, out + i * ld, ld, n, n_pad, gain, offset,
                                           rstd + i * rstd_stride, rstd_stride);
  }
  for (; i < rows; ++i) {
    norm_relu_block<S, 1, kKeep, kAdd>(pre + i * ld, out + i * ld, ld, n, n_pad, gain, offset, rstd + i * rstd_stride,
                                       rstd_stride);
  }
}

// Where the vector gradients of one LayerNorm are summed.
template <typename T>
struct NormGrads {
  T *bias, *gain, *offset;
};

// Gradient of relu(LN(.)) for R rows, `ld` elements apart: from d loss / d output in `from` to d loss / d
// pre-activation in `grad`, which may be the same memory.
template <class S, int R>
inline void norm_relu_backward_block(const typename S::T* from, typename S::T* grad, const typename S::T* hat,
                                     int64_t ld, const typename S::T* rstd, int64_t rstd_stride, int64_t n,
                                     int64_t n_pad, const typename S::T* gain, const typename S::T* offset,
                                     const NormGrads<typename S::T>& to) {
  using Reg = typename S::Reg;
  Reg sum[R], dot[R];
  for (int i = 0; i < R; ++i) sum[i] = dot[i] = S::zero();
  for (int64_t v = 0; v < n_pad; v += S::kLanes) {
    const Reg w = S::load(gain + v);
    const Reg b = S::load(offset + v);
    Reg d_gain = S::load(to.gain + v);
    Reg d_offset = S::load(to.offset + v);
    for (int i = 0; i < R; ++i) {
      const Reg h = S::load(hat + i * ld + v);
      const Reg dy = S::where_positive(S::fma(h, w, b), S::load(from + i * ld + v));
      d_gain = S::fma(dy, h, d_gain);
      d_offset = S::add(dy, d_offset);
      const Reg g = S::mul(dy, w);
      S::store(grad + i * ld + v, g);
      sum[i] = S::add(sum[i], g);
      dot[i] = S::fma(g, h, dot[i]);
    }
    S::store(to.gain + v, d_gain);
    S::store(to.offset + v, d_offset);
  }
  typename S::T sums[R], dots[R];
  S::template sums<R>(sum, sums);
  S::template sums<R>(dot, dots);
  const auto count = static_cast<typename S::T>(n);
  Reg mean[R], slope[R], scale[R];
  for (int i = 0; i < R; ++i) {
    mean[i] = S::set1(sums[i] / count);
    slope[i] = S::set1(dots[i] / count);
    scale[i] = S::set1(rstd[i * rstd_stride]);
  }
  for (int64_t v = 0; v < n_pad; v += S::kLanes) {
    Reg d_bias = S::load(to.bias + v);
    for (int i = 0; i < R; ++i) {
      const Reg centred = S::sub(S::load(grad + i * ld + v), mean[i]);
      const Reg d_pre = S::mul(scale[i], S::sub(centred, S::mul(S::load(hat + i * ld + v), slope[i])));
      S::store(grad + i * ld + v, d_pre);
      d_bias = S::add(d_pre, d_bias);
    }
    S::store(to.bias + v, d_bias);
  }
}

template <class S>
inline void norm_relu_backward(int64_t rows, const typename S::T* from, typename S::T* grad, const typename S::T* hat,
                               int64_t ld, const typename S::T* rstd, int64_t rstd_stride, int64_t n, int64_t n_pad,
                               const typename S::T* gain, const typename S::T* offset,
                               const NormGrads<typename S::T>& to) {
  constexpr int kRows = S::kNormRows;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    norm_relu_backward_block<S, kRows>(from + i * ld, grad + i * ld, hat + i * ld, ld, rstd + i * rstd_stride,
                                       rstd_stride, n, n_pad, gain, offset, to);
  }
  for (; i < rows; ++i) {
    norm_relu_backward_block<S, 1>(from + i * ld, grad + i * ld, hat + i * ld, ld, rstd + i * rstd_stride, rstd_stride,
                                   n, n_pad, gain, offset, to);
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
  // body(first, end) for every run of experts that the domain uses, in ascending order.
  template <typename Body>
  void each_run(const Body& body) const {
    const T* used = own + pack_layout.used;
    const auto count = static_cast<int64_t>(used[0]);
    for (int64_t i = 0; i < count; ++i) {
      body(static_cast<int64_t>(used[1 + 2 * i]), static_cast<int64_t>(used[2 + 2 * i]));
    }
  }

  // body(e) for every expert that the domain uses.
  template <typename Body>
  void each_expert(const Body& body) const {
    each_run([&](int64_t first, int64_t end) {
      for (int64_t e = first; e < end; ++e) body(e);
    });
  }

  const T* tower_vector(int64_t t, int64_t which) const {
    return own + pack_layout.tower_vectors + (t * 4 + which) * size.tower_pad;
  }

  template <bool kKeep>
  void representation() const {
    const NetworkSize& s = size;
    const Left x = left(s.inputs, at(layout.x), s.ld_input);
    for (int64_t i = 0; i < rows; i += E::kChunk) {
      representation_chunk<kKeep>(x.from(i), i, rows - i < E::kChunk ? rows - i : E::kChunk);
    }
  }

  // Rows first .. first + count: few enough that what the products wrote is still in L1 when it is normalised.
  template <bool kKeep>
  void representation_chunk(const Left& x, int64_t first, int64_t count) const {
    const NetworkSize& s = size;
    const int64_t n = s.hidden, n_pad = s.hidden_pad, ld = s.ld_hidden;
    T* star = at(layout.star_hat) + first * ld;
    T* skip = at(layout.skip_hat) + first * ld;
    T* r = at(layout.r) + first * ld;
    E::template product<Init::kBias>(count, x, n_pad, own + pack_layout.star_weight, star, ld,
                                     own + pack_layout.star_bias);
    E::template product<Init::kBias>(count, x, n_pad, common + pack_layout.skip_weight, skip, ld,
                                     common + pack_layout.skip_bias);
    norm_relu<S, kKeep, false>(count, skip, r, ld, n, n_pad, common + pack_layout.skip_gain,
                               common + pack_layout.skip_offset, at(layout.skip_rstd) + first, 1);
    if (!s.star_linear) {
      norm_relu<S, kKeep, true>(count, star, r, ld, n, n_pad, common + pack_layout.star_gain,
                                common + pack_layout.star_offset, at(layout.star_rstd) + first, 1);
      return;
    }
    for (int64_t i = 0; i < count * ld; i += ld) {
      for (int64_t v = i; v < i + n_pad; v += S::kLanes) S::store(r + v, S::add(S::load(r + v), S::load(star + v)));
    }
  }

  // Activations of layer l; they overwrite the pre-activations unless the backward pass needs those.
  T* activations(int64_t l, bool keep) const { return at(keep ? layout.layers[l].out : layout.layers[l].hat); }

  // Expert after expert: what its product wrote, [rows][X], is still in L1 when it is normalised.
  template <bool kKeep>
  void experts(const Left& r) const {
    for (int64_t l = 0; l < size.depth; ++l) {
      const LayerSize& layer = size.layers[l];
      const LayerOffsets& weights = pack_layout.layers[l];
      T* hat = at(layout.layers[l].hat);
      T* out = activations(l, kKeep);
      each_expert([&](int64_t e) {
        const int64_t column = e * layer.out_pad;
        const Left in = l == 0 ? r : expert_input<kKeep>(l, e);
        E::template product<Init::kBias>(rows, in, layer.out_pad, common + weights.weight + column * packed(layer.in),
                                         hat + column, layer.ld, common + weights.bias + column);
        norm_relu<S, kKeep, false>(rows, hat + column, out + column, layer.ld, layer.out, layer.out_pad,
                                   common + weights.gain + column, common + weights.offset + column,
                                   at(layout.layers[l].rstd) + e, size.experts);
      });
    }
  }

  template <bool kKeep>
  Left expert_input(int64_t l, int64_t e) const {
    const LayerSize& before = size.layers[l - 1];
    return left(size.layers[l].in, activations(l - 1, kKeep) + e * before.out_pad, before.ld, 1);
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
      if (s.masked) {
        softmax<true>(gate, mask);
      } else {
        softmax<false>(gate, mask);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      T* coef = at(layout.coef) + i * s.tasks * s.experts;
      for (int64_t j = 0; j < s.tasks * s.experts; ++j) coef[j] = table[j];
      for (int64_t t = 0; t < s.tasks; ++t) {
        for (int64_t g = 0; g < s.gated; ++g) coef[t * s.experts + g] += gate[i * s.ld_gate + t * s.gated + g];
      }
    }
  }

  // Scores [rows][T * G] -> softmax over each task's open gates. exp runs over whole vectors of the buffer: the padding
  // holds zeros, as the packed weights and biases there are zero.
  template <bool kMasked>
  void softmax(T* gate, const T* mask) const {
    const NetworkSize& s = size;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t t = 0; t < s.tasks; ++t) {
        T* score = gate + i * s.ld_gate + t * s.gated;
        T top = -S::kInfinity;
        // A NaN score may not become the maximum, but it poisons the row's sum.
        for (int64_t g = 0; g < s.gated; ++g) {
          if (!kMasked || mask[t * s.gated + g] != 0) top = score[g] > top ? score[g] : top;
        }
        for (int64_t g = 0; g < s.gated; ++g) score[g] -= top;
      }
    }
    for (int64_t i = 0; i < rows * s.ld_gate; i += S::kLanes) S::store(gate + i, S::exp(S::load(gate + i)));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t t = 0; t < s.tasks; ++t) {
        T* weight = gate + i * s.ld_gate + t * s.gated;
        T sum = 0;
        for (int64_t g = 0; g < s.gated; ++g) {
          if (kMasked && mask[t * s.gated + g] == 0) weight[g] = 0;
          sum += weight[g];
        }
        const T scale = kMasked && sum == 0 ? T(0) : T(1) / sum;  // 0: every gate of the pair is masked
        for (int64_t g = 0; g < s.gated; ++g) weight[g] *= scale;
      }
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
    each_expert([&](int64_t e) {
      const auto c = S::set1(coef[e]);
      for (int j = 0; j < NV; ++j) acc[j] = S::fma(c, S::load(z + e * stride + j * S::kLanes), acc[j]);
    });
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
      T* h = at(h_offset) + t * s.tower_pad;
      norm_relu<S, kKeep, false>(rows, hat, h, s.ld_tower, s.tower, s.tower_pad, tower_vector(t, 1), tower_vector(t, 2),
                                 at(layout.tower_rstd) + t, s.tasks);
      for (int64_t i = 0; i < rows; ++i) {
        auto dot = S::zero();
        for (int64_t v = 0; v < s.tower_pad; v += S::kLanes) {
          dot = S::fma(S::load(h + i * s.ld_tower + v), S::load(head + v), dot);
        }
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
  using Base::each_expert;
  using Base::each_run;
  using Base::layout;
  using Base::left;
  using Base::own;
  using Base::pack_layout;
  using Base::packed;
  using Base::rows;
  using Base::size;
  using typename Base::Left;
  using Across = typename E::Across;
  using typename Base::S;
  using typename Base::T;

  const GradLayout& grad_layout;
  T* common_grad;
  T* own_grad;

  Across across(int64_t k, const T* a, int64_t lda) const { return E::across(rows, k, a, lda, at(layout.operand[0])); }

  // c [k][n_pad] += a^T b over the tile's rows: a weight gradient.
  void outer(const Across& a, int64_t n_pad, const T* b, int64_t ldb, T* c, int64_t ldc) const {
    E::outer(rows, a, n_pad, b, ldb, c, ldc, at(layout.operand[1]));
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
      }
      T* d_tower = at(layout.d_h) + t * s.tower_pad;
      norm_relu_backward<S>(rows, d_tower, d_tower, at(layout.tower_hat) + t * s.tower_pad, s.ld_tower,
                            at(layout.tower_rstd) + t, s.tasks, s.tower, s.tower_pad, Base::tower_vector(t, 1),
                            Base::tower_vector(t, 2), {vectors, vectors + s.tower_pad, vectors + 2 * s.tower_pad});
      own_grad[grad_layout.head_bias + t] += d_bias;
      add_sums(vectors, 4 * s.tower_pad, own_grad + grad_layout.tower_vectors + t * 4 * s.tower_pad);
      const T* d_pre = at(layout.d_h) + t * s.tower_pad;
      outer(across(s.width, at(layout.u) + t * s.width_pad, s.ld_width), s.tower_pad, d_pre, s.ld_tower,
            own_grad + grad_layout.tower_weight + t * s.width * s.tower_pad, s.tower_pad);
      E::template product<Init::kZero>(rows, left(s.tower, d_pre, s.ld_tower), s.width_pad,
                                       own + pack_layout.tower_weight_t + t * packed(s.tower) * s.width_pad,
                                       at(layout.d_u) + t * s.width_pad, s.ld_width);
    }
  }

  // d_u -> d_z of the last expert layer, the gradient of the table if wanted, d_gate (gradient of the gate scores).
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
      each_expert([&](int64_t e) {
        if (s.table_grad || e < s.gated) {
          for (int64_t t = 0; t < s.tasks; ++t) {
            auto dot = S::zero();
            for (int64_t v = 0; v < s.width_pad; v += S::kLanes) {
              dot = S::fma(S::load(d_u + t * s.width_pad + v), S::load(z + e * last.out_pad + v), dot);
            }
            d_coef[t * s.experts + e] = S::sum(dot);
          }
        }
        for (int64_t v = 0; v < s.width_pad; v += S::kLanes) {
          auto sum = S::zero();
          for (int64_t t = 0; t < s.tasks; ++t) {
            sum = S::fma(S::set1(coef[t * s.experts + e]), S::load(d_u + t * s.width_pad + v), sum);
          }
          S::store(d_z + e * last.out_pad + v, sum);
        }
      });
      if (s.table_grad) add_sums(d_coef, pairs, d_table);
      softmax_backward(at(layout.gate) + i * s.ld_gate, d_coef, at(layout.d_gate) + i * s.ld_gate);
    }
    add_sums(d_table, pairs, own_grad + grad_layout.table);
  }

  void softmax_backward(const T* gate, const T* d_coef, T* d_gate) const {
    const NetworkSize& s = size;
    const T* mask = own + pack_layout.gate_mask;
    // Masked experts are skipped, not multiplied by zero: a NaN of another expert must not reach them, and where no
    // task uses them there is no d_coef.
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

  // d_z of the last layer -> d_r; gradients of every expert layer. Expert after expert: its d_z, [rows][X], is still in
  // L1 when its weight gradient sums over it.
  void experts(bool needs_d_r) const {
    for (int64_t l = size.depth - 1; l > 0; --l) {
      const LayerSize& layer = size.layers[l];
      const LayerSize& before = size.layers[l - 1];
      each_expert([&](int64_t e) {
        const int64_t column = e * before.out_pad;
        const T* d_pre =
            layer_gradients(l, e, [&] { return across(before.out, at(layout.layers[l - 1].out) + column, before.ld); });
        E::template product<Init::kZero>(rows, left(layer.out, d_pre, layer.ld), before.out_pad,
                                         common + pack_layout.layers[l].weight_t + column * packed(layer.out),
                                         at(layout.d_z[(l - 1) & 1]) + column, before.ld);
      });
    }
    const Across r = across(size.hidden, at(layout.r), size.ld_hidden);
    each_expert([&](int64_t e) { layer_gradients(0, e, [&] { return r; }); });
    if (needs_d_r) representation_gradient();
  }

  // Gradients of the first layer's pre-activations -> d_r: a product per run of experts, which is one where a domain
  // uses all. A product per expert would load and store d_r more often: some 2 % of a step in bf16.
  void representation_gradient() const {
    const NetworkSize& s = size;
    const LayerSize& layer = s.layers[0];
    const T* weight = common + pack_layout.layers[0].weight_t;
    T* d_r = at(layout.d_r);
    const auto add = [&]<Init kInit>(int64_t first, int64_t end) {
      const Left d_pre = left((end - first) * layer.out_pad, at(layout.d_z[0]) + first * layer.out_pad, layer.ld);
      const Part part{packed(first * layer.out_pad) / planes(s.format.operand), packed(s.experts * layer.out_pad)};
      E::template product<kInit>(rows, d_pre, s.hidden_pad, weight, d_r, s.ld_hidden, nullptr, part);
    };
    bool begun = false;
    each_run([&](int64_t first, int64_t end) {
      if (begun) {
        add.template operator()<Init::kAdd>(first, end);
      } else {
        add.template operator()<Init::kZero>(first, end);
      }
      begun = true;
    });
    for (int64_t i = 0; !begun && i < rows * s.ld_hidden; ++i) d_r[i] = 0;
  }

  // d_z -> gradient of the pre-activation, in its place and returned, of one expert in layer l; gradients of bias, gain
  // and offset, and of the weight from the layer's input, `in()`.
  template <typename In>
  const T* layer_gradients(int64_t l, int64_t e, const In& in) const {
    const LayerSize& layer = size.layers[l];
    const LayerOffsets& weights = pack_layout.layers[l];
    const LayerOffsets& grads = grad_layout.layers[l];
    const int64_t n = layer.out_pad, column = e * n;
    T* d_z = at(layout.d_z[l & 1]) + column;
    T* sums = open_sums(3 * n);
    norm_relu_backward<S>(rows, d_z, d_z, at(layout.layers[l].hat) + column, layer.ld, at(layout.layers[l].rstd) + e,
                          size.experts, layer.out, n, common + weights.gain + column, common + weights.offset + column,
                          {sums, sums + n, sums + 2 * n});
    add_sums(sums, n, common_grad + grads.bias + column);
    add_sums(sums + n, n, common_grad + grads.gain + column);
    add_sums(sums + 2 * n, n, common_grad + grads.offset + column);
    outer(in(), n, d_z, layer.ld, common_grad + grads.weight + layer.in * column, n);
    return d_z;
  }

  void gates(bool needs_d_r) const {
    const NetworkSize& s = size;
    if (s.gated == 0) return;
    const T* d_gate = at(layout.d_gate);
    outer(across(s.hidden, at(layout.r), s.ld_hidden), s.gates_pad, d_gate, s.ld_gate,
          own_grad + grad_layout.gate_weight, s.gates_pad);
    T* d_bias = open_sums(s.gates_pad);
    for (int64_t i = 0; i < rows; ++i) add_sums(d_gate + i * s.ld_gate, s.gates_pad, d_bias);
    add_sums(d_bias, s.gates_pad, own_grad + grad_layout.gate_bias);
    if (needs_d_r && !s.gate_detach) {
      E::template product<Init::kAdd>(rows, left(s.tasks * s.gated, d_gate, s.ld_gate), s.hidden_pad,
                                      own + pack_layout.gate_weight_t, at(layout.d_r), s.ld_hidden);
    }
  }

  // d_r -> d_x; gradients of the star and skip layers.
  void representation(bool input_grad) const {
    const NetworkSize& s = size;
    const int64_t n = s.hidden_pad;
    T* sums = open_sums(6 * n);  // bias, gain, offset of the skip layer, then of the star layer
    const T* d_r = at(layout.d_r);
    norm_relu_backward<S>(rows, d_r, at(layout.d_skip), at(layout.skip_hat), s.ld_hidden, at(layout.skip_rstd), 1,
                          s.hidden, n, common + pack_layout.skip_gain, common + pack_layout.skip_offset,
                          {sums, sums + n, sums + 2 * n});
    if (s.star_linear) {
      for (int64_t i = 0; i < rows; ++i) add_sums(d_r + i * s.ld_hidden, n, sums + 3 * n);
    } else {
      norm_relu_backward<S>(rows, d_r, at(layout.d_star), at(layout.star_hat), s.ld_hidden, at(layout.star_rstd), 1,
                            s.hidden, n, common + pack_layout.star_gain, common + pack_layout.star_offset,
                            {sums + 3 * n, sums + 4 * n, sums + 5 * n});
    }
    const T* d_star = s.star_linear ? d_r : at(layout.d_star);
    add_sums(sums, n, common_grad + grad_layout.skip_bias);
    add_sums(sums + n, n, common_grad + grad_layout.skip_gain);
    add_sums(sums + 2 * n, n, common_grad + grad_layout.skip_offset);
    add_sums(sums + 3 * n, n, own_grad + grad_layout.star_bias);
    add_sums(sums + 4 * n, n, common_grad + grad_layout.star_gain);
    add_sums(sums + 5 * n, n, common_grad + grad_layout.star_offset);
    const Across x = across(s.inputs, at(layout.x), s.ld_input);
    outer(x, n, d_star, s.ld_hidden, own_grad + grad_layout.star_weight, n);
    outer(x, n, at(layout.d_skip), s.ld_hidden, common_grad + grad_layout.skip_weight, n);
    if (!input_grad) return;
    E::template product<Init::kZero>(rows, left(s.hidden, d_star, s.ld_hidden), s.inputs_pad,
                                     own + pack_layout.star_weight_t, at(layout.d_x), s.ld_input);
    E::template product<Init::kAdd>(rows, left(s.hidden, at(layout.d_skip), s.ld_hidden), s.inputs_pad,
                                    common + pack_layout.skip_weight_t, at(layout.d_x), s.ld_input);
  }

  void backward(bool input_grad) const {
    towers();
    fusion();
    const bool needs_d_r = size.representation || input_grad;
    experts(needs_d_r);
    gates(needs_d_r);
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
constexpr MatrixKernels<typename E::T> matrix_kernels() {
  if constexpr (E::kFormat.operand == Operand::kElement) {
    return {&multiply<typename E::S>, &gemm_tn<typename E::S>};
  } else {
    return {nullptr, nullptr};
  }
}

template <class E>
constexpr NetworkKernels<typename E::T> network_kernels() {
  using S = typename E::S;
  return {
      S::kLanes,        S::kPanelVectors * S::kLanes, E::kFormat, matrix_kernels<E>(), &tile_forward<E>, &sigmoid<S>,
      &tile_backward<E>};
}

}  // namespace
}  // namespace m3oe

#include "pack.h"

#include <algorithm>
#include <bit>
#include <vector>

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

// The 16 bits of bf16 nearest to v, ties to even.
inline uint32_t bf16_bits(float v) {
  const auto bits = std::bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;  // NaN must not round to infinity
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline float bf16_error(float v) { return v - std::bit_cast<float>(bf16_bits(v) << 16); }

inline float word(float low, float high) { return std::bit_cast<float>(bf16_bits(low) | bf16_bits(high) << 16); }

// A packed matrix of k_count rows and n_total padded columns (see PackLayout and OperandFormat), written element by
// element or pair by pair.
template <typename T>
class PackedMatrix {
 public:
  PackedMatrix(T* data, int64_t k_count, int64_t n_total, int64_t panel, const OperandFormat& format)
      : data_(data), rows_(packed_rows(format, k_count)), columns_(n_total), panel_(panel), operand_(format.operand) {
    std::fill(data, data + rows_ * n_total, T(0));
  }

  // How many of the k go into one row of words.
  int64_t depth() const { return operand_ == Operand::kElement ? 1 : 2; }

  // Columns from `column` to the end of its panel.
  int64_t run(int64_t column) const { return panel_ - column % panel_; }

  // Writes rows k and, if words hold two, k + 1: elements low[i * stride] - low_shift and high[i * stride] - high_shift
  // to the `count` columns from `column` on, all in one panel. k is a multiple of depth(); high null: zeros.
  void put(int64_t k, int64_t column, int64_t count, const T* low, T low_shift, const T* high, T high_shift) const {
    T* to = at(k / depth(), column);
    if (operand_ == Operand::kElement) {
      for (int64_t i = 0; i < count; ++i) to[i] = low[i] - low_shift;
    } else if constexpr (sizeof(T) == 4) {
      if (high == nullptr) {
        put_words(to, count, [&](int64_t i) { return low[i] - low_shift; }, [](int64_t) { return 0.0f; });
      } else {
        put_words(
            to, count, [&](int64_t i) { return low[i] - low_shift; }, [&](int64_t i) { return high[i] - high_shift; });
      }
    }
  }

  // Writes one column from row k on: elements values[0..count).
  void put_column(int64_t k, int64_t column, int64_t count, const T* values) const {
    T* to = at(k / depth(), column);
    const int64_t stride = std::min(panel_, columns_ - column / panel_ * panel_);
    if (operand_ == Operand::kElement) {
      for (int64_t i = 0; i < count; ++i) to[i * stride] = values[i];
    } else if constexpr (sizeof(T) == 4) {
      for (int64_t i = 0; i < count; i += 2) {
        const float high = i + 1 < count ? values[i + 1] : 0.0f;
        put_words(to + i / 2 * stride, 1, [&](int64_t) { return values[i]; }, [&](int64_t) { return high; });
      }
    }
  }

 private:
  T* at(int64_t row, int64_t column) const {
    const int64_t first = column / panel_ * panel_;
    const int64_t width = std::min(panel_, columns_ - first);
    return data_ + first * rows_ + row * width + (column - first);
  }

  template <typename Low, typename High>
  void put_words(T* to, int64_t count, const Low& low, const High& high) const {
    for (int64_t i = 0; i < count; ++i) to[i] = word(low(i), high(i));
    if (operand_ != Operand::kBf16x3) return;
    // The plane of low parts begins half of the panel's rows further on.
    const int64_t first = (to - data_) / rows_ / panel_ * panel_;
    const int64_t plane = rows_ / 2 * std::min(panel_, columns_ - first);
    for (int64_t i = 0; i < count; ++i) to[i + plane] = word(bf16_error(low(i)), bf16_error(high(i)));
  }

  T* data_;
  int64_t rows_, columns_, panel_;
  Operand operand_;
};

// Packs [K][blocks x n_pad]: column b * n_pad + j holds column j of block b.
template <typename T>
void pack_matrix(const Blocks<T>& source, int64_t n_pad, bool centre, const PackedMatrix<T>& packed) {
  const auto shift = [&](const T* row) { return centre && row != nullptr ? mean(row, source.n) : T(0); };
  for (int64_t b = 0; b < source.blocks; ++b) {
    for (int64_t k = 0; k < source.rows; k += packed.depth()) {
      const T* low = source.row(b, k);
      const T* high = packed.depth() == 2 && k + 1 < source.rows ? source.row(b, k + 1) : nullptr;
      const T low_shift = shift(low), high_shift = shift(high);
      for (int64_t j = 0; j < source.n;) {
        const int64_t column = b * n_pad + j;
        const int64_t count = std::min(source.n - j, packed.run(column));
        packed.put(k, column, count, low + j, low_shift, high == nullptr ? nullptr : high + j, high_shift);
        j += count;
      }
    }
  }
}

// Packs the transpose, [blocks x n_pad][K padded]: row b * n_pad + j holds column j of block b.
template <typename T>
void pack_transposed(const Blocks<T>& source, int64_t n_pad, const PackedMatrix<T>& packed) {
  for (int64_t b = 0; b < source.blocks; ++b) {
    for (int64_t k = 0; k < source.rows; ++k) packed.put_column(b * n_pad, k, source.n, source.row(b, k));
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
  int64_t packed_size(int64_t k, int64_t n_pad) const { return packed_rows(layout.size.format, k) * n_pad; }
  PackedMatrix<T> matrix(T* to, int64_t k_count, int64_t n_total) const {
    return {to, k_count, n_total, panel, layout.size.format};
  }

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
    pack_matrix(source, s.hidden_pad, true, matrix(packed + p.skip_weight, s.inputs, s.hidden_pad));
    if (backward) pack_transposed(source, s.hidden, matrix(packed + p.skip_weight_t, s.hidden, s.inputs_pad));
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
    const int64_t matrix_size = layer.in * layer.out;
    for (int64_t i = 0; i < s.experts; ++i) {
      const Blocks<T> source{e.weight + i * matrix_size, layer.in, 1, layer.out, layer.out, 0};
      T* to = packed + p.weight + i * packed_size(layer.in, layer.out_pad);
      pack_matrix(source, layer.out_pad, true, matrix(to, layer.in, layer.out_pad));
      if (backward && l > 0) {
        const int64_t in_pad = s.layers[l - 1].out_pad;
        T* transposed = packed + p.weight_t + i * packed_size(layer.out, in_pad);
        pack_transposed(source, layer.out, matrix(transposed, layer.out, in_pad));
      }
    }
    if (backward && l == 0) {
      // The gradient of the first layer's input is a product over the outputs of all experts that a domain uses.
      const Blocks<T> source{e.weight, layer.in, s.experts, layer.out, layer.out, matrix_size};
      pack_transposed(source, layer.out_pad, matrix(packed + p.weight_t, s.experts * layer.out_pad, s.hidden_pad));
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
      pack_matrix(source, s.hidden_pad, centre, matrix(own + p.star_weight, s.inputs, s.hidden_pad));
      if (backward) pack_transposed(source, s.hidden, matrix(own + p.star_weight_t, s.hidden, s.inputs_pad));
    }
    const int64_t gates = s.tasks * s.gated;
    const Blocks<T> gate{w.gate_weight + d * s.hidden * gates, s.hidden, s.tasks, s.gated, s.gated, s.hidden * s.gated};
    if (gates > 0) {
      pack_matrix(gate, s.gated, false, matrix(own + p.gate_weight, s.hidden, s.gates_pad));
      copy_padded(w.gate_bias + d * gates, gates, s.gates_pad, T(0), own + p.gate_bias);
      if (backward && !s.gate_detach) {
        const PackedMatrix<T> to = matrix(own + p.gate_weight_t, gates, s.hidden_pad);
        // The gates of all tasks are one operand: a word may hold the last of one task and the first of the next.
        std::vector<T> row(gates);
        for (int64_t k = 0; k < s.hidden; ++k) {
          for (int64_t t = 0; t < s.tasks; ++t) std::copy_n(gate.row(t, k), s.gated, row.data() + t * s.gated);
          to.put_column(0, k, gates, row.data());
        }
      }
    }
    for (int64_t j = 0; j < gates; ++j) own[p.gate_mask + j] = mask == nullptr || mask[d * gates + j] ? T(1) : T(0);
    std::copy_n(w.table + d * s.tasks * s.experts, s.tasks * s.experts, own + p.table);
    used_runs(own + p.gate_mask, own + p.table, own + p.used);
    for (int64_t t = 0; t < s.tasks; ++t) tower(d * s.tasks + t, t, own);
    std::copy_n(w.head_bias + d * s.tasks, s.tasks, own + p.head_bias);
  }

  // See PackLayout::used. An expert is used if it has a gate, or a coefficient other than zero, of any task.
  void used_runs(const T* mask, const T* table, T* runs) const {
    const NetworkSize& s = size();
    const auto used = [&](int64_t e) {
      bool any = s.table_grad;
      for (int64_t t = 0; t < s.tasks; ++t) {
        any |= table[t * s.experts + e] != 0 || (e < s.gated && mask[t * s.gated + e] != 0);
      }
      return any;
    };
    int64_t count = 0;
    for (int64_t e = 0; e < s.experts; ++e) {
      if (!used(e)) continue;
      if (e == 0 || !used(e - 1)) runs[1 + 2 * count++] = static_cast<T>(e);
      runs[2 * count] = static_cast<T>(e + 1);
    }
    runs[0] = static_cast<T>(count);
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
    T* weight = own + p.tower_weight + t * packed_size(s.width, s.tower_pad);
    pack_matrix(source, s.tower_pad, true, matrix(weight, s.width, s.tower_pad));
    if (backward) {
      T* transposed = own + p.tower_weight_t + t * packed_size(s.tower, s.width_pad);
      pack_transposed(source, s.tower, matrix(transposed, s.tower, s.width_pad));
    }
  }
};

}  // namespace

constexpr OperandFormat kElements{Operand::kElement, 1, 1, 0};

template <typename T>
void pack_plain(const T* from, int64_t rows, int64_t columns, int64_t n_pad, int64_t panel, T* packed) {
  const Blocks<T> source{from, rows, 1, columns, columns, 0};
  pack_matrix(source, n_pad, false, PackedMatrix<T>(packed, rows, n_pad, panel, kElements));
}

template <typename T>
void pack_plain_transposed(const T* from, int64_t rows, int64_t columns, int64_t n_pad, int64_t panel, T* packed) {
  const Blocks<T> source{from, rows, 1, columns, columns, 0};
  pack_transposed(source, columns, PackedMatrix<T>(packed, columns, n_pad, panel, kElements));
}

template void pack_plain(const float*, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_plain(const double*, int64_t, int64_t, int64_t, int64_t, double*);
template void pack_plain_transposed(const float*, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_plain_transposed(const double*, int64_t, int64_t, int64_t, int64_t, double*);

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

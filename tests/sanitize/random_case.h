// One random call of the network: its sizes and switches, drawn from a seed, and its inputs in memory of exactly their
// size, so that a read or write behind the end of any of them is one behind the end of an allocation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/embedding.h"
#include "cpu/layout.h"
#include "cpu/weights.h"

namespace m3oe {

class Random {
 public:
  Random(uint64_t seed, uint64_t stream) {
    std::seed_seq sequence{seed, seed >> 32, stream, stream >> 32};
    engine_.seed(sequence);
  }
  // Uniform in [low, high].
  int64_t whole(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }
  float normal(float scale, float shift = 0) { return std::normal_distribution<float>(shift, scale)(engine_); }
  int64_t one_of(std::initializer_list<int64_t> values) {
    return values.begin()[whole(0, static_cast<int64_t>(values.size()) - 1)];
  }
  // A width or a number of rows: small, around the edge of a vector, a register block or a tile, or anything.
  int64_t extent() {
    const int64_t kind = whole(0, 3);
    if (kind == 0) return whole(1, 5);
    if (kind == 1) return std::max<int64_t>(1, one_of({4, 6, 8, 12, 16, 32, 48, 64}) + whole(-1, 1));
    return whole(1, kind == 2 ? 24 : 70);
  }

 private:
  std::mt19937_64 engine_;
};

enum class EmbeddingForm : int { kNone, kDense, kSparse };
enum class Bad : int { kNothing, kId, kDomain };

struct Case {
  int64_t rows, columns;  // B, C
  NetworkShape shape;
  std::vector<int64_t> vocab;  // empty: no embeddings
  int64_t embedding_width;
  bool narrow_ids, narrow_domain, absent_domain;
  bool input_grad, from_labels, row_weight, probability, packed_ahead;
  EmbeddingForm embedding_grad;
  Bad bad;
  int64_t workers, tile_rows;  // tile_rows 0: chosen as in production
  int64_t callers;             // threads that make such calls at once
  int64_t lead;                // elements in front of every input: its alignment
  double zeros;                // share of the table's entries that are zero
  bool spread;                 // red zones between the parts of every scratch buffer

  int64_t fields() const { return static_cast<int64_t>(vocab.size()); }
  int64_t embedded() const { return fields() * embedding_width; }

  // Multiply-adds of a forward pass.
  int64_t work() const {
    const NetworkShape& s = shape;
    const int64_t hidden = s.widths.front();
    int64_t row = s.representation ? 2 * s.inputs * hidden : 0;
    for (size_t l = 1; l < s.widths.size(); ++l) row += s.experts * s.widths[l - 1] * s.widths[l];
    row += s.tasks * (hidden * s.gated + s.experts * s.widths.back() + s.widths.back() * s.tower);
    return rows * row;
  }

  std::string describe() const {
    const NetworkShape& s = shape;
    std::ostringstream out;
    out << "B=" << rows << " C=" << columns << " widths=";
    for (const int64_t& width : s.widths) out << (&width == &s.widths.front() ? "" : "x") << width;
    out << " Y=" << s.tower << " D=" << s.domains << " T=" << s.tasks << " E=" << s.experts << " G=" << s.gated;
    if (fields() > 0) {
      out << " vocab=";
      for (const int64_t& size : vocab) out << (&size == &vocab.front() ? "" : ",") << size;
      out << " N=" << embedding_width << " embedding_grad=" << static_cast<int>(embedding_grad);
    }
    out << " workers=" << workers << " tile_rows=" << tile_rows << " callers=" << callers << " lead=" << lead
        << " zeros=" << zeros;
    const std::pair<bool, const char*> flags[] = {{!s.representation, "no_representation"},
                                                  {s.star_linear, "star_linear"},
                                                  {s.gate_detach, "gate_detach"},
                                                  {s.masked, "masked"},
                                                  {s.table_grad, "table_grad"},
                                                  {narrow_ids, "int32_ids"},
                                                  {narrow_domain, "int32_domain"},
                                                  {absent_domain, "absent_domain"},
                                                  {input_grad, "input_grad"},
                                                  {from_labels, "loss"},
                                                  {row_weight, "row_weight"},
                                                  {probability, "probability"},
                                                  {packed_ahead, "packed_ahead"},
                                                  {bad == Bad::kId, "bad_id"},
                                                  {bad == Bad::kDomain, "bad_domain"},
                                                  {spread, "red_zones"}};
    for (const auto& [set, name] : flags) out << (set ? " " : "") << (set ? name : "");
    return out.str();
  }
};

inline Case draw_case(Random& random) {
  Case c{};
  NetworkShape& s = c.shape;
  c.rows = random.chance(0.03) ? 0 : random.chance(0.1) ? random.whole(71, 300) : random.extent();
  s.domains = random.whole(1, random.chance(0.2) ? 40 : 5);
  s.tasks = random.whole(1, 4);
  s.experts = random.whole(1, random.chance(0.2) ? 20 : 6);
  s.gated = random.chance(0.1) ? 0 : random.whole(1, s.experts);
  s.tower = random.extent();
  s.representation = random.chance(0.75);
  s.star_linear = random.chance(0.3);
  s.gate_detach = random.chance(0.5);
  s.masked = random.chance(0.4);
  s.table_grad = random.chance(0.4);
  c.zeros = random.chance(0.4) ? 0 : random.chance(0.3) ? 1 : 0.75;
  c.columns = random.chance(0.04) ? random.whole(250, 265) : random.extent();  // sums over k are cut at 256
  if (random.chance(0.6)) {
    c.vocab.resize(random.whole(1, 4));
    for (int64_t& size : c.vocab)
      size = random.chance(0.1) ? 1 : random.chance(0.3) ? random.whole(100, 900) : random.extent();
    c.embedding_width = random.chance(0.5) ? random.one_of({8, 16, 32}) : random.whole(1, 33);
    if (random.chance(0.2)) c.columns = 0;
  }
  s.inputs = c.embedded() + c.columns;
  s.widths.push_back(s.representation ? random.extent() : s.inputs);
  for (int64_t depth = random.whole(1, 3); depth > 0; --depth) s.widths.push_back(random.extent());
  c.narrow_ids = random.chance(0.5);
  c.narrow_domain = random.chance(0.5);
  c.absent_domain = s.domains > 1 && random.chance(0.4);
  c.input_grad = random.chance(0.5);
  c.from_labels = random.chance(0.5);
  c.row_weight = random.chance(0.5);
  c.probability = random.chance(0.5);
  c.packed_ahead = random.chance(0.4);
  c.embedding_grad = static_cast<EmbeddingForm>(random.whole(0, 2));
  if (c.rows > 0 && random.chance(0.15)) c.bad = c.fields() > 0 && random.chance(0.7) ? Bad::kId : Bad::kDomain;
  c.workers = random.whole(1, 4);
  c.tile_rows = random.chance(0.5) ? 0 : random.whole(1, 20);
  c.callers = random.whole(1, 2);
  c.lead = random.whole(0, 1);
  c.spread = random.chance(0.6);
  return c;
}

// A case whose forward pass takes at most `most_work` multiply-adds.
inline Case random_case(Random& random, int64_t most_work) {
  Case c = draw_case(random);
  while (c.work() > most_work) c = draw_case(random);
  return c;
}

// `size` elements at the very end of their allocation.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t size, int64_t lead) : memory_(new T[lead + size]()), lead_(lead), size_(size) {}

  // Null if empty, as an empty tensor's pointer may be.
  T* data() const { return size_ == 0 ? nullptr : memory_.get() + lead_; }
  int64_t size() const { return size_; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t lead_ = 0, size_ = 0;
};

// In schema order (see ops.cpp).
inline std::vector<int64_t> weight_sizes(const NetworkShape& s) {
  const int64_t d = s.domains, t = s.tasks, hidden = s.widths.front(), pairs = d * t;
  const int64_t rep = s.representation ? 1 : 0;
  std::vector<int64_t> sizes{rep * d * s.inputs * hidden, rep * d * hidden};
  sizes.insert(sizes.end(), 2, rep * hidden);
  sizes.push_back(rep * s.inputs * hidden);
  sizes.insert(sizes.end(), 3, rep * hidden);
  sizes.insert(sizes.end(), {pairs * hidden * s.gated, pairs * s.gated, pairs * s.experts});
  sizes.push_back(pairs * s.widths.back() * s.tower);
  sizes.insert(sizes.end(), 4, pairs * s.tower);
  sizes.push_back(pairs);
  for (size_t l = 1; l < s.widths.size(); ++l) {
    sizes.push_back(s.experts * s.widths[l - 1] * s.widths[l]);
    sizes.insert(sizes.end(), 3, s.experts * s.widths[l]);
  }
  return sizes;
}

template <typename T>
struct Inputs {
  Buffer<T> x, table, label, row_weight, pair_weight, d_logits;
  Buffer<int32_t> narrow_ids, narrow_domain;
  Buffer<int64_t> wide_ids, wide_domain;
  Buffer<bool> mask;
  std::vector<Buffer<T>> weights;
  int64_t bad_place = std::numeric_limits<int64_t>::max();  // the smallest, row * F + field
  int64_t bad_row = -1;

  const void* ids() const {
    return narrow_ids.size() > 0 ? static_cast<const void*>(narrow_ids.data()) : wide_ids.data();
  }
  WeightPointers<const T*> weight_pointers() const {
    std::vector<const T*> pointers;
    for (const Buffer<T>& weight : weights) pointers.push_back(weight.data());
    return name_weights(pointers);
  }
};

inline void fill_ids(Random& random, const Case& c, Inputs<float>& to) {
  const int64_t fields = c.fields();
  if (c.narrow_ids) {
    to.narrow_ids = Buffer<int32_t>(c.rows * fields, c.lead);
  } else {
    to.wide_ids = Buffer<int64_t>(c.rows * fields, c.lead);
  }
  for (int64_t i = 0; i < c.rows * fields; ++i) {
    const int64_t size = c.vocab[i % fields];
    int64_t id = random.whole(0, random.chance(0.3) ? std::min<int64_t>(size - 1, 2) : size - 1);  // some ids are hot
    if (c.bad == Bad::kId && (i == 0 || random.chance(0.05)) && random.chance(0.9)) {
      id = random.one_of({-1, size, size, size, std::numeric_limits<int32_t>::min(),
                          std::numeric_limits<int32_t>::max(), c.narrow_ids ? -1 : std::numeric_limits<int64_t>::min(),
                          c.narrow_ids ? -1 : std::numeric_limits<int64_t>::max()});
      to.bad_place = std::min(to.bad_place, i);
    }
    if (c.narrow_ids) {
      to.narrow_ids.data()[i] = static_cast<int32_t>(id);
    } else {
      to.wide_ids.data()[i] = id;
    }
  }
}

inline void fill_domains(Random& random, const Case& c, Inputs<float>& to) {
  if (c.narrow_domain) {
    to.narrow_domain = Buffer<int32_t>(c.rows, c.lead);
  } else {
    to.wide_domain = Buffer<int64_t>(c.rows, c.lead);
  }
  const int64_t absent = c.absent_domain ? random.whole(0, c.shape.domains - 1) : -1;
  for (int64_t i = 0; i < c.rows; ++i) {
    int64_t domain = random.whole(0, c.shape.domains - 1);
    if (domain == absent) domain = (domain + 1) % c.shape.domains;
    if (c.bad == Bad::kDomain && to.bad_row < 0 && (i == c.rows - 1 || random.chance(0.2))) {
      domain = random.one_of({-1, c.shape.domains, std::numeric_limits<int32_t>::min()});
      to.bad_row = i;
    }
    if (c.narrow_domain) {
      to.narrow_domain.data()[i] = static_cast<int32_t>(domain);
    } else {
      to.wide_domain.data()[i] = domain;
    }
  }
}

// Weights as a trained network has them: of unit gain, biases off zero, products of unit size.
inline void fill_weights(Random& random, const Case& c, Inputs<float>& to) {
  const NetworkShape& s = c.shape;
  const auto scale = [](int64_t fan_in) { return 1 / std::sqrt(static_cast<float>(fan_in)); };
  const std::vector<int64_t> sizes = weight_sizes(s);
  for (size_t i = 0; i < sizes.size(); ++i) {
    to.weights.emplace_back(sizes[i], c.lead);
    float spread = 0.3f, shift = 0;
    if (i == 2 || i == 6 || i == 13 || (i > 17 && (i - 17) % 4 == 2)) shift = 1;  // gains
    if (i == 0 || i == 4) spread = scale(s.inputs);
    if (i == 8) spread = scale(s.widths.front());
    if (i == 10) spread = 1;
    if (i == 11) spread = scale(s.widths.back());
    if (i == 15) spread = scale(s.tower);
    if (i >= 17 && (i - 17) % 4 == 0) spread = scale(s.widths[(i - 17) / 4]);
    for (float& value : to.weights.back()) value = random.normal(spread, shift);
  }
  for (float& coefficient : to.weights[10]) {
    if (random.chance(c.zeros)) coefficient = 0;
  }
}

// Whether any pair of any domain has a gate for expert e, or a coefficient other than zero.
inline bool used(const Case& c, const Inputs<float>& in, int64_t e) {
  const NetworkShape& s = c.shape;
  bool any = false;
  for (int64_t pair = 0; pair < s.domains * s.tasks; ++pair) {
    any |= in.weights[10].data()[pair * s.experts + e] != 0;
    if (e < s.gated) any |= !s.masked || in.mask.data()[pair * s.gated + e];
  }
  return any;
}

// Experts that nobody uses become NaN, which may show nowhere.
inline void spoil_unused(const Case& c, Inputs<float>& to) {
  if (c.shape.table_grad) return;
  for (int64_t e = 0; e < c.shape.experts; ++e) {
    if (used(c, to, e)) continue;
    for (size_t i = 17; i < to.weights.size(); ++i) {
      const int64_t size = to.weights[i].size() / c.shape.experts;
      std::fill_n(to.weights[i].data() + e * size, size, std::numeric_limits<float>::quiet_NaN());
    }
  }
}

inline Inputs<float> random_inputs(Random& random, const Case& c) {
  Inputs<float> to;
  const auto normals = [&](int64_t size) {
    Buffer<float> buffer(size, c.lead);
    for (float& value : buffer) value = random.normal(1);
    return buffer;
  };
  const int64_t tasks = c.shape.tasks;
  int64_t table_rows = 0;
  for (const int64_t size : c.vocab) table_rows += size;
  to.x = normals(c.rows * c.columns);
  to.table = normals(table_rows * c.embedding_width);
  to.d_logits = normals(c.rows * tasks);
  to.label = Buffer<float>(c.rows * tasks, c.lead);
  for (float& y : to.label) {
    y = random.chance(0.2) ? std::numeric_limits<float>::quiet_NaN() : random.chance(0.5) ? 1.0f : 0.0f;
  }
  to.row_weight = Buffer<float>(c.row_weight ? c.rows : 0, c.lead);
  for (float& weight : to.row_weight) weight = random.chance(0.1) ? 0 : std::abs(random.normal(1));
  to.pair_weight = normals(c.shape.domains * tasks);
  to.mask = Buffer<bool>(c.shape.masked ? c.shape.domains * tasks * c.shape.gated : 0, c.lead);
  for (bool& open : to.mask) open = random.chance(c.zeros > 0 ? 0.2 : 0.6);
  fill_ids(random, c, to);
  fill_domains(random, c, to);
  fill_weights(random, c, to);
  spoil_unused(c, to);
  return to;
}

template <typename To, typename From>
Buffer<To> copy_as(const Buffer<From>& from, int64_t lead) {
  Buffer<To> to(from.size(), lead);
  std::copy(from.begin(), from.end(), to.begin());
  return to;
}

// The same inputs for the kernels in double precision.
inline Inputs<double> widen(const Case& c, const Inputs<float>& from) {
  const auto copy = [&]<typename T>(const Buffer<T>& buffer) { return copy_as<T>(buffer, c.lead); };
  const auto wide = [&](const Buffer<float>& buffer) { return copy_as<double>(buffer, c.lead); };
  Inputs<double> to{wide(from.x),           wide(from.table),
                    wide(from.label),       wide(from.row_weight),
                    wide(from.pair_weight), wide(from.d_logits),
                    copy(from.narrow_ids),  copy(from.narrow_domain),
                    copy(from.wide_ids),    copy(from.wide_domain),
                    copy(from.mask),        {},
                    from.bad_place,         from.bad_row};
  for (const Buffer<float>& weight : from.weights) to.weights.push_back(wide(weight));
  return to;
}

}  // namespace m3oe

// The network op's weight tensors as raw pointers, in the order of its schema (see ops.cpp for the shapes).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace m3oe {

template <typename Pointer>
struct ExpertPointers {
  Pointer weight, bias, gain, offset;
};

// Pointer is const T* for weights and T* for their gradients; all contiguous.
template <typename Pointer>
struct WeightPointers {
  Pointer star_weight, star_bias, star_gain, star_offset;
  Pointer skip_weight, skip_bias, skip_gain, skip_offset;
  Pointer gate_weight, gate_bias, table;
  Pointer tower_weight, tower_bias, tower_gain, tower_offset, head_weight, head_bias;
  std::vector<ExpertPointers<Pointer>> experts;
};

// Number of tensors in front of the expert layers, and per expert layer.
constexpr int64_t kFixedWeights = 17;
constexpr int64_t kLayerWeights = 4;

// Reads the pointers off a list in schema order.
template <typename Pointer>
WeightPointers<Pointer> name_weights(const std::vector<Pointer>& p) {
  WeightPointers<Pointer> w{p[0], p[1],  p[2],  p[3],  p[4],  p[5],  p[6],  p[7],  p[8],
                            p[9], p[10], p[11], p[12], p[13], p[14], p[15], p[16], {}};
  for (std::size_t i = kFixedWeights; i + kLayerWeights <= p.size(); i += kLayerWeights) {
    w.experts.push_back({p[i], p[i + 1], p[i + 2], p[i + 3]});
  }
  return w;
}

}  // namespace m3oe

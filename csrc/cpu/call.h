// The arguments of one network op: tensors checked, made contiguous, and read down to sizes and pointers. The only
// header of the CPU kernels besides network.cpp that knows torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "embedding.h"
#include "layout.h"
#include "network.h"
#include "weights.h"

namespace m3oe {

using torch::stable::Tensor;

// The input side of every op: x [B, C], or with ids the columns behind the embeddings; see ops.cpp.
struct InputArguments {
  const Tensor& x;
  const std::optional<Tensor>& ids;
  const std::optional<Tensor>& embedding;
  const std::vector<int64_t>& vocab;
  const Tensor& domain;
};

struct WeightArguments {
  const std::vector<Tensor>& weights;
  const std::optional<Tensor>& gate_mask;
  bool star_linear, gate_detach, table_grad;
};

// Everything about one call that does not depend on the element type.
struct Call {
  Tensor x, domain;
  std::optional<Tensor> ids, embedding;
  std::optional<IdFields> fields;
  std::vector<Tensor> weights;
  std::optional<Tensor> mask;
  NetworkShape shape;
  Precision precision;
  int64_t rows;
  int64_t columns;   // C, of x
  int64_t embedded;  // F * N, in front of them

  bool is_double() const;
  const bool* mask_data() const { return mask.has_value() ? mask->const_data_ptr<bool>() : nullptr; }
};

// Sizes and weights alone, for packing: shape, weights, mask and precision are set. `inputs` is I.
Call read_weights(int64_t inputs, const WeightArguments& weights, const std::string& precision);

// Checks every shape and type: the kernels trust them. Throws what torch turns into a RuntimeError. With
// `packed_weights` the weights give shapes only and are not made contiguous.
Call read_call(const InputArguments& inputs, const WeightArguments& weights, const std::string& precision,
               bool packed_weights = false);

template <typename T>
WeightPointers<const T*> weight_pointers(const Call& call) {
  std::vector<const T*> pointers;
  for (const Tensor& weight : call.weights) pointers.push_back(weight.const_data_ptr<T>());
  return name_weights(pointers);
}

}  // namespace m3oe

#include "call.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace m3oe {
namespace {

using torch::headeronly::ScalarType;

void check_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* name) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; equal && i < tensor.dim(); ++i) equal = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(equal, "network: weight ", name, " has the wrong shape");
}

// Reads the sizes off the tensors and checks every shape.
NetworkShape read_shape(int64_t inputs, const WeightArguments& arguments) {
  const std::vector<Tensor>& w = arguments.weights;
  const auto count = static_cast<int64_t>(w.size());
  STD_TORCH_CHECK(count > kFixedWeights && (count - kFixedWeights) % kLayerWeights == 0,
                  "network: expected 17 weights and 4 per expert layer, got ", count);
  STD_TORCH_CHECK(w[8].dim() == 4 && w[10].dim() == 3 && w[11].dim() == 4 && w[17].dim() == 3,
                  "network: gate_weight, table, tower_weight and expert weights have 4, 3, 4 and 3 dimensions");
  NetworkShape s{};
  s.inputs = inputs;
  s.domains = w[10].size(0);
  s.tasks = w[10].size(1);
  s.experts = w[10].size(2);
  s.gated = w[8].size(3);
  s.tower = w[11].size(3);
  s.representation = w[0].numel() > 0;
  s.star_linear = arguments.star_linear;
  s.gate_detach = arguments.gate_detach;
  s.masked = arguments.gate_mask.has_value();
  s.table_grad = arguments.table_grad;
  s.widths.push_back(w[17].size(1));
  STD_TORCH_CHECK(s.gated <= s.experts, "network: gates over ", s.gated, " of ", s.experts, " experts");
  STD_TORCH_CHECK(s.domains > 0 && s.tasks > 0 && s.experts > 0 && s.tower > 0 && s.inputs > 0,
                  "network: domains, tasks, experts and widths must be positive");
  for (int64_t i = kFixedWeights; i < count; i += kLayerWeights) {
    STD_TORCH_CHECK(w[i].dim() == 3, "network: expert weights are [E, in, out]");
    const int64_t in = s.widths.back();
    const int64_t out = w[i].size(2);
    STD_TORCH_CHECK(in > 0 && out > 0, "network: expert widths must be positive");
    check_shape(w[i], {s.experts, in, out}, "expert_weight");
    for (int64_t j = 1; j < kLayerWeights; ++j) check_shape(w[i + j], {s.experts, out}, "expert bias, gain or offset");
    s.widths.push_back(out);
  }
  const int64_t d = s.domains, t = s.tasks, h = s.widths.front(), y = s.tower;
  if (s.representation) {
    check_shape(w[0], {d, s.inputs, h}, "star_weight");
    check_shape(w[1], {d, h}, "star_bias");
    check_shape(w[4], {s.inputs, h}, "skip_weight");
    for (int64_t i : {2, 3, 5, 6, 7}) check_shape(w[i], {h}, "star or skip vector");
  } else {
    for (int64_t i = 0; i < 8; ++i) {
      STD_TORCH_CHECK(w[i].numel() == 0, "network: without star_weight all star and skip weights must be empty");
    }
    STD_TORCH_CHECK(s.inputs == h, "network: without a representation layer the input must be [B, H]");
  }
  check_shape(w[8], {d, t, h, s.gated}, "gate_weight");
  check_shape(w[9], {d, t, s.gated}, "gate_bias");
  check_shape(w[11], {d, t, s.widths.back(), y}, "tower_weight");
  for (int64_t i : {12, 13, 14, 15}) check_shape(w[i], {d, t, y}, "tower vector");
  check_shape(w[16], {d, t}, "head_bias");
  return s;
}

Precision read_precision(const std::string& name, ScalarType type) {
  if (name == "fp32") return Precision::kFp32;
  STD_TORCH_CHECK(type == ScalarType::Float, "network: precision ", name, " is for float32 tensors");
  if (name == "bf16") return Precision::kBf16;
  STD_TORCH_CHECK(name == "bf16x3", "network: precision must be fp32, bf16x3 or bf16, got ", name);
  return Precision::kBf16x3;
}

// Ids and table, checked; the sizes of the fields must add up to the table.
void read_fields(const InputArguments& from, Call& call) {
  STD_TORCH_CHECK(from.embedding.has_value(), "network: ids need an embedding table");
  const Tensor& ids = *from.ids;
  const Tensor& table = *from.embedding;
  const auto fields = static_cast<int64_t>(from.vocab.size());
  const bool narrow = ids.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(narrow || ids.scalar_type() == ScalarType::Long, "network: ids must be int32 or int64");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(0) == call.rows && ids.size(1) == fields, "network: ids must be [B, F]");
  STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == from.x.scalar_type(),
                  "network: the embedding table must be [V, N] in the dtype of x");
  call.ids = torch::stable::contiguous(ids);
  call.embedding = torch::stable::contiguous(table);
  const void* data = narrow ? static_cast<const void*>(call.ids->const_data_ptr<int32_t>())
                            : static_cast<const void*>(call.ids->const_data_ptr<int64_t>());
  for (const int64_t size : from.vocab) STD_TORCH_CHECK(size >= 0, "network: a vocabulary size is negative");
  call.fields.emplace(data, narrow, call.rows, from.vocab);
  STD_TORCH_CHECK(call.fields->total() == table.size(0), "network: the embedding table has ", table.size(0),
                  " rows, the vocabularies have ", call.fields->total());
  call.embedded = fields * table.size(1);
}

void read_mask(const WeightArguments& from, Call& call) {
  if (!from.gate_mask.has_value()) return;
  STD_TORCH_CHECK(from.gate_mask->scalar_type() == ScalarType::Bool, "network: gate_mask must be bool");
  check_shape(*from.gate_mask, {call.shape.domains, call.shape.tasks, call.shape.gated}, "gate_mask");
  call.mask = torch::stable::contiguous(*from.gate_mask);
}

}  // namespace

bool Call::is_double() const { return weights.front().scalar_type() == ScalarType::Double; }

Call read_weights(int64_t inputs, const WeightArguments& from, const std::string& precision) {
  STD_TORCH_CHECK(!from.weights.empty(), "network: no weights");
  const ScalarType type = from.weights.front().scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "network: weights are float32 or float64");
  Call call{
      from.weights.front(), from.weights.front(), {}, {}, {}, {}, {}, {}, read_precision(precision, type), 0, 0, 0};
  call.shape = read_shape(inputs, from);
  for (const Tensor& weight : from.weights) {
    STD_TORCH_CHECK(weight.scalar_type() == type, "network: all weights must have one dtype");
    call.weights.push_back(torch::stable::contiguous(weight));
  }
  read_mask(from, call);
  return call;
}

Call read_call(const InputArguments& inputs, const WeightArguments& from, const std::string& precision,
               bool packed_weights) {
  const Tensor& x = inputs.x;
  const Tensor& domain = inputs.domain;
  STD_TORCH_CHECK(x.dim() == 2 && domain.dim() == 1 && domain.size(0) == x.size(0),
                  "network: x is [B, C] and domain [B]");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "network: x must be float32 or float64");
  STD_TORCH_CHECK(domain.scalar_type() == ScalarType::Int || domain.scalar_type() == ScalarType::Long,
                  "network: domain must be int32 or int64");
  Call call{torch::stable::contiguous(x),
            torch::stable::contiguous(domain),
            {},
            {},
            {},
            {},
            {},
            {},
            read_precision(precision, type),
            x.size(0),
            x.size(1),
            0};
  if (inputs.ids.has_value()) read_fields(inputs, call);
  for (const Tensor& weight : from.weights) {
    STD_TORCH_CHECK(weight.scalar_type() == type, "network: all weights must have the dtype of x");
    call.weights.push_back(packed_weights ? weight : torch::stable::contiguous(weight));
  }
  call.shape = read_shape(call.embedded + call.columns, from);
  read_mask(from, call);
  return call;
}

}  // namespace m3oe

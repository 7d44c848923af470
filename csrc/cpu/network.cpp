// The network op on the CPU: checks, routing, threads. x [B, I] -> logits [B, T] and its gradients.
//
// Decomposition: rows are sorted by domain and cut into tiles; a tile runs the whole network on one thread. The forward
// pass hands tiles out as threads become free (a row's result does not depend on its tile). The backward pass gives
// every worker a fixed range of tiles and private gradients, then sums them in worker order: the same bits for the same
// batch and number of threads. It recomputes the forward pass of its tile, so nothing but x is kept in between. The
// loss op runs both at once: a tile's loss and its gradient follow from its logits, and nothing is recomputed.
#include "network.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "gradients.h"
#include "layout.h"
#include "loss.h"
#include "pack.h"
#include "route.h"
#include "weights.h"
#include "workspace.h"

namespace m3oe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Everything about one call that does not depend on the element type.
struct Call {
  Tensor x, domain;
  std::vector<Tensor> weights;
  std::optional<Tensor> mask;
  NetworkShape shape;
  int64_t rows;
};

void check_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* name) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; equal && i < tensor.dim(); ++i) equal = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(equal, "network: weight ", name, " has the wrong shape");
}

// Reads the sizes off the tensors and checks every shape: the kernels trust them.
NetworkShape read_shape(const Tensor& x, const std::vector<Tensor>& w, bool masked, bool star_linear,
                        bool gate_detach) {
  const auto count = static_cast<int64_t>(w.size());
  STD_TORCH_CHECK(count > kFixedWeights && (count - kFixedWeights) % kLayerWeights == 0,
                  "network: expected 17 weights and 4 per expert layer, got ", count);
  STD_TORCH_CHECK(w[8].dim() == 4 && w[10].dim() == 3 && w[11].dim() == 4 && w[17].dim() == 3,
                  "network: gate_weight, table, tower_weight and expert weights have 4, 3, 4 and 3 dimensions");
  NetworkShape s{};
  s.inputs = x.size(1);
  s.domains = w[10].size(0);
  s.tasks = w[10].size(1);
  s.experts = w[10].size(2);
  s.gated = w[8].size(3);
  s.tower = w[11].size(3);
  s.representation = w[0].numel() > 0;
  s.star_linear = star_linear;
  s.gate_detach = gate_detach;
  s.masked = masked;
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
    STD_TORCH_CHECK(s.inputs == h, "network: without a representation layer x must be [B, H]");
  }
  check_shape(w[8], {d, t, h, s.gated}, "gate_weight");
  check_shape(w[9], {d, t, s.gated}, "gate_bias");
  check_shape(w[11], {d, t, s.widths.back(), y}, "tower_weight");
  for (int64_t i : {12, 13, 14, 15}) check_shape(w[i], {d, t, y}, "tower vector");
  check_shape(w[16], {d, t}, "head_bias");
  return s;
}

Call make_call(const Tensor& x, const Tensor& domain, const std::vector<Tensor>& weights,
               const std::optional<Tensor>& mask, bool star_linear, bool gate_detach) {
  STD_TORCH_CHECK(x.dim() == 2 && domain.dim() == 1 && domain.size(0) == x.size(0),
                  "network: x is [B, I] and domain [B]");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "network: x must be float32 or float64");
  STD_TORCH_CHECK(domain.scalar_type() == ScalarType::Int || domain.scalar_type() == ScalarType::Long,
                  "network: domain must be int32 or int64");
  Call call{torch::stable::contiguous(x), torch::stable::contiguous(domain), {}, std::nullopt, {}, x.size(0)};
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.scalar_type() == type, "network: all weights must have the dtype of x");
    call.weights.push_back(torch::stable::contiguous(weight));
  }
  call.shape = read_shape(x, weights, mask.has_value(), star_linear, gate_detach);
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "network: gate_mask must be bool");
    check_shape(*mask, {call.shape.domains, call.shape.tasks, call.shape.gated}, "gate_mask");
    call.mask = torch::stable::contiguous(*mask);
  }
  return call;
}

Route make_route(const Call& call, int64_t tile_rows) {
  const bool narrow = call.domain.scalar_type() == ScalarType::Int;
  Route result = narrow ? route(call.domain.const_data_ptr<int32_t>(), call.rows, call.shape.domains, tile_rows)
                        : route(call.domain.const_data_ptr<int64_t>(), call.rows, call.shape.domains, tile_rows);
  if (result.bad_row >= 0) {
    const int64_t id = narrow ? call.domain.const_data_ptr<int32_t>()[result.bad_row]
                              : call.domain.const_data_ptr<int64_t>()[result.bad_row];
    STD_TORCH_CHECK(false, "domain[", result.bad_row, "] is ", id, ", the model has ", call.shape.domains, " domains");
  }
  return result;
}

// Runs body(worker) for every worker of [0, workers), each on its own thread where there are threads.
template <typename Body>
void for_workers(int64_t workers, const Body& body) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) body(w);
  });
}

// Runs body(job) for every job, handed out as workers become free.
template <typename Body>
void for_jobs(int64_t jobs, int64_t workers, const Body& body) {
  std::atomic<int64_t> next{0};
  for_workers(std::min(workers, jobs), [&](int64_t) {
    for (int64_t job = next++; job < jobs; job = next++) body(job);
  });
}

int64_t count_workers(int64_t rows) {
  constexpr int64_t kRowsWorthAThread = 16;  // about 0.1 ms of work, what waking a thread costs
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return std::clamp<int64_t>(rows / kRowsWorthAThread, 1, threads);
}

// The state that forward and backward share: routing, layouts, packed weights, tiles.
template <typename T>
struct Run {
  const Call& call;
  const NetworkKernels<T>& kernels;
  int64_t workers;
  Route route;
  std::vector<int64_t> cuts;  // backward: worker w has the tiles [cuts[w], cuts[w + 1])
  Layout layout;
  int64_t grad_levels;
  T* packed = nullptr;
  T* tiles = nullptr;
  T* grads = nullptr;

  Run(const Call& c, bool backward)
      : call(c),
        kernels(active_kernels<T>()),
        workers(count_workers(c.rows)),
        route(make_route(c, choose_tile_rows(c.rows, workers, kMostTileRows))),
        cuts(worker_ranges(route.tiles, c.rows, workers)),
        layout(c.shape, kernels.lanes, sizeof(T), tallest(), backward),
        grad_levels(PrivateGrads<T>::levels_for(most_tiles())) {
    const int64_t private_grads = backward ? workers * grad_levels * layout.grad_elements() : 0;
    const int64_t elements = layout.pack_elements() + workers * layout.tile.size + private_grads;
    packed = static_cast<T*>(workspace(elements * static_cast<int64_t>(sizeof(T))));
    tiles = packed + layout.pack_elements();
    grads = tiles + workers * layout.tile.size;
    std::vector<const T*> pointers;
    for (const Tensor& weight : call.weights) pointers.push_back(weight.const_data_ptr<T>());
    const WeightPointers<const T*> named = name_weights(pointers);
    const bool* mask = call.mask.has_value() ? call.mask->const_data_ptr<bool>() : nullptr;
    std::vector<int64_t> jobs;
    for (int64_t job = 0; job < pack_jobs_shared(layout.size); ++job) jobs.push_back(job);
    for (const RowTile& tile : route.tiles) {  // only domains with rows; tiles are sorted by domain
      const int64_t job = pack_jobs_shared(layout.size) + tile.domain;
      if (jobs.back() != job) jobs.push_back(job);
    }
    for_jobs(static_cast<int64_t>(jobs.size()), workers,
             [&](int64_t i) { pack_weights(jobs[i], named, mask, layout, kernels.panel, backward, packed); });
  }

  int64_t tallest() const {
    int64_t rows = 1;
    for (const RowTile& tile : route.tiles) rows = std::max(rows, tile.rows);
    return rows;
  }

  int64_t most_tiles() const {
    int64_t most = 0;
    for (int64_t w = 0; w < workers; ++w) most = std::max(most, cuts[w + 1] - cuts[w]);
    return most;
  }

  T* tile_of(int64_t worker) const { return tiles + worker * layout.tile.size; }

  // Gathers the tile's rows of a [B, n] tensor.
  void gather(const T* from, int64_t n, const RowTile& tile, T* to, int64_t stride) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      std::copy_n(from + route.order[tile.first + i] * n, n, to + i * stride);
    }
  }

  void scatter(const T* from, int64_t stride, int64_t n, const RowTile& tile, T* to) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      std::copy_n(from + i * stride, n, to + route.order[tile.first + i] * n);
    }
  }

  void tile_forward(const RowTile& tile, T* memory, bool keep) const {
    gather(call.x.const_data_ptr<T>(), layout.size.inputs, tile, memory + layout.tile.x, layout.size.ld_input);
    kernels.tile_forward(layout.size, layout.pack, packed, layout.tile, memory, tile.domain, tile.rows, keep);
  }

  static constexpr int64_t kMostTileRows = 96;
};

template <typename T>
void forward(const Call& call, Tensor& logits) {
  const Run<T> run(call, false);
  T* out = logits.mutable_data_ptr<T>();
  std::atomic<int64_t> next{0};
  const auto tiles = static_cast<int64_t>(run.route.tiles.size());
  for_workers(run.workers, [&](int64_t worker) {
    T* memory = run.tile_of(worker);
    for (int64_t i = next++; i < tiles; i = next++) {
      const RowTile& tile = run.route.tiles[i];
      run.tile_forward(tile, memory, false);
      run.scatter(memory + run.layout.tile.logit, call.shape.tasks, call.shape.tasks, tile, out);
    }
  });
}

// Where the gradients go: d_x is empty unless it is asked for.
struct Gradients {
  Tensor d_x;
  std::vector<Tensor> d_weights;

  Gradients(const Call& call, bool input_grad)
      : d_x(torch::stable::new_empty(call.x, {input_grad ? call.rows : 0, call.shape.inputs})) {
    for (const Tensor& weight : call.weights) d_weights.push_back(torch::stable::empty_like(weight));
  }
};

// Forward and backward of every tile. `output_grad(i, logit, d_logit)` gives the gradient of tile i's logits.
template <typename T, typename OutputGrad>
void backward(const Run<T>& run, Gradients& to, bool input_grad, const OutputGrad& output_grad) {
  const Layout& layout = run.layout;
  T* d_input = input_grad ? to.d_x.template mutable_data_ptr<T>() : nullptr;
  PrivateGrads<T> grads(run.grads, layout, run.workers, run.grad_levels);
  for_workers(run.workers, [&](int64_t worker) {
    T* memory = run.tile_of(worker);
    for (int64_t i = run.cuts[worker]; i < run.cuts[worker + 1]; ++i) {
      const RowTile& tile = run.route.tiles[i];
      T* own = grads.open(worker, i - run.cuts[worker], tile.domain);
      run.tile_forward(tile, memory, true);
      output_grad(i, memory + layout.tile.logit, memory + layout.tile.d_logit);
      run.kernels.tile_backward(layout.size, layout.pack, run.packed, layout.grad, own, layout.tile, memory,
                                tile.domain, tile.rows, input_grad);
      if (input_grad) {
        run.scatter(memory + layout.tile.d_x, layout.size.ld_input, layout.size.inputs, tile, d_input);
      }
    }
  });
  std::vector<T*> pointers;
  for (Tensor& d_weight : to.d_weights) pointers.push_back(d_weight.mutable_data_ptr<T>());
  const std::vector<GradPiece<T>> pieces = grad_pieces(layout, name_weights(pointers));
  for_jobs(static_cast<int64_t>(pieces.size()), run.workers, [&](int64_t i) { sum_piece(pieces[i], grads); });
}

template <typename T>
void backward_from_logits(const Call& call, const Tensor& grad, Gradients& to, bool input_grad) {
  const Run<T> run(call, true);
  const T* d_logits = grad.const_data_ptr<T>();
  backward<T>(run, to, input_grad, [&](int64_t i, const T*, T* d_logit) {
    run.gather(d_logits, call.shape.tasks, run.route.tiles[i], d_logit, call.shape.tasks);
  });
}

template <typename T>
void backward_from_labels(const Call& call, const Tensor& label, const Tensor* row_weight, const Tensor& pair_weight,
                          Tensor& pair_loss, Gradients& to, bool input_grad) {
  const Run<T> run(call, true);
  PairLoss<T> loss(label.const_data_ptr<T>(), row_weight == nullptr ? nullptr : row_weight->const_data_ptr<T>(),
                   pair_weight.const_data_ptr<T>(), run.route, call.shape.domains, call.shape.tasks);
  backward<T>(run, to, input_grad, [&](int64_t i, const T* logit, T* d_logit) { loss.tile(i, logit, d_logit); });
  loss.finish(pair_loss.mutable_data_ptr<T>());
}

Tensor network_fwd(const Tensor& x, const Tensor& domain, const std::vector<Tensor>& weights,
                   const std::optional<Tensor>& gate_mask, bool star_linear) {
  const Call call = make_call(x, domain, weights, gate_mask, star_linear, true);
  Tensor logits = torch::stable::new_empty(call.x, {call.rows, call.shape.tasks});
  if (call.x.scalar_type() == ScalarType::Double) {
    forward<double>(call, logits);
  } else {
    forward<float>(call, logits);
  }
  return logits;
}

// Returns d_x (empty unless input_grad), then a gradient per weight.
std::vector<Tensor> network_bwd(const Tensor& grad, const Tensor& x, const Tensor& domain,
                                const std::vector<Tensor>& weights, const std::optional<Tensor>& gate_mask,
                                bool star_linear, bool gate_detach, bool input_grad) {
  const Call call = make_call(x, domain, weights, gate_mask, star_linear, gate_detach);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == call.rows && grad.size(1) == call.shape.tasks &&
                      grad.scalar_type() == call.x.scalar_type(),
                  "network: the gradient must be [B, T] in the dtype of x");
  const Tensor dense_grad = torch::stable::contiguous(grad);
  Gradients to(call, input_grad);
  if (call.x.scalar_type() == ScalarType::Double) {
    backward_from_logits<double>(call, dense_grad, to, input_grad);
  } else {
    backward_from_logits<float>(call, dense_grad, to, input_grad);
  }
  to.d_weights.insert(to.d_weights.begin(), to.d_x);
  return to.d_weights;
}

// Returns pair_loss [D, T], d_x (empty unless input_grad), then a gradient per weight, all of the weighted loss
// sum(pair_weight * pair_loss).
std::vector<Tensor> network_loss(const Tensor& x, const Tensor& domain, const Tensor& label,
                                 const std::optional<Tensor>& row_weight, const Tensor& pair_weight,
                                 const std::vector<Tensor>& weights, const std::optional<Tensor>& gate_mask,
                                 bool star_linear, bool gate_detach, bool input_grad) {
  const Call call = make_call(x, domain, weights, gate_mask, star_linear, gate_detach);
  const ScalarType type = call.x.scalar_type();
  const int64_t d = call.shape.domains, t = call.shape.tasks;
  STD_TORCH_CHECK(label.dim() == 2 && label.size(0) == call.rows && label.size(1) == t && label.scalar_type() == type,
                  "network_loss: label must be [B, T] in the dtype of x");
  STD_TORCH_CHECK(pair_weight.dim() == 2 && pair_weight.size(0) == d && pair_weight.size(1) == t &&
                      pair_weight.scalar_type() == type,
                  "network_loss: pair_weight must be [D, T] in the dtype of x");
  std::optional<Tensor> rows;
  if (row_weight.has_value()) {
    STD_TORCH_CHECK(row_weight->dim() == 1 && row_weight->size(0) == call.rows && row_weight->scalar_type() == type,
                    "network_loss: row_weight must be [B] in the dtype of x");
    rows = torch::stable::contiguous(*row_weight);
  }
  const Tensor* row_pointer = rows.has_value() ? &*rows : nullptr;
  const Tensor labels = torch::stable::contiguous(label);
  const Tensor pairs = torch::stable::contiguous(pair_weight);
  Tensor pair_loss = torch::stable::new_empty(call.x, {d, t});
  Gradients to(call, input_grad);
  if (type == ScalarType::Double) {
    backward_from_labels<double>(call, labels, row_pointer, pairs, pair_loss, to, input_grad);
  } else {
    backward_from_labels<float>(call, labels, row_pointer, pairs, pair_loss, to, input_grad);
  }
  to.d_weights.insert(to.d_weights.begin(), {pair_loss, to.d_x});
  return to.d_weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(m3oe_fast, CPU, m) {
  m.impl("network_fwd", TORCH_BOX(&network_fwd));
  m.impl("network_bwd", TORCH_BOX(&network_bwd));
  m.impl("network_loss", TORCH_BOX(&network_loss));
}

}  // namespace m3oe

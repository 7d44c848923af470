// The network op on the CPU: routing, threads, results. Inputs [B, C] and ids [B, F] -> logits [B, T], loss, gradients.
//
// Decomposition: rows are sorted by domain and cut into tiles; a tile runs the whole network on one thread, embedding
// lookup included. The forward pass hands tiles out as threads become free (a row's result does not depend on its
// tile). The backward pass gives every worker a fixed range of tiles and private gradients, then sums them in worker
// order: the same bits for the same batch and number of threads. It recomputes the forward pass of its tile, so nothing
// but the inputs is kept in between. The loss op runs both at once: a tile's loss and its gradient follow from its
// logits, and nothing is recomputed.
#include "network.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <vector>

#include "call.h"
#include "dispatch.h"
#include "embedding.h"
#include "gradients.h"
#include "layout.h"
#include "loss.h"
#include "pack.h"
#include "parallel.h"
#include "route.h"
#include "weights.h"
#include "workspace.h"

namespace m3oe {
namespace {

using torch::headeronly::ScalarType;

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

int64_t count_workers(int64_t rows) {
  constexpr int64_t kRowsWorthAThread = 16;  // about 0.1 ms of work, what waking a thread costs
  return std::clamp<int64_t>(rows / kRowsWorthAThread, 1, num_threads());
}

// Packs the shared weights and those of the given domains (ascending, repeats allowed).
template <typename T, typename Domains>
void pack(const Call& call, const Layout& layout, int64_t panel, bool backward, int64_t workers, const Domains& domains,
          T* packed) {
  const int64_t shared = pack_jobs_shared(layout.size);
  std::vector<int64_t> jobs;
  for (int64_t job = 0; job < shared; ++job) jobs.push_back(job);
  for (const int64_t d : domains) {
    if (jobs.back() != shared + d) jobs.push_back(shared + d);
  }
  const WeightPointers<const T*> weights = weight_pointers<T>(call);
  for_jobs(static_cast<int64_t>(jobs.size()), workers, [&](int64_t i, int64_t) {
    pack_weights(jobs[i], weights, call.mask_data(), layout, panel, backward, packed);
  });
}

// What forward and backward share: routing, layouts, packed weights, tiles, lookup. `extra` elements of scratch memory
// lie behind the tiles.
template <typename T>
struct Run {
  const Call& call;
  const NetworkKernels<T>& kernels;
  int64_t workers;
  Route route;
  Layout layout;
  const T* packed = nullptr;
  T* tiles = nullptr;
  T* extra = nullptr;
  mutable std::atomic<int64_t> bad_id{std::numeric_limits<int64_t>::max()};

  Run(const Call& c, bool backward)
      : call(c),
        kernels(active_kernels<T>(c.precision)),
        workers(count_workers(c.rows)),
        route(make_route(c, choose_tile_rows(c.rows, workers, tallest_tile(c, backward)))),
        layout(c.shape, kernels.lanes, kernels.format, sizeof(T), tallest(), backward),
        backward_(backward) {}

  // Lays out the scratch memory and packs the weights, unless they come packed.
  void open(int64_t extra_elements, const Tensor* packed_weights) {
    const int64_t pack_elements = packed_weights == nullptr ? layout.pack_elements() : 0;
    const int64_t elements = pack_elements + workers * layout.tile.size + extra_elements;
    T* memory = static_cast<T*>(workspace(elements * static_cast<int64_t>(sizeof(T))));
    tiles = memory + pack_elements;
    extra = tiles + workers * layout.tile.size;
    if (packed_weights != nullptr) {
      packed = packed_weights->const_data_ptr<T>();
      return;
    }
    packed = memory;
    std::vector<int64_t> domains;  // only those with rows; tiles are sorted by domain
    for (const RowTile& tile : route.tiles) domains.push_back(tile.domain);
    pack(call, layout, kernels.panel, backward_, workers, domains, memory);
  }

  // A tile reads and writes all weight gradients once. Where those of the experts are too large for L2, with some 30
  // experts and more, a tile twice as tall halves that traffic; its own buffers are beyond L2 by then anyway.
  int64_t tallest_tile(const Call& c, bool backward) const {
    constexpr int64_t kLarge = int64_t{2} << 20;
    int64_t gradient = 0;
    for (size_t l = 0; l + 1 < c.shape.widths.size(); ++l) gradient += c.shape.widths[l] * c.shape.widths[l + 1];
    const bool large = c.shape.experts * gradient * static_cast<int64_t>(sizeof(T)) > kLarge;
    return kernels.format.tile_rows * (backward && large ? 2 : 1);
  }

  int64_t tallest() const {
    int64_t rows = 1;
    for (const RowTile& tile : route.tiles) rows = std::max(rows, tile.rows);
    return rows;
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
    T* x = memory + layout.tile.x;
    if (call.fields.has_value()) {
      gather_embeddings(*call.fields, call.embedding->const_data_ptr<T>(), call.embedding->size(1),
                        route.order.data() + tile.first, tile.rows, x, layout.size.ld_input, bad_id);
    }
    gather(call.x.const_data_ptr<T>(), call.columns, tile, x + call.embedded, layout.size.ld_input);
    kernels.tile_forward(layout.size, layout.pack, packed, layout.tile, memory, tile.domain, tile.rows, keep);
  }

  // After the parallel regions, where nothing may throw.
  void check_ids() const {
    const int64_t place = bad_id;
    if (place == std::numeric_limits<int64_t>::max()) return;
    const int64_t row = place / call.fields->fields(), field = place % call.fields->fields();
    STD_TORCH_CHECK(false, "ids[", row, ", ", field, "] is ", call.fields->id(row, field), ", field ", field, " has ",
                    call.fields->size(field), " rows");
  }

 private:
  bool backward_;
};

// Stands behind packed weights: in which format they are. Two formats can take the same number of elements.
template <typename T>
T format_mark(const NetworkKernels<T>& kernels) {
  return static_cast<T>(static_cast<int64_t>(kernels.format.operand) * 4096 + kernels.panel);
}

template <typename T>
void check_packed(const Tensor& packed, const Run<T>& run) {
  const int64_t elements = run.layout.pack_elements();
  const bool fits = packed.numel() == elements + 1 && packed.is_contiguous() &&
                    packed.const_data_ptr<T>()[elements] == format_mark(run.kernels);
  STD_TORCH_CHECK(fits, "network: the packed weights are of another network or precision");
}

template <typename T>
void forward(const Call& call, const Tensor* packed, bool probability, Tensor& result) {
  Run<T> run(call, false);
  if (packed != nullptr) check_packed(*packed, run);
  run.open(0, packed);
  T* out = result.mutable_data_ptr<T>();
  std::atomic<int64_t> next{0};
  const auto tiles = static_cast<int64_t>(run.route.tiles.size());
  for_workers(std::min(run.workers, std::max<int64_t>(tiles, 1)), [&](int64_t worker) {
    T* memory = run.tile_of(worker);
    for (int64_t i = next++; i < tiles; i = next++) {
      const RowTile& tile = run.route.tiles[i];
      run.tile_forward(tile, memory, false);
      T* logit = memory + run.layout.tile.logit;
      if (probability) run.kernels.sigmoid(logit, tile.rows * call.shape.tasks);
      run.scatter(logit, call.shape.tasks, call.shape.tasks, tile, out);
    }
  });
  run.check_ids();
}

// How the gradient of the embedding table is wanted.
enum class EmbeddingForm : int { kNone, kDense, kSparse };

EmbeddingForm read_embedding_form(const std::string& name) {
  if (name == "none") return EmbeddingForm::kNone;
  if (name == "dense") return EmbeddingForm::kDense;
  STD_TORCH_CHECK(name == "sparse", "network: embedding_grad must be none, dense or sparse, got ", name);
  return EmbeddingForm::kSparse;
}

// Which gradients a backward pass computes besides those of the weights.
struct Wanted {
  bool x;
  EmbeddingForm embedding;
};

// Where the gradients go: empty tensors for what is not wanted.
struct Gradients {
  Tensor d_x, d_embedding, embedding_rows;
  std::vector<Tensor> d_weights;

  Gradients(const Call& call, const Wanted& wanted)
      : d_x(torch::stable::new_empty(call.x, {wanted.x ? call.rows : 0, call.columns})),
        d_embedding(torch::stable::new_empty(call.x, {0, 0})),
        embedding_rows(torch::stable::new_empty(call.x, {0}, ScalarType::Long)) {
    for (const Tensor& weight : call.weights) d_weights.push_back(torch::stable::empty_like(weight));
  }

  std::vector<Tensor> list() const {
    std::vector<Tensor> all{d_x, d_embedding, embedding_rows};
    all.insert(all.end(), d_weights.begin(), d_weights.end());
    return all;
  }
};

template <typename T>
void write_embedding_grad(const EmbeddingGrad<T>& from, const Call& call, int64_t workers, bool sparse, Gradients& to) {
  to.d_embedding = torch::stable::new_empty(call.x, {from.result_rows(), call.embedding->size(1)});
  T* values = to.d_embedding.template mutable_data_ptr<T>();
  if (sparse) {
    to.embedding_rows = torch::stable::new_empty(call.x, {from.result_rows()}, ScalarType::Long);
    from.write_rows(to.embedding_rows.template mutable_data_ptr<int64_t>());
  }
  for_jobs(from.jobs(), workers, [&](int64_t job, int64_t) { from.write_small(job, values); });
  if (from.has_large()) for_jobs(from.jobs(), workers, [&](int64_t job, int64_t) { from.add_large(job, values); });
}

// Forward and backward of every tile. `output_grad(i, logit, d_logit)` writes the gradient of tile i's logits.
template <typename T, typename OutputGrad>
void backward(Run<T>& run, const Wanted& wanted, Gradients& to, const OutputGrad& output_grad) {
  const Call& call = run.call;
  const Layout& layout = run.layout;
  const std::vector<int64_t> cuts =
      worker_ranges(run.route.tiles, call.rows, run.workers);  // worker w: [cuts[w], cuts[w + 1])
  int64_t most_tiles = 0;
  for (int64_t w = 0; w < run.workers; ++w) most_tiles = std::max(most_tiles, cuts[w + 1] - cuts[w]);
  const int64_t levels = PrivateGrads<T>::levels_for(most_tiles);
  const bool sparse = wanted.embedding == EmbeddingForm::kSparse;
  std::optional<EmbeddingGrad<T>> table;
  if (wanted.embedding != EmbeddingForm::kNone && call.fields.has_value()) {
    table.emplace(*call.fields, call.embedding->size(1), run.workers, sparse);
  }
  const int64_t private_grads = run.workers * levels * layout.grad_elements();
  run.open(private_grads + (table.has_value() ? table->scratch_elements() : 0), nullptr);
  if (table.has_value()) table->use_scratch(run.extra + private_grads);
  PrivateGrads<T> grads(run.extra, layout, run.workers, levels);

  T* d_x = wanted.x ? to.d_x.template mutable_data_ptr<T>() : nullptr;
  const bool input_grad = wanted.x || table.has_value();
  for_workers(run.workers, [&](int64_t worker) {
    T* memory = run.tile_of(worker);
    for (int64_t i = cuts[worker]; i < cuts[worker + 1]; ++i) {
      const RowTile& tile = run.route.tiles[i];
      T* own = grads.open(worker, i - cuts[worker], tile.domain);
      run.tile_forward(tile, memory, true);
      output_grad(i, memory + layout.tile.logit, memory + layout.tile.d_logit);
      run.kernels.tile_backward(layout.size, layout.pack, run.packed, layout.grad, own, layout.tile, memory,
                                tile.domain, tile.rows, input_grad);
      const T* d_input = memory + layout.tile.d_x;
      if (wanted.x) run.scatter(d_input + call.embedded, layout.size.ld_input, call.columns, tile, d_x);
      if (table.has_value()) {
        table->add_tile(worker, run.route.order.data() + tile.first, tile.rows, d_input, layout.size.ld_input);
      }
    }
  });
  run.check_ids();
  std::vector<T*> pointers;
  for (Tensor& d_weight : to.d_weights) pointers.push_back(d_weight.mutable_data_ptr<T>());
  const std::vector<GradPiece<T>> pieces = grad_pieces(layout, name_weights(pointers));
  for_jobs(static_cast<int64_t>(pieces.size()), run.workers, [&](int64_t i, int64_t) { sum_piece(pieces[i], grads); });
  if (table.has_value()) write_embedding_grad(*table, call, run.workers, sparse, to);
}

template <typename T>
void backward_from_logits(const Call& call, const Tensor& grad, const Wanted& wanted, Gradients& to) {
  Run<T> run(call, true);
  const T* d_logits = grad.const_data_ptr<T>();
  backward<T>(run, wanted, to, [&](int64_t i, const T*, T* d_logit) {
    run.gather(d_logits, call.shape.tasks, run.route.tiles[i], d_logit, call.shape.tasks);
  });
}

template <typename T>
void backward_from_labels(const Call& call, const Tensor& label, const Tensor* row_weight, const Tensor& pair_weight,
                          const Wanted& wanted, Tensor& pair_loss, Gradients& to) {
  Run<T> run(call, true);
  PairLoss<T> loss(label.const_data_ptr<T>(), row_weight == nullptr ? nullptr : row_weight->const_data_ptr<T>(),
                   pair_weight.const_data_ptr<T>(), run.route, call.shape.domains, call.shape.tasks);
  backward<T>(run, wanted, to, [&](int64_t i, const T* logit, T* d_logit) { loss.tile(i, logit, d_logit); });
  loss.finish(pair_loss.mutable_data_ptr<T>());
}

Tensor network_pack(const std::vector<Tensor>& weights, const std::optional<Tensor>& gate_mask, int64_t inputs,
                    bool star_linear, const std::string& precision) {
  const Call call = read_weights(inputs, {weights, gate_mask, star_linear, true, false}, precision);
  std::vector<int64_t> domains(call.shape.domains);
  for (int64_t d = 0; d < call.shape.domains; ++d) domains[d] = d;
  const auto packed_by = [&]<typename T>(const NetworkKernels<T>& kernels) {
    const Layout layout(call.shape, kernels.lanes, kernels.format, sizeof(T), 1, false);
    Tensor packed = torch::stable::new_empty(call.weights.front(), {layout.pack_elements() + 1});
    T* data = packed.template mutable_data_ptr<T>();
    // Whole buffer: the gaps between aligned parts must not differ from call to call.
    std::fill_n(data, layout.pack_elements(), T(0));
    data[layout.pack_elements()] = format_mark(kernels);
    pack(call, layout, kernels.panel, false, num_threads(), domains, data);
    return packed;
  };
  return call.is_double() ? packed_by(active_kernels<double>(call.precision))
                          : packed_by(active_kernels<float>(call.precision));
}

Tensor network_fwd(const Tensor& x, const std::optional<Tensor>& ids, const std::optional<Tensor>& embedding,
                   const std::vector<int64_t>& vocab, const Tensor& domain, const std::vector<Tensor>& weights,
                   const std::optional<Tensor>& gate_mask, const std::optional<Tensor>& packed, bool star_linear,
                   const std::string& precision, bool probability) {
  const Call call = read_call({x, ids, embedding, vocab, domain}, {weights, gate_mask, star_linear, true, false},
                              precision, packed.has_value());
  Tensor result = torch::stable::new_empty(call.x, {call.rows, call.shape.tasks});
  const Tensor* packed_weights = packed.has_value() ? &*packed : nullptr;
  if (packed_weights != nullptr) {
    STD_TORCH_CHECK(packed->scalar_type() == call.x.scalar_type(), "network: packed weights of another dtype");
  }
  if (call.is_double()) {
    forward<double>(call, packed_weights, probability, result);
  } else {
    forward<float>(call, packed_weights, probability, result);
  }
  return result;
}

// Returns d_x and d_embedding (empty unless wanted), the table rows of a sparse d_embedding, then a gradient per
// weight.
std::vector<Tensor> network_bwd(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& ids,
                                const std::optional<Tensor>& embedding, const std::vector<int64_t>& vocab,
                                const Tensor& domain, const std::vector<Tensor>& weights,
                                const std::optional<Tensor>& gate_mask, bool star_linear, bool gate_detach,
                                const std::string& precision, bool input_grad, const std::string& embedding_grad,
                                bool table_grad) {
  const Call call = read_call({x, ids, embedding, vocab, domain},
                              {weights, gate_mask, star_linear, gate_detach, table_grad}, precision);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == call.rows && grad.size(1) == call.shape.tasks &&
                      grad.scalar_type() == call.x.scalar_type(),
                  "network: the gradient must be [B, T] in the dtype of x");
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const Wanted wanted{input_grad, read_embedding_form(embedding_grad)};
  Gradients to(call, wanted);
  if (call.is_double()) {
    backward_from_logits<double>(call, dense_grad, wanted, to);
  } else {
    backward_from_logits<float>(call, dense_grad, wanted, to);
  }
  return to.list();
}

// Returns pair_loss [D, T], then what network_bwd returns, all of the weighted loss sum(pair_weight * pair_loss).
std::vector<Tensor> network_loss(const Tensor& x, const std::optional<Tensor>& ids,
                                 const std::optional<Tensor>& embedding, const std::vector<int64_t>& vocab,
                                 const Tensor& domain, const Tensor& label, const std::optional<Tensor>& row_weight,
                                 const Tensor& pair_weight, const std::vector<Tensor>& weights,
                                 const std::optional<Tensor>& gate_mask, bool star_linear, bool gate_detach,
                                 const std::string& precision, bool input_grad, const std::string& embedding_grad,
                                 bool table_grad) {
  const Call call = read_call({x, ids, embedding, vocab, domain},
                              {weights, gate_mask, star_linear, gate_detach, table_grad}, precision);
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
  const Wanted wanted{input_grad, read_embedding_form(embedding_grad)};
  Gradients to(call, wanted);
  if (call.is_double()) {
    backward_from_labels<double>(call, labels, row_pointer, pairs, wanted, pair_loss, to);
  } else {
    backward_from_labels<float>(call, labels, row_pointer, pairs, wanted, pair_loss, to);
  }
  std::vector<Tensor> result = to.list();
  result.insert(result.begin(), pair_loss);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(m3oe_fast, CPU, m) {
  m.impl("network_pack", TORCH_BOX(&network_pack));
  m.impl("network_fwd", TORCH_BOX(&network_fwd));
  m.impl("network_bwd", TORCH_BOX(&network_bwd));
  m.impl("network_loss", TORCH_BOX(&network_loss));
}

}  // namespace m3oe

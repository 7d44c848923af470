// The network op without torch: csrc/cpu/network.cpp line for line where threads and memory matter, with std::jthread
// in place of torch's pool and exact allocations in place of tensors. A change of the decomposition there belongs here
// too.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/embedding.h"
#include "cpu/gradients.h"
#include "cpu/layout.h"
#include "cpu/loss.h"
#include "cpu/network.h"
#include "cpu/pack.h"
#include "cpu/route.h"
#include "cpu/workspace.h"
#include "random_case.h"
#include "red_zones.h"

namespace m3oe {

// Runs body(worker) for every worker of [0, workers), each on its own thread.
template <typename Body>
void for_workers(int64_t workers, const Body& body) {
  if (workers == 1) return body(0);
  std::vector<std::jthread> pool;
  for (int64_t w = 0; w < workers; ++w) pool.emplace_back([&body, w] { body(w); });
}

// Runs body(job) for every job, handed out as workers become free.
template <typename Body>
void for_jobs(int64_t jobs, int64_t workers, const Body& body) {
  std::atomic<int64_t> next{0};
  for_workers(std::min(workers, jobs), [&](int64_t) {
    for (int64_t job = next++; job < jobs; job = next++) body(job);
  });
}

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

template <typename T>
struct Results {
  std::vector<T> output;  // [B, T], logits or probabilities
  std::vector<T> pair_loss, d_x, d_embedding;
  std::vector<int64_t> embedding_rows;
  std::vector<std::vector<T>> d_weights;
};

// Elements that nobody wrote are not finite.
template <typename T>
std::vector<T> unwritten(int64_t elements) {
  return std::vector<T>(elements, std::numeric_limits<T>::quiet_NaN());
}

template <typename T>
struct Call {
  const Case& config;
  const Inputs<T>& in;
  const NetworkKernels<T>& kernels;
  std::optional<IdFields> fields;

  Call(const Case& c, const Inputs<T>& inputs, const NetworkKernels<T>& k) : config(c), in(inputs), kernels(k) {
    if (c.fields() > 0) fields.emplace(in.ids(), c.narrow_ids, c.rows, c.vocab);
  }
  int64_t rows() const { return config.rows; }
  int64_t tasks() const { return config.shape.tasks; }
  bool spread() const { return kRedZones && config.spread; }
};

template <typename T>
Route make_route(const Call<T>& call, int64_t tile_rows) {
  const int64_t domains = call.config.shape.domains;
  Route result = call.config.narrow_domain ? route(call.in.narrow_domain.data(), call.rows(), domains, tile_rows)
                                           : route(call.in.wide_domain.data(), call.rows(), domains, tile_rows);
  require(result.bad_row == call.in.bad_row, "route() reported row " + std::to_string(result.bad_row) +
                                                 " as the first bad one, not " + std::to_string(call.in.bad_row));
  return result;
}

// Packs the shared weights and those of the given domains (ascending, repeats allowed).
template <typename T>
void pack(const Call<T>& call, const Layout& layout, bool backward, int64_t workers,
          const std::vector<int64_t>& domains, T* packed) {
  const int64_t shared = pack_jobs_shared(layout.size);
  std::vector<int64_t> jobs;
  for (int64_t job = 0; job < shared; ++job) jobs.push_back(job);
  for (const int64_t d : domains) {
    if (jobs.back() != shared + d) jobs.push_back(shared + d);
  }
  const WeightPointers<const T*> weights = call.in.weight_pointers();
  for_jobs(static_cast<int64_t>(jobs.size()), workers, [&](int64_t i) {
    pack_weights(jobs[i], weights, call.in.mask.data(), layout, call.kernels.panel, backward, packed);
  });
}

// The shape of a call that computes no gradients.
inline NetworkShape without_table_grad(NetworkShape shape) {
  shape.table_grad = false;
  return shape;
}

// What forward and backward share: routing, layouts, packed weights, tiles, lookup.
template <typename T>
struct Run {
  const Call<T>& call;
  int64_t workers;
  Route route;
  SpreadLayout spread;
  const Layout& layout;
  const T* packed = nullptr;
  T* tiles = nullptr;
  T* grads = nullptr;
  T* table_grads = nullptr;
  mutable std::atomic<int64_t> bad_id{std::numeric_limits<int64_t>::max()};

  Run(const Call<T>& c, bool backward)
      : call(c),
        workers(c.config.workers),
        route(make_route(c, tile_rows())),
        spread(backward ? c.config.shape : without_table_grad(c.config.shape), c.kernels.lanes, c.kernels.format,
               sizeof(T), tallest(), backward, c.spread()),
        layout(spread.layout),
        backward_(backward) {}

  // Lays out the scratch memory, as one allocation or each part apart, and packs the weights unless they come packed.
  void open(int64_t grad_elements, int64_t table_elements, const T* packed_weights) {
    const int64_t pack_elements = packed_weights == nullptr ? layout.pack_elements() : 0;
    const int64_t sizes[] = {pack_elements, workers * layout.tile.size, grad_elements, table_elements};
    T* parts[4];
    if (call.spread()) {
      for (int i = 0; i < 4; ++i) parts[i] = memory_.emplace_back(sizes[i]).data();
      if (packed_weights == nullptr) spread.poison_pack(parts[0]);
      for (int64_t w = 0; w < workers; ++w) spread.tile.poison(parts[1] + w * layout.tile.size);
    } else {
      int64_t elements = 0;
      for (const int64_t size : sizes) elements += size;
      parts[0] = static_cast<T*>(workspace(elements * static_cast<int64_t>(sizeof(T))));
      for (int i = 1; i < 4; ++i) parts[i] = parts[i - 1] + sizes[i - 1];
    }
    tiles = parts[1];
    grads = parts[2];
    table_grads = parts[3];
    packed = packed_weights == nullptr ? parts[0] : packed_weights;
    if (packed_weights != nullptr) return;
    std::vector<int64_t> domains;  // only those with rows; tiles are sorted by domain
    for (const RowTile& tile : route.tiles) domains.push_back(tile.domain);
    pack(call, layout, backward_, workers, domains, parts[0]);
  }

  int64_t tile_rows() const {
    const int64_t most = call.kernels.format.tile_rows;
    return call.config.tile_rows > 0 ? call.config.tile_rows : choose_tile_rows(call.rows(), workers, most);
  }

  int64_t tallest() const {
    int64_t rows = 1;
    for (const RowTile& tile : route.tiles) rows = std::max(rows, tile.rows);
    return rows;
  }

  T* tile_of(int64_t worker) const { return tiles + worker * layout.tile.size; }

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
    const Case& c = call.config;
    T* x = memory + layout.tile.x;
    if (call.fields.has_value()) {
      gather_embeddings(*call.fields, call.in.table.data(), c.embedding_width, route.order.data() + tile.first,
                        tile.rows, x, layout.size.ld_input, bad_id);
    }
    gather(call.in.x.data(), c.columns, tile, x + c.embedded(), layout.size.ld_input);
    call.kernels.tile_forward(layout.size, layout.pack, packed, layout.tile, memory, tile.domain, tile.rows, keep);
  }

  // Whether the op ends here with an error.
  bool has_bad_id() const {
    require(bad_id == call.in.bad_place, "gather_embeddings() reported the wrong bad id");
    return call.in.bad_place != std::numeric_limits<int64_t>::max();
  }

 private:
  bool backward_;
  std::vector<Scratch<T>> memory_;
};

template <typename T>
Scratch<T> pack_ahead(const Call<T>& call) {
  const Case& c = call.config;
  std::vector<int64_t> domains(c.shape.domains);
  for (int64_t d = 0; d < c.shape.domains; ++d) domains[d] = d;
  const SpreadLayout spread(without_table_grad(c.shape), call.kernels.lanes, call.kernels.format, sizeof(T), 1, false,
                            call.spread());
  Scratch<T> packed(spread.layout.pack_elements());
  std::fill_n(packed.data(), spread.layout.pack_elements(), T(0));
  spread.poison_pack(packed.data());
  pack(call, spread.layout, false, c.workers, domains, packed.data());
  return packed;
}

template <typename T>
void forward(const Call<T>& call, Results<T>& to) {
  std::optional<Scratch<T>> ahead;
  if (call.config.packed_ahead) ahead = pack_ahead(call);
  Run<T> run(call, false);
  if (call.in.bad_row >= 0) return;
  run.open(0, 0, ahead.has_value() ? ahead->data() : nullptr);
  to.output = unwritten<T>(call.rows() * call.tasks());
  std::atomic<int64_t> next{0};
  const auto tiles = static_cast<int64_t>(run.route.tiles.size());
  for_workers(std::min(run.workers, std::max<int64_t>(tiles, 1)), [&](int64_t worker) {
    T* memory = run.tile_of(worker);
    for (int64_t i = next++; i < tiles; i = next++) {
      const RowTile& tile = run.route.tiles[i];
      run.tile_forward(tile, memory, false);
      T* logit = memory + run.layout.tile.logit;
      if (call.config.probability) call.kernels.sigmoid(logit, tile.rows * call.tasks());
      run.scatter(logit, call.tasks(), call.tasks(), tile, to.output.data());
    }
  });
  if (run.has_bad_id()) to.output.clear();
}

template <typename T>
void write_embedding_grad(const EmbeddingGrad<T>& from, const Call<T>& call, int64_t workers, Results<T>& to) {
  to.d_embedding = unwritten<T>(from.result_rows() * call.config.embedding_width);
  if (call.config.embedding_grad == EmbeddingForm::kSparse) {
    to.embedding_rows.assign(from.result_rows(), -1);
    from.write_rows(to.embedding_rows.data());
  }
  T* values = to.d_embedding.data();
  for_jobs(from.jobs(), workers, [&](int64_t job) { from.write_small(job, values); });
  if (from.has_large()) for_jobs(from.jobs(), workers, [&](int64_t job) { from.add_large(job, values); });
}

// The gaps of every block of private gradients must be as they were: zero, or untouched.
template <typename T>
void check_grad_gaps(const Run<T>& run, int64_t blocks) {
  const Layout& layout = run.layout;
  const auto check = [](const Gaps& gaps, const T* block) {
    const bool untouched = std::isnan(block[0]) && (gaps.starts.empty() || std::isnan(block[gaps.starts[0]]));
    require(untouched || gaps.zero(block), "a write past the end of a private gradient");
  };
  for (int64_t i = 0; i < blocks; ++i) {
    const T* block = run.grads + i * layout.grad_elements();
    check(run.spread.common_grad, block);
    for (int64_t d = 0; d < layout.size.domains; ++d) {
      check(run.spread.domain_grad, block + layout.grad.common_size + d * layout.grad.domain_size);
    }
  }
}

template <typename T>
void backward(const Call<T>& call, Results<T>& to) {
  const Case& c = call.config;
  Run<T> run(call, true);
  if (call.in.bad_row >= 0) return;
  const Layout& layout = run.layout;
  const std::vector<int64_t> cuts = worker_ranges(run.route.tiles, call.rows(), run.workers);
  int64_t most_tiles = 0;
  for (int64_t w = 0; w < run.workers; ++w) most_tiles = std::max(most_tiles, cuts[w + 1] - cuts[w]);
  const int64_t levels = PrivateGrads<T>::levels_for(most_tiles);
  std::optional<EmbeddingGrad<T>> table;
  if (c.embedding_grad != EmbeddingForm::kNone && call.fields.has_value()) {
    table.emplace(*call.fields, c.embedding_width, run.workers, c.embedding_grad == EmbeddingForm::kSparse);
  }
  run.open(run.workers * levels * layout.grad_elements(), table.has_value() ? table->scratch_elements() : 0, nullptr);
  if (table.has_value()) table->use_scratch(run.table_grads);
  PrivateGrads<T> grads(run.grads, layout, run.workers, levels);
  std::optional<PairLoss<T>> loss;
  if (c.from_labels) {
    loss.emplace(call.in.label.data(), call.in.row_weight.data(), call.in.pair_weight.data(), run.route,
                 c.shape.domains, call.tasks());
  }
  to.d_x = unwritten<T>(c.input_grad ? c.rows * c.columns : 0);
  const bool input_grad = c.input_grad || table.has_value();
  for_workers(run.workers, [&](int64_t worker) {
    T* memory = run.tile_of(worker);
    for (int64_t i = cuts[worker]; i < cuts[worker + 1]; ++i) {
      const RowTile& tile = run.route.tiles[i];
      T* own = grads.open(worker, i - cuts[worker], tile.domain);
      run.tile_forward(tile, memory, true);
      T* d_logit = memory + layout.tile.d_logit;
      if (loss.has_value()) {
        loss->tile(i, memory + layout.tile.logit, d_logit);
      } else {
        run.gather(call.in.d_logits.data(), call.tasks(), tile, d_logit, call.tasks());
      }
      call.kernels.tile_backward(layout.size, layout.pack, run.packed, layout.grad, own, layout.tile, memory,
                                 tile.domain, tile.rows, input_grad);
      const T* d_input = memory + layout.tile.d_x;
      if (c.input_grad) run.scatter(d_input + c.embedded(), layout.size.ld_input, c.columns, tile, to.d_x.data());
      if (table.has_value()) {
        table->add_tile(worker, run.route.order.data() + tile.first, tile.rows, d_input, layout.size.ld_input);
      }
    }
  });
  if (run.has_bad_id()) {
    to.d_x.clear();
    return;
  }
  check_grad_gaps(run, run.workers * levels);
  std::vector<T*> pointers;
  for (const int64_t size : weight_sizes(c.shape)) to.d_weights.push_back(unwritten<T>(size));
  for (std::vector<T>& d_weight : to.d_weights) pointers.push_back(d_weight.data());
  const std::vector<GradPiece<T>> pieces = grad_pieces(layout, name_weights(pointers));
  for_jobs(static_cast<int64_t>(pieces.size()), run.workers, [&](int64_t i) { sum_piece(pieces[i], grads); });
  if (table.has_value()) write_embedding_grad(*table, call, run.workers, to);
  if (loss.has_value()) {
    to.pair_loss = unwritten<T>(c.shape.domains * call.tasks());
    loss->finish(to.pair_loss.data());
  }
}

template <typename T>
Results<T> run_network(const Case& c, const Inputs<T>& inputs, const NetworkKernels<T>& kernels) {
  const Call<T> call(c, inputs, kernels);
  Results<T> results;
  forward(call, results);
  backward(call, results);
  return results;
}

}  // namespace m3oe

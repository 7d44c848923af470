// Embedding tables of the network op: rows gathered straight into a tile's x, and their gradients put back. Torch-free.
//
// All fields share one table [V, N]: field f owns `sizes[f]` rows from `first_rows[f]` on.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace m3oe {

// ids [B, F], each counted from the first row of its field.
class IdFields {
 public:
  // `narrow`: the ids are int32_t, else int64_t.
  IdFields(const void* ids, bool narrow, int64_t rows, const std::vector<int64_t>& sizes);

  int64_t rows() const { return rows_; }
  int64_t fields() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t field) const { return sizes_[field]; }
  int64_t first_row(int64_t field) const { return first_rows_[field]; }
  int64_t total() const { return first_rows_.back(); }
  int64_t id(int64_t row, int64_t field) const {
    const int64_t i = row * fields() + field;
    return narrow_ ? static_cast<const int32_t*>(ids_)[i] : static_cast<const int64_t*>(ids_)[i];
  }
  bool fits(int64_t id, int64_t field) const { return id >= 0 && id < sizes_[field]; }

 private:
  const void* ids_;
  bool narrow_;
  int64_t rows_;
  std::vector<int64_t> sizes_, first_rows_;  // first_rows_ has V behind its last field
};

// Copies the embeddings of rows order[0..count) to `to`, [count][stride], field after field. An id outside its field
// leaves zeros and its place, row * F + field, in `bad` (the smallest such place; INT64_MAX: none).
template <typename T>
void gather_embeddings(const IdFields& ids, const T* table, int64_t width, const int64_t* order, int64_t count, T* to,
                       int64_t stride, std::atomic<int64_t>& bad);

// The gradient of the table. A small field (it has fewer rows than the batch gives each worker) gets a private table
// per worker, summed in worker order. Gradients for larger fields are stored per batch row and then added by table row:
// every table row belongs to one worker, which adds its batch rows in order, so there is no race and no sort. Traffic
// of a large field: B N elements written and read. The result is dense, [V, N], or sparse: the distinct rows that the
// batch names, ascending, which a bitmap yields without sorting.
template <typename T>
class EmbeddingGrad {
 public:
  EmbeddingGrad(const IdFields& ids, int64_t width, int64_t workers, bool sparse);

  // Rows of the result: V or the number of distinct rows.
  int64_t result_rows() const { return result_rows_; }
  // Sparse form: the table row of every row of the result.
  void write_rows(int64_t* to) const;

  // Elements of scratch memory; `memory` must be that large before the first add_tile.
  int64_t scratch_elements() const { return workers_ * small_rows_ * width_ + ids_.rows() * large_.size() * width_; }
  void use_scratch(T* memory) { memory_ = memory; }

  // Adds the tile's d_x, [count][stride], of batch rows order[0..count). Thread-safe across workers.
  void add_tile(int64_t worker, const int64_t* order, int64_t count, const T* d_x, int64_t stride);

  // The result, in two rounds of independent jobs; all of the first must be done before the second starts.
  int64_t jobs() const { return workers_; }
  void write_small(int64_t job, T* to) const;
  void add_large(int64_t job, T* to) const;
  bool has_large() const { return !large_.empty(); }

 private:
  T* private_table(int64_t worker) const { return memory_ + worker * small_rows_ * width_; }
  T* stored(int64_t row) const {
    return memory_ + workers_ * small_rows_ * width_ + row * static_cast<int64_t>(large_.size()) * width_;
  }
  bool marked(int64_t row) const { return (bitmap_[row >> 6] >> (row & 63)) & 1; }
  int64_t result_row(int64_t row) const;
  void mark();

  const IdFields& ids_;
  int64_t width_, workers_;
  bool sparse_;
  int64_t small_rows_ = 0;
  std::vector<int64_t> small_, large_;  // fields
  std::vector<int64_t> private_first_;  // of each small field, in the private tables
  std::vector<unsigned char> touched_;  // per worker: its private table is initialised
  std::vector<uint64_t> bitmap_;        // sparse: which table rows the batch names
  std::vector<int64_t> before_;         // sparse: named rows in front of each word of the bitmap
  int64_t result_rows_;
  T* memory_ = nullptr;
};

}  // namespace m3oe

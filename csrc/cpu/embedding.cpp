#include "embedding.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace m3oe {
namespace {

// Calls body(n) with the width as a constant where it is a usual one: a copy of 64 bytes then needs no loop.
template <typename Body>
void with_width(int64_t width, const Body& body) {
  switch (width) {
    case 8:
      return body(std::integral_constant<int64_t, 8>{});
    case 16:
      return body(std::integral_constant<int64_t, 16>{});
    case 32:
      return body(std::integral_constant<int64_t, 32>{});
    default:
      return body(width);
  }
}

// Plain loops: with a constant n they become a few vector moves, where std::copy_n stays a call.
template <typename T, typename Count>
void copy(const T* __restrict__ from, Count n, T* __restrict__ to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// The worker that owns a table row: neighbours and the few rows of a hot field go to different ones.
int64_t owner(int64_t row, int64_t workers) {
  const auto hash = static_cast<uint32_t>(static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u >> 32);
  return static_cast<int64_t>(static_cast<uint64_t>(hash) * static_cast<uint64_t>(workers) >> 32);
}

void keep_smallest(std::atomic<int64_t>& to, int64_t value) {
  int64_t seen = to.load(std::memory_order_relaxed);
  while (value < seen && !to.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

}  // namespace

IdFields::IdFields(const void* ids, bool narrow, int64_t rows, const std::vector<int64_t>& sizes)
    : ids_(ids), narrow_(narrow), rows_(rows), sizes_(sizes), first_rows_(sizes.size() + 1, 0) {
  for (size_t f = 0; f < sizes.size(); ++f) first_rows_[f + 1] = first_rows_[f] + sizes[f];
}

template <typename T>
void gather_embeddings(const IdFields& ids, const T* table, int64_t width, const int64_t* order, int64_t count, T* to,
                       int64_t stride, std::atomic<int64_t>& bad) {
  const int64_t fields = ids.fields();
  with_width(width, [&](auto n) {
    for (int64_t i = 0; i < count; ++i) {
      // A table does not fit into L1 or L2: ask for the rows of a later batch row while this one is copied.
      constexpr int64_t kAhead = 4;
      for (int64_t f = 0; i + kAhead < count && f < fields; ++f) {
        const int64_t id = ids.id(order[i + kAhead], f);
        if (ids.fits(id, f)) __builtin_prefetch(table + (ids.first_row(f) + id) * n);
      }
      for (int64_t f = 0; f < fields; ++f) {
        T* cell = to + i * stride + f * n;
        const int64_t id = ids.id(order[i], f);
        if (ids.fits(id, f)) [[likely]] {
          copy(table + (ids.first_row(f) + id) * n, n, cell);
        } else {
          std::fill_n(cell, n, T(0));
          keep_smallest(bad, order[i] * fields + f);
        }
      }
    }
  });
}

template <typename T>
EmbeddingGrad<T>::EmbeddingGrad(const IdFields& ids, int64_t width, int64_t workers, bool sparse)
    : ids_(ids), width_(width), workers_(workers), sparse_(sparse), touched_(workers, 0), result_rows_(ids.total()) {
  for (int64_t f = 0; f < ids.fields(); ++f) {
    if (ids.size(f) <= ids.rows() / workers) {
      small_.push_back(f);
      private_first_.push_back(small_rows_);
      small_rows_ += ids.size(f);
    } else {
      large_.push_back(f);
    }
  }
  if (sparse) mark();
}

template <typename T>
void EmbeddingGrad<T>::mark() {
  bitmap_.assign((ids_.total() + 63) / 64, 0);
  for (int64_t b = 0; b < ids_.rows(); ++b) {
    for (int64_t f = 0; f < ids_.fields(); ++f) {
      const int64_t id = ids_.id(b, f);
      if (!ids_.fits(id, f)) continue;  // the gather reports it
      const int64_t row = ids_.first_row(f) + id;
      bitmap_[row >> 6] |= uint64_t{1} << (row & 63);
    }
  }
  before_.resize(bitmap_.size());
  result_rows_ = 0;
  for (size_t w = 0; w < bitmap_.size(); ++w) {
    before_[w] = result_rows_;
    result_rows_ += std::popcount(bitmap_[w]);
  }
}

template <typename T>
void EmbeddingGrad<T>::write_rows(int64_t* to) const {
  for (size_t w = 0; w < bitmap_.size(); ++w) {
    for (uint64_t bits = bitmap_[w]; bits != 0; bits &= bits - 1) {
      *to++ = static_cast<int64_t>(w) * 64 + std::countr_zero(bits);
    }
  }
}

template <typename T>
int64_t EmbeddingGrad<T>::result_row(int64_t row) const {
  if (!sparse_) return row;
  const uint64_t below = (uint64_t{1} << (row & 63)) - 1;
  return before_[row >> 6] + std::popcount(bitmap_[row >> 6] & below);
}

template <typename T>
void EmbeddingGrad<T>::add_tile(int64_t worker, const int64_t* order, int64_t count, const T* d_x, int64_t stride) {
  T* own = private_table(worker);
  if (!touched_[worker]) std::fill_n(own, small_rows_ * width_, T(0));
  touched_[worker] = 1;
  with_width(width_, [&](auto n) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = order[i];
      const T* from = d_x + i * stride;
      for (size_t j = 0; j < small_.size(); ++j) {
        const int64_t id = ids_.id(row, small_[j]);
        if (!ids_.fits(id, small_[j])) continue;
        T* to = own + (private_first_[j] + id) * n;
        const T* values = from + small_[j] * n;
        for (int64_t c = 0; c < n; ++c) to[c] += values[c];
      }
      for (size_t j = 0; j < large_.size(); ++j) {
        copy(from + large_[j] * n, n, stored(row) + static_cast<int64_t>(j) * n);
      }
    }
  });
}

template <typename T>
void EmbeddingGrad<T>::write_small(int64_t job, T* to) const {
  const auto share = [&](int64_t rows) { return std::pair{rows * job / workers_, rows * (job + 1) / workers_}; };
  for (size_t j = 0; j < small_.size(); ++j) {
    const auto [begin, end] = share(ids_.size(small_[j]));
    for (int64_t id = begin; id < end; ++id) {
      const int64_t row = ids_.first_row(small_[j]) + id;
      if (sparse_ && !marked(row)) continue;
      T* sum = to + result_row(row) * width_;
      std::fill_n(sum, width_, T(0));
      for (int64_t w = 0; w < workers_; ++w) {
        if (!touched_[w]) continue;
        const T* part = private_table(w) + (private_first_[j] + id) * width_;
        for (int64_t c = 0; c < width_; ++c) sum[c] += part[c];
      }
    }
  }
  for (const int64_t field : large_) {
    const int64_t row = ids_.first_row(field);
    const int64_t first = sparse_ && row == ids_.total() ? result_rows_ : result_row(row);
    const int64_t next = row + ids_.size(field);
    const int64_t last = next == ids_.total() ? result_rows_ : result_row(next);
    const auto [begin, end] = share(last - first);
    std::fill(to + (first + begin) * width_, to + (first + end) * width_, T(0));
  }
}

template <typename T>
void EmbeddingGrad<T>::add_large(int64_t job, T* to) const {
  with_width(width_, [&](auto n) {
    for (int64_t b = 0; b < ids_.rows(); ++b) {
      for (size_t j = 0; j < large_.size(); ++j) {
        const int64_t id = ids_.id(b, large_[j]);
        if (!ids_.fits(id, large_[j])) continue;
        const int64_t row = ids_.first_row(large_[j]) + id;
        if (owner(row, workers_) != job) continue;
        T* sum = to + result_row(row) * n;
        const T* values = stored(b) + static_cast<int64_t>(j) * n;
        for (int64_t c = 0; c < n; ++c) sum[c] += values[c];
      }
    }
  });
}

template void gather_embeddings(const IdFields&, const float*, int64_t, const int64_t*, int64_t, float*, int64_t,
                                std::atomic<int64_t>&);
template void gather_embeddings(const IdFields&, const double*, int64_t, const int64_t*, int64_t, double*, int64_t,
                                std::atomic<int64_t>&);
template class EmbeddingGrad<float>;
template class EmbeddingGrad<double>;

}  // namespace m3oe

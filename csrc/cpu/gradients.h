// From private gradients to gradient tensors: a deterministic sum over workers, in worker order.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"
#include "weights.h"

namespace m3oe {

// Part of one gradient tensor: `rows` x `columns` from every worker's private block at `from`, row stride `stride`.
template <typename T>
struct GradPiece {
  int64_t domain;  // -1: the common block
  int64_t from, rows, columns, stride;
  T* to;  // dense, row-major
};

// The private gradients of all workers. A worker has `levels` blocks of the gradient layout: it adds its tiles to the
// first and moves that to the second every kTilesPerLevel tiles, since one chain of additions through hundreds of tiles
// loses digits that sums of sums keep. Blocks that a worker never touched are not initialised.
template <typename T>
class PrivateGrads {
 public:
  static constexpr int64_t kTilesPerLevel = 32;

  // How many levels a worker with this many tiles needs.
  static int64_t levels_for(int64_t tiles) { return tiles > kTilesPerLevel ? 2 : 1; }

  // `memory` holds workers * levels blocks of layout.grad_elements().
  PrivateGrads(T* memory, const Layout& layout, int64_t workers, int64_t levels)
      : memory_(memory),
        layout_(layout.grad),
        block_(layout.grad_elements()),
        workers_(workers),
        levels_(levels),
        domains_(layout.size.domains),
        touched_(workers * levels * (domains_ + 1), 0) {}

  // Where worker w adds its `tile`-th tile, which is of domain d. Thread-safe across workers.
  T* open(int64_t w, int64_t tile, int64_t d);

  // The sum over workers and levels of `count` elements at `from`, in a fixed order. domain -1: the common block.
  void sum(int64_t domain, int64_t from, int64_t count, T* to) const;

 private:
  T* block(int64_t w, int64_t level) const { return memory_ + (w * levels_ + level) * block_; }
  // One flag for the common block, then one per domain.
  unsigned char* flags(int64_t w, int64_t level) { return touched_.data() + (w * levels_ + level) * (domains_ + 1); }
  void zero_once(int64_t w, int64_t level, int64_t d);
  void raise(int64_t w, int64_t d);

  T* memory_;
  const GradLayout& layout_;
  int64_t block_, workers_, levels_, domains_;
  std::vector<unsigned char> touched_;
};

// Every piece of every gradient tensor, cut small enough to be summed in parallel.
template <typename T>
std::vector<GradPiece<T>> grad_pieces(const Layout& layout, const WeightPointers<T*>& grads);

// Writes one piece.
template <typename T>
void sum_piece(const GradPiece<T>& piece, const PrivateGrads<T>& grads);

}  // namespace m3oe

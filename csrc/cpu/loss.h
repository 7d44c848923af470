// Binary cross-entropy per (domain, task) pair on tiles of logits, with its gradient. Torch-free.
//
// The weight of a row's loss, pair_weight / n with n the labelled rows of its pair, is known before the forward pass,
// so the gradient of the loss needs nothing from later rows: one pass over the network yields loss and gradients.
#pragma once

#include <cstdint>
#include <vector>

#include "route.h"

namespace m3oe {

template <typename T>
class PairLoss {
 public:
  // label [B, T], NaN = not observed; row_weight [B] or null; pair_weight [D, T].
  PairLoss(const T* label, const T* row_weight, const T* pair_weight, const Route& route, int64_t domains,
           int64_t tasks);

  // Turns the tile's logits [rows][T] into d loss / d logit, and keeps its sums. Tiles may run on different threads.
  void tile(int64_t tile, const T* logit, T* d_logit);

  // pair_loss [D, T]: the mean over the labelled rows, 0 for a pair without any. Sums tile by tile, in order.
  void finish(T* pair_loss) const;

 private:
  const T* label_;
  const T* row_weight_;
  const Route& route_;
  int64_t domains_, tasks_;
  std::vector<int64_t> count_;  // [D, T]
  std::vector<double> scale_;   // [D, T] pair_weight / count
  std::vector<double> sums_;    // [tiles, T]
};

}  // namespace m3oe

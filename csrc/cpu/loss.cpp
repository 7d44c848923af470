#include "loss.h"

#include <algorithm>
#include <cmath>

namespace m3oe {

template <typename T>
PairLoss<T>::PairLoss(const T* label, const T* row_weight, const T* pair_weight, const Route& route, int64_t domains,
                      int64_t tasks)
    : label_(label),
      row_weight_(row_weight),
      route_(route),
      domains_(domains),
      tasks_(tasks),
      count_(domains * tasks, 0),
      scale_(domains * tasks, 0),
      sums_(route.tiles.size() * tasks, 0) {
  for (const RowTile& tile : route.tiles) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      const T* y = label + route.order[tile.first + i] * tasks;
      for (int64_t t = 0; t < tasks; ++t) count_[tile.domain * tasks + t] += std::isnan(y[t]) ? 0 : 1;
    }
  }
  for (size_t p = 0; p < count_.size(); ++p) {
    scale_[p] = static_cast<double>(pair_weight[p]) / static_cast<double>(std::max<int64_t>(count_[p], 1));
  }
}

template <typename T>
void PairLoss<T>::tile(int64_t tile, const T* logit, T* d_logit) {
  const RowTile& rows = route_.tiles[tile];
  const double* scale = scale_.data() + rows.domain * tasks_;
  double* sums = sums_.data() + tile * tasks_;
  for (int64_t i = 0; i < rows.rows; ++i) {
    const int64_t row = route_.order[rows.first + i];
    const double weight = row_weight_ == nullptr ? 1.0 : static_cast<double>(row_weight_[row]);
    for (int64_t t = 0; t < tasks_; ++t) {
      const T y = label_[row * tasks_ + t];
      T& d = d_logit[i * tasks_ + t];
      d = 0;
      if (std::isnan(y)) continue;
      // With e = exp(-|z|) <= 1 nothing overflows: log(1 + exp(z)) = max(z, 0) + log1p(e).
      const double z = static_cast<double>(logit[i * tasks_ + t]);
      const double e = std::exp(-std::abs(z));
      const double probability = (z >= 0 ? 1.0 : e) / (1.0 + e);
      sums[t] += weight * ((z > 0 ? z : 0.0) - z * static_cast<double>(y) + std::log1p(e));
      d = static_cast<T>(scale[t] * weight * (probability - static_cast<double>(y)));
    }
  }
}

template <typename T>
void PairLoss<T>::finish(T* pair_loss) const {
  std::vector<double> total(count_.size(), 0);
  for (size_t i = 0; i < route_.tiles.size(); ++i) {
    for (int64_t t = 0; t < tasks_; ++t) total[route_.tiles[i].domain * tasks_ + t] += sums_[i * tasks_ + t];
  }
  for (size_t p = 0; p < total.size(); ++p) {
    pair_loss[p] = static_cast<T>(total[p] / static_cast<double>(std::max<int64_t>(count_[p], 1)));
  }
}

template class PairLoss<float>;
template class PairLoss<double>;

}  // namespace m3oe

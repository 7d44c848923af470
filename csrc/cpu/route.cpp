#include "route.h"

#include <algorithm>

namespace m3oe {

template <typename Id>
Route route(const Id* domain, int64_t rows, int64_t domains, int64_t tile_rows) {
  Route result;
  std::vector<int64_t> next(domains + 1, 0);
  for (int64_t i = 0; i < rows; ++i) {
    const auto d = static_cast<int64_t>(domain[i]);
    if (d < 0 || d >= domains) {
      result.bad_row = i;
      return result;
    }
    ++next[d + 1];
  }
  for (int64_t d = 0; d < domains; ++d) {
    const int64_t count = next[d + 1];
    // Equal heights rather than full tiles and a sliver: a short tile streams the weights for little work.
    const int64_t tiles = (count + tile_rows - 1) / tile_rows;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = count * i / tiles;
      const int64_t end = count * (i + 1) / tiles;
      result.tiles.push_back({d, next[d] + begin, end - begin});
    }
    next[d + 1] += next[d];
  }
  result.order.resize(rows);
  for (int64_t i = 0; i < rows; ++i) result.order[next[domain[i]]++] = i;
  return result;
}

template Route route(const int32_t*, int64_t, int64_t, int64_t);
template Route route(const int64_t*, int64_t, int64_t, int64_t);

int64_t choose_tile_rows(int64_t rows, int64_t workers, int64_t most) {
  constexpr int64_t kTilesPerWorker = 4;
  constexpr int64_t kLeast = 12;  // two register blocks; shorter tiles starve the GEMM of reuse
  const int64_t even = (rows + workers * kTilesPerWorker - 1) / (workers * kTilesPerWorker);
  return std::clamp(even, kLeast, most);
}

std::vector<int64_t> worker_ranges(const std::vector<RowTile>& tiles, int64_t rows, int64_t workers) {
  std::vector<int64_t> cuts(workers + 1, static_cast<int64_t>(tiles.size()));
  cuts[0] = 0;
  int64_t tile = 0;
  for (int64_t w = 1; w < workers; ++w) {
    const int64_t target = rows * w / workers;
    // A tile belongs to the worker in whose share its middle lies.
    while (tile < static_cast<int64_t>(tiles.size()) && tiles[tile].first + tiles[tile].rows / 2 < target) ++tile;
    cuts[w] = tile;
  }
  return cuts;
}

}  // namespace m3oe

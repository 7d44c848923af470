// Own-domain routing: a stable counting sort of the rows by domain, cut into tiles that never mix domains.
#pragma once

#include <cstdint>
#include <vector>

namespace m3oe {

struct RowTile {
  int64_t domain, first, rows;  // rows order[first .. first + rows)
};

struct Route {
  std::vector<int64_t> order;  // [B] row numbers, sorted by domain, stable
  std::vector<RowTile> tiles;  // ascending in `first`
  int64_t bad_row = -1;        // first row whose domain is outside [0, D), or -1
};

// O(B + D). `Id` is int32_t or int64_t.
template <typename Id>
Route route(const Id* domain, int64_t rows, int64_t domains, int64_t tile_rows);

// Tile height for a batch: the largest that leaves every worker a few tiles, at most `most`.
int64_t choose_tile_rows(int64_t rows, int64_t workers, int64_t most);

// Cuts the tiles into one contiguous range per worker with about equal rows: range w is [cuts[w], cuts[w + 1]).
// A function of the tiles and the number of workers only, so gradients are summed in the same order every time.
std::vector<int64_t> worker_ranges(const std::vector<RowTile>& tiles, int64_t rows, int64_t workers);

}  // namespace m3oe

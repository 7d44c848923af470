// Packs the weights for the GEMM kernels (see PackLayout): zero padding, column panels, centring in front of a
// LayerNorm, transposed copies for the backward pass. O(parameters) per call.
#pragma once

#include <cstdint>

#include "layout.h"
#include "weights.h"

namespace m3oe {

// Independent pieces of packing work: those of the common block first, then one per domain.
inline int64_t pack_jobs_shared(const NetworkSize& size) { return size.depth + 1; }

// Packs a plain matrix [rows][columns] or its transpose for products with its elements; columns of the result are
// padded with zeros to n_pad, a multiple of the kernel's lanes.
template <typename T>
void pack_plain(const T* from, int64_t rows, int64_t columns, int64_t n_pad, int64_t panel, T* packed);
template <typename T>
void pack_plain_transposed(const T* from, int64_t rows, int64_t columns, int64_t n_pad, int64_t panel, T* packed);

// Does one job: below pack_jobs_shared() part of the common block, from there on domain job - pack_jobs_shared().
// `mask` is the gate mask [D, T, G] or null.
template <typename T>
void pack_weights(int64_t job, const WeightPointers<const T*>& weights, const bool* mask, const Layout& layout,
                  int64_t panel, bool backward, T* packed);

}  // namespace m3oe

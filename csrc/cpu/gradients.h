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

// The private gradients of all workers: worker w at data + w * stride. touched[w * (D + 1)] says whether w ran at all,
// touched[w * (D + 1) + 1 + d] whether it met domain d; what it did not touch is not initialised.
template <typename T>
struct PrivateGrads {
  T* data;
  int64_t stride, workers, domains;
  std::vector<unsigned char> touched;

  PrivateGrads(T* memory, int64_t worker_stride, int64_t worker_count, int64_t domain_count)
      : data(memory),
        stride(worker_stride),
        workers(worker_count),
        domains(domain_count),
        touched(worker_count * (domain_count + 1), 0) {}

  // Worker w is about to add to domain d: zeroes the blocks it meets for the first time. Thread-safe across workers.
  T* open(int64_t w, int64_t d, const GradLayout& layout);
};

// Every piece of every gradient tensor, cut small enough to be summed in parallel.
template <typename T>
std::vector<GradPiece<T>> grad_pieces(const Layout& layout, const WeightPointers<T*>& grads);

// Writes one piece.
template <typename T>
void sum_piece(const GradPiece<T>& piece, const PrivateGrads<T>& grads);

}  // namespace m3oe

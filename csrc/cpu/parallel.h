// Work shared out to torch's threads. The number of threads is torch's (torch.set_num_threads).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace m3oe {

inline int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Runs body(worker) for every worker of [0, workers), each on its own thread where there are threads.
template <typename Body>
void for_workers(int64_t workers, const Body& body) {
  if (workers == 1) return body(0);  // a batch of a few rows must not pay for a parallel region
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) body(w);
  });
}

// Runs body(job, worker) for every job, handed out as workers become free.
template <typename Body>
void for_jobs(int64_t jobs, int64_t workers, const Body& body) {
  std::atomic<int64_t> next{0};
  for_workers(std::max<int64_t>(std::min(workers, jobs), 1), [&](int64_t worker) {
    for (int64_t job = next++; job < jobs; job = next++) body(job, worker);
  });
}

}  // namespace m3oe

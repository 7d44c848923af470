// The star layer folded into one matrix per domain: M_d = (W_d * W_sh) W_c, and its gradient. W_d [D, I, S], W_sh [I,
// S], W_c [S, H] -> [D, I, H].
//
// Decomposition: jobs of a few rows i for all domains (forward, and the gradients of W_d and W_sh), and of a few
// columns s (gradient of W_c): every output belongs to one job, so the same bits come out for any number of threads.
// The elementwise product is made in scratch memory, a job at a time. Work: D I S (H + 1) multiply-adds forward, twice
// that backward, O(1) in the batch. torch.mm would do, but on AMD it reaches less than half of what these kernels do.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "network.h"
#include "pack.h"
#include "parallel.h"
#include "workspace.h"

namespace m3oe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsOfJob = 24;
constexpr int64_t kColumnsOfJob = 48;
constexpr int64_t kRowsOfSum = 96;  // sums over rows are cut, as everywhere: one long chain loses digits

struct FoldSize {
  int64_t domains, inputs, star, hidden;
};

FoldSize read_size(const Tensor& own, const Tensor& shared, const Tensor& out) {
  STD_TORCH_CHECK(own.dim() == 3 && shared.dim() == 2 && out.dim() == 2 && own.size(1) == shared.size(0) &&
                      own.size(2) == shared.size(1) && out.size(0) == own.size(2),
                  "star_fold: weights must be [D, I, S], [I, S] and [S, H]");
  const ScalarType type = own.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) && shared.scalar_type() == type &&
                      out.scalar_type() == type,
                  "star_fold: all weights must be float32, or all float64");
  return {own.size(0), own.size(1), own.size(2), out.size(1)};
}

// The weights of one call, contiguous, and how matrices are padded for the kernels.
template <typename T>
struct Fold {
  FoldSize size;
  const NetworkKernels<T>& kernels;
  const T *own, *shared, *out;
  int64_t star_pad, hidden_pad, workers;

  Fold(const FoldSize& s, const T* own_data, const T* shared_data, const T* out_data)
      : size(s),
        kernels(active_kernels<T>(Precision::kFp32)),
        own(own_data),
        shared(shared_data),
        out(out_data),
        star_pad(round_up(s.star, kernels.lanes)),
        hidden_pad(round_up(s.hidden, kernels.lanes)),
        workers(num_threads()) {}

  T* memory(int64_t elements) const { return static_cast<T*>(workspace(elements * static_cast<int64_t>(sizeof(T)))); }

  // Columns [first, first + count) of row i of W_d * W_sh.
  void product_row(int64_t d, int64_t i, int64_t first, int64_t count, T* to) const {
    const T* a = own + (d * size.inputs + i) * size.star + first;
    const T* b = shared + i * size.star + first;
    for (int64_t s = 0; s < count; ++s) to[s] = a[s] * b[s];
  }

  int64_t row_jobs() const { return (size.inputs + kRowsOfJob - 1) / kRowsOfJob; }

  void forward(T* to) const {
    const int64_t packed_size = size.star * hidden_pad;
    const int64_t scratch = kRowsOfJob * (star_pad + hidden_pad);
    T* packed = memory(packed_size + workers * scratch);
    pack_plain(out, size.star, size.hidden, hidden_pad, kernels.panel, packed);
    const int64_t blocks = row_jobs();
    for_jobs(size.domains * blocks, workers, [&](int64_t job, int64_t worker) {
      T* a = packed + packed_size + worker * scratch;
      T* c = a + kRowsOfJob * star_pad;
      const int64_t d = job / blocks, first = job % blocks * kRowsOfJob;
      const int64_t rows = std::min(kRowsOfJob, size.inputs - first);
      for (int64_t i = 0; i < rows; ++i) product_row(d, first + i, 0, size.star, a + i * star_pad);
      kernels.matrix.product(rows, size.star, hidden_pad, a, star_pad, packed, c, hidden_pad);
      for (int64_t i = 0; i < rows; ++i) {
        std::copy_n(c + i * hidden_pad, size.hidden, to + (d * size.inputs + first + i) * size.hidden);
      }
    });
  }

  // grad [D, I, H] -> gradients of W_d and W_sh, through d(W_d * W_sh) = grad W_c^T.
  void backward_factors(const T* grad, T* d_own, T* d_shared) const {
    const int64_t packed_size = size.hidden * star_pad;
    const int64_t scratch = kRowsOfJob * star_pad;
    T* packed = memory(packed_size + workers * scratch);
    pack_plain_transposed(out, size.star, size.hidden, star_pad, kernels.panel, packed);
    for_jobs(row_jobs(), workers, [&](int64_t job, int64_t worker) {
      T* d_product = packed + packed_size + worker * scratch;
      const int64_t first = job * kRowsOfJob;
      const int64_t rows = std::min(kRowsOfJob, size.inputs - first);
      std::fill_n(d_shared + first * size.star, rows * size.star, T(0));
      for (int64_t d = 0; d < size.domains; ++d) {
        const int64_t row = d * size.inputs + first;
        kernels.matrix.product(rows, size.hidden, star_pad, grad + row * size.hidden, size.hidden, packed, d_product,
                               star_pad);
        for (int64_t i = 0; i < rows; ++i) {
          const T* from = d_product + i * star_pad;
          const T* a = own + (row + i) * size.star;
          const T* b = shared + (first + i) * size.star;
          T* to_own = d_own + (row + i) * size.star;
          T* to_shared = d_shared + (first + i) * size.star;
          for (int64_t s = 0; s < size.star; ++s) {
            to_own[s] = from[s] * b[s];
            to_shared[s] += from[s] * a[s];
          }
        }
      }
    });
  }

  // grad -> gradient of W_c: the sum over domains and rows of (W_d * W_sh)^T grad.
  void backward_out(const T* grad, T* d_out) const {
    const int64_t total = size.domains * size.inputs;
    const int64_t scratch = kRowsOfSum * (kColumnsOfJob + hidden_pad) + kColumnsOfJob * hidden_pad;
    T* scratches = memory(workers * scratch);
    const int64_t blocks = (size.star + kColumnsOfJob - 1) / kColumnsOfJob;
    for_jobs(blocks, workers, [&](int64_t job, int64_t worker) {
      T* a = scratches + worker * scratch;
      T* b = a + kRowsOfSum * kColumnsOfJob;
      T* sum = b + kRowsOfSum * hidden_pad;
      const int64_t first = job * kColumnsOfJob;
      const int64_t columns = std::min(kColumnsOfJob, size.star - first);
      std::fill_n(sum, columns * hidden_pad, T(0));
      for (int64_t row = 0; row < total; row += kRowsOfSum) {
        const int64_t rows = std::min(kRowsOfSum, total - row);
        for (int64_t i = 0; i < rows; ++i) {
          product_row((row + i) / size.inputs, (row + i) % size.inputs, first, columns, a + i * kColumnsOfJob);
          T* padded = std::copy_n(grad + (row + i) * size.hidden, size.hidden, b + i * hidden_pad);
          std::fill(padded, b + (i + 1) * hidden_pad, T(0));
        }
        kernels.matrix.outer(rows, columns, hidden_pad, a, kColumnsOfJob, b, hidden_pad, sum, hidden_pad);
      }
      for (int64_t s = 0; s < columns; ++s) {
        std::copy_n(sum + s * hidden_pad, size.hidden, d_out + (first + s) * size.hidden);
      }
    });
  }
};

template <typename Body>
void with_type(const Tensor& tensor, const Body& body) {
  tensor.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

Tensor star_fold(const Tensor& own, const Tensor& shared, const Tensor& out) {
  const FoldSize size = read_size(own, shared, out);
  const Tensor a = torch::stable::contiguous(own), b = torch::stable::contiguous(shared),
               c = torch::stable::contiguous(out);
  Tensor result = torch::stable::new_empty(a, {size.domains, size.inputs, size.hidden});
  with_type(a, [&]<typename T>(T) {
    Fold<T>(size, a.const_data_ptr<T>(), b.const_data_ptr<T>(), c.const_data_ptr<T>())
        .forward(result.mutable_data_ptr<T>());
  });
  return result;
}

std::vector<Tensor> star_fold_bwd(const Tensor& grad, const Tensor& own, const Tensor& shared, const Tensor& out) {
  const FoldSize size = read_size(own, shared, out);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == size.domains && grad.size(1) == size.inputs &&
                      grad.size(2) == size.hidden && grad.scalar_type() == own.scalar_type(),
                  "star_fold: the gradient must be [D, I, H] in the dtype of the weights");
  const Tensor a = torch::stable::contiguous(own), b = torch::stable::contiguous(shared),
               c = torch::stable::contiguous(out), g = torch::stable::contiguous(grad);
  std::vector<Tensor> result{torch::stable::empty_like(a), torch::stable::empty_like(b), torch::stable::empty_like(c)};
  with_type(a, [&]<typename T>(T) {
    const Fold<T> fold(size, a.const_data_ptr<T>(), b.const_data_ptr<T>(), c.const_data_ptr<T>());
    const T* from = g.const_data_ptr<T>();
    fold.backward_factors(from, result[0].mutable_data_ptr<T>(), result[1].mutable_data_ptr<T>());
    fold.backward_out(from, result[2].mutable_data_ptr<T>());
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(m3oe_fast, CPU, m) {
  m.impl("star_fold", TORCH_BOX(&star_fold));
  m.impl("star_fold_bwd", TORCH_BOX(&star_fold_bwd));
}

}  // namespace m3oe

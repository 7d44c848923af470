// The one file that declares ops: schemas of the namespace m3oe_fast, and the Python module _C.
//
// Importing _C registers the ops; pybind11 exposes what is not a tensor op.
//
// `weights` (symbols of cpu/network.h; every tensor in the dtype of x):
//    0 star_weight [D, I, H]   1 star_bias [D, H]     2 star_gain [H]        3 star_offset [H]
//    4 skip_weight [I, H]      5 skip_bias [H]        6 skip_gain [H]        7 skip_offset [H]
//    8 gate_weight [D, T, H, G]  9 gate_bias [D, T, G]   the gate ranges over the first G <= E experts
//   10 table [D, T, E]         added to the gate: u_t = sum_e (gate_te + table_dte) z_e
//   11 tower_weight [D, T, X, Y]  12 tower_bias  13 tower_gain  14 tower_offset  15 head_weight [D, T, Y]
//   16 head_bias [D, T]
//   17 + 4 l: expert weight [E, in, out], bias, gain, offset [E, out] of layer l
// star_weight is the folded M_d. With 0 to 7 empty there is no representation layer: r = x, I = H.
// gate_mask: bool [D, T, G], which experts each softmax ranges over; absent = all.
// A domain uses expert e if one of its tasks has a gate for it, or a table entry other than zero (NaN is). The CPU
// kernels compute no others for its rows, unless table_grad asks for the gradient of entries that are zero now.
//
// The input of a row is its embeddings in field order, then x: ids [B, F] (int32 or int64, each counted from the first
// row of its field), one table `embedding` [V, N] for all fields, `vocab` the rows of each, x [B, C], I = F N + C.
// Without ids and embedding, x [B, I] is all of it. precision: "fp32", "bf16x3", "bf16"; one that the processor has no
// fast instructions for computes in fp32.
//
// network_pack returns the weights as the kernels read them: opaque, float or double as they are, for this process
// only. network_fwd takes it as `packed`, and then only shapes from `weights`. It returns logits [B, T], or their
// sigmoid. network_bwd returns d_x (empty unless input_grad), d_embedding and its rows, then a gradient per weight.
// embedding_grad: "none" (empty), "dense" ([V, N], no rows), "sparse" (values [U, N] of the distinct rows [U],
// ascending). table_grad: whether the gradient of `table` is wanted; without it that one means nothing (on a CPU it is
// zeros). network_loss returns pair_loss [D, T], then the same of sum(pair_weight * pair_loss); label [B, T], NaN = not
// observed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/workspace.h"

STABLE_TORCH_LIBRARY(m3oe_fast, m) {
  m.def("star_fold(Tensor star_weight, Tensor shared_weight, Tensor out_weight) -> Tensor");
  m.def("star_fold_bwd(Tensor grad, Tensor star_weight, Tensor shared_weight, Tensor out_weight) -> Tensor[]");
  m.def("network_pack(Tensor[] weights, Tensor? gate_mask, int inputs, bool star_linear, str precision) -> Tensor");
  m.def(
      "network_fwd(Tensor x, Tensor? ids, Tensor? embedding, int[] vocab, Tensor domain, Tensor[] weights, "
      "Tensor? gate_mask, Tensor? packed, bool star_linear, str precision, bool probability) -> Tensor");
  m.def(
      "network_bwd(Tensor grad, Tensor x, Tensor? ids, Tensor? embedding, int[] vocab, Tensor domain, Tensor[] "
      "weights, "
      "Tensor? gate_mask, bool star_linear, bool gate_detach, str precision, bool input_grad, str embedding_grad, "
      "bool table_grad) -> Tensor[]");
  m.def(
      "network_loss(Tensor x, Tensor? ids, Tensor? embedding, int[] vocab, Tensor domain, Tensor label, "
      "Tensor? row_weight, Tensor pair_weight, Tensor[] weights, Tensor? gate_mask, bool star_linear, "
      "bool gate_detach, str precision, bool input_grad, str embedding_grad, bool table_grad) -> Tensor[]");
}

namespace {

// Peak of `threads` threads at once doing nothing but multiply-adds in registers, in GFLOP/s.
double measure_fma_peak(int threads) {
  constexpr int64_t kIterations = 4'000'000;
  const m3oe::Isa& isa = m3oe::active_isa();
  std::vector<int64_t> flops(threads);
  std::vector<float> sinks(threads, 0.5f);
  const auto start = std::chrono::steady_clock::now();
  {
    std::vector<std::jthread> pool;
    for (int i = 0; i < threads; ++i) {
      pool.emplace_back([&, i] { flops[i] = isa.fma_burst(kIterations, &sinks[i]); });
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return static_cast<double>(std::accumulate(flops.begin(), flops.end(), int64_t{0})) / seconds.count() * 1e-9;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of m3oe_fast; importing registers the torch ops.";
  m.attr("version") = M3OE_FAST_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def("cpu_isa", [] { return m3oe::active_isa().name; }, "Instruction set in use.");
  m.def("cpu_isas", &m3oe::supported_isas, "Instruction sets that can run here, best first.");
  m.def(
      "computes_bf16", [] { return m3oe::computes_in(m3oe::Precision::kBf16); },
      "Whether the set in use has bf16 kernels.");
  m.def(
      "computes_bf16x3", [] { return m3oe::computes_in(m3oe::Precision::kBf16x3); },
      "Whether the set in use has bf16x3 kernels.");
  m.def("measure_fma_peak", &measure_fma_peak, pybind11::arg("threads"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Floating-point peak of the instruction set in use, GFLOP/s over all threads.");
  m.def("poison_workspace", &m3oe::poison_workspace, pybind11::arg("on"),
        "For tests: fill scratch memory with NaN before every call.");
}

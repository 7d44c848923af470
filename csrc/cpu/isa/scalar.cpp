// The portable set: 16-byte GCC/Clang vectors, which every target lowers to what it has (SSE2 on x86-64). Also the
// only one for double, which gradient checks use.
#include "../engine/fma.h"
#include "../network_kernel.h"
#include "isa.h"
#include "peak.h"

namespace m3oe {
namespace {

template <typename Element>
struct Portable {
  using T = Element;
  typedef T Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / sizeof(T);
  static constexpr int kPanelVectors = 2;
  static constexpr int kNormRows = 2;
  static constexpr T kInfinity = static_cast<T>(__builtin_inf());
  static constexpr int block_rows(int vectors) { return vectors >= 2 ? 4 : 8; }

  static Reg load(const T* p) {
    Reg v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, Reg v) { __builtin_memcpy(p, &v, sizeof v); }
  static Reg zero() { return Reg{}; }
  static Reg set1(T v) { return Reg{} + v; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  // Written with <= so that NaN passes through as in PyTorch.
  static Reg relu(Reg v) { return v <= zero() ? zero() : v; }
  static Reg where_positive(Reg condition, Reg v) { return condition <= zero() ? zero() : v; }
  static T sum(Reg v) {
    T total = v[0];
    for (int i = 1; i < kLanes; ++i) total += v[i];
    return total;
  }
  template <int R>
  static void sums(const Reg (&v)[R], T* to) {
    for (int i = 0; i < R; ++i) to[i] = sum(v[i]);
  }
  static T sqrt(T v) {
    if constexpr (sizeof(T) == 4) return __builtin_sqrtf(v);
    return static_cast<T>(__builtin_sqrt(v));
  }
  static Reg exp(Reg v) {
    for (int i = 0; i < kLanes; ++i) v[i] = static_cast<T>(__builtin_exp(v[i]));
    return v;
  }
};

}  // namespace

const Isa& isa_scalar() {
  static constexpr Isa kIsa{
      "scalar", network_kernels<FmaEngine<Portable<float>>>(), {}, {}, &fma_burst<Portable<float>, 8>};
  return kIsa;
}

const NetworkKernels<double>& network_kernels_double() {
  static constexpr NetworkKernels<double> kKernels = network_kernels<FmaEngine<Portable<double>>>();
  return kKernels;
}

}  // namespace m3oe

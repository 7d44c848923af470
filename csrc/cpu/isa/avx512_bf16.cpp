// AVX-512 with AVX512-BF16, for processors that run vdpbf16ps at full rate. Compiled with its own flags; nothing here
// may be inlined elsewhere.
#include "../engine/dot.h"
#include "../engine/fma.h"
#include "../network_kernel.h"
#include "avx512.h"
#include "isa.h"
#include "peak.h"

namespace m3oe {

const Isa& isa_avx512_bf16() {
  static constexpr Isa kIsa{
      "avx512_bf16", network_kernels<FmaEngine<Avx512>>(), network_kernels<DotEngine>(), {}, &fma_burst<Avx512, 24>};
  return kIsa;
}

}  // namespace m3oe

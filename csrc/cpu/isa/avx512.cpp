// AVX-512 (F, BW, DQ, VL). Compiled with its own flags; nothing here may be inlined elsewhere.
#include "avx512.h"

#include "../engine/fma.h"
#include "../network_kernel.h"
#include "isa.h"
#include "peak.h"

namespace m3oe {

const Isa& isa_avx512() {
  static constexpr Isa kIsa{"avx512", network_kernels<FmaEngine<Avx512>>(), {}, {}, &fma_burst<Avx512, 24>};
  return kIsa;
}

}  // namespace m3oe

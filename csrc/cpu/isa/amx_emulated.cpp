// The AMX kernels with the tile unit emulated in AVX-512: slow, bit for bit the same data movement, for tests on
// machines without one. Runs only where M3OE_FAST_CPU_ISA=amx_emulated asks for it.
#include "../engine/fma.h"
#include "../engine/tile.h"
#include "../network_kernel.h"
#include "avx512.h"
#include "isa.h"
#include "peak.h"

namespace m3oe {

const Isa& isa_amx_emulated() {
  static constexpr Isa kIsa{"amx_emulated", network_kernels<FmaEngine<Avx512>>(),
                            network_kernels<TileEngine<EmulatedUnit, Operand::kBf16>>(),
                            network_kernels<TileEngine<EmulatedUnit, Operand::kBf16x3>>(), &fma_burst<Avx512, 24>};
  return kIsa;
}

}  // namespace m3oe

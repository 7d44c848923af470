// AMX: tile registers for bf16 and bf16x3, AVX-512 for everything else. Compiled with its own flags; nothing here may
// be inlined elsewhere.
#include "../engine/fma.h"
#include "../engine/tile.h"
#include "../network_kernel.h"
#include "avx512.h"
#include "isa.h"
#include "peak.h"

namespace m3oe {

const Isa& isa_amx() {
  static constexpr Isa kIsa{"amx", network_kernels<FmaEngine<Avx512>>(),
                            network_kernels<TileEngine<AmxUnit, Operand::kBf16>>(),
                            network_kernels<TileEngine<AmxUnit, Operand::kBf16x3>>(), &fma_burst<Avx512, 24>};
  return kIsa;
}

}  // namespace m3oe

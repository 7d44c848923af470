// One function per instruction set. Calling one is safe anywhere; calling the kernels behind it is safe only where
// the processor and the operating system support the set (see ../dispatch.h).
#pragma once

#include "../network.h"

namespace m3oe {

const Isa& isa_scalar();
#if defined(__x86_64__)
const Isa& isa_avx2();
const Isa& isa_avx512();
const Isa& isa_avx512_bf16();
const Isa& isa_amx();
const Isa& isa_amx_emulated();
#endif
const NetworkKernels<double>& network_kernels_double();

}  // namespace m3oe

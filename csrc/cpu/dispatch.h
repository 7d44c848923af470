// Chooses the instruction set once per process: what processor and operating system support, best first, unless the
// environment variable M3OE_FAST_CPU_ISA names one.
#pragma once

#include <string>
#include <vector>

#include "network.h"

namespace m3oe {

// Names of the sets this process can run, best first; "scalar" is always last.
std::vector<std::string> supported_isas();

// The set in use. Throws std::runtime_error if M3OE_FAST_CPU_ISA names one that does not exist or cannot run here.
const Isa& active_isa();

// Kernels for the element type: the active set for float, the portable one for double. A precision that the set has no
// kernels for computes in fp32.
template <typename T>
const NetworkKernels<T>& active_kernels(Precision precision);

// Whether the active set has kernels of its own for a precision.
bool computes_in(Precision precision);

}  // namespace m3oe

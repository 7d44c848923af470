// AMX tile registers: whether this process may use them. Torch-free.
#pragma once

namespace m3oe {

// The processor multiplies bf16 tiles and the operating system lets this process use their registers, for which it asks
// once (Linux saves 8 KiB more per thread from then on).
bool tiles_permitted();

}  // namespace m3oe

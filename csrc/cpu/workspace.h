// Scratch memory of the calling thread: grows, is reused by the next call, is freed with the thread. A fresh allocation
// per call would be page-faulted anew each time, which costs more than packing the weights.
#pragma once

#include <cstdint>

namespace m3oe {

// At least `bytes` bytes, 64-byte aligned, with any content; valid until this thread's next call.
void* workspace(int64_t bytes);

// For tests: every later workspace() is filled with NaN, so that a read of uninitialised memory shows.
void poison_workspace(bool on);

}  // namespace m3oe

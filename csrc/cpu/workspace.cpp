#include "workspace.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace m3oe {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

std::atomic<bool> poisoned{false};

}  // namespace

void* workspace(int64_t bytes) {
  constexpr int64_t kAlign = 64;
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t capacity = 0;
  bytes = (bytes + kAlign - 1) / kAlign * kAlign;
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(std::aligned_alloc(kAlign, static_cast<size_t>(bytes)));
    if (memory == nullptr) throw std::bad_alloc();
    capacity = bytes;
  }
  // All bits set is a NaN in float and in double.
  if (poisoned.load(std::memory_order_relaxed)) std::memset(memory.get(), 0xff, static_cast<size_t>(bytes));
  return memory.get();
}

void poison_workspace(bool on) { poisoned = on; }

}  // namespace m3oe

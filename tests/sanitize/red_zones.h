// Red zones inside scratch memory. The kernels lay dozens of buffers side by side in one allocation, where a write past
// the end of one lands in the next and no sanitizer sees it. Here the parts of a layout move apart, and
// AddressSanitizer is told that nothing may touch the gaps.
//
// A layout is a struct of offsets, so this moves whatever offsets there are, not a list of names that would fall
// behind.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/layout.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace m3oe {

constexpr bool kRedZones =
#if defined(__SANITIZE_ADDRESS__)
    true;
#else
    false;
#endif

// Elements between two parts; a multiple of every alignment that a layout asks for.
constexpr int64_t kGap = 64;

// One block of parts: where its gaps lie, counted from its start.
struct Gaps {
  std::vector<int64_t> starts;

  template <typename T>
  void poison([[maybe_unused]] T* block) const {
#if defined(__SANITIZE_ADDRESS__)
    for (const int64_t start : starts) __asan_poison_memory_region(block + start, kGap * sizeof(T));
#endif
  }
  // Whether nobody wrote to the gaps of a block that was set to zero.
  template <typename T>
  bool zero(const T* block) const {
    return std::all_of(starts.begin(), starts.end(), [&](int64_t start) {
      return std::all_of(block + start, block + start + kGap, [](T value) { return value == 0; });
    });
  }
};

// Moves the parts at `offsets` of a block of `size` elements apart. Parts that share an offset (an alias, or a part of
// no elements and what follows it) stay together.
inline Gaps move_apart(const std::vector<int64_t*>& offsets, int64_t& size) {
  std::vector<int64_t> starts;
  for (const int64_t* offset : offsets) starts.push_back(*offset);
  std::sort(starts.begin(), starts.end());
  starts.erase(std::unique(starts.begin(), starts.end()), starts.end());
  for (int64_t* offset : offsets) {
    *offset += (std::lower_bound(starts.begin(), starts.end(), *offset) - starts.begin()) * kGap;
  }
  Gaps gaps;
  starts.push_back(size);
  for (size_t i = 1; i < starts.size(); ++i) gaps.starts.push_back(starts[i] + static_cast<int64_t>(i - 1) * kGap);
  size = gaps.starts.back() + kGap;
  return gaps;
}

// The offsets in members [first, last) bytes of a struct of int64_t, without its pointer to the layers.
template <typename Struct>
std::vector<int64_t*> offsets_between(Struct& layout, size_t first, size_t last) {
  static_assert(sizeof(Struct) % sizeof(int64_t) == 0 && alignof(Struct) == alignof(int64_t));
  std::vector<int64_t*> offsets;
  for (size_t at = first; at < last; at += sizeof(int64_t)) {
    if (at != offsetof(Struct, layers)) {
      offsets.push_back(reinterpret_cast<int64_t*>(reinterpret_cast<std::byte*>(&layout) + at));
    }
  }
  return offsets;
}

// The layout of one call, with its parts apart if `spread`.
class SpreadLayout {
 public:
  Layout layout;
  Gaps tile, common_pack, domain_pack, common_grad, domain_grad;

  SpreadLayout(const NetworkShape& shape, int64_t lanes, const OperandFormat& format, int64_t element_size,
               int64_t tile_rows, bool backward, bool spread)
      : layout(shape, lanes, format, element_size, tile_rows, backward) {
    if (!spread) return;
    std::vector<int64_t*> offsets = offsets_between(layout.tile, 0, offsetof(TileLayout, size));
    own_layers(layout.tile, tile_layers_, offsets);
    tile = move_apart(offsets, layout.tile.size);
    split(layout.pack, pack_layers_, common_pack, domain_pack);
    if (backward) split(layout.grad, grad_layers_, common_grad, domain_grad);
  }

  template <typename T>
  void poison_pack(T* packed) const {
    common_pack.poison(packed);
    for (int64_t d = 0; d < layout.size.domains; ++d) {
      domain_pack.poison(packed + layout.pack.common_size + d * layout.pack.domain_size);
    }
  }

 private:
  // Replaces the layers by a copy that may be changed.
  template <typename Struct, typename Layer>
  void own_layers(Struct& from, std::vector<Layer>& to, std::vector<int64_t*>& offsets) {
    to.assign(from.layers, from.layers + layout.size.depth);
    from.layers = to.data();
    for (Layer& layer : to) {
      auto* words = reinterpret_cast<int64_t*>(&layer);
      for (size_t i = 0; i < sizeof(Layer) / sizeof(int64_t); ++i) offsets.push_back(words + i);
    }
  }

  // Weights and gradients: the members up to common_size and the layers, then those of a domain.
  template <typename Struct>
  void split(Struct& from, std::vector<LayerOffsets>& layers, Gaps& common, Gaps& own) {
    std::vector<int64_t*> offsets = offsets_between(from, 0, offsetof(Struct, common_size));
    own_layers(from, layers, offsets);
    common = move_apart(offsets, from.common_size);
    own = move_apart(
        offsets_between(from, offsetof(Struct, common_size) + sizeof(int64_t), offsetof(Struct, domain_size)),
        from.domain_size);
  }

  std::vector<LayerBuffers> tile_layers_;
  std::vector<LayerOffsets> pack_layers_, grad_layers_;
};

// Memory of exactly this size on the alignment that workspace() has, full of NaN.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t elements) {
    const size_t bytes = static_cast<size_t>(elements) * sizeof(T);
    memory_.reset(static_cast<T*>(::operator new(bytes, kAlign)));
    std::fill_n(reinterpret_cast<unsigned char*>(memory_.get()), bytes, static_cast<unsigned char>(0xff));
  }
  T* data() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kAlign); }
  };
  std::unique_ptr<T, Free> memory_;
};

}  // namespace m3oe

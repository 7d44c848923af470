// Eight registers of 16 rows x 64 bytes and their bf16 product, as the tile engine sees them: the AMX unit, and the
// same in plain AVX-512 for machines without one, so that everything around the unit is tested there too.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace m3oe {
namespace {

// Written as assembly because the tile intrinsics of gcc 12 take register numbers as literals only, and its
// _tile_loadconfig declares 8 of the 64 bytes as input, so that -O3 drops the stores to the rest.
struct AmxUnit {
  struct Session {
    Session() {
      struct alignas(64) Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_per_row[16];
        uint8_t rows[16];
      };
      Config config{};
      config.palette = 1;
      for (int t = 0; t < 8; ++t) {
        config.bytes_per_row[t] = 64;
        config.rows[t] = 16;
      }
      asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~Session() { asm volatile("tilerelease"); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  // 16 rows of 64 bytes, `stride` bytes apart; 0 repeats one row.
  template <int t>
  static void load(const float* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void store(float* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
  }
  // c[i][j] += sum over k of a[i][k] b[k][j], words of two bf16 each.
  template <int c, int a, int b>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};

struct EmulatedUnit {
  struct Session {
    Session() {
      // Registers hold garbage until they are loaded, as far as a test can see.
      for (auto& tile : tiles_) {
        for (auto& row : tile) row = _mm512_castsi512_ps(_mm512_set1_epi32(-1));
      }
    }
  };

  template <int t>
  static void zero() {
    for (auto& row : tiles_[t]) row = _mm512_setzero_ps();
  }
  template <int t>
  static void load(const float* from, int64_t stride) {
    const char* bytes = reinterpret_cast<const char*>(from);
    for (int i = 0; i < 16; ++i) tiles_[t][i] = _mm512_loadu_ps(bytes + i * stride);
  }
  template <int t>
  static void store(float* to, int64_t stride) {
    char* bytes = reinterpret_cast<char*>(to);
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(bytes + i * stride, tiles_[t][i]);
  }
  // As the instruction's manual page has it: even and odd k are summed apart, both then added to c.
  template <int c, int a, int b>
  static void dot() {
    for (int i = 0; i < 16; ++i) {
      alignas(64) uint32_t words[16];
      _mm512_store_ps(words, tiles_[a][i]);
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int k = 0; k < 16; ++k) {
        const __m512i pair = _mm512_castps_si512(tiles_[b][k]);
        const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-65536)));
        even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(words[k] << 16))), low, even);
        odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(words[k] & 0xffff0000u))), high,
                              odd);
      }
      tiles_[c][i] = _mm512_add_ps(tiles_[c][i], _mm512_add_ps(even, odd));
    }
  }

 private:
  static thread_local __m512 tiles_[8][16];
};

thread_local __m512 EmulatedUnit::tiles_[8][16];

}  // namespace
}  // namespace m3oe

// AMX's tiles in software, for tests on machines without them.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace zs3fast {
namespace {

struct SoftwareTiles {
  struct Tile {
    uint8_t row[16][64];
  };
  inline static thread_local Tile tiles[8];
  inline static thread_local bool configured = false;

  static void begin() {
    if (configured) throw std::logic_error("tiles are configured twice");
    configured = true;
    std::memset(tiles, 0xFF, sizeof tiles);  // NaN
  }
  static void end() {
    check();
    configured = false;
  }
  static float widened(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
  static void check() {
    if (!configured) throw std::logic_error("tiles are used without a configuration");
  }
  template <int T>
  static void zero() {
    check();
    std::memset(&tiles[T], 0, sizeof(Tile));
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    check();
    for (int i = 0; i < 16; ++i) std::memcpy(tiles[T].row[i], static_cast<const uint8_t*>(from) + i * stride, 64);
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    check();
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<uint8_t*>(to) + i * stride, tiles[T].row[i], 64);
  }
  template <int C, int A, int B>
  static void dot() {
    static_assert(C != A && C != B && A != B, "three different tiles: others are an illegal instruction");
    check();
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        float sum;
        std::memcpy(&sum, tiles[C].row[m] + 4 * n, 4);
        for (int k = 0; k < 16; ++k)
          for (int half = 0; half < 2; ++half) {
            uint16_t a, b;
            std::memcpy(&a, tiles[A].row[m] + 4 * k + 2 * half, 2);
            std::memcpy(&b, tiles[B].row[k] + 4 * n + 2 * half, 2);
            sum += widened(a) * widened(b);
          }
        std::memcpy(tiles[C].row[m] + 4 * n, &sum, 4);
      }
  }
  template <int C, int A, int B>
  static void dot_int8() {  // int8 times uint8
    static_assert(C != A && C != B && A != B, "three different tiles: others are an illegal instruction");
    check();
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        int32_t sum;
        std::memcpy(&sum, tiles[C].row[m] + 4 * n, 4);
        for (int k = 0; k < 64; ++k)
          sum += static_cast<int8_t>(tiles[A].row[m][k]) * int{tiles[B].row[k / 4][4 * n + k % 4]};
        std::memcpy(tiles[C].row[m] + 4 * n, &sum, 4);
      }
  }
};

}  // namespace
}  // namespace zs3fast

// Products by AMX's tiles: eight registers of 16 rows of 64 bytes, C [16, 16] += A [16, 32] B [32, 16] in bfloat16 with
// float32 sums, or A [16, 64] B [64, 16] of int8 and uint8 with int32 sums, bytes lying alike. `Tiles` is the hardware's, or
// software that stands in for it where there is none.
//
// C [rows, kBlock] (+)= A [rows, depth] B, A in rows, B in pairs [depth / 2, kBlock, 2] or fours; rows are a multiple of 32,
// depth of a tile's columns, and so are the columns of B and C, at least the first `columns`, that it visits. All within
// begin() and end(), on one thread.
#pragma once

#include <concepts>
#include <cstdint>

#include "avx512.h"

namespace zs3fast {
namespace {

struct TilesOfBf16 {
  using Left = uint16_t;
  using Right = uint16_t;
  using Sum = float;
};
struct TilesOfInt8 {
  using Left = int8_t;
  using Right = uint8_t;
  using Sum = int32_t;
};

template <class Tiles, class Of = TilesOfBf16>
struct TileProducts {
  using Left = typename Of::Left;
  using Right = typename Of::Right;
  using Sum = typename Of::Sum;
  static constexpr int64_t kPer = 4 / sizeof(Left), kDeep = 64 / sizeof(Left);  // elements of a unit, of a tile's row

  static void begin() { Tiles::begin(); }
  static void end() { Tiles::end(); }

  // Tiles 0..3: C, two by two. 4, 5: rows of A. 6, 7: columns of B. Rows are a multiple of 32.
  static void multiply(int64_t rows, int64_t depth, const Left* a, int64_t lda, const Right* b, Sum* c,
                       bool accumulate, int64_t columns = kBlock) {
    constexpr int64_t row = kBlock * sizeof(Sum);  // bytes, of C and of a row of pairs alike
    const int64_t step = lda * static_cast<int64_t>(sizeof(Left));
    for (int64_t i = 0; i < rows; i += 32)
      for (int64_t j = 0; j < columns; j += 32) {
        Sum* at = c + i * kBlock + j;
        if (accumulate) {
          Tiles::template load<0>(at, row);
          Tiles::template load<1>(at + 16, row);
          Tiles::template load<2>(at + 16 * kBlock, row);
          Tiles::template load<3>(at + 16 * kBlock + 16, row);
        } else {
          Tiles::template zero<0>();
          Tiles::template zero<1>();
          Tiles::template zero<2>();
          Tiles::template zero<3>();
        }
        for (int64_t k = 0; k < depth; k += kDeep) {
          const Right* right = b + k * kBlock + kPer * j;
          Tiles::template load<6>(right, row);
          Tiles::template load<4>(a + i * lda + k, step);
          dot<0, 4, 6>();
          Tiles::template load<7>(right + 16 * kPer, row);
          dot<1, 4, 7>();
          Tiles::template load<5>(a + (i + 16) * lda + k, step);
          dot<2, 5, 6>();
          dot<3, 5, 7>();
        }
        store_four(at, row);
      }
  }

  // A depth of 64: the four tiles of 32 columns of B stay in 4..7 while all rows pass. 0, 1: C. 2, 3: a row of A.
  static void multiply64(int64_t rows, const uint16_t* a, const uint16_t* b, float* c, int64_t columns)
    requires std::same_as<Of, TilesOfBf16>
  {
    constexpr int64_t row = kBlock * sizeof(float), step = 64 * sizeof(uint16_t);
    for (int64_t j = 0; j < columns; j += 32) {
      Tiles::template load<4>(b + 2 * j, row);
      Tiles::template load<5>(b + 2 * j + 32, row);
      Tiles::template load<6>(b + 32 * kBlock + 2 * j, row);
      Tiles::template load<7>(b + 32 * kBlock + 2 * j + 32, row);
      for (int64_t i = 0; i < rows; i += 16) {
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        Tiles::template load<2>(a + i * 64, step);
        Tiles::template dot<0, 2, 4>();
        Tiles::template dot<1, 2, 5>();
        Tiles::template load<3>(a + i * 64 + 32, step);
        Tiles::template dot<0, 3, 6>();
        Tiles::template dot<1, 3, 7>();
        Tiles::template store<0>(c + i * kBlock + j, row);
        Tiles::template store<1>(c + i * kBlock + j + 16, row);
      }
    }
  }

 private:
  template <int C, int A, int B>
  static void dot() {
    if constexpr (sizeof(Left) == 1)
      Tiles::template dot_int8<C, A, B>();
    else
      Tiles::template dot<C, A, B>();
  }
  static void store_four(Sum* at, int64_t row) {
    Tiles::template store<0>(at, row);
    Tiles::template store<1>(at + 16, row);
    Tiles::template store<2>(at + 16 * kBlock, row);
    Tiles::template store<3>(at + 16 * kBlock + 16, row);
  }
};

}  // namespace
}  // namespace zs3fast

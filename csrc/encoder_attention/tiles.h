// Attention by AMX's tiles: eight registers of 16 rows of 64 bytes, C [16, 16] += A [16, 32] B [32, 16] in bfloat16
// with float32 sums. `Tiles` is the hardware's, or software that stands in for it where there is none.
#pragma once

#include "encoder_attention/pairs.h"

namespace zs3fast::encoder_attention {
namespace {

template <class Tiles>
struct TileProducts : PairOperands {
  static void begin() { Tiles::begin(); }
  static void end() { Tiles::end(); }

  // Tiles 0..3: C, two by two. 4, 5: rows of A. 6, 7: columns of B. Rows are a multiple of 32, depth too.
  static void multiply(int64_t rows, int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b, float* c,
                       bool accumulate) {
    constexpr int64_t row = kQueries * sizeof(float);  // bytes, of C and of a row of pairs alike
    const int64_t step = lda * static_cast<int64_t>(sizeof(uint16_t));
    for (int64_t j = 0; j < kQueries; j += 32)
      for (int64_t i = 0; i < rows; i += 32) {
        float* at = c + i * kQueries + j;
        if (accumulate) {
          Tiles::template load<0>(at, row);
          Tiles::template load<1>(at + 16, row);
          Tiles::template load<2>(at + 16 * kQueries, row);
          Tiles::template load<3>(at + 16 * kQueries + 16, row);
        } else {
          Tiles::template zero<0>();
          Tiles::template zero<1>();
          Tiles::template zero<2>();
          Tiles::template zero<3>();
        }
        for (int64_t k = 0; k < depth; k += 32) {
          const uint16_t* right = b + k * kQueries + 2 * j;
          Tiles::template load<6>(right, row);
          Tiles::template load<4>(a + i * lda + k, step);
          Tiles::template dot<0, 4, 6>();
          Tiles::template load<7>(right + 32, row);
          Tiles::template dot<1, 4, 7>();
          Tiles::template load<5>(a + (i + 16) * lda + k, step);
          Tiles::template dot<2, 5, 6>();
          Tiles::template dot<3, 5, 7>();
        }
        store_four(at, row);
      }
  }

  // dh up to 64: the four tiles of 32 queries stay in 4..7 while all keys pass. 0, 1: C. 2, 3: a row of A.
  static void resident(int64_t keys, const uint16_t* k, const uint16_t* q, float* s) {
    constexpr int64_t row = kQueries * sizeof(float), step = 64 * sizeof(uint16_t);
    for (int64_t j = 0; j < kQueries; j += 32) {
      Tiles::template load<4>(q + 2 * j, row);
      Tiles::template load<5>(q + 2 * j + 32, row);
      Tiles::template load<6>(q + 32 * kQueries + 2 * j, row);
      Tiles::template load<7>(q + 32 * kQueries + 2 * j + 32, row);
      for (int64_t i = 0; i < keys; i += 16) {
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        Tiles::template load<2>(k + i * 64, step);
        Tiles::template dot<0, 2, 4>();
        Tiles::template dot<1, 2, 5>();
        Tiles::template load<3>(k + i * 64 + 32, step);
        Tiles::template dot<0, 3, 6>();
        Tiles::template dot<1, 3, 7>();
        Tiles::template store<0>(s + i * kQueries + j, row);
        Tiles::template store<1>(s + i * kQueries + j + 16, row);
      }
    }
  }

  static void scores(int64_t keys, int64_t width, const uint16_t* k, const uint16_t* q, float* s) {
    if (width == 64)
      resident(keys, k, q, s);
    else
      multiply(keys, width, k, width, q, s, false);
  }
  static void values(int64_t keys, int64_t width, int64_t stride, const uint16_t* v, const uint16_t* p, float* o) {
    multiply(width, keys, v, stride, p, o, true);
  }

 private:
  static void store_four(float* at, int64_t row) {
    Tiles::template store<0>(at, row);
    Tiles::template store<1>(at + 16, row);
    Tiles::template store<2>(at + 16 * kQueries, row);
    Tiles::template store<3>(at + 16 * kQueries + 16, row);
  }
};

}  // namespace
}  // namespace zs3fast::encoder_attention

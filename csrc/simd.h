// Vectors of one instruction set, for the files that are compiled once for each: exp and blocked products.
#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace zs3fast {
namespace {  // every translation unit has its own: their instructions differ

constexpr int kRows = 6;  // of a product's tile
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // 24 accumulators, 4 of B, 1 of A: 29 of 32 registers
#else
constexpr int kVectors = 2;  // 12 accumulators, 2 of B, 1 of A: 15 of 16 registers
#endif

// exp for x up to about 88, 2 ulp; below -87.3 the smallest normal number, NaN stays NaN.
inline Float exponential(Float x) {
  x = x < all(-87.3f) ? all(-87.3f) : x;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const Float shifted = x * 1.44269504f + shifter;
  const Float n = shifted - shifter;
  Float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Float p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Int bits = ((Int)shifted - 0x4B400000 + 127) << 23;
  return p * (Float)bits;
}

// C[M, vectors * lanes] (+)= A[M, K] B[K, ...]; A has any strides, B and C are rows of whole vectors.
template <int R, int V>
inline void gemm_tile(int64_t K, const float* a, int64_t row, int64_t col, const float* b, int64_t ldb, float* c,
                      int64_t ldc, bool accumulate) {
  Float sum[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sum[i][j] = accumulate ? load(c + i * ldc + j * kLanes) : Float{};
  for (int64_t k = 0; k < K; ++k) {
    Float right[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) right[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Float left = all(a[i * row + k * col]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
}

template <int V>
void gemm_panel(int64_t M, int64_t K, const float* a, int64_t row, int64_t col, const float* b, int64_t ldb, float* c,
                int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + kRows <= M; i += kRows)
    gemm_tile<kRows, V>(K, a + i * row, row, col, b, ldb, c + i * ldc, ldc, accumulate);
  a += i * row;
  c += i * ldc;
  switch (M - i) {
    case 5: return gemm_tile<5, V>(K, a, row, col, b, ldb, c, ldc, accumulate);
    case 4: return gemm_tile<4, V>(K, a, row, col, b, ldb, c, ldc, accumulate);
    case 3: return gemm_tile<3, V>(K, a, row, col, b, ldb, c, ldc, accumulate);
    case 2: return gemm_tile<2, V>(K, a, row, col, b, ldb, c, ldc, accumulate);
    case 1: return gemm_tile<1, V>(K, a, row, col, b, ldb, c, ldc, accumulate);
    default: return;
  }
}

[[maybe_unused]] void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t row, int64_t col, const float* b, int64_t ldb,
          float* c, int64_t ldc, bool accumulate) {
  int64_t j = 0;
  for (; j + kVectors * kLanes <= N; j += kVectors * kLanes)
    gemm_panel<kVectors>(M, K, a, row, col, b + j, ldb, c + j, ldc, accumulate);
  b += j;
  c += j;
  switch ((N - j) / kLanes) {
    case 3: return gemm_panel<3>(M, K, a, row, col, b, ldb, c, ldc, accumulate);
    case 2: return gemm_panel<2>(M, K, a, row, col, b, ldb, c, ldc, accumulate);
    case 1: return gemm_panel<1>(M, K, a, row, col, b, ldb, c, ldc, accumulate);
    default: return;
  }
}

}  // namespace
}  // namespace zs3fast

// Marks of functions that the GPU and, in tests, a plain C++ compiler run. No torch header here, nor in what a .cu file
// includes: nvcc reads every header once an architecture, and torch's take it a minute.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define ZS3FAST_HD __host__ __device__ __forceinline__
#define ZS3FAST_BODY __device__ __forceinline__  // bodies of kernels: on the GPU here, on the CPU where nvcc is not
#else
#define ZS3FAST_HD inline
#define ZS3FAST_BODY inline
#endif
#if defined(__CUDA_ARCH__)
#define ZS3FAST_UNROLL _Pragma("unroll")
#else
#define ZS3FAST_UNROLL
#endif

namespace zs3fast::cuda {

constexpr float kInfinity = __builtin_inff();

template <class Int>
ZS3FAST_HD Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}
template <class Int>
ZS3FAST_HD Int at_least(Int a, Int b) {
  return a > b ? a : b;
}
template <class Int>
ZS3FAST_HD Int at_most(Int a, Int b) {
  return a < b ? a : b;
}

// The bits of `from` as another type.
template <class To, class From>
ZS3FAST_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

ZS3FAST_HD int32_t count_bits(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

// 2^x, relative error 2^-22; 0 below -126.
ZS3FAST_HD float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x, relative error 2^-23; 0 of infinity and of what its inverse would be subnormal for.
ZS3FAST_HD float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

}  // namespace zs3fast::cuda

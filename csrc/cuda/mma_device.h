// The vocabulary of mma.h on a GPU of sm_80 or later: a lane's value is a scalar, a call is an instruction or two.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/element.h"

namespace zs3fast::mma {

using cuda::BFloat16;
using cuda::Half;

template <class T>
using Lanes = T;

template <class T>
struct Same { using type = T; };

constexpr unsigned kEveryLane = 0xffffffffu;

ZS3FAST_BODY int lane_index() { return static_cast<int>(threadIdx.x % 32); }

template <class To, class From>
ZS3FAST_BODY To cast(From x) { return static_cast<To>(x); }

template <class T>
ZS3FAST_BODY T select(bool condition, T a, typename Same<T>::type b) { return condition ? a : b; }

template <class T>
ZS3FAST_BODY T shuffle(T x, int from) { return __shfl_sync(kEveryLane, x, from); }

template <class T>
ZS3FAST_BODY T shuffle_xor(T x, int with) { return __shfl_xor_sync(kEveryLane, x, with); }

ZS3FAST_BODY bool any(bool x) { return __any_sync(kEveryLane, x); }
ZS3FAST_BODY uint32_t ballot(bool x) { return __ballot_sync(kEveryLane, x); }

ZS3FAST_BODY float larger(float a, float b) { return fmaxf(a, b); }
ZS3FAST_BODY float fused(float a, float b, float c) { return fmaf(a, b, c); }  // a b + c
ZS3FAST_BODY float log_2(float x) { return log2f(x); }
ZS3FAST_BODY float exp_2(float x) { return cuda::fast_exp2(x); }
ZS3FAST_BODY uint32_t as_bits(float x) { return __float_as_uint(x); }

// The low or the high halves of two registers as a pair.
template <bool kHigh>
ZS3FAST_BODY uint32_t pair_of(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, kHigh ? 0x7632 : 0x5410);
}

template <class T>
ZS3FAST_BODY uint32_t pack(float low, float high);
template <>
ZS3FAST_BODY uint32_t pack<Half>(float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&x);
}
template <>
ZS3FAST_BODY uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&x);
}

template <class T>
ZS3FAST_BODY void unpack(uint32_t pair, float& low, float& high);
template <>
ZS3FAST_BODY void unpack<Half>(uint32_t pair, float& low, float& high) {
  const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  low = x.x;
  high = x.y;
}
template <>
ZS3FAST_BODY void unpack<BFloat16>(uint32_t pair, float& low, float& high) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}

// sum += a b, see mma.h for who holds what.
template <class T>
ZS3FAST_BODY void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define ZS3FAST_MMA(TAG, NAME)                                                                                   \
  template <>                                                                                                    \
  ZS3FAST_BODY void multiply_add<TAG>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                   \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                   \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                         \
  }
ZS3FAST_MMA(Half, "f16")
ZS3FAST_MMA(BFloat16, "bf16")
#undef ZS3FAST_MMA

// kWords neighbouring registers from (or to) element `at` of global memory; zeros (or nothing) where not inside.
template <int kWords, class T>
ZS3FAST_BODY void load(uint32_t (&to)[kWords], const T* base, int64_t at, bool inside) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 1) {
    to[0] = inside ? __ldg(reinterpret_cast<const uint32_t*>(base + at)) : 0;
  } else if constexpr (kWords == 2) {
    const uint2 x = inside ? __ldg(reinterpret_cast<const uint2*>(base + at)) : make_uint2(0, 0);
    to[0] = x.x, to[1] = x.y;
  } else {
    const uint4 x = inside ? __ldg(reinterpret_cast<const uint4*>(base + at)) : make_uint4(0, 0, 0, 0);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  }
}

template <int kWords, class T>
ZS3FAST_BODY void store(T* base, int64_t at, const uint32_t (&from)[kWords], bool inside) {
  static_assert(kWords == 1 || kWords == 2);
  if (!inside) return;
  if constexpr (kWords == 1)
    *reinterpret_cast<uint32_t*>(base + at) = from[0];
  else
    *reinterpret_cast<uint2*>(base + at) = make_uint2(from[0], from[1]);
}

// One warp's view of its block: which warp it is, shared memory by byte, barriers, copies that overlap with work.
class Block {
 public:
  __device__ explicit Block(unsigned char* shared)
      : warp(static_cast<int>(threadIdx.x / 32)), shared_(shared),
        address_(static_cast<uint32_t>(__cvta_generic_to_shared(shared))) {}

  const int warp;

  ZS3FAST_BODY void sync() { __syncthreads(); }

  ZS3FAST_BODY void write(int at, float x, bool inside) {
    if (inside) *reinterpret_cast<float*>(shared_ + at) = x;
  }
  ZS3FAST_BODY float read(int at) { return *reinterpret_cast<const float*>(shared_ + at); }
  ZS3FAST_BODY void write(int at, const float (&x)[4]) {
    *reinterpret_cast<float4*>(shared_ + at) = make_float4(x[0], x[1], x[2], x[3]);
  }
  ZS3FAST_BODY void read(float (&x)[4], int at) {
    const float4 y = *reinterpret_cast<const float4*>(shared_ + at);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  }

  // 16 bytes a lane from global to shared memory, zeros where not inside; there once their group was waited for.
  template <class T>
  ZS3FAST_BODY void copy_async(int to, const T* base, int64_t at, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address_ + to), "l"(base + (inside ? at : 0)),
                 "r"(inside ? 16 : 0)
                 : "memory");
  }
  ZS3FAST_BODY void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kOpen>  // all groups but the last kOpen
  ZS3FAST_BODY void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
  }

  // Four 8 x 8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8, and gets of each the
  // pair in row `group`, columns 2 place and 2 place + 1, or with kTranspose in column `group` and those rows.
  template <bool kTranspose>
  ZS3FAST_BODY void load_matrices(uint32_t (&to)[4], int at) {
    if constexpr (kTranspose)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "r"(address_ + at)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "r"(address_ + at)
                   : "memory");
  }

 private:
  unsigned char* shared_;
  uint32_t address_;
};

}  // namespace zs3fast::mma

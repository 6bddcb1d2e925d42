// A kernel's body is written once, for the threads of one block, as phases with barriers between them:
//
//   block.each([&](int thread) { shared[thread] = ...; });   // then every thread sees it
//   PerThread<Block, float> sum(block);                      // lives from phase to phase, one a thread
//
// On the GPU a thread runs its own part and waits; HostBlock, in tests, runs one part after the other.
// What is taken over a warp (ballot, warp_max) is a phase of its own, for all threads of the block.
#pragma once

#include "cuda/host_device.h"

#if !defined(__CUDACC__)
#include <vector>
#endif

namespace zs3fast::cuda {

#if defined(__CUDACC__)

struct GpuBlock {
  template <class T>
  struct Values {
    T value;
    ZS3FAST_BODY explicit Values(const GpuBlock&) {}
    ZS3FAST_BODY T& operator[](int) { return value; }
  };

  ZS3FAST_BODY int x() const { return blockIdx.x; }
  ZS3FAST_BODY int y() const { return blockIdx.y; }
  ZS3FAST_BODY int z() const { return blockIdx.z; }
  ZS3FAST_BODY int threads() const { return blockDim.x; }

  template <class F>
  ZS3FAST_BODY void each(F f) const {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  // A phase behind which no thread reads what another wrote: without the barrier.
  template <class F>
  ZS3FAST_BODY void alone(F f) const {
    f(static_cast<int>(threadIdx.x));
  }
  // out: bit l is what f says of lane l of the thread's warp.
  template <class F>
  ZS3FAST_BODY void ballot(Values<uint32_t>& out, F f) const {
    out.value = __ballot_sync(0xffffffffu, f(static_cast<int>(threadIdx.x)));
  }
  ZS3FAST_BODY void warp_max(Values<float>& x) const {
    ZS3FAST_UNROLL
    for (int step = 16; step; step >>= 1) x.value = fmaxf(x.value, __shfl_xor_sync(0xffffffffu, x.value, step));
  }
  ZS3FAST_BODY void add(int64_t* to, int64_t n) const {  // integers: the order does not matter
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n));
  }
};

#else

class HostBlock {
 public:
  template <class T>
  struct Values {
    std::vector<T> values;
    explicit Values(const HostBlock& block) : values(block.threads()) {}
    T& operator[](int thread) { return values[thread]; }
  };

  HostBlock(int x, int y, int z, int threads) : x_(x), y_(y), z_(z), threads_(threads) {}
  int x() const { return x_; }
  int y() const { return y_; }
  int z() const { return z_; }
  int threads() const { return threads_; }

  template <class F>
  void each(F f) const {
    for (int thread = 0; thread < threads_; ++thread) f(thread);
  }
  template <class F>
  void alone(F f) const {
    each(f);
  }
  template <class F>
  void ballot(Values<uint32_t>& out, F f) const {
    for (int warp = 0; warp < threads_; warp += 32) {
      uint32_t bits = 0;
      for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(f(warp + lane)) << lane;
      for (int lane = 0; lane < 32; ++lane) out[warp + lane] = bits;
    }
  }
  void warp_max(Values<float>& x) const {
    for (int step = 16; step; step >>= 1) {
      Values<float> before = x;
      for (int thread = 0; thread < threads_; ++thread) x[thread] = fmaxf(before[thread], before[thread ^ step]);
    }
  }
  void add(int64_t* to, int64_t n) const { *to += n; }

 private:
  int x_, y_, z_, threads_;
};

// Runs `body(block)` for every block of a grid, in order.
template <class F>
void for_each_block(int64_t x, int64_t y, int64_t z, int threads, F body) {
  for (int64_t k = 0; k < z; ++k)
    for (int64_t j = 0; j < y; ++j)
      for (int64_t i = 0; i < x; ++i) body(HostBlock(i, j, k, threads));
}

#endif

template <class Block, class T>
using PerThread = typename Block::template Values<T>;

}  // namespace zs3fast::cuda

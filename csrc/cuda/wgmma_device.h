// The vocabulary of wgmma.h on a GPU of sm_90a: a call is an instruction or two. Not yet run on a GPU.
#pragma once

#include <cuda.h>  // the type of a tensor map; nothing of the driver is called here

namespace zs3fast::wgmma {

// Where the copy engine finds tiles of a tensor [images, heads, tokens, columns]. An axis that all read alike is given
// to the engine as of length 1, and its step is 0.
struct Map {
  CUtensorMap tensor;
  int head_step, image_step;
};

#define ZS3FAST_NAMES_64                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "                  \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ZS3FAST_NAMES_128                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "                  \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "                  \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "                  \
  "%59, %60, %61, %62, %63"

// The operands of a product's text behind the sums: a[4], descriptor, whether to add, whether across.
template <class T, int kTiles>
struct Product;
#define ZS3FAST_SUM(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
#define ZS3FAST_SUM8(i)                                                                                            \
  ZS3FAST_SUM(i), ZS3FAST_SUM(i + 1), ZS3FAST_SUM(i + 2), ZS3FAST_SUM(i + 3), ZS3FAST_SUM(i + 4), ZS3FAST_SUM(i + 5), \
      ZS3FAST_SUM(i + 6), ZS3FAST_SUM(i + 7)
#define ZS3FAST_WGMMA(TAG, NAME, TILES, COLUMNS, A0, A1, A2, A3, RIGHT, ADD, ACROSS, NAMES, ...)                     \
  template <>                                                                                                      \
  struct Product<TAG, TILES> {                                                                                     \
    template <bool kAcross>                                                                                        \
    static ZS3FAST_BODY void issue(float (&sum)[TILES][4], const uint32_t (&a)[4], uint64_t right, bool add) {     \
      asm volatile(                                                                                                \
          "{.reg .pred more; setp.ne.b32 more, " ADD ", 0; "                                                       \
          "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." NAME "." NAME " {" NAMES                          \
          "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " RIGHT ", more, 1, 1, " ACROSS ";}"                                \
          : __VA_ARGS__                                                                                            \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "r"(static_cast<int>(add)), "n"(int{kAcross}));  \
    }                                                                                                              \
  };
#define ZS3FAST_WGMMA_OF(TAG, NAME)                                                                                 \
  ZS3FAST_WGMMA(TAG, NAME, 8, "64", "%32", "%33", "%34", "%35", "%36", "%37", "%38", ZS3FAST_NAMES_64,              \
                ZS3FAST_SUM8(0))                                                                                   \
  ZS3FAST_WGMMA(TAG, NAME, 16, "128", "%64", "%65", "%66", "%67", "%68", "%69", "%70", ZS3FAST_NAMES_128,           \
                ZS3FAST_SUM8(0), ZS3FAST_SUM8(8))
ZS3FAST_WGMMA_OF(mma::Half, "f16")
ZS3FAST_WGMMA_OF(mma::BFloat16, "bf16")
#undef ZS3FAST_WGMMA_OF
#undef ZS3FAST_WGMMA
#undef ZS3FAST_SUM8
#undef ZS3FAST_SUM
#undef ZS3FAST_NAMES_64
#undef ZS3FAST_NAMES_128

// Registers that the compiler may not move or recompute across this place.
template <int kRows>
ZS3FAST_BODY void pin(float (&x)[kRows][4]) {
  ZS3FAST_UNROLL
  for (int i = 0; i < 4 * kRows; ++i) asm volatile("" : "+f"(x[i / 4][i % 4])::"memory");
}
template <int kRows>
ZS3FAST_BODY void pin(uint32_t (&x)[kRows][4]) {
  ZS3FAST_UNROLL
  for (int i = 0; i < 4 * kRows; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

// One warp's view of its block. Shared memory begins at a multiple of 1024 bytes; places in it are given by byte.
class Block {
 public:
  __device__ explicit Block(unsigned char* shared)
      : warp(__shfl_sync(mma::kEveryLane, static_cast<int>(threadIdx.x / 32), 0)),
        address_(static_cast<uint32_t>(__cvta_generic_to_shared(shared))) {}

  const int warp;

  ZS3FAST_BODY void sync() { __syncthreads(); }

  ZS3FAST_BODY void start(int barrier, int arrivals) {
    if (first_lane())
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_ + barrier), "r"(arrivals) : "memory");
  }
  ZS3FAST_BODY void publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  ZS3FAST_BODY void expect(int barrier, int bytes) {  // arrives too
    if (first_lane())
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_ + barrier), "r"(bytes)
                   : "memory");
  }
  ZS3FAST_BODY void arrive(int barrier) {
    __syncwarp();
    if (first_lane()) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_ + barrier) : "memory");
  }
  ZS3FAST_BODY void wait(int barrier, int phase) {
    uint32_t over;
    do {
      asm volatile(
          "{.reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.b32 %0, 1, 0, over;}"
          : "=r"(over)
          : "r"(address_ + barrier), "r"(phase)
          : "memory");
    } while (over == 0);
    __syncwarp();
  }

  // Rows token and on, columns column and on, of the map's box, zeros where the tensor ends.
  ZS3FAST_BODY void copy(int to, const Map& map, int barrier, int column, int token, int head, int image) {
    if (first_lane())
      asm volatile(
          "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
          "%5}], [%6];" ::"r"(address_ + to),
          "l"(&map.tensor), "r"(column), "r"(token), "r"(head * map.head_step), "r"(image * map.image_step),
          "r"(address_ + barrier)
          : "memory");
    __syncwarp();
  }

  // A right operand at byte `at`.
  ZS3FAST_BODY uint64_t operand(int at, int leading, int stride) const {
    return descriptor(address_ + at, leading, stride);
  }

  template <class... Registers>
  ZS3FAST_BODY void fence(Registers&... registers) {
    (pin(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  template <class T, bool kAcross, int kTiles>
  ZS3FAST_BODY void multiply(float (&sum)[kTiles][4], const uint32_t (&a)[4], uint64_t right, bool add) {
    Product<T, kTiles>::template issue<kAcross>(sum, a, right, add);
  }
  ZS3FAST_BODY void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  template <int kOpen, class... Registers>
  ZS3FAST_BODY void finish(Registers&... sums) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
    (pin(sums), ...);
  }

 private:
  ZS3FAST_BODY static bool first_lane() { return threadIdx.x % 32 == 0; }

  uint32_t address_;
};

}  // namespace zs3fast::wgmma

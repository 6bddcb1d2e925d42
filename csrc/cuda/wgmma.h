// What Hopper kernels (sm_90a) are written in, beside the words of mma.h: products of a warpgroup that run on while its
// warps go on, tiles brought by the bulk copy engine, and barriers in shared memory that both report to.
//
// A warpgroup is four neighbouring warps, the first a multiple of four. A product (wgmma) is of 64 rows, warp i of the
// group holding rows 16 i and on as it would for mma.sync (mma.h): left operand a[4], sums [columns / 8][4]. The right
// operand is read from shared memory, where a descriptor says it lies. Tiles are rows of 128 bytes (64 elements) at
// multiples of 1024 bytes, in which 16 bytes of address bits 4 to 6 are found at those bits xor bits 7 to 9: what the
// copy engine calls a swizzle of 128 bytes, and products too. A product's columns are
//   kAcross = false   rows of the tile, its sum runs over 16 of a row's elements      (scores: keys x columns)
//   kAcross = true    elements of a row, its sum runs over 16 rows                    (keys' values, transposed)
//
// Order, all of which the emulation holds a body to:
//   fence(registers...)   sums and left operands as they are now may go into products issued from here on
//   multiply, commit      issued; the registers must not be touched, nor the shared memory written to, until
//   finish<n>(sums...)    all committed groups but the last n are done, these sums among them
//   expect, copy          a barrier's phase ends when as many arrived as it was started for and its bytes are there
//   arrive, wait(phase)   what a warp did before it arrives is done for one that waits; phases are 0, 1, 0, ...
//   sync, publish         barriers are for the copy engine to see once the warp that started them published them
//
// Facts: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "Data Movement and Conversion Instructions".
#pragma once

#include "cuda/mma.h"

namespace zs3fast::wgmma {

using mma::Lanes;

constexpr int kGroupWarps = 4, kGroupRows = 64;
constexpr int kLine = 128, kAtom = 1024;  // bytes: a row of a tile, and 8 of them, after which the swizzle repeats

// Describes a right operand whose first byte lies at `address` in shared memory, swizzled by 128 bytes. `stride` is the
// way to the next 8 rows. `leading` to the next 64 columns, where kAcross has more; otherwise it is not looked at.
ZS3FAST_HD uint64_t descriptor(uint32_t address, int leading, int stride) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffffu) >> 4); };
  return field(address) | field(leading) << 16 | field(stride) << 32 | uint64_t{1} << 62;
}

}  // namespace zs3fast::wgmma

#ifdef __CUDACC__
#include "cuda/wgmma_device.h"
#else
#include "emulated/wgmma.h"  // tests/ops/emulated
#endif

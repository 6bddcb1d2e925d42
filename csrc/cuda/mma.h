// What tensor-core kernels are written in: registers of a warp, products of 16-bit matrices, shared memory of a block.
//
// A body is plain C++ over `Lanes<T>`: what the 32 lanes of a warp hold in one register. nvcc sees Lanes<T> = T and an
// instruction a call (mma_device.h). Any other compiler sees 32 values in lock step and an exact account of the same
// instructions (tests/ops/emulated/mma.h), so that tests run the very body of a kernel where no GPU is. Two rules keep both true:
// a body branches only on what the whole warp agrees on (sizes, `any`) and says `select` otherwise; and memory is read
// and written through `load`, `store` and `Block` alone.
//
// Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), with group = lane / 4, place = lane % 4:
//
//   a[4]    16 x 16, pairs of columns 2 place, 2 place + 1:   rows group, group + 8; then both 8 columns further on
//   b0, b1  16 x 8,  pairs of rows 2 place, 2 place + 1 of column group:   b1 is 8 rows further down
//   sum[4]  16 x 8,  row group: columns 2 place, 2 place + 1;   row group + 8: the same columns
#pragma once

#ifdef __CUDACC__
#include "cuda/mma_device.h"
#else
#include "emulated/mma.h"  // tests/ops/emulated: nothing of it is built into the extension
#endif

namespace zs3fast::mma {

// Over the four lanes of a group: they hold the columns of two rows.
ZS3FAST_BODY Lanes<float> sum_of_group(Lanes<float> x) {
  x = x + shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

ZS3FAST_BODY Lanes<float> largest_of_group(Lanes<float> x) {
  x = larger(x, shuffle_xor(x, 1));
  return larger(x, shuffle_xor(x, 2));
}

// Dot product of the pairs that two registers hold, added to `sum`.
template <class T>
ZS3FAST_BODY Lanes<float> dot_pairs(Lanes<uint32_t> a, Lanes<uint32_t> b, Lanes<float> sum) {
  Lanes<float> a0, a1, b0, b1;
  unpack<T>(a, a0, a1);
  unpack<T>(b, b0, b1);
  return fused(a1, b1, fused(a0, b0, sum));
}

}  // namespace zs3fast::mma

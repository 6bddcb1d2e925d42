// A request to the kernels of proposal_attention as it comes from Python.
#pragma once

#include "emulated/entry.h"
#include "proposal_attention/cuda_problem.h"

namespace zs3fast {

template <class T>
proposal_attention::Problem<T> proposals_problem(const Entry& entry, const int64_t* sizes, float scale) {
  int n[4];
  for (int i = 0; i < 4; ++i) n[i] = static_cast<int>(sizes[i]);
  return {n[0],
          n[1],
          n[2],
          n[3],
          scale,
          entry.heads<const T>(0),
          entry.heads<const T>(1),
          entry.heads<const T>(2),
          entry.heads<const T>(3),
          entry.heads<const T>(4),
          entry.data<const uint32_t>(5),
          entry.stride(5, 0),
          entry.stride(5, 1),
          entry.stride(5, 2),
          entry.heads<T>(6),
          entry.data<float>(7)};
}

}  // namespace zs3fast

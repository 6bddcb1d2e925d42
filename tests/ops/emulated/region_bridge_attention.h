// A request to the kernels of region_bridge_attention as it comes from Python.
#pragma once

#include "emulated/entry.h"
#include "region_bridge_attention/cuda_problem.h"

namespace zs3fast {

template <class T>
region_bridge_attention::Problem<T> bridge_problem(const Entry& entry, const int64_t* sizes, float scale) {
  int n[8];
  for (int i = 0; i < 8; ++i) n[i] = static_cast<int>(sizes[i]);
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], scale, entry.heads<const T>(0), entry.heads<const T>(1),
          entry.heads<const T>(2), entry.heads<T>(3), entry.data<float>(4)};
}

}  // namespace zs3fast

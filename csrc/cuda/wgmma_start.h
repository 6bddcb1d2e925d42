// How a .cu file starts a Hopper kernel: with tensor maps for the copy engine. The one function of the driver that
// makes them, there since CUDA 12.0, is asked for when it is first needed: the extension does not depend on libcuda,
// which comes with a driver. Strides of a packed projection do not grow from axis to axis; that the engine takes those
// is the first thing to see on a card.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/mma_rows.h"
#include "cuda/start.h"
#include "cuda/wgmma_attention.h"

namespace zs3fast::wgmma {

inline decltype(&cuTensorMapEncodeTiled) encode_tiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult how;
    constexpr unsigned kSince = 12000;  // CUDA 12.0
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince, cudaEnableDefault, &how) !=
            cudaSuccess ||
        how != cudaDriverEntryPointSuccess)
      found = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

// Boxes of 64 columns and `rows` tokens of x [images, heads, tokens, dh], whose tokens lie apart; no token, no map.
template <class T>
cudaError_t make_map(Map& map, const mma::Heads<const T>& x, int images, int heads, int tokens, int dh, int rows) {
  static_assert(std::is_same_v<T, cuda::Half> || std::is_same_v<T, cuda::BFloat16>);
  if (tokens == 0) return cudaSuccess;
  const auto encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr auto kType = std::is_same_v<T, cuda::Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // an axis that is stepped along by nothing, or not at all, is one of length 1 with any step that is allowed
  const auto steps = [](int length, int64_t stride) { return length > 1 && stride != 0; };
  const auto bytes = [&](int length, int64_t stride) {
    return steps(length, stride) ? static_cast<cuuint64_t>(stride) * sizeof(T) : cuuint64_t{16};
  };
  map.head_step = steps(heads, x.head);
  map.image_step = steps(images, x.image);
  const cuuint64_t length[] = {static_cast<cuuint64_t>(dh), static_cast<cuuint64_t>(tokens),
                               static_cast<cuuint64_t>(map.head_step ? heads : 1),
                               static_cast<cuuint64_t>(map.image_step ? images : 1)};
  const cuuint64_t stride[] = {bytes(tokens, x.token), bytes(heads, x.head), bytes(images, x.image)};
  const cuuint32_t box[] = {kLine / sizeof(T), static_cast<cuuint32_t>(rows), 1, 1}, each[] = {1, 1, 1, 1};
  const CUresult made = encode(&map.tensor, kType, 4, const_cast<T*>(x.data), length, stride, box, each,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// kernel(problem, maps of k and v) on `blocks` blocks; problem: images, heads, k, v, and `tokens` of the latter.
template <int kDh, template <class> class Problem, class T>
cudaError_t start(void (*kernel)(Problem<T>, Map, Map), const Problem<T>& problem, int tokens, int blocks,
                  int64_t shared_bytes, cudaStream_t stream) {
  using S = Shape<kDh>;
  Map k{}, v{};
  for (const bool values : {false, true})
    if (const cudaError_t refused = make_map(values ? v : k, values ? problem.v : problem.k, problem.images,
                                             problem.heads, tokens, kDh, S::kKeys))
      return refused;
  return cuda::start(kernel, dim3(blocks), 32 * S::kWarps, shared_bytes + kAtom, stream, problem, k, v);
}

// Shared memory of a block from where a swizzle's pattern begins; kAtom bytes more than are used have to be there.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ unsigned char shared[];
  return shared + (0u - static_cast<uint32_t>(__cvta_generic_to_shared(shared))) % kAtom;
}

}  // namespace zs3fast::wgmma

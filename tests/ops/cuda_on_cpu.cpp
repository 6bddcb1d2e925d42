// The bodies of the CUDA kernels, run on the CPU block by block for tests/ops/test_cuda_kernels.py: what a launch is
// given and how its grid is cut is what csrc/<op>/cuda.cu and cuda_binding.cpp do. No torch, so that it builds in
// seconds.
#include <vector>

#include "masks_to_labels/cuda_kernel.h"

using namespace zs3fast;

namespace {

// A tensor as ctypes hands it over.
struct View {
  void* data;
  int64_t size[4], stride[4];
};

masks_to_labels::CudaMaps maps_of(const View& x, int64_t height, int64_t width) {
  return {x.data, x.stride[0], x.stride[1], x.stride[2], x.stride[3],
          {static_cast<int32_t>(x.size[2]), static_cast<int32_t>(height)},
          {static_cast<int32_t>(x.size[3]), static_cast<int32_t>(width)}};
}

}  // namespace

extern "C" {

// Returns the columns of patches in shared memory, 0 for none; no_shared takes that path whatever fits.
int32_t run_masks_to_labels(View masks, const View* trusty, int32_t element, const uint8_t* seen, float seen_offset,
                            bool weigh_seen, bool weigh_unseen, int64_t height, int64_t width, bool no_shared,
                            int32_t label_bytes, void* labels, float* scores, int64_t* nan_count) {
  masks_to_labels::CudaRequest q{};
  q.masks = maps_of(masks, height, width);
  if (trusty) q.trusty = maps_of(*trusty, height, width);
  q.element = static_cast<cuda::Element>(element);
  q.images = static_cast<int32_t>(masks.size[0]), q.classes = static_cast<int32_t>(masks.size[1]);
  q.height = static_cast<int32_t>(height), q.width = static_cast<int32_t>(width);
  q.seen_offset = seen_offset, q.weigh_seen = weigh_seen, q.weigh_unseen = weigh_unseen;
  q.labels = labels, q.label_bytes = label_bytes, q.scores = scores, q.nan_count = nan_count;
  for (int32_t c = 0; c < q.classes; ++c) q.seen[c / 32] |= static_cast<uint32_t>(seen[c]) << (c % 32);
  masks_to_labels::gpu::plan(q);
  if (no_shared) q.span = 0;
  std::vector<float> shared(masks_to_labels::gpu::shared_bytes(q) / sizeof(float) + 1, NAN);
  const int32_t across = cuda::ceil_div(q.width, masks_to_labels::kThreads);
  const int32_t down = (q.masks.rows.points + 1) * q.chunks;
  cuda::for_each_block(across, down, q.images, masks_to_labels::kThreads, [&](const cuda::HostBlock& block) {
    q.span ? masks_to_labels::gpu::one_window<true>(block, q, shared.data())
           : masks_to_labels::gpu::one_window<false>(block, q, shared.data());
  });
  return q.span;
}

// Every float16 and bfloat16 as float.
void run_conversions(const uint16_t* halves, int64_t count, float* from_half, float* from_bfloat16) {
  for (int64_t i = 0; i < count; ++i) {
    from_half[i] = cuda::to_float(cuda::Half{halves[i]});
    from_bfloat16[i] = cuda::to_float(cuda::BFloat16{halves[i]});
  }
}

}  // extern "C"

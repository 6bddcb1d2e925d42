// The bodies of the CUDA kernels, run on the CPU block by block for tests/ops/test_cuda_kernels.py: what a launch is
// given and how its grid is cut is what csrc/<op>/cuda.cu and cuda_binding.cpp do. No torch, so that it builds in
// seconds.
#include <memory>
#include <vector>

#include "mask_loss/cuda_kernel.h"
#include "masks_to_bits/cuda_kernel.h"
#include "masks_to_labels/cuda_kernel.h"

using namespace zs3fast;

namespace {

// A tensor as ctypes hands it over.
struct View {
  void* data;
  int64_t size[4], stride[4];
};

template <class T>
void bits(const masks_to_bits::CudaRequest& q) {
  cuda::for_each_block(masks_to_bits::gpu::blocks_x(q), masks_to_bits::gpu::blocks_y(q), 1, masks_to_bits::kThreads,
                       [&](const cuda::HostBlock& block) {
                         q.logits ? masks_to_bits::gpu::make_words<T, true>(block, q)
                                  : masks_to_bits::gpu::make_words<T, false>(block, q);
                       });
}

mask_loss::CudaProblem problem_of(const View& logits, int32_t element, const View& labels, int32_t label, float alpha,
                                  float gamma) {
  mask_loss::CudaProblem q{};
  q.logits = logits.data, q.labels = labels.data;
  q.element = static_cast<cuda::Element>(element), q.label = static_cast<mask_loss::Label>(label);
  q.logits_b = logits.stride[0], q.logits_c = logits.stride[1];
  q.logits_y = logits.stride[2], q.logits_x = logits.stride[3];
  q.labels_b = labels.stride[0], q.labels_y = labels.stride[1], q.labels_x = labels.stride[2];
  q.images = static_cast<int32_t>(logits.size[0]), q.classes = static_cast<int32_t>(logits.size[1]);
  q.rows = {static_cast<int32_t>(logits.size[2]), static_cast<int32_t>(labels.size[1])};
  q.columns = {static_cast<int32_t>(logits.size[3]), static_cast<int32_t>(labels.size[2])};
  q.alpha = alpha, q.gamma = gamma;
  mask_loss::gpu::plan(q);
  return q;
}

template <class F>
void for_each_strip(const mask_loss::CudaProblem& q, F body) {
  cuda::for_each_block(q.strips * q.groups, q.tile_rows(), q.images, 32 * q.warps, body);
}

masks_to_labels::CudaMaps maps_of(const View& x, int64_t height, int64_t width) {
  return {x.data, x.stride[0], x.stride[1], x.stride[2], x.stride[3],
          {static_cast<int32_t>(x.size[2]), static_cast<int32_t>(height)},
          {static_cast<int32_t>(x.size[3]), static_cast<int32_t>(width)}};
}

}  // namespace

extern "C" {

void run_masks_to_bits(View masks, int32_t element, int64_t grid_h, int64_t grid_w, int64_t padded_h, int64_t padded_w,
                       bool align_corners, bool logits, uint32_t* out) {
  masks_to_bits::CudaRequest q{};
  q.masks = masks.data;
  q.stride_b = masks.stride[0], q.stride_q = masks.stride[1];
  q.stride_y = masks.stride[2], q.stride_x = masks.stride[3];
  q.count = static_cast<int32_t>(masks.size[0] * masks.size[1]), q.proposals = static_cast<int32_t>(masks.size[1]);
  q.grid_w = static_cast<int32_t>(grid_w), q.patches = static_cast<int32_t>(grid_h * grid_w);
  q.words = cuda::ceil_div(q.patches, 32);
  q.logits = logits;
  q.padded_y = masks_to_bits::gpu::resize(masks.size[2], padded_h, align_corners);
  q.padded_x = masks_to_bits::gpu::resize(masks.size[3], padded_w, align_corners);
  q.grid_y = masks_to_bits::gpu::resize(padded_h, grid_h, false);
  q.grid_x = masks_to_bits::gpu::resize(padded_w, grid_w, false);
  q.bits = out;
  switch (static_cast<cuda::Element>(element)) {
    case cuda::Element::float32: return bits<float>(q);
    case cuda::Element::float16: return bits<cuda::Half>(q);
    default: return bits<cuda::BFloat16>(q);
  }
}

void run_mask_loss(View logits, int32_t element, View labels, int32_t label, float alpha, float gamma, float* sums) {
  const auto q = problem_of(logits, element, labels, label, alpha, gamma);
  const int64_t rows = static_cast<int64_t>(q.tile_rows()) * q.strips;
  std::vector<float> partial(4 * q.images * rows * q.classes, NAN), shared(mask_loss::kSumThreads, NAN);
  const auto tile = std::make_unique<mask_loss::gpu::Tile>();
  for_each_strip(q, [&](const cuda::HostBlock& block) {
    gamma == 2.0f ? mask_loss::gpu::forward<true>(block, q, *tile, partial.data())
                  : mask_loss::gpu::forward<false>(block, q, *tile, partial.data());
  });
  cuda::for_each_block(cuda::ceil_div(q.classes, 32), 4 * q.images, 1, mask_loss::kSumThreads,
                       [&](const cuda::HostBlock& block) {
                         mask_loss::gpu::add_rows(block, partial.data(), sums, rows, q.classes, shared.data());
                       });
}

void run_mask_loss_backward(const float* focal, const float* intersection, const float* prob, View logits,
                            int32_t element, View labels, int32_t label, float alpha, float gamma, void* grad) {
  const auto q = problem_of(logits, element, labels, label, alpha, gamma);
  const mask_loss::Gradients gradients{focal, intersection, prob};
  std::vector<float> corners(4 * static_cast<int64_t>(q.images) * q.tile_rows() * q.tile_columns() * q.classes, NAN);
  const auto tile = std::make_unique<mask_loss::gpu::Tile>();
  for_each_strip(q, [&](const cuda::HostBlock& block) {
    gamma == 2.0f ? mask_loss::gpu::backward<true>(block, q, gradients, *tile, corners.data())
                  : mask_loss::gpu::backward<false>(block, q, gradients, *tile, corners.data());
  });
  const int threads = mask_loss::gpu::gather_threads(q);
  cuda::for_each_block(q.rows.points * q.columns.points, cuda::ceil_div(q.classes, threads), q.images, threads,
                       [&](const cuda::HostBlock& block) { mask_loss::gpu::gather(block, q, corners.data(), grad); });
}

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

// Every conversion there is: float16 and bfloat16 to float, and back from floats.
void run_conversions(const uint16_t* halves, int64_t count, float* from_half, float* from_bfloat16, const float* floats,
                     int64_t float_count, uint16_t* to_half, uint16_t* to_bfloat16) {
  for (int64_t i = 0; i < count; ++i) {
    from_half[i] = cuda::to_float(cuda::Half{halves[i]});
    from_bfloat16[i] = cuda::to_float(cuda::BFloat16{halves[i]});
  }
  for (int64_t i = 0; i < float_count; ++i) {
    to_half[i] = cuda::from_float<cuda::Half>(floats[i]).bits;
    to_bfloat16[i] = cuda::from_float<cuda::BFloat16>(floats[i]).bits;
  }
}

}  // extern "C"

// One call of proposals_to_labels on raw pointers and strides. No torch header: the instruction-set files include this.
#pragma once

#include <cstdint>

namespace zs3fast::proposals_to_labels {

constexpr int64_t kTile = 32;  // output pixels a side of one task

enum class Element { float32, float16, bfloat16 };

// Maps [batch, proposals, h, w] with strides in elements.
struct Maps {
  const void* data;
  Element element;
  int64_t w;
  int64_t image_stride, proposal_stride, y_stride, x_stride;
};

// What one side of a tile reads. Output pixels mix two image pixels, image pixels two patches of the maps; of either
// only those that are read are listed, once and in ascending order. Entries beyond the last repeat it.
struct AxisTile {
  int32_t outputs, pixels, patches;
  int32_t pixel_low[kTile], pixel_high[kTile];  // output -> image pixel, as an index into the list
  float pixel_weight[kTile];                    // of high
  int32_t patch_low[3 * kTile], patch_high[3 * kTile];  // image pixel -> patch, as an index into the list
  float patch_weight[3 * kTile];
  int32_t patch[4 * kTile];  // coordinate in the maps
};

struct Request {
  const float* weights;  // [batch, proposals, classes]
  const float* spread;   // [batch, proposals] greatest minus least weight of a proposal
  const float* largest;  // [batch, proposals] greatest absolute weight of a proposal
  const uint8_t* finite;  // [batch] whether all weights are
  Maps maps;
  bool logits, upsample;  // upsample: image pixels are mixed from patches; otherwise they are patches
  int64_t batch, proposals, classes, height, width;
  const AxisTile* tiles_y;  // [ceil(height / kTile)]
  const AxisTile* tiles_x;
  int64_t patches_y, patches_x;  // the most a tile has
  void* labels;                  // [batch, height, width]
  int label_bytes;
  float* scores;  // [batch, height, width] or null
};

struct Kernels {
  int64_t (*scratch_bytes)(const Request&);
  void (*run)(const Request&, int64_t task, unsigned char* scratch);  // task: (image, tile row, tile column)
};

// The same code, compiled for each instruction set.
extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace zs3fast::proposals_to_labels

// One call of masks_to_labels on raw pointers and strides. No torch header: the instruction-set files include this.
#pragma once

#include <cstdint>

namespace zs3fast::masks_to_labels {

enum class Element { float32, float16, bfloat16 };

// Maps [rows, channels, h, w] with strides in elements; data is null where there are none.
struct Maps {
  const void* data;
  Element element;
  int64_t h, w;
  int64_t row_stride, channel_stride, y_stride, x_stride;
};

// Where each output coordinate of a bilinear resize reads: low, high and the weight of high.
struct Axis {
  const int32_t* low;
  const int32_t* high;
  const float* weight;
};

struct Request {
  Maps masks, trusty;
  int64_t batch, classes;
  const uint8_t* seen;  // [classes], 0 or 1
  float seen_offset;
  bool weigh_seen, weigh_unseen;  // false without trusty maps
  int64_t crop_h, crop_w, canvas_h, canvas_w, height, width;
  const int64_t* windows;  // [num_windows, 2]: y, x
  int64_t num_windows;
  int64_t top_k;
  Axis masks_y, masks_x;    // crop pixel -> mask patch
  Axis trusty_y, trusty_x;  // crop pixel -> trusty patch
  Axis resize_y, resize_x;  // output pixel -> canvas pixel
  void* labels;             // [batch, top_k, height, width]
  int label_bytes;
  float* scores;       // like labels, or null
  int64_t* nan_count;  // [batch], or null

  bool weighted() const { return weigh_seen || weigh_unseen; }

  // The last resize and the averaging are identities, so a pixel reads four patches and nothing else.
  bool one_native_window() const {
    return num_windows == 1 && crop_h == canvas_h && crop_w == canvas_w && canvas_h == height && canvas_w == width;
  }
};

// A kernel is split into independent tasks; a thread runs some of them on scratch memory of its own.
struct Plan {
  int64_t tasks;
  int64_t scratch_bytes;
};

// kernels_baseline::, kernels_avx2:: and kernels_avx512:: hold the same code, compiled for each instruction set.
#define ZS3FAST_DECLARE(isa)                                                                        \
  namespace isa {                                                                                   \
  Plan plan_one_window(const Request& request);                                                     \
  void run_one_window(const Request& request, int64_t first, int64_t last, unsigned char* scratch); \
  Plan plan_windows(const Request& request);                                                        \
  void run_windows(const Request& request, int64_t first, int64_t last, unsigned char* scratch);    \
  }
ZS3FAST_DECLARE(kernels_baseline)
ZS3FAST_DECLARE(kernels_avx2)
ZS3FAST_DECLARE(kernels_avx512)
#undef ZS3FAST_DECLARE

}  // namespace zs3fast::masks_to_labels

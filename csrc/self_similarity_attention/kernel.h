// self_similarity_attention on the CPU: what one task computes, on raw pointers and strides. No torch header here.
//
// One task is one block of queries of one head. Scores are kept transposed, [n, query] with queries along the vector:
// the block's Q^T is packed once, keys are used as they lie, the softmax over n is vertical (no horizontal reduction).
// The prior's two factors are looked up once a block, [h, query] and [w, query], and multiplied where scores are read.
// Where two score matrices share the values (qq+kk), both run over a tile of keys while its values are in the cache.
#pragma once

#include <cstdint>

namespace zs3fast::self_similarity_attention {

// [B, heads, rows, dh] in any layout; strides in elements.
template <class T>
struct Heads {
  T* data;
  int64_t batch, head, row, column;
  T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

struct Problem {
  int64_t tokens, prefix, grid_h, grid_w, width;
  float scale;
  const float *rows, *columns;  // the prior by |dy| [h] and by |dx| [w]: a score grows by their product; or null
  int64_t streams;              // score matrices: 1 or 2
  Heads<const float> left[2], right[2], v;
  Heads<float> output;  // its row i is patch i
};

// One build an instruction set, each in its own translation unit.
struct Kernels {
  int64_t (*scratch)(const Problem&);  // floats a task needs
  void (*forward)(const Problem&, int64_t b, int64_t h, int64_t first, int64_t end, float* scratch);  // patch queries
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

constexpr int64_t kKeyBlock = 96;     // keys of a score tile
constexpr int64_t kQueryBlock = 128;  // most queries of a task, a multiple of every vector's lanes

}  // namespace zs3fast::self_similarity_attention

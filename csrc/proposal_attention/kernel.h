// proposal_attention on the CPU: what one head of one image computes, on raw pointers and strides. No torch header here.
//
// Rows come in tiles of 16 proposals. A tile whose rows keep mostly the same patches is dense: blocked products over the
// union of them, scores as [patch, row] with the rows along the vector and a 16-bit word a patch that says which rows
// keep it. Any other tile is sparse: row by row over the patches that the row keeps, whole vectors of dot products, and
// in the backward pass patch by patch over the rows that keep it, so that no sum over rows goes through memory. Lists
// are made from the bits once an image and read by every head; a word that no row has a bit in costs one look.
#pragma once

#include <cstdint>

namespace zs3fast::proposal_attention {

constexpr int64_t kTile = 16;         // rows
constexpr int64_t kPatchBlock = 128;  // patches of a dense tile's scores
constexpr int64_t kPad = 16;          // dh is a multiple of this, so that every vector is whole

// Rows of dh neighbouring elements, `stride` apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

struct Tile {
  int64_t first, rows;
  const int32_t* patches;  // sparse: those of row 0, of row 1, ...; dense: the union
  bool dense;
  int64_t count;           // dense: patches of the union
  const uint16_t* keeps;   // dense: [count] bit r: row r keeps the patch
  const int32_t* begin;    // sparse: [rows + 1] where a row's patches begin
  int64_t pairs_before;    // sparse pairs of the image's earlier tiles
};

// The sparse pairs of an image, patch by patch.
struct ByPatch {
  int64_t pairs;
  const int32_t* begin;  // [N + 1]
  const int32_t* row;    // [pairs] absolute rows
  const int32_t* pair;   // [pairs] place among the pairs as the tiles list them
};

struct Forward {
  int64_t patches, dh;
  float scale;
  Rows<const float> q, k_self, v_self, k, v;
  Rows<float> output;
  float* lse;
};

struct Backward {
  int64_t patches, dh;
  float scale;
  Rows<const float> grad_output, q, k_self, v_self, k, v, output;
  const float* lse;
  Rows<float> dq, dk_self, dv_self, dk, dv;
};

// One build an instruction set, each in its own translation unit.
struct Kernels {
  int64_t (*forward_scratch)(int64_t patches, int64_t dh);  // floats
  void (*forward)(const Forward&, const Tile* tiles, int64_t count, float* scratch);
  int64_t (*backward_scratch)(int64_t patches, int64_t dh, int64_t sparse_pairs);
  void (*backward)(const Backward&, const Tile* tiles, int64_t count, const ByPatch&, float* scratch);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace zs3fast::proposal_attention

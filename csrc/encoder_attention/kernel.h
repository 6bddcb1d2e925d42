// encoder_attention on the CPU: softmax attention over two runs of keys, on raw pointers and strides. No torch header.
//
//   S^T = K Q^T, P^T = exp(S^T - max), O^T = O^T rescaled + V^T P^T
//
// everything transposed, so that a vector holds 16 queries: maximum, sum and exponentials run down the registers and no
// reduction crosses a vector. Keys come in blocks with an online maximum. One task is one block of queries of one head;
// neighbouring tasks share their head, whose keys and values a thread packs once: K [keys, dh] and V^T [dh, keys], which
// both the dot products of AVX-512-BF16 and AMX's tiles read where they lie.
#pragma once

#include <cstdint>

namespace zs3fast::encoder_attention {

enum class Element { float32, bfloat16 };

// [B, tokens, heads, dh] with neighbouring columns; strides in elements. batch is 0 where one serves all.
struct Tokens {
  void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0, count = 0;
};

struct Problem {
  Element element = Element::float32;
  int64_t batches = 0, heads = 0, dh = 0;
  float scale = 1.0f;
  Tokens q, output;
  Tokens k[2], v[2];     // runs of keys, one after the other; a run of none has a count of 0
  float* lse = nullptr;    // [B, heads, queries], or null
  int64_t lse_stride = 0;  // between heads
};

// One build an instruction set, each in its own translation unit.
struct Kernel {
  const char* name;
  bool bf16;                                     // multiplies bfloat16 as such: takes no float32
  int64_t (*tasks)(const Problem&);              // how many there are
  void (*run)(const Problem&, int64_t, int64_t); // tasks [begin, end), on the calling thread
};

extern const Kernel kernel_baseline, kernel_avx2, kernel_avx512, kernel_avx512_bf16, kernel_amx;

}  // namespace zs3fast::encoder_attention

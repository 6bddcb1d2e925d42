// The kernels of kernel.h, compiled once an instruction set: the including file names it in ZS3FAST_ISA.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own _mm512_undefined_epi32
#endif
#include <immintrin.h>
#endif

#include "attention_to_mask/kernel.h"
#include "simd.h"

namespace zs3fast::attention_to_mask {
namespace {

typedef uint32_t Word __attribute__((vector_size(kBytes)));
typedef uint64_t Wide __attribute__((vector_size(kBytes)));

inline int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

inline Wide multiply_even(Word a, Word b) {  // 64-bit products of the even lanes
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return ((Wide)a & 0xffffffffull) * ((Wide)b & 0xffffffffull);
#endif
}

inline void multiply(Word a, uint32_t factor, Word& high, Word& low) {
  const Word f = factor - Word{};
  const Wide even = multiply_even(a, f), odd = multiply_even((Word)((Wide)a >> 32), f);
  const Wide upper = (Wide{} + 0xffffffff00000000ull);
  high = (Word)((even >> 32) | (odd & upper));
  low = (Word)((even & ~upper) | (odd << 32));
}

// Rows 4 * group ... 4 * group + 3 of the words for the classes `c`, `c + 1`, ...
inline void philox(uint32_t group, uint32_t c, uint32_t head, const Dropout& d, Word out[4]) {
  Word lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Word c0 = group - Word{}, c1 = lane + c, c2 = head - Word{}, c3{};
  uint32_t k0 = d.key0, k1 = d.key1;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

inline Float keep(Word word, Float x, const Dropout& d) { return word >= (d.threshold - Word{}) ? x : Float{}; }

// Copies rows [0, M) of a strided matrix, `width` columns, to rows of `ld` with zeros behind.
void pack(const float* from, int64_t row, int64_t col, int64_t M, int64_t width, float* to, int64_t ld, float factor) {
  for (int64_t i = 0; i < M; ++i, from += row, to += ld) {
    if (col == 1)
      for (int64_t j = 0; j < width; ++j) to[j] = from[j] * factor;
    else
      for (int64_t j = 0; j < width; ++j) to[j] = from[j * col] * factor;
    for (int64_t j = width; j < ld; ++j) to[j] = 0.0f;
  }
}

// The same, transposed: to[width, ld], zeros behind the M columns.
void pack_transposed(const float* from, int64_t row, int64_t col, int64_t M, int64_t width, float* to, int64_t ld,
                     float factor) {
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t i = 0; i < M; ++i) to[j * ld + i] = from[i * row + j * col] * factor;
    for (int64_t i = M; i < ld; ++i) to[j * ld + i] = 0.0f;
  }
}

float* take(float*& scratch, int64_t floats) {
  float* p = scratch;
  scratch += round_up(floats);
  return p;
}

int64_t forward_scratch(const Sizes& size, int64_t heads, int64_t classes) {
  const int64_t C = round_up(classes), D = round_up(size.width);
  return heads * (D * C + C * D + 2 * C) + kPatchBlock * D + 2 * kPatchBlock * C + C;
}

void forward(const Forward& f, int64_t b, int64_t h0, int64_t h1, int64_t c0, int64_t c1, float* scratch) {
  const int64_t dh = f.size.width, N = f.size.patches, M = c1 - c0, H = h1 - h0;
  const int64_t C = round_up(M), D = round_up(dh);
  float* q = take(scratch, H * D * C);     // [H, dh, C], scaled
  float* out = take(scratch, H * C * D);   // [H, C, D]
  float* largest = take(scratch, H * C);   // [H, C]
  float* total = take(scratch, H * C);     // [H, C]
  float* v = take(scratch, kPatchBlock * D);
  float* scores = take(scratch, kPatchBlock * C);  // [n, C], later the probabilities
  float* masks = take(scratch, kPatchBlock * C);   // [n, C]
  float* shrink = take(scratch, C);

  for (int64_t h = 0; h < H; ++h)
    pack_transposed(f.q.at(b, h0 + h) + c0 * f.q.row, f.q.row, f.q.column, M, dh, q + h * D * C, C, f.scale);
  for (int64_t i = 0; i < H * C; ++i) {
    largest[i] = -std::numeric_limits<float>::infinity();
    total[i] = 0.0f;
  }

  for (int64_t n0 = 0; n0 < N; n0 += kPatchBlock) {
    const int64_t n = n0 + kPatchBlock < N ? kPatchBlock : N - n0;
    for (int64_t h = 0; h < H; ++h) {
      const float* k = f.k.at(b, h0 + h) + n0 * f.k.row;
      pack(f.v.at(b, h0 + h) + n0 * f.v.row, f.v.row, f.v.column, n, dh, v, D, 1.0f);
      gemm(n, C, dh, k, f.k.row, f.k.column, q + h * D * C, C, scores, C, false);

      for (int64_t c = 0; c < C; c += kLanes) {
        float* column = scores + c;
        const Float before = load(largest + h * C + c);
        Float now = before;
        for (int64_t i = 0; i < n; ++i) {
          const Float s = load(column + i * C);
          now = s > now ? s : now;
          if (f.masks != nullptr) store(masks + i * C + c, h == 0 ? s : load(masks + i * C + c) + s);
        }
        const Float factor = exponential(before - now);
        Float sum = load(total + h * C + c) * factor;
        if (!f.dropout.active) {
          for (int64_t i = 0; i < n; ++i) {
            const Float p = exponential(load(column + i * C) - now);
            sum += p;
            store(column + i * C, p);
          }
        } else {
          for (int64_t i = 0; i < n; i += 4) {
            Word words[4];
            philox((n0 + i) / 4, c0 + c, b * f.size.heads + h0 + h, f.dropout, words);
            for (int64_t w = 0; w < 4 && i + w < n; ++w) {
              const Float p = exponential(load(column + (i + w) * C) - now);
              sum += p;
              store(column + (i + w) * C, keep(words[w], p, f.dropout));
            }
          }
        }
        store(largest + h * C + c, now);
        store(total + h * C + c, sum);
        store(shrink + c, factor);
      }

      float* o = out + h * C * D;
      if (n0 > 0)
        for (int64_t c = 0; c < M; ++c)
          for (int64_t d = 0; d < D; d += kLanes) store(o + c * D + d, load(o + c * D + d) * shrink[c]);
      gemm(M, D, n, scores, 1, C, v, D, o, D, n0 > 0);
    }
    if (f.masks != nullptr) {
      const float mean = 1.0f / static_cast<float>(f.size.heads);
      for (int64_t c = 0; c < M; ++c) {
        float* to = f.masks + (b * f.size.classes + c0 + c) * N + n0;
        for (int64_t i = 0; i < n; ++i) to[i] = masks[i * C + c] * mean;
      }
    }
  }

  const float keep_scale = f.dropout.active ? f.dropout.keep_scale : 1.0f;
  for (int64_t h = 0; h < H; ++h) {
    for (int64_t c = 0; c < M; ++c) {
      const float factor = keep_scale / total[h * C + c];
      float* to = f.output.at(b, h0 + h) + (c0 + c) * f.output.row;
      for (int64_t d = 0; d < dh; ++d) to[d * f.output.column] = out[(h * C + c) * D + d] * factor;
      f.lse[(b * f.size.heads + h0 + h) * f.size.classes + c0 + c] =
          largest[h * C + c] + std::log(total[h * C + c]);
    }
  }
}

int64_t backward_scratch(const Sizes& size) {
  const int64_t C = round_up(size.classes), D = round_up(size.width);
  return 2 * D * C + 3 * C * D + 2 * C + 4 * kPatchBlock * D + 2 * kPatchBlock * kClassBlock;
}

void backward(const Backward& g, int64_t b, int64_t h, float* scratch) {
  const int64_t dh = g.size.width, N = g.size.patches, M = g.size.classes;
  const int64_t C = round_up(M), D = round_up(dh);
  float* q = take(scratch, C * D);                // [C, D] scaled
  float* q_transposed = take(scratch, D * C);     // [dh, C] scaled
  float* grad = take(scratch, C * D);             // [C, D]
  float* grad_transposed = take(scratch, D * C);  // [dh, C]
  float* dq = take(scratch, C * D);
  float* lse = take(scratch, C);
  float* delta = take(scratch, C);  // sum over n of probability times its gradient = output . grad_output
  float* k = take(scratch, kPatchBlock * D);
  float* v = take(scratch, kPatchBlock * D);
  float* dk = take(scratch, kPatchBlock * D);
  float* dv = take(scratch, kPatchBlock * D);
  float* p = take(scratch, kPatchBlock * kClassBlock);   // probabilities, later as dropped
  float* ds = take(scratch, kPatchBlock * kClassBlock);  // gradient of the probabilities, later of the scores

  const float* q_rows = g.q.at(b, h);
  const float* grad_rows = g.grad_output.at(b, h);
  const float* out_rows = g.output.at(b, h);
  pack(q_rows, g.q.row, g.q.column, M, dh, q, D, g.scale);
  pack_transposed(q_rows, g.q.row, g.q.column, M, dh, q_transposed, C, g.scale);
  pack(grad_rows, g.grad_output.row, g.grad_output.column, M, dh, grad, D, 1.0f);
  pack_transposed(grad_rows, g.grad_output.row, g.grad_output.column, M, dh, grad_transposed, C, 1.0f);
  for (int64_t c = 0; c < C; ++c) {
    float sum = 0.0f;
    if (c < M)
      for (int64_t d = 0; d < dh; ++d) sum += grad[c * D + d] * out_rows[c * g.output.row + d * g.output.column];
    delta[c] = sum;
    lse[c] = c < M ? g.lse[(b * g.size.heads + h) * M + c] : 0.0f;
  }

  const float keep_scale = g.dropout.active ? g.dropout.keep_scale : 1.0f;
  for (int64_t n0 = 0; n0 < N; n0 += kPatchBlock) {
    const int64_t n = n0 + kPatchBlock < N ? kPatchBlock : N - n0;
    pack(g.k.at(b, h) + n0 * g.k.row, g.k.row, g.k.column, n, dh, k, D, 1.0f);
    pack(g.v.at(b, h) + n0 * g.v.row, g.v.row, g.v.column, n, dh, v, D, 1.0f);
    for (int64_t c0 = 0; c0 < M; c0 += kClassBlock) {
      const int64_t m = c0 + kClassBlock < M ? kClassBlock : M - c0, columns = round_up(m);
      gemm(n, columns, dh, k, D, 1, q_transposed + c0, C, p, kClassBlock, false);
      gemm(n, columns, dh, v, D, 1, grad_transposed + c0, C, ds, kClassBlock, false);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Float log_sum = load(lse + c0 + c), correction = load(delta + c0 + c);
        for (int64_t i = 0; i < n; i += 4) {
          Word words[4]{};
          if (g.dropout.active) philox((n0 + i) / 4, c0 + c, b * g.size.heads + h, g.dropout, words);
          for (int64_t w = 0; w < 4 && i + w < n; ++w) {
            const int64_t at = (i + w) * kClassBlock + c;
            const Float probability = exponential(load(p + at) - log_sum);
            Float gradient = load(ds + at), dropped = probability;
            if (g.dropout.active) {
              gradient = keep(words[w], gradient * keep_scale, g.dropout);
              dropped = keep(words[w], probability * keep_scale, g.dropout);
            }
            gradient = probability * (gradient - correction);
            if (g.grad_masks != nullptr)
              gradient += load(g.grad_masks + ((b * N + n0 + i + w) * C + c0 + c));
            store(p + at, dropped);
            store(ds + at, gradient);
          }
        }
      }
      gemm(n, D, m, p, kClassBlock, 1, grad + c0 * D, D, dv, D, c0 > 0);
      gemm(n, D, m, ds, kClassBlock, 1, q + c0 * D, D, dk, D, c0 > 0);
      gemm(m, D, n, ds, 1, kClassBlock, k, D, dq + c0 * D, D, n0 > 0);
    }
    for (int64_t i = 0; i < n; ++i) {
      float* to_k = g.dk.at(b, h) + (n0 + i) * g.dk.row;
      float* to_v = g.dv.at(b, h) + (n0 + i) * g.dv.row;
      for (int64_t d = 0; d < dh; ++d) {
        to_k[d * g.dk.column] = dk[i * D + d];
        to_v[d * g.dv.column] = dv[i * D + d];
      }
    }
  }
  for (int64_t c = 0; c < M; ++c)
    for (int64_t d = 0; d < dh; ++d)
      g.dq.at(b, h)[c * g.dq.row + d * g.dq.column] = dq[c * D + d] * g.scale;
}

}  // namespace

const Kernels ZS3FAST_ISA = {kLanes, forward_scratch, forward, backward_scratch, backward};

}  // namespace zs3fast::attention_to_mask

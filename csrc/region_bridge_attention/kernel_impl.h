// The kernels of kernel.h, compiled once an instruction set: the including file names it in ZS3FAST_ISA.
#include <cmath>

#include "bfloat16.h"
#include "region_bridge_attention/kernel.h"

namespace zs3fast::region_bridge_attention {
namespace {

template <class T>
inline float dot(const T* a, const T* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += widen(a[i]) * widen(b[i]);
  return sum;
}

template <class T>
inline void add(float* to, float factor, const T* x, int64_t n) {  // to += factor * x
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += factor * widen(x[i]);
}

template <class T>
inline void blend(T* to, float a, const T* x, float b, const T* y, int64_t n) {  // to = a * x + b * y; to may be x
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(to + i, a * widen(x[i]) + b * widen(y[i]));
}

inline int64_t patch_of(const Layout& at, int64_t region, int64_t cell) {
  const int64_t y = region / at.regions_w * at.wh + cell / at.ww, x = region % at.regions_w * at.ww + cell % at.ww;
  return y * at.grid_w + x;
}

template <class T>
void forward(const Forward<T>& f, int64_t region, float* scratch) {
  const Layout& at = f.layout;
  const int64_t cells = at.wh * at.ww, dh = at.dh;
  float *scores = scratch, *out = scratch + cells + 1;
  const int64_t own_q = at.prefix_q + at.patches + region, own_k = at.prefix_k + at.patches + region;
  const T *q = f.q[own_q], *k = f.k[own_k], *v = f.v[own_k];
  float largest = scores[cells] = at.scale * dot(q, k, dh);
  for (int64_t cell = 0; cell < cells; ++cell) {
    const int64_t patch = patch_of(at, region, cell), row = at.prefix_q + patch;
    scores[cell] = at.scale * dot(q, f.k[at.prefix_k + patch], dh);
    largest = scores[cell] > largest ? scores[cell] : largest;

    // one more key for the patch: probabilities before : of the region = e^lse : e^score
    const float before = f.lse[row], score = at.scale * dot(f.q[row], k, dh), lead = score - before;
    const float ratio = std::exp(-std::fabs(lead)), major = 1.0f / (1.0f + ratio), minor = ratio * major;
    const float keep = lead > 0.0f ? minor : major;
    blend<T>(f.output[row], keep, f.output[row], lead > 0.0f ? major : minor, v, dh);
    f.lse[row] = (lead > 0.0f ? score : before) + std::log1p(ratio);
  }

  float total = std::exp(scores[cells] - largest);
  for (int64_t i = 0; i < dh; ++i) out[i] = total * widen(v[i]);
  for (int64_t cell = 0; cell < cells; ++cell) {
    const float p = std::exp(scores[cell] - largest);
    total += p;
    add(out, p, f.v[at.prefix_k + patch_of(at, region, cell)], dh);
  }
  for (int64_t i = 0; i < dh; ++i) put(f.output[own_q] + i, out[i] / total);
  f.lse[own_q] = largest + std::log(total);
}

void backward(const Backward& g, int64_t region) {
  const Layout& at = g.layout;
  const int64_t cells = at.wh * at.ww, dh = at.dh;
  const int64_t own_q = at.prefix_q + at.patches + region, own_k = at.prefix_k + at.patches + region;
  const float *q = g.q[own_q], *k = g.k[own_k], *v = g.v[own_k], *grad = g.grad_output[own_q];
  float *dq = g.dq[own_q], *dk = g.dk[own_k], *dv = g.dv[own_k];
  const float lse = g.lse[own_q], delta = dot(grad, g.output[own_q], dh);  // delta = sum of p dp over the row

  const float p = std::exp(at.scale * dot(q, k, dh) - lse), ds = at.scale * p * (dot(grad, v, dh) - delta);
  for (int64_t i = 0; i < dh; ++i) {
    dq[i] = ds * k[i];
    dk[i] = ds * q[i];
    dv[i] = p * grad[i];
  }
  for (int64_t cell = 0; cell < cells; ++cell) {
    const int64_t patch = patch_of(at, region, cell), row = at.prefix_q + patch, key = at.prefix_k + patch;
    {  // the region's view of the patch
      const float *patch_k = g.k[key], *patch_v = g.v[key];
      const float p = std::exp(at.scale * dot(q, patch_k, dh) - lse);
      const float ds = at.scale * p * (dot(grad, patch_v, dh) - delta);
      add(dq, ds, patch_k, dh);
      blend<float>(g.dk[key], 1.0f, g.block_dk[key], ds, q, dh);
      blend<float>(g.dv[key], 1.0f, g.block_dv[key], p, grad, dh);
    }
    {  // the patch's view of the region
      const float *patch_q = g.q[row], *patch_grad = g.grad_output[row];
      const float p = std::exp(at.scale * dot(patch_q, k, dh) - g.lse[row]);
      const float ds = at.scale * p * (dot(patch_grad, v, dh) - dot(patch_grad, g.output[row], dh));
      blend<float>(g.dq[row], 1.0f, g.block_dq[row], ds, k, dh);
      add(dk, ds, patch_q, dh);
      add(dv, p, patch_grad, dh);
    }
  }
}

}  // namespace

const Kernels ZS3FAST_ISA = {forward<float>, forward<uint16_t>, backward};

}  // namespace zs3fast::region_bridge_attention

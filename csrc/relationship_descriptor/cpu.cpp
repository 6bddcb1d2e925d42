// relationship_descriptor, CPU: out[r, c] = W1 (text[c] * visual[r]) + term[c], with term = W2 text + bias if not given.
//
// The product text * visual exists for one chunk of visual rows at a time, a few MB that stay in cache between being
// written and being read by the matrix product, however many region tokens there are.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "checks.h"

namespace zs3fast {
namespace {

constexpr char kOp[] = "relationship_descriptor";

void check(const at::Tensor& text, const at::Tensor& visual, const at::Tensor& weight) {
  check_floats(kOp, "text", text, at::kCPU, {kAny, kAny});
  const int64_t D = text.size(1);
  TORCH_CHECK_VALUE(D >= 1, kOp, ": text: expected [C, D >= 1], got ", text.sizes());
  if (visual.dim() == 3) {
    check_floats(kOp, "visual", visual, at::kCPU, {kAny, kAny, D});
  } else {
    check_floats(kOp, "visual", visual, at::kCPU, {kAny, D});
  }
  check_floats(kOp, "weight", weight, at::kCPU, {kAny, 2 * D});
}

constexpr int64_t kChunkRows = 1024;  // rows of the matrix product at a time: 2 MB at D = 512

// Visual rows a chunk holds. One that has more than kChunkRows classes is a chunk of its own.
int64_t chunk_of(int64_t classes) { return std::max<int64_t>(1, kChunkRows / std::max<int64_t>(classes, 1)); }

void hadamard(const at::Tensor& text, const at::Tensor& visual, float* out) {  // [R, C, D], rows of text and visual dense
  const int64_t C = text.size(0), D = text.size(1), ldt = text.stride(0), ldv = visual.stride(0);
  const float *t = text.data_ptr<float>(), *v = visual.data_ptr<float>();
  at::parallel_for(0, visual.size(0) * C, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *a = t + i % C * ldt, *b = v + i / C * ldv;
      float* o = out + i * D;
      for (int64_t d = 0; d < D; ++d) o[d] = a[d] * b[d];
    }
  });
}

at::Tensor dense_rows(const at::Tensor& x) { return x.stride(1) == 1 ? x : x.contiguous(); }

at::Tensor relationship_descriptor(const at::Tensor& text_in, const at::Tensor& visual_in, const at::Tensor& weight,
                                   const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& term_in) {
  check(text_in, visual_in, weight);
  const int64_t C = text_in.size(0), D = text_in.size(1), wide = weight.size(0);
  if (bias.has_value()) check_floats(kOp, "bias", *bias, at::kCPU, {wide});
  if (term_in.has_value()) check_floats(kOp, "text_term", *term_in, at::kCPU, {C, wide});
  const auto text = dense_rows(text_in), visual = dense_rows(visual_in.reshape({-1, D}));
  const int64_t R = visual.size(0);
  at::Tensor term;
  if (term_in.has_value()) {
    term = *term_in;
  } else {
    const auto w2 = weight.narrow(1, D, D).t();
    term = bias.has_value() ? at::addmm(*bias, text, w2) : at::mm(text, w2);
  }
  auto shape = visual_in.sizes().vec();
  shape.back() = C;
  shape.push_back(wide);
  auto out = at::empty(shape, text.options());
  if (out.numel() == 0) return out;

  const auto w1 = weight.narrow(1, 0, D).t();
  auto rows = out.view({R, C, wide});
  const int64_t chunk = chunk_of(C);
  auto product = at::empty({std::min(chunk, R) * C, D}, text.options());
  for (int64_t r = 0; r < R; r += chunk) {
    const int64_t n = std::min(chunk, R - r);
    hadamard(text, visual.narrow(0, r, n), product.data_ptr<float>());
    auto part = rows.narrow(0, r, n);
    part.copy_(term);
    part.view({n * C, wide}).addmm_(product.narrow(0, 0, n * C), w1);
  }
  return out;
}

// dtext[c] += sum_r H[r, c] * visual[r] and dvisual[r] = sum_c H[r, c] * text[c], in one pass over H [R, C, D].
void contract(const at::Tensor& H, const at::Tensor& text, const at::Tensor& visual, at::Tensor& dtext,
              at::Tensor& dvisual) {
  const int64_t R = visual.size(0), C = text.size(0), D = text.size(1), ldt = text.stride(0), ldv = visual.stride(0);
  const float *h = H.data_ptr<float>(), *t = text.data_ptr<float>(), *v = visual.data_ptr<float>();
  float *dt = dtext.data_ptr<float>(), *dv = dvisual.data_ptr<float>();
  at::parallel_for(0, D, 64, [&](int64_t begin, int64_t end) {  // columns are independent: no two threads share a sum
    for (int64_t r = 0; r < R; ++r) {
      float* to_visual = dv + r * D;
      for (int64_t d = begin; d < end; ++d) to_visual[d] = 0.0f;
      for (int64_t c = 0; c < C; ++c) {
        const float *row = h + (r * C + c) * D, *a = t + c * ldt, *b = v + r * ldv;
        float* to_text = dt + c * D;
#pragma GCC ivdep
        for (int64_t d = begin; d < end; ++d) {
          to_text[d] += row[d] * b[d];
          to_visual[d] += row[d] * a[d];
        }
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relationship_descriptor_backward(
    const at::Tensor& grad_in, const at::Tensor& text_in, const at::Tensor& visual_in, const at::Tensor& weight,
    bool has_text_term, bool need_text, bool need_visual, bool need_weight) {
  check(text_in, visual_in, weight);
  auto shape = visual_in.sizes().vec();
  shape.back() = text_in.size(0);
  shape.push_back(weight.size(0));
  TORCH_CHECK_VALUE(grad_in.sizes() == at::IntArrayRef(shape), kOp, ": grad: expected ", shape, ", got ", grad_in.sizes());
  const int64_t C = text_in.size(0), D = text_in.size(1), wide = weight.size(0);
  const auto text = dense_rows(text_in), visual = dense_rows(visual_in.reshape({-1, D}));
  const int64_t R = visual.size(0), chunk = chunk_of(C);
  const auto grad = grad_in.reshape({R, C, wide});
  const auto w1 = weight.narrow(1, 0, D);
  const auto options = text.options();

  auto dterm = at::zeros({C, wide}, options);
  if (grad.numel() > 0) dterm = grad.sum(0);
  const bool need_tokens = need_text || need_visual;  // both come from one pass over H
  auto dtext = need_tokens ? at::zeros({C, D}, options) : at::empty({0}, options);
  auto dvisual = need_tokens ? at::zeros({R, D}, options) : at::empty({0}, options);
  auto dweight = need_weight ? at::zeros({wide, 2 * D}, options) : at::empty({0}, options);
  if (need_weight || need_tokens) {
    const int64_t largest = C == 0 ? 0 : std::min(chunk, R) * C;
    auto buffer = at::empty({largest, D}, options);
    for (int64_t r = 0; r < R && C > 0; r += chunk) {
      const int64_t n = std::min(chunk, R - r);
      const auto part = grad.narrow(0, r, n).reshape({n * C, wide}), seen = visual.narrow(0, r, n);
      auto rows = buffer.narrow(0, 0, n * C);
      if (need_tokens) {
        at::mm_out(rows, part, w1);
        auto dseen = dvisual.narrow(0, r, n);
        contract(rows, text, seen, dtext, dseen);
      }
      if (need_weight) {
        hadamard(text, seen, rows.data_ptr<float>());
        dweight.narrow(1, 0, D).addmm_(part.t(), rows);
      }
    }
  }
  if (!has_text_term) {
    if (need_text) dtext.addmm_(dterm, weight.narrow(1, D, D));
    if (need_weight) dweight.narrow(1, D, D).addmm_(dterm.t(), text);
  }
  if (!need_text) dtext = at::empty({0}, options);
  dvisual = need_visual ? dvisual.reshape(visual_in.sizes()) : at::empty({0}, options);
  return {dtext, dvisual, dweight, dterm};
}

}  // namespace
}  // namespace zs3fast

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) {
  m.impl("relationship_descriptor", zs3fast::relationship_descriptor);
  m.impl("relationship_descriptor_backward", zs3fast::relationship_descriptor_backward);
}

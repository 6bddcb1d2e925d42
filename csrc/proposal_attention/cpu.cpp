// proposal_attention, CPU: lists of kept patches from the bits, once an image, and a task a head (kernel.h).
//
// Tried and left out: copying a head's k and v together before its rows read them. Where few patches are kept the copy
// costs more than the rows; where all are, it makes no difference.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "checks.h"
#include "heads.h"
#include "isa.h"
#include "proposal_attention/kernel.h"
#include "scratch.h"

namespace zs3fast::proposal_attention {
namespace {

// A pair of a sparse row costs as much as this many of a dense tile (measured with AVX-512: they meet at 55 to 60 %).
constexpr double kSparseCost = 1.8;

const Kernels& kernels() { return ZS3FAST_FOR_ISA(); }

// The lists of one image; `tiles` point into them.
class Plan {
 public:
  Plan(const uint32_t* bits, int64_t proposals, int64_t patches, bool may_be_dense)
      : bits_(bits), patches_(patches), may_be_dense_(may_be_dense) {
    const int64_t count = (proposals + kTile - 1) / kTile;
    lists_.resize(count);
    tiles_.resize(count);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t first = t * kTile, rows = std::min(kTile, proposals - first);
      fill(first, rows, lists_[t], tiles_[t]);
      tiles_[t].pairs_before = sparse_pairs_;
      if (!tiles_[t].dense) sparse_pairs_ += lists_[t].begin[rows];
    }
  }

  const std::vector<Tile>& tiles() const { return tiles_; }
  int64_t sparse_pairs() const { return sparse_pairs_; }

  // The sparse pairs patch by patch.
  ByPatch by_patch() {
    starts_.assign(patches_ + 1, 0);
    rows_.resize(sparse_pairs_);
    pair_.resize(sparse_pairs_);
    for_each_sparse_pair([&](int32_t patch, int64_t, int64_t) { ++starts_[patch + 1]; });
    for (int64_t n = 0; n < patches_; ++n) starts_[n + 1] += starts_[n];
    std::vector<int32_t> next(starts_.begin(), starts_.end() - 1);
    for_each_sparse_pair([&](int32_t patch, int64_t row, int64_t pair) {
      const int32_t at = next[patch]++;
      rows_[at] = static_cast<int32_t>(row);
      pair_[at] = static_cast<int32_t>(pair);
    });
    return {sparse_pairs_, starts_.data(), rows_.data(), pair_.data()};
  }

 private:
  struct Lists {
    std::vector<int32_t> patches, begin;
    std::vector<uint16_t> keeps;
  };

  uint32_t word(int64_t row, int64_t w) const {
    const int64_t inside = std::min<int64_t>(32, patches_ - 32 * w);  // bits behind the last patch are ignored
    return bits_[row * ((patches_ + 31) / 32) + w] & (0xffffffffu >> (32 - inside));
  }

  void fill(int64_t first, int64_t rows, Lists& lists, Tile& tile) {
    const int64_t words = (patches_ + 31) / 32;
    int64_t pairs = 0, united = 0;
    std::vector<uint32_t> any(words, 0);
    for (int64_t w = 0; w < words; ++w) {
      for (int64_t r = 0; r < rows; ++r) {
        pairs += std::popcount(word(first + r, w));
        any[w] |= word(first + r, w);
      }
      united += std::popcount(any[w]);
    }
    tile = {first, rows, nullptr, may_be_dense_ && kSparseCost * pairs > kTile * united, united, nullptr, nullptr, 0};
    if (tile.dense) {
      lists.patches.reserve(united);
      for (int64_t w = 0; w < words; ++w) {
        const auto start = static_cast<int64_t>(lists.patches.size());
        for (uint32_t left = any[w]; left != 0; left &= left - 1)
          lists.patches.push_back(static_cast<int32_t>(32 * w + std::countr_zero(left)));
        lists.keeps.resize(lists.patches.size(), 0);
        for (int64_t r = 0; r < rows; ++r) {
          const uint32_t row = word(first + r, w);
          for (auto i = start; i < static_cast<int64_t>(lists.patches.size()); ++i)
            lists.keeps[i] |= static_cast<uint16_t>((row >> (lists.patches[i] % 32) & 1u) << r);
        }
      }
    } else {
      lists.patches.reserve(pairs);
      for (int64_t r = 0; r < rows; ++r) {
        lists.begin.push_back(static_cast<int32_t>(lists.patches.size()));
        for (int64_t w = 0; w < words; ++w)
          for (uint32_t left = word(first + r, w); left != 0; left &= left - 1)
            lists.patches.push_back(static_cast<int32_t>(32 * w + std::countr_zero(left)));
      }
      lists.begin.push_back(static_cast<int32_t>(lists.patches.size()));
    }
    tile.patches = lists.patches.data();
    tile.keeps = lists.keeps.data();
    tile.begin = lists.begin.data();
  }

  template <class Visit>
  void for_each_sparse_pair(const Visit& visit) const {
    for (const Tile& tile : tiles_) {
      if (tile.dense) continue;
      for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t i = tile.begin[r]; i < tile.begin[r + 1]; ++i)
          visit(tile.patches[i], tile.first + r, tile.pairs_before + i);
    }
  }

  const uint32_t* bits_;
  int64_t patches_, sparse_pairs_ = 0;
  bool may_be_dense_;
  std::vector<Lists> lists_;
  std::vector<Tile> tiles_;
  std::vector<int32_t> starts_, rows_, pair_;
};

std::vector<std::unique_ptr<Plan>> plans_of(const at::Tensor& bits, int64_t patches, bool may_be_dense) {
  std::vector<std::unique_ptr<Plan>> plans(bits.size(0));
  const auto words = bits.contiguous();
  const auto* data = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  at::parallel_for(0, bits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      plans[b] = std::make_unique<Plan>(data + b * bits.size(1) * bits.size(2), bits.size(1), patches, may_be_dense);
  });
  return plans;
}

constexpr char kOp[] = "proposal_attention";

void check(const at::Tensor& q, const at::Tensor& k_self, const at::Tensor& v_self, const at::Tensor& k,
           const at::Tensor& v, const at::Tensor& bits) {
  check_floats(kOp, "q", q, at::kCPU, {kAny, kAny, kAny, kAny});
  const int64_t B = q.size(0), heads = q.size(1), Nq = q.size(2), dh = q.size(3), N = k.dim() == 4 ? k.size(2) : kAny;
  check_floats(kOp, "k_self", k_self, at::kCPU, {B, heads, Nq, dh});
  check_floats(kOp, "v_self", v_self, at::kCPU, {B, heads, Nq, dh});
  check_floats(kOp, "k", k, at::kCPU, {B, heads, N, dh});
  check_floats(kOp, "v", v, at::kCPU, {B, heads, N, dh});
  check_tensor(kOp, "bits", bits, at::kCPU, {B, Nq, (N + 31) / 32});
  TORCH_CHECK_TYPE(bits.scalar_type() == at::kInt, kOp, ": bits: expected int32, got ", bits.scalar_type());
  TORCH_CHECK_VALUE(heads >= 1 && dh >= 1, kOp, ": heads and dh: expected at least 1, got q ", q.sizes());
  TORCH_CHECK_VALUE(N <= kMaxPixels && Nq <= kMaxPixels && (N + 32) * (Nq + 16) <= kMaxPixels, kOp,
                    ": more pairs of proposals and patches than an int32 counts, got q ", q.sizes(), " and k ", k.sizes());
}

template <class T>
Rows<T> head(const at::Tensor& x, int64_t b, int64_t h) {
  return {x.data_ptr<float>() + b * x.stride(0) + h * x.stride(1), x.stride(2)};
}

// What was computed in whole vectors, in the width and type that were asked for.
at::Tensor finish(const at::Tensor& x, const at::Tensor& like) {
  if (x.size(3) == like.size(3)) return x.to(like.scalar_type());
  auto narrow = empty_heads(like, like.size(3));
  return narrow.copy_(x.narrow(3, 0, like.size(3)));
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q_in, const at::Tensor& k_self_in,
                                           const at::Tensor& v_self_in, const at::Tensor& k_in, const at::Tensor& v_in,
                                           const at::Tensor& bits, double scale) {
  check(q_in, k_self_in, v_self_in, k_in, v_in, bits);
  const auto q = rows_of(q_in, kPad), k_self = rows_of(k_self_in, kPad), v_self = rows_of(v_self_in, kPad);
  const auto k = rows_of(k_in, kPad), v = rows_of(v_in, kPad);
  const int64_t batch = q.size(0), heads = q.size(1), proposals = q.size(2), patches = k.size(2), dh = q.size(3);
  auto output = empty_heads(q, dh);
  auto lse = at::empty({batch, heads, proposals}, q.options());
  if (lse.numel() == 0) return {finish(output, q_in), lse};

  // a dense tile multiplies what its rows do not keep by 0, which leaves NaN and infinities standing
  const auto plans = plans_of(bits, patches, std::isfinite(v.sum().item<float>()));
  const Kernels& kernel = kernels();
  const int64_t tiles = (proposals + kTile - 1) / kTile;
  // heads are enough tasks, unless the threads are many and the images few
  const int64_t parts = std::clamp<int64_t>((at::get_num_threads() + batch * heads - 1) / (batch * heads), 1, tiles);
  at::parallel_for(0, batch * heads * parts, 1, [&](int64_t begin, int64_t end) {
    ScratchArena scratch = ScratchArena::of_floats(kernel.forward_scratch(patches, dh));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts / heads, h = i / parts % heads, part = i % parts;
      const Plan& plan = *plans[b];
      const int64_t first = part * tiles / parts, last = (part + 1) * tiles / parts;
      const Forward f{patches,
                      dh,
                      static_cast<float>(scale),
                      head<const float>(q, b, h),
                      head<const float>(k_self, b, h),
                      head<const float>(v_self, b, h),
                      head<const float>(k, b, h),
                      head<const float>(v, b, h),
                      head<float>(output, b, h),
                      lse.data_ptr<float>() + (b * heads + h) * proposals};
      kernel.forward(f, plan.tiles().data() + first, last - first, scratch.floats());
    }
  });
  return {finish(output, q_in), lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_output_in, const at::Tensor& q_in, const at::Tensor& k_self_in, const at::Tensor& v_self_in,
    const at::Tensor& k_in, const at::Tensor& v_in, const at::Tensor& bits, const at::Tensor& output_in,
    const at::Tensor& lse_in, double scale) {
  check(q_in, k_self_in, v_self_in, k_in, v_in, bits);
  check_floats(kOp, "grad_output", grad_output_in, at::kCPU, {q_in.size(0), q_in.size(1), q_in.size(2), q_in.size(3)});
  check_floats(kOp, "output", output_in, at::kCPU, {q_in.size(0), q_in.size(1), q_in.size(2), q_in.size(3)});
  check_floats(kOp, "lse", lse_in, at::kCPU, {q_in.size(0), q_in.size(1), q_in.size(2)});
  const auto q = rows_of(q_in, kPad), k_self = rows_of(k_self_in, kPad), v_self = rows_of(v_self_in, kPad);
  const auto k = rows_of(k_in, kPad), v = rows_of(v_in, kPad);
  const auto grad_output = rows_of(grad_output_in, kPad), output = rows_of(output_in, kPad), lse = lse_in.contiguous();
  const int64_t batch = q.size(0), heads = q.size(1), proposals = q.size(2), patches = k.size(2), dh = q.size(3);
  auto dq = empty_heads(q, dh), dk_self = empty_heads(q, dh), dv_self = empty_heads(q, dh);
  auto dk = empty_heads(k, dh), dv = empty_heads(k, dh);
  if (batch != 0) {
    const auto plans = plans_of(bits, patches, true);
    std::vector<ByPatch> by_patch(batch);
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) by_patch[b] = plans[b]->by_patch();
    });
    int64_t most_pairs = 0;
    for (const auto& plan : plans) most_pairs = std::max(most_pairs, plan->sparse_pairs());
    const Kernels& kernel = kernels();
    at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
      ScratchArena scratch = ScratchArena::of_floats(kernel.backward_scratch(patches, dh, most_pairs));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / heads, h = i % heads;
        const Backward g{patches,
                         dh,
                         static_cast<float>(scale),
                         head<const float>(grad_output, b, h),
                         head<const float>(q, b, h),
                         head<const float>(k_self, b, h),
                         head<const float>(v_self, b, h),
                         head<const float>(k, b, h),
                         head<const float>(v, b, h),
                         head<const float>(output, b, h),
                         lse.data_ptr<float>() + i * proposals,
                         head<float>(dq, b, h),
                         head<float>(dk_self, b, h),
                         head<float>(dv_self, b, h),
                         head<float>(dk, b, h),
                         head<float>(dv, b, h)};
        const auto& tiles = plans[b]->tiles();
        kernel.backward(g, tiles.data(), static_cast<int64_t>(tiles.size()), by_patch[b], scratch.floats());
      }
    });
  }
  return {finish(dq, q_in), finish(dk_self, k_self_in), finish(dv_self, v_self_in), finish(dk, k_in), finish(dv, v_in)};
}

}  // namespace
}  // namespace zs3fast::proposal_attention

TORCH_LIBRARY_IMPL(zs3fast_cpp, CPU, m) {
  m.impl("proposal_attention", zs3fast::proposal_attention::forward);
  m.impl("proposal_attention_backward", zs3fast::proposal_attention::backward);
}

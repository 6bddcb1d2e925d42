// masks_to_labels on the GPU: one window at its native size, the best class. Neither torch nor CUDA headers here: tests
// run this very code on the CPU.
//
// A block takes 128 columns of pixels of one band (the rows between two rows of patches), a thread 8 pixels of a
// column. The patches that the block reads, of all classes, lie in shared memory as pairs (row above, row below): a
// class costs a thread two 8-byte reads, one interpolation across for all 8 pixels and one down for each.
//
// Scores grow with logits inside the seen and inside the unseen group. So a warp first leaves out the classes whose
// largest patch is below another's smallest in its group; over the others a pixel takes two walks: the largest logit of
// each group, and then the scores, exact, of the classes within rounding of it, of which there is one but for ties. No
// class is left out whose score can be equal, so ties go to the lowest index as they do in argmax of all scores.
//
// Prediction for an H100, C = 171, 32 x 32 -> 512 x 512, int64 labels, B = 1: 4.5e7 pixels and classes. Both walks
// together are 12 instructions (counted in the sm_90a code), over all classes 5.4e8 at 28e12 a second: 19 us (the
// Triton kernel: some 35, two exponential and division); over the 20 that maps of real images leave, with 1,500
// instructions a thread for bounds and limits, 4 us, if 8 warps a multiprocessor hide their latency. Memory: 0.7 MB of
// logits from L2, 2.1 MB of labels out, 1 us. At less than 8 pixels a patch, lanes idle by as much. Not yet run on a
// GPU.
#pragma once

#include "cuda/bands.h"
#include "cuda/block.h"
#include "cuda/element.h"

namespace zs3fast::masks_to_labels {

constexpr int kThreads = 128;   // columns of a block
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 8;        // pixels of a thread, one below the other
constexpr int kMaxClasses = 8192;
constexpr int64_t kMaxShared = 96 * 1024;  // two blocks a multiprocessor of an H100, one of an A100

// Maps [B, channels, h, w] with strides in elements.
struct CudaMaps {
  const void* data;
  int64_t row_stride, channel_stride, y_stride, x_stride;
  cuda::Axis rows, columns;
};

struct CudaRequest {
  CudaMaps masks, trusty;
  cuda::Element element;
  int32_t images, classes, height, width;
  float seen_offset;
  bool weigh_seen, weigh_unseen;  // false without trusty maps
  void* labels;                   // [B, height, width]
  int32_t label_bytes;
  float* scores;        // like labels, or null
  int64_t* nan_count;   // [B], or null
  int32_t chunks;       // blocks that share a band, from plan()
  int32_t span;         // columns of patches that a block reads at most, 0: straight from memory
  uint32_t seen[kMaxClasses / 32];  // a bit a class: an argument, so no table is copied to the device

  ZS3FAST_HD bool weighted() const { return weigh_seen || weigh_unseen; }
  ZS3FAST_HD bool is_seen(int32_t c) const { return seen[c / 32] >> (c % 32) & 1; }
  ZS3FAST_HD float offset_of(bool is_seen) const { return is_seen ? seen_offset : 0.0f; }
};

// A column of patches of one class, the two rows around the band.
struct alignas(8) Pair {
  float above, below;
};

namespace gpu {

// Where pixel x reads: two neighbours and the weight of the second. At the same size the mean of a value with itself,
// exact for infinities too.
struct Source {
  int32_t low, high;
  float weight;
};

ZS3FAST_HD Source source(const cuda::Axis& axis, int32_t x) {
  if (axis.points == axis.pixels) return {x, x, 0.5f};
  const int32_t at = cuda::at_least((2 * x + 1) * axis.points - axis.pixels, 0), low = at / (2 * axis.pixels);
  const float weight = static_cast<float>(at - low * 2 * axis.pixels) / static_cast<float>(2 * axis.pixels);
  return {low, cuda::at_most(low + 1, axis.points - 1), weight};
}

// The weight alone, of a pixel whose `low` is known.
ZS3FAST_HD float weight_above(const cuda::Axis& axis, int32_t low, int32_t x) {
  if (axis.points == axis.pixels) return 0.5f;
  const int32_t at = cuda::at_least((2 * x + 1) * axis.points - axis.pixels, 0);
  return static_cast<float>(at - low * 2 * axis.pixels) * (0.5f / static_cast<float>(axis.pixels));
}

inline int64_t shared_bytes(const CudaRequest& q) {
  return q.span ? q.classes * (q.span * static_cast<int64_t>(sizeof(Pair)) + kWarps * sizeof(uint16_t)) : 0;
}

inline void plan(CudaRequest& q) {
  q.chunks = cuda::ceil_div(cuda::longest_band(q.masks.rows), kRows);
  q.span = 0;
  for (int32_t x = 0; x < q.width; x += kThreads) {
    const int32_t last = cuda::at_most(x + kThreads, q.width) - 1;
    const int32_t span = source(q.masks.columns, last).high - source(q.masks.columns, x).low + 1;
    q.span = cuda::at_least(q.span, span);
  }
  if (shared_bytes(q) > kMaxShared) q.span = 0;
}

ZS3FAST_HD float mix(float low, float high, float weight) { return low * (1.0f - weight) + high * weight; }

ZS3FAST_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Larger, NaN being the largest: on equality the class that came first stays.
ZS3FAST_HD bool beats(float a, float b) { return a > b || (a != a && b == b); }

// What a score can be wrong by, relative to its terms.
constexpr float kRounding = 2e-6f;

// A logit below this has a strictly smaller score than `logit`, rounding included, however flat the sigmoid or coarse
// the subtraction.
ZS3FAST_HD float threshold_of(float logit, float offset) {
  const float x = fminf(logit, 12.0f), power = cuda::fast_exp2(x * 1.44269504f), size = fabsf(offset);
  const float away = kRounding * (1.0f + (1.0f + size) * power + 2.0f * size * cuda::fast_reciprocal(power));
  return x < -40.0f || !(away <= 1.0f) ? -cuda::kInfinity : x - away;
}

// A weight under which products of scores may be equal where scores are not.
ZS3FAST_HD bool may_tie(float weight) { return !(weight >= 1e-18f); }

// Weights of a score, from P(pixel is unseen).
ZS3FAST_HD float weight_of(const CudaRequest& q, float unseen, bool is_seen) {
  return is_seen ? (q.weigh_seen ? 1.0f - unseen : 1.0f) : (q.weigh_unseen ? unseen : 1.0f);
}

struct Rows {
  float x[kRows];
};

// What a block works on, the same for all of its threads.
struct Place {
  int32_t image, y, rows, x;  // first pixel; rows of pixels, 0: none
  int32_t above, below;       // rows of patches
  int32_t first_column;       // of patches, in shared memory
};

template <class Block>
ZS3FAST_BODY Place place_of(const Block& block, const CudaRequest& q) {
  const cuda::Axis& rows = q.masks.rows;
  const int32_t band = block.y() / q.chunks, y = cuda::first_pixel(rows, band) + block.y() % q.chunks * kRows;
  const int32_t count = cuda::at_most(cuda::first_pixel(rows, band + 1) - y, kRows), x = block.x() * kThreads;
  if (count <= 0) return {block.z(), y, 0, x, 0, 0, 0};
  const Source source_y = source(rows, y);
  return {block.z(), y, count, x, source_y.low, source_y.high, source(q.masks.columns, x).low};
}

// Reads the patches of any class, from shared memory (kStaged) or from where they lie.
template <bool kStaged>
struct Patches {
  const CudaRequest& q;
  const Place& at;
  const Pair* shared;

  ZS3FAST_HD Pair from_memory(int32_t c, int32_t column) const {
    const int64_t base = at.image * q.masks.row_stride + c * q.masks.channel_stride + column * q.masks.x_stride;
    return {cuda::read(q.masks.data, q.element, base + at.above * q.masks.y_stride),
            cuda::read(q.masks.data, q.element, base + at.below * q.masks.y_stride)};
  }
  ZS3FAST_HD Pair operator()(int32_t c, int32_t column) const {
    if constexpr (kStaged) return shared[c * q.span + column - at.first_column];
    return from_memory(c, column);
  }
};

// The least and the greatest value that a class has anywhere in some columns, rounding included; everything is possible
// where a patch is not finite.
struct Bounds {
  float least, greatest;
};

template <bool kStaged>
ZS3FAST_HD Bounds bounds_of(const Patches<kStaged>& patches, int32_t c, int32_t first, int32_t last) {
  float least = cuda::kInfinity, greatest = -cuda::kInfinity, zero = 0.0f;
  for (int32_t column = first; column <= last; ++column) {
    const Pair pair = patches(c, column);
    least = fminf(least, fminf(pair.above, pair.below));
    greatest = fmaxf(greatest, fmaxf(pair.above, pair.below));
    zero += pair.above * 0.0f + pair.below * 0.0f;  // NaN if one is not finite
  }
  if (zero != 0.0f) return {-cuda::kInfinity, cuda::kInfinity};
  const float slack = 1e-6f * fmaxf(fabsf(least), fabsf(greatest));
  return {least - slack, greatest + slack};
}

// The value of a class at the 8 pixels of a thread.
ZS3FAST_HD Rows values_of(const Pair& left, const Pair& right, float weight, const Rows& down) {
  const float above = mix(left.above, right.above, weight), below = mix(left.below, right.below, weight);
  Rows v;
  ZS3FAST_UNROLL
  for (int r = 0; r < kRows; ++r) v.x[r] = mix(above, below, down.x[r]);
  return v;
}

ZS3FAST_HD void raise(Rows& greatest, const Rows& v) {
  ZS3FAST_UNROLL
  for (int r = 0; r < kRows; ++r) greatest.x[r] = fmaxf(greatest.x[r], v.x[r]);  // a NaN is passed over
}

// P(pixel is unseen) at the 8 pixels of a thread.
ZS3FAST_HD Rows unseen_of(const CudaRequest& q, const Place& at, int32_t x) {
  Rows unseen;
  const Source columns = source(q.trusty.columns, x);
  const int64_t base = at.image * q.trusty.row_stride;
  const int64_t left = base + columns.low * q.trusty.x_stride, right = base + columns.high * q.trusty.x_stride;
  const auto across = [&](int32_t y) {
    return mix(cuda::read(q.trusty.data, q.element, left + y * q.trusty.y_stride),
               cuda::read(q.trusty.data, q.element, right + y * q.trusty.y_stride), columns.weight);
  };
  ZS3FAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const Source rows = source(q.trusty.rows, at.y + cuda::at_most(r, at.rows - 1));
    unseen.x[r] = sigmoid(mix(across(rows.low), across(rows.high), rows.weight));
  }
  return unseen;
}

struct Best {
  Rows score;
  int32_t label[kRows];
};

// A class in a list: its index, and whether it is seen in the highest bit.
struct Candidate {
  int32_t c;
  bool is_seen;
};

ZS3FAST_HD uint16_t packed(int32_t c, bool is_seen) { return static_cast<uint16_t>(c | (is_seen ? 0x8000 : 0)); }
ZS3FAST_HD Candidate unpacked(uint16_t entry) { return {entry & 0x7fff, (entry & 0x8000) != 0}; }

// Takes the class where its score is the best so far; only pixels whose value reaches their group's limit are asked.
ZS3FAST_HD void challenge(const CudaRequest& q, const Candidate& candidate, const Rows& v, const Rows& seen_limit,
                          const Rows& unseen_limit, const Rows& unseen, Best& best) {
  const auto [c, is_seen] = candidate;
  bool any = false;
  if (is_seen) {  // the same for the whole warp
    ZS3FAST_UNROLL
    for (int r = 0; r < kRows; ++r) any |= !(v.x[r] < seen_limit.x[r]);
  } else {
    ZS3FAST_UNROLL
    for (int r = 0; r < kRows; ++r) any |= !(v.x[r] < unseen_limit.x[r]);
  }
  if (!any) return;
  ZS3FAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (v.x[r] < (is_seen ? seen_limit.x[r] : unseen_limit.x[r])) continue;
    float score = sigmoid(v.x[r]) - q.offset_of(is_seen);
    if (q.weighted()) score *= weight_of(q, unseen.x[r], is_seen);
    if (beats(score, best.score.x[r])) best.score.x[r] = score, best.label[r] = c;
  }
}

ZS3FAST_HD void store_label(void* labels, int32_t bytes, int64_t at, int32_t label) {
  switch (bytes) {
    case 8: static_cast<int64_t*>(labels)[at] = label; break;
    case 4: static_cast<int32_t*>(labels)[at] = label; break;
    case 2: static_cast<int16_t*>(labels)[at] = static_cast<int16_t>(label); break;
    default: static_cast<uint8_t*>(labels)[at] = static_cast<uint8_t>(label);
  }
}

// Writes the classes that can win in a warp's columns, in order, to that warp's list; the number of them to `count`.
template <class Block>
ZS3FAST_BODY void find_candidates(const Block& block, const CudaRequest& q, const Place& at,
                                  const Patches<true>& patches, cuda::PerThread<Block, Rows>& unseen, uint16_t* lists,
                                  cuda::PerThread<Block, int32_t>& count) {
  // per thread: the first and the last column of patches of its warp
  const auto read_by = [&](int32_t x) { return source(q.masks.columns, cuda::at_most(x, q.width - 1)); };
  const auto first = [&](int thread) { return read_by(at.x + thread / 32 * 32).low; };
  const auto last = [&](int thread) { return read_by(at.x + thread / 32 * 32 + 31).high; };
  cuda::PerThread<Block, float> seen_bound(block), unseen_bound(block), seen_ties(block), unseen_ties(block);
  block.alone([&](int thread) {
    seen_bound[thread] = unseen_bound[thread] = -cuda::kInfinity;
    for (int32_t c = thread % 32; c < q.classes; c += 32) {
      float& bound = q.is_seen(c) ? seen_bound[thread] : unseen_bound[thread];
      bound = fmaxf(bound, bounds_of(patches, c, first(thread), last(thread)).least);
    }
    seen_ties[thread] = unseen_ties[thread] = 0.0f;
    for (int r = 0; q.weighted() && r < kRows; ++r) {
      if (may_tie(weight_of(q, unseen[thread].x[r], true))) seen_ties[thread] = 1.0f;
      if (may_tie(weight_of(q, unseen[thread].x[r], false))) unseen_ties[thread] = 1.0f;
    }
    count[thread] = 0;
  });
  block.warp_max(seen_bound);
  block.warp_max(unseen_bound);
  block.warp_max(seen_ties);
  block.warp_max(unseen_ties);
  block.alone([&](int thread) {  // from bounds to thresholds
    seen_bound[thread] = seen_ties[thread] > 0.0f ? -cuda::kInfinity : threshold_of(seen_bound[thread], q.seen_offset);
    unseen_bound[thread] = unseen_ties[thread] > 0.0f ? -cuda::kInfinity : threshold_of(unseen_bound[thread], 0.0f);
  });
  cuda::PerThread<Block, uint32_t> kept(block);
  for (int32_t base = 0; base < q.classes; base += 32) {
    block.ballot(kept, [&](int thread) {
      const int32_t c = base + thread % 32;
      if (c >= q.classes) return false;
      const float bound = q.is_seen(c) ? seen_bound[thread] : unseen_bound[thread];
      return !(bounds_of(patches, c, first(thread), last(thread)).greatest < bound);
    });
    block.alone([&](int thread) {
      const uint32_t mine = 1u << (thread % 32);
      if (kept[thread] & mine) {
        const int32_t place = count[thread] + cuda::count_bits(kept[thread] & (mine - 1));
        const int32_t c = base + thread % 32;
        lists[thread / 32 * q.classes + place] = packed(c, q.is_seen(c));
      }
      count[thread] += cuda::count_bits(kept[thread]);
    });
  }
}

// shared: [classes, span] pairs and [kWarps, classes] candidates, if kStaged.
template <bool kStaged, class Block>
ZS3FAST_BODY void one_window(const Block& block, const CudaRequest& q, void* shared) {
  const Place at = place_of(block, q);
  if (at.rows == 0) return;
  Pair* pairs = static_cast<Pair*>(shared);
  const Patches<kStaged> patches{q, at, pairs};
  uint16_t* lists = reinterpret_cast<uint16_t*>(pairs + static_cast<int64_t>(q.classes) * q.span);
  cuda::PerThread<Block, Rows> unseen(block);
  cuda::PerThread<Block, int32_t> count(block);
  block.alone([&](int thread) {
    count[thread] = q.classes;
    if (q.weighted()) unseen[thread] = unseen_of(q, at, cuda::at_most(at.x + thread, q.width - 1));
  });
  if constexpr (kStaged) {
    const int32_t last = source(q.masks.columns, cuda::at_most(at.x + kThreads, q.width) - 1).high;
    const int32_t columns = last - at.first_column + 1;
    block.each([&](int thread) {  // neighbouring threads read neighbouring patches
      for (int32_t i = thread; i < q.classes * columns; i += kThreads) {
        const int32_t c = i / columns, column = i % columns;
        pairs[c * q.span + column] = patches.from_memory(c, at.first_column + column);
      }
    });
    find_candidates(block, q, at, patches, unseen, lists, count);
    block.each([](int) {});
  }
  block.alone([&](int thread) {
    const int32_t x = at.x + thread;
    if (x >= q.width) return;
    const Source column = source(q.masks.columns, x);
    const uint16_t* list = lists + thread / 32 * q.classes;
    Rows down, seen_limit, unseen_limit;
    ZS3FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      down.x[r] = weight_above(q.masks.rows, at.above, at.y + cuda::at_most(r, at.rows - 1));
      seen_limit.x[r] = unseen_limit.x[r] = -cuda::kInfinity;
    }
    const auto candidate = [&](int32_t i) { return kStaged ? unpacked(list[i]) : Candidate{i, q.is_seen(i)}; };
    const auto values = [&](int32_t c) {
      return values_of(patches(c, column.low), patches(c, column.high), column.weight, down);
    };
    for (int32_t i = 0; i < count[thread]; ++i) {
      const auto [c, is_seen] = candidate(i);
      const Rows v = values(c);
      is_seen ? raise(seen_limit, v) : raise(unseen_limit, v);
    }
    Best best;
    ZS3FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      seen_limit.x[r] = threshold_of(seen_limit.x[r], q.seen_offset);
      unseen_limit.x[r] = threshold_of(unseen_limit.x[r], 0.0f);
      if (q.weighted() && may_tie(weight_of(q, unseen[thread].x[r], true))) seen_limit.x[r] = -cuda::kInfinity;
      if (q.weighted() && may_tie(weight_of(q, unseen[thread].x[r], false))) unseen_limit.x[r] = -cuda::kInfinity;
      best.score.x[r] = -cuda::kInfinity, best.label[r] = 0;
    }
    for (int32_t i = 0; i < count[thread]; ++i) {
      challenge(q, candidate(i), values(candidate(i).c), seen_limit, unseen_limit, unseen[thread], best);
    }
    int64_t nan = 0;
    ZS3FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= at.rows) continue;
      const int64_t to = (static_cast<int64_t>(at.image) * q.height + at.y + r) * q.width + x;
      store_label(q.labels, q.label_bytes, to, best.label[r]);
      if (q.scores) q.scores[to] = best.score.x[r];
      nan += best.score.x[r] != best.score.x[r];
    }
    if (q.nan_count && nan) block.add(q.nan_count + at.image, nan);
  });
}

}  // namespace gpu
}  // namespace zs3fast::masks_to_labels

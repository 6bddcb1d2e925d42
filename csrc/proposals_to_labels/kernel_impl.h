// The kernels of request.h, compiled once an instruction set: the including file names it in ZS3FAST_ISA.
//
// A tile is 32 x 32 output pixels. From its patches every proposal gets an interval; classes that cannot win for any masks
// in the intervals are struck off, first for the tile, then among the rest for each leaf of it. A leaf with one class left
// is done without a single mask value. Otherwise the masks that tell the remaining classes apart are evaluated at its pixels
// and multiplied with their weights; a mask that is constant up to rounding goes into the start of the sums.
#include <cstdint>
#include <cstring>

#include "carver.h"
#include "labels.h"
#include "proposals_to_labels/classes.h"
#include "proposals_to_labels/masks.h"

namespace zs3fast::proposals_to_labels {
namespace {

constexpr float kEpsilon = 1.1920929e-7f;

struct Scratch {
  Patches patches;
  float *middle, *half, *greatest, *spread;  // [proposals]
  float *sums, *losses;                      // [classes]
  float* rows;                               // [proposals, classes], weights of the tile's candidates
  int32_t *numbers, *tile_classes, *leaf_winners, *leaf_classes;  // [classes]
  float* packed;                             // [proposals, classes]
  float* start;                              // [classes]
  int32_t* active;                           // [proposals]
  Rows mixing;
  float* masks;  // [proposals, kLeaf]
  float* best;   // [kLeaf]
  int32_t* label;

  Scratch(const Request& q, Carver& carver) {
    const int64_t proposals = round_up(q.proposals + 1), classes = round_up(q.classes);
    patches.data = carver.take<float>(q.proposals * q.patches_y * round_up(q.patches_x) + 2 * kLanes);
    middle = carver.take<float>(proposals), half = carver.take<float>(proposals);
    greatest = carver.take<float>(proposals), spread = carver.take<float>(proposals);
    sums = carver.take<float>(classes), losses = carver.take<float>(classes), start = carver.take<float>(classes);
    numbers = carver.take<int32_t>(classes), tile_classes = carver.take<int32_t>(classes);
    leaf_winners = carver.take<int32_t>(classes), leaf_classes = carver.take<int32_t>(classes);
    rows = carver.take<float>(q.proposals * classes);
    packed = carver.take<float>(q.proposals * classes);
    active = carver.take<int32_t>(proposals);
    mixing.patches = carver.take<float>(q.patches_y * kPixels);
    mixing.image = carver.take<float>(2 * kLeafRows * kPixels);
    mixing.outputs = carver.take<float>(kLeafRows * kPixels);
    masks = carver.take<float>(q.proposals * kLeaf);
    best = carver.take<float>(kLeaf);
    label = carver.take<int32_t>(kLeaf);
  }
};

class Tile {
 public:
  Tile(const Request& request, int64_t task, unsigned char* scratch)
      : request_(request), carver_(scratch), s_(request, carver_) {
    const int64_t across = (request.width + kTile - 1) / kTile, down = (request.height + kTile - 1) / kTile;
    image_ = task / (down * across);
    top_ = task / across % down * kTile;
    left_ = task % across * kTile;
    y_ = request.tiles_y + task / across % down;
    x_ = request.tiles_x + task % across;
    weights_ = request.weights + image_ * request.proposals * request.classes;
    largest_ = request.largest + image_ * request.proposals;
  }

  void run() {
    load_patches(request_, image_, *y_, *x_, s_.patches);
    prune_ = s_.patches.finite && request_.finite[image_];
    for (int64_t c = 0; c < request_.classes; ++c) s_.numbers[c] = static_cast<int32_t>(c);
    Candidates candidates{weights_, request_.classes, request_.classes, s_.numbers};
    const float* spread = request_.spread + image_ * request_.proposals;
    if (prune_) {
      const int64_t count = strike_off(candidates, spread, {0, kTile, 0, kTile});
      if (count == 1 && !request_.scores) return fill({0, kTile, 0, kTile}, s_.leaf_winners[0]);
      if (count < request_.classes) {
        candidates = gather_rows(count);
        spread = s_.spread;
      }
    }
    for (int64_t row = 0; row < y_->outputs; row += kLeafRows)
      for (int64_t column = 0; column < x_->outputs; column += kLeafColumns) leaf(candidates, spread, row, column);
  }

 private:
  // Leaves the candidates that can win on a part in leaf_winners.
  int64_t strike_off(const Candidates& candidates, const float* spread, const Part& part) {
    find_intervals(request_, s_.patches, *y_, *x_, part, s_.middle, s_.half, s_.greatest);
    float scale = 0, slope = 0;
    for (int64_t q = 0; q < request_.proposals; ++q) {
      scale += largest_[q] * s_.greatest[q];
      slope += spread[q] * (s_.greatest[q] < 0.25f ? s_.greatest[q] : 0.25f);
    }
    // what rounding can add to a difference of scores: that of the sums and, through the sigmoids, that of the logits
    slack_ = kEpsilon * static_cast<float>(request_.proposals + 8) * scale;
    if (request_.logits) slack_ += 1e-6f * s_.patches.largest * slope;
    return find_winners(
        candidates, request_.proposals, s_.middle, s_.half, spread, slack_, s_.sums, s_.losses, s_.leaf_winners);
  }

  // The candidates in leaf_winners with their weights side by side.
  Candidates gather_rows(int64_t count) {
    const int64_t stride = round_up(count);
    for (int64_t k = 0; k < count; ++k) s_.tile_classes[k] = s_.leaf_winners[k];
    for (int64_t q = 0; q < request_.proposals; ++q) {
      const float* from = weights_ + q * request_.classes;
      float* to = s_.rows + q * stride;
      float least = kInf, greatest = -kInf;
      for (int64_t k = 0; k < count; ++k) {
        to[k] = from[s_.tile_classes[k]];
        least = to[k] < least ? to[k] : least;
        greatest = to[k] > greatest ? to[k] : greatest;
      }
      s_.spread[q] = greatest - least;
    }
    return {s_.rows, stride, count, s_.tile_classes};
  }

  void leaf(const Candidates& candidates, const float* spread, int64_t row, int64_t column) {
    const Part part{row, kLeafRows, column, kLeafColumns};
    int64_t count = candidates.count;
    if (prune_) {
      count = strike_off(candidates, spread, part);
    } else {
      for (int64_t k = 0; k < count; ++k) s_.leaf_winners[k] = static_cast<int32_t>(k);
    }
    if (count == 1 && !request_.scores) return fill(part, candidates.classes[s_.leaf_winners[0]]);
    const int64_t active = split_proposals(spread);
    pack(candidates, count, active);
    const Columns columns = columns_of(*x_, column);
    for (int64_t i = 0; i < active; ++i)
      evaluate(request_, s_.patches, s_.active[i], *y_, row, columns, s_.mixing, s_.masks + i * kLeaf);
    for (int64_t p = 0; p < kLeaf; ++p) {
      s_.best[p] = -kInf;
      s_.label[p] = s_.leaf_classes[0];
    }
    find_best(count, active, s_.packed, s_.start, s_.leaf_classes, s_.masks, kLeaf, s_.best, s_.label);
    for (int64_t r = 0; r < smaller(kLeafRows, y_->outputs - row); ++r)
      write(row + r, column, smaller(kLeafColumns, x_->outputs - column), s_.label + r * kLeafColumns,
            s_.best + r * kLeafColumns);
  }

  // Lists the proposals whose mask must be known pixel by pixel, then the others: taken as constant, all of them together
  // change no score by more than a hundredth of what rounding may.
  int64_t split_proposals(const float* spread) {
    int64_t active = 0, constant = request_.proposals;
    const float* matters = request_.scores ? largest_ : spread;
    for (int64_t q = 0; q < request_.proposals; ++q) {
      const bool varies = !prune_ || s_.half[q] * matters[q] * static_cast<float>(request_.proposals) > 0.01f * slack_;
      s_.active[varies ? active++ : --constant] = static_cast<int32_t>(q);
    }
    return active;
  }

  // Weights of the leaf's candidates in groups of kGroup, and what the constant proposals add to each.
  void pack(const Candidates& candidates, int64_t count, int64_t active) {
    for (int64_t k = 0; k < count; ++k) {
      s_.leaf_classes[k] = candidates.classes[s_.leaf_winners[k]];
      s_.start[k] = 0;
    }
    for (int64_t i = active; i < request_.proposals; ++i) {
      const float* row = candidates.rows + s_.active[i] * candidates.stride;
      const float middle = s_.middle[s_.active[i]];
      for (int64_t k = 0; k < count; ++k) s_.start[k] += row[s_.leaf_winners[k]] * middle;
    }
    for (int64_t k = 0; k < count; k += kGroup) {
      const int64_t size = smaller(count - k, kGroup);
      float* to = s_.packed + k * active;
      for (int64_t i = 0; i < active; ++i, to += size) {
        const float* row = candidates.rows + s_.active[i] * candidates.stride;
        for (int64_t r = 0; r < size; ++r) to[r] = row[s_.leaf_winners[k + r]];
      }
    }
  }

  void fill(const Part& part, int32_t value) {
    for (int64_t i = 0; i < part.columns; ++i) s_.label[i] = value;
    for (int64_t r = part.row; r < smaller(part.row + part.rows, y_->outputs); ++r)
      write(r, part.column, smaller(part.columns, x_->outputs - part.column), s_.label, nullptr);
  }

  void write(int64_t row, int64_t column, int64_t count, const int32_t* labels, const float* scores) {
    const int64_t at = (image_ * request_.height + top_ + row) * request_.width + left_ + column;
    store_labels(request_.labels, request_.label_bytes, at, labels, count);
    if (request_.scores && scores) std::memcpy(request_.scores + at, scores, count * sizeof(float));
  }

  const Request& request_;
  Carver carver_;
  Scratch s_;
  int64_t image_, top_, left_;
  const AxisTile *y_, *x_;
  const float *weights_, *largest_;
  float slack_ = 0;
  bool prune_ = false;
};

int64_t scratch_bytes(const Request& request) {
  Carver carver(nullptr);
  Scratch(request, carver);
  return carver.used();
}

void run(const Request& request, int64_t task, unsigned char* scratch) { Tile(request, task, scratch).run(); }

}  // namespace

const Kernels ZS3FAST_ISA = {scratch_bytes, run};

}  // namespace zs3fast::proposals_to_labels

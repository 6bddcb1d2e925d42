// The kernels of kernel.h, compiled once an instruction set: the including file names it in ZS3FAST_ISA.
#include <algorithm>
#include <cstdint>

#include "mask_loss/kernel.h"
#include "vectors.h"

namespace zs3fast::mask_loss {
namespace {

constexpr int64_t kRows = 32;  // rows summed in one fp32 accumulator

inline Float larger(Float x, Float y) { return x > y ? x : y; }   // y if either is NaN
inline Float smaller(Float x, Float y) { return x < y ? x : y; }  // y if either is NaN

double sum(Float x) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// exp(-a) for a >= 0, relative error 1.5e-7; 2e-38 beyond a = 87.
inline Float exp_minus(Float a) {
  constexpr float kLog2e = 1.44269504f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  a = smaller(all(87.0f), a);
  const Float shifted = a * -kLog2e + kRound;
  const Float f = a * -kLog2e - (shifted - kRound);  // fused: [-0.5, 0.5]
  Float p = f * 1.32764722e-3f + 9.67554133e-3f;     // minimax of 2^f, error 7.5e-8
  p = p * f + 5.55071327e-2f;
  p = p * f + 2.40221197e-1f;
  p = p * f + 6.93146967e-1f;
  p = p * f + 1.00000007f;
  return (Float)((Int)p + ((Int)shifted << 23));
}

// log(1 + e) for 0 <= e <= 1, relative error 2e-7.
inline Float log1p(Float e) {
  Float p = e * 5.23269411e-3f - 2.95052373e-2f;  // minimax of log(1 + e) / e, error 3e-8
  p = p * e + 7.82259478e-2f;
  p = p * e - 1.36632453e-1f;
  p = p * e + 1.91060064e-1f;
  p = p * e - 2.48429821e-1f;
  p = p * e + 3.33190968e-1f;
  p = p * e - 4.99994931e-1f;
  p = p * e + 9.9999997e-1f;
  return p * e;
}

// What a pixel's terms are made of. Towards its target t the logit is s = t ? -z : z, and
// focal = (t ? alpha : 1 - alpha) * wrong^gamma * softplus(s) with wrong = sigmoid(s).
struct Pixel {
  Float prob, wrong, right, softplus, power, weight, sign;
};

template <bool kTargets, bool kSquare>
inline Pixel pixel(Float z, Int target, float alpha, float gamma) {
  const Float e = exp_minus((Float)((Int)z & 0x7fffffff));
  const Float r = 1.0f / (1.0f + e), er = e * r;
  const Int positive = z >= 0.0f;
  const Float prob = positive ? r : er, rest = positive ? er : r;
  const Float log_term = log1p(e), relu = larger(z, Float{});
  Pixel x{prob, prob, rest, log_term + relu, Float{}, all(1 - alpha), all(1.0f)};
  if constexpr (kTargets) {
    x.wrong = target ? rest : prob;
    x.right = target ? prob : rest;
    x.softplus = log_term + (target ? relu - z : relu);
    x.weight = target ? all(alpha) : all(1 - alpha);
    x.sign = target ? all(-1.0f) : all(1.0f);
  }
  if constexpr (kSquare) {
    x.power = x.wrong * x.wrong;
  } else {  // wrong = exp(-softplus(-s))
    x.power = exp_minus((log_term + (kTargets ? (target ? relu : relu - z) : relu - z)) * gamma);
  }
  return x;
}

// One grid row at W pixels. Whole vectors are stored: what runs over belongs to the next band, or to the padding, whose
// logit is so low that a padded pixel adds nothing.
void widen(const Axis& axis, const float* grid, float* wide) {
  for (int64_t k = 0; k <= axis.in; ++k) {
    const float lower = grid[std::max<int64_t>(k - 1, 0)], upper = grid[std::min(k, axis.in - 1)];
    for (int64_t x = axis.begin[k]; x < axis.begin[k + 1]; x += kLanes)
      store(wide + x, lower * load(axis.lower + x) + upper * load(axis.upper + x));
  }
  for (int64_t x = axis.out; x < axis.padded; ++x) wide[x] = -1e30f;
}

// The transpose of widen.
void contract(const Axis& axis, const float* wide, float* grid) {
  for (int64_t j = 0; j < axis.in; ++j) {
    const float* pixels = wide + axis.begin[j];
    Float total{};
    for (int64_t i = axis.support[j]; i < axis.support[j + 1]; i += kLanes, pixels += kLanes) {
      const Float weight = load(axis.gather + i);
      total += weight != 0.0f ? weight * load(pixels) : Float{};  // a neighbour's NaN stays with the neighbour
    }
    grid[j] = static_cast<float>(sum(total));
  }
}

// The two widened grid rows around band k; going up, each is widened once.
class GridRows {
 public:
  GridRows(const Problem& problem, int64_t plane, float* scratch)
      : rows_(problem.rows), columns_(problem.columns),
        grid_(problem.logits + plane * problem.rows.in * problem.columns.in),
        buffer_{scratch, scratch + problem.columns.padded + kPad} {}

  const float* row(int64_t j) {
    j = std::clamp<int64_t>(j, 0, rows_.in - 1);
    if (held_[j & 1] != j) {
      widen(columns_, grid_ + j * columns_.in, buffer_[j & 1]);
      held_[j & 1] = j;
    }
    return buffer_[j & 1];
  }

 private:
  const Axis &rows_, &columns_;
  const float* grid_;
  float* buffer_[2];
  int64_t held_[2] = {-1, -1};
};

template <bool kTargets, bool kSquare>
void forward_rows(const Problem& problem, const float* above, const float* below, const int32_t* labels, int32_t c,
                  int64_t begin, int64_t end, Sums& sums) {
  const int64_t width = problem.columns.padded;
  const float *lower = problem.rows.lower, *upper = problem.rows.upper;
  Float focal{}, intersection{}, prob{};
  for (int64_t x = 0; x < width; x += kLanes) {
    const Float a = load(above + x), b = load(below + x);
    Float strip_focal{}, strip_intersection{}, strip_prob{};  // short sums of short sums keep fp32 exact enough
    for (int64_t y = begin; y < end; ++y) {
      Int target{};
      if constexpr (kTargets) target = load(labels + y * width + x) == c;
      const Pixel pix = pixel<kTargets, kSquare>(a * lower[y] + b * upper[y], target, problem.alpha, problem.gamma);
      const Float term = pix.power * pix.softplus;
      strip_focal += kTargets ? pix.weight * term : term;
      strip_prob += pix.prob;
      if constexpr (kTargets) strip_intersection += target ? pix.prob : Float{};
    }
    focal += strip_focal;
    prob += strip_prob;
    intersection += strip_intersection;
  }
  sums.focal += kTargets ? sum(focal) : sum(focal) * (1 - problem.alpha);
  sums.prob += sum(prob);
  sums.intersection += sum(intersection);
}

template <bool kSquare>
Sums forward_plane(const Problem& problem, int64_t plane, float* scratch) {
  const Axis& rows = problem.rows;
  const int64_t b = plane / problem.classes, c = plane % problem.classes;
  const int32_t* labels = problem.labels + b * rows.out * problem.columns.padded;
  GridRows grid(problem, plane, scratch);
  Sums sums{};
  for (int64_t k = 0; k <= rows.in; ++k) {
    const bool present = problem.counts[(b * (rows.in + 1) + k) * problem.classes + c] > 0;
    const auto run = present ? forward_rows<true, kSquare> : forward_rows<false, kSquare>;
    for (int64_t y = rows.begin[k]; y < rows.begin[k + 1]; y += kRows)
      run(problem, grid.row(k - 1), grid.row(k), labels, static_cast<int32_t>(c), y,
          std::min(y + kRows, rows.begin[k + 1]), sums);
  }
  return sums;
}

struct Gradients {
  float focal, intersection, prob;
};

// Adds dz of the pixel rows to the widened gradients of the two grid rows around them (one row at the border).
template <bool kTargets, bool kSquare>
void backward_rows(const Problem& problem, const float* above, const float* below, const int32_t* labels, int32_t c,
                   int64_t begin, int64_t end, const Gradients& g, float* grad_above, float* grad_below) {
  const int64_t width = problem.columns.padded;
  const float *lower = problem.rows.lower, *upper = problem.rows.upper;
  for (int64_t x = 0; x < width; x += kLanes) {
    const Float a = load(above + x), b = load(below + x);
    Float to_above{}, to_below{};
    for (int64_t y = begin; y < end; ++y) {
      Int target{};
      if constexpr (kTargets) target = load(labels + y * width + x) == c;
      const Pixel pix = pixel<kTargets, kSquare>(a * lower[y] + b * upper[y], target, problem.alpha, problem.gamma);
      const Float slope = pix.power * (problem.gamma * pix.right * pix.softplus + pix.wrong);
      Float of_prob = all(g.prob);
      if constexpr (kTargets) of_prob = target ? all(g.prob + g.intersection) : of_prob;
      const Float dz = g.focal * (pix.sign * pix.weight) * slope + of_prob * (pix.wrong * pix.right);
      to_above += lower[y] * dz;
      to_below += upper[y] * dz;
    }
    store(grad_above + x, load(grad_above + x) + to_above);
    store(grad_below + x, load(grad_below + x) + to_below);
  }
}

template <bool kSquare>
void backward_plane(const Problem& problem, int64_t plane, const Gradients& g, float* grad, float* scratch) {
  const Axis &rows = problem.rows, &columns = problem.columns;
  const int64_t b = plane / problem.classes, c = plane % problem.classes, stride = columns.padded + kPad;
  const int32_t* labels = problem.labels + b * rows.out * columns.padded;
  GridRows grid(problem, plane, scratch);
  float* wide[2] = {scratch + 2 * stride, scratch + 3 * stride};
  std::fill_n(wide[0], 2 * stride, 0.0f);
  for (int64_t k = 0; k <= rows.in; ++k) {
    const int64_t upper = std::min(k, rows.in - 1), lower = std::max<int64_t>(k - 1, 0);
    const bool present = problem.counts[(b * (rows.in + 1) + k) * problem.classes + c] > 0;
    const auto run = present ? backward_rows<true, kSquare> : backward_rows<false, kSquare>;
    for (int64_t y = rows.begin[k]; y < rows.begin[k + 1]; y += kRows)
      run(problem, grid.row(k - 1), grid.row(k), labels, static_cast<int32_t>(c), y,
          std::min(y + kRows, rows.begin[k + 1]), g, wide[lower & 1], wide[upper & 1]);
    if (k > 0) {  // no later band reaches grid row k - 1
      contract(columns, wide[lower & 1], grad + lower * columns.in);
      std::fill_n(wide[lower & 1], stride, 0.0f);
    }
  }
}

Sums forward(const Problem& problem, int64_t plane, float* scratch) {
  return (problem.gamma == 2.0f ? forward_plane<true> : forward_plane<false>)(problem, plane, scratch);
}

void backward(const Problem& problem, int64_t plane, float grad_focal, float grad_intersection, float grad_prob,
              float* grad, float* scratch) {
  const Gradients g{grad_focal, grad_intersection, grad_prob};
  (problem.gamma == 2.0f ? backward_plane<true> : backward_plane<false>)(problem, plane, g, grad, scratch);
}

}  // namespace

extern const Kernels ZS3FAST_ISA{forward, backward};

}  // namespace zs3fast::mask_loss

// One product of a warpgroup with a tile that the copy engine brought, whole or with a mistake that a GPU would not
// report, and the emulation must.
#include <cstring>
#include <string>

#include "emulated/entry.h"

namespace {

using namespace zs3fast;
using mma::Lanes;
using T = mma::BFloat16;

constexpr int kRows = 64, kBytes = kRows * wgmma::kLine, kFull = 2 * kBytes, kEmpty = kFull + 8;

// Rows [0, 64) of a, 16 columns, times columns [16, 32) of the tile's rows, or across: times rows [16, 32) of it.
template <bool kAcross>
void run(wgmma::Block& block, const Entry& entry, const wgmma::Map& map, const std::string& mistake) {
  const auto is = [&](const char* name) { return mistake == name; };
  if (block.warp == 0) {
    block.start(kFull, 1);
    block.start(kEmpty, wgmma::kGroupWarps);
    if (!is("not published")) block.publish();
  }
  block.sync();
  if (block.warp == 0) {
    block.expect(kFull, is("bytes") ? kBytes / 2 : kBytes);
    block.copy(0, map, kFull, 0, is("origin") ? 9 : 8, 0, 0);
  }

  const Lanes<int> group = mma::lane_index() / 4, place = mma::lane_index() % 4;
  const Lanes<int> row[2] = {group + 16 * block.warp, group + (16 * block.warp + 8)};
  const Lanes<bool> inside[2] = {row[0] < kRows, row[1] < kRows};
  Lanes<uint32_t> left[1][4];
  mma::load_rows<16>(left, mma::Rows<const T>{entry.data<const T>(0), 16}, row, inside);
  Lanes<float> sum[8][4], other[8][4];

  if (is("not copied")) {
    if (block.warp == 1) block.write(16 * mma::lane_index() + kBytes, left[0]);
    block.sync();
  }
  if (!is("not waited for")) block.wait(kFull, is("phase"));
  if (!is("no fence")) block.fence(sum, left);
  if (is("sums after the fence")) sum[3][1] = 0.0f;
  if (is("operand after the fence")) left[0][2] = 0u;
  const int at = is("not copied") ? kBytes : (kAcross ? 16 * wgmma::kLine : 32) + (is("warps") ? block.warp * 32 : 0);
  block.multiply<T, kAcross>(sum, left[0], block.operand(at, kBytes, is("stride") ? 512 : wgmma::kAtom), false);
  block.commit();
  if (is("operand in use")) left[0][0] = 0u;
  if (is("sums in use")) sum[0][0] = 0.0f;
  if (is("arrived before")) block.arrive(kEmpty);
  if (is("open")) {
    block.fence(other);
    block.multiply<T, kAcross>(other, left[0], block.operand(at, kBytes, wgmma::kAtom), false);
    block.commit();
    block.finish<1>(other);
  }
  if (!is("not finished") && !is("read before")) block.finish<0>(sum);
  if (!is("arrived before") && !is("nobody arrives")) block.arrive(kEmpty);
  const bool once = is("once") || is("read before") || is("not finished");
  if (block.warp == 0 && !once) {  // the next tile, to the same place
    if (!is("in use")) block.wait(kEmpty, is("free already"));
    block.expect(kFull, kBytes);
    block.copy(0, map, kFull, 0, 0, 0, 0);
  }
  for (int i = 0; i < 32; ++i) {
    const Lanes<uint32_t> word[1] = {mma::as_bits(sum[i / 4][i % 4])};
    const Lanes<int> to = row[i % 4 / 2] * 64 + 2 * place + (i / 4 * 8 + i % 2);
    mma::store<1>(entry.data<float>(2), mma::cast<int64_t>(to), word, inside[0]);
  }
  if (is("read before")) block.finish<0>(sum);
}

}  // namespace

// tensors: a [64, 16] and b [64, 64], bf16; the product [64, 64], fp32. The tile is rows [8, 72) of b.
extern "C" bool wgmma_product(const Tensor* tensors, bool across, const char* mistake, char* error, int64_t length) {
  return guarded(tensors, 3, error, length, [&] {
    const Entry entry{tensors};
    auto map = map_of(entry.heads<const T>(1), 1, 1, 64, 64, kRows);
    map.stride[1] = 64 * sizeof(T);
    map.swizzle = std::strcmp(mistake, "swizzle") != 0;
    wgmma::Launch(wgmma::kGroupWarps, kEmpty + 8, [&](wgmma::Block& block) {
      across ? run<true>(block, entry, map, mistake) : run<false>(block, entry, map, mistake);
    }).run();
  });
}

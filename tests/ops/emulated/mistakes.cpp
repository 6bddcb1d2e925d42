// Bodies with a mistake each, for tests: what a GPU would not report, the emulation must. One of them has none.
#include <cstring>
#include <string>

#include "emulated/entry.h"

namespace {

using namespace zs3fast;
using mma::Lanes;

constexpr int kBytes = 1024;

// Every lane writes its warp's number, then reads what the other of two warps wrote.
void exchange(mma::Block& block, bool barrier) {
  const Lanes<int> lane = mma::lane_index();
  block.write(4 * lane + 128 * block.warp, Lanes<float>(static_cast<float>(block.warp)), lane >= 0);
  if (barrier) block.sync();
  const Lanes<float> other = block.read(4 * lane + 128 * (1 - block.warp));
  if (barrier && any(other != static_cast<float>(1 - block.warp))) mma::fail("wrong value");
}

// Copies 512 bytes to shared memory and reads them as matrices whose rows lie `stride` bytes apart.
void copy(mma::Block& block, const uint16_t* from, bool wait, int stride) {
  const Lanes<int> lane = mma::lane_index();
  block.copy_async(16 * lane, from, mma::cast<int64_t>(8 * lane), lane >= 0);
  block.close_group();
  if (wait) block.wait_for_groups<0>();
  Lanes<uint32_t> words[4];
  block.load_matrices<false>(words, lane % 8 * stride);
  if (any((words[0] & 0x7f80u) == 0x7f80u)) mma::fail("NaN");
}

}  // namespace

// tensors[0]: 256 finite bf16 values.
extern "C" bool mistakes(const Tensor* tensors, const char* name, int64_t* conflicts, char* error, int64_t length) {
  const auto is = [&](const char* what) { return std::strcmp(name, what) == 0; };
  const auto* data = static_cast<const uint16_t*>(tensors[0].data);
  return guarded(tensors, 1, error, length, [&] {
    mma::Launch(is("race") || is("barrier") || is("exchange") ? 2 : 1, kBytes, [&](mma::Block& block) {
      const Lanes<int64_t> lane = mma::cast<int64_t>(mma::lane_index());
      Lanes<uint32_t> word[1], words[4];
      if (is("exchange")) exchange(block, true);
      if (is("race")) exchange(block, false);
      if (is("barrier") && block.warp == 0) block.sync();
      if (is("copy")) copy(block, data, true, 16);
      if (is("copy not waited for")) copy(block, data, false, 16);
      if (is("bank conflicts")) copy(block, data, true, 64);
      if (is("outside")) mma::load<1>(word, data, 2 * lane + 194, lane >= 0);
      if (is("outside, but not read")) mma::load<1>(word, data, 2 * lane + 194, lane < 31);
      if (is("misaligned")) mma::load<4>(words, data, 4 * lane, lane >= 0);
      if (is("outside of shared memory")) block.read(mma::lane_index() * 4 + (kBytes - 124));
    }).run();
    *conflicts = mma::Block::bank_conflicts;
  });
}

// product = a b^T through matrix loads and one multiply_add a tile: a is 16 x 16 and b 8 x 16, row by row.
extern "C" bool product(const Tensor* tensors, char* error, int64_t length) {
  return guarded(tensors, 3, error, length, [&] {
    mma::Launch(1, kBytes, [&](mma::Block& block) {
      const Lanes<int> lane = mma::lane_index();
      const auto *a = static_cast<const cuda::BFloat16*>(tensors[0].data);
      const auto *b = static_cast<const cuda::BFloat16*>(tensors[1].data);
      block.copy_async(16 * lane, a, mma::cast<int64_t>(8 * lane), lane >= 0);
      block.copy_async(512 + 16 * lane, b, mma::cast<int64_t>(8 * lane), lane < 16);
      block.close_group();
      block.wait_for_groups<0>();
      Lanes<uint32_t> left[4], right[4];
      block.load_matrices<false>(left, lane % 16 * 32 + lane / 16 * 16);
      block.load_matrices<false>(right, lane % 8 * 32 + lane / 8 % 2 * 16 + 512);
      Lanes<float> sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      mma::multiply_add<cuda::BFloat16>(sum, left, right[0], right[1]);
      for (int i = 0; i < 4; ++i) {
        const Lanes<uint32_t> word[1] = {mma::as_bits(sum[i])};
        const Lanes<int> at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
        mma::store<1>(static_cast<float*>(tensors[2].data), mma::cast<int64_t>(at), word, lane >= 0);
      }
    }).run();
  });
}

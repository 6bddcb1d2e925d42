// The CPU kernels of bfloat16 on tiles in software: the loops of csrc/tiles.h, which a CPU with AMX runs on its own.
#include "emulated/software_tiles.h"
#include "encoder_attention/pairs.h"
#include "fused_linear/loops.h"
#include "fused_linear_int8/loops.h"
#include "tiles.h"

namespace {

using namespace zs3fast;

encoder_attention::Tokens tokens(const int64_t* of) {
  return {reinterpret_cast<void*>(of[0]), of[1], of[2], of[3], of[4]};
}

}  // namespace

// tensors: x, weight, bias, residual, out and room for what is packed (fused_linear/kernel.h), rows without gaps.
extern "C" void fused_linear_amx(const int64_t* sizes, void* const* tensors, int64_t activation) {
  using namespace zs3fast::fused_linear;
  const int64_t rows = sizes[0], outputs = sizes[1], depth = sizes[2];
  const Problem f{rows,       outputs,    depth,  tensors[0], tensors[1], tensors[2], tensors[3],
                  tensors[4], depth,      depth,  outputs,    outputs,    static_cast<Activation>(activation),
                  tensors[5]};
  pack_blocks<uint16_t>(f, 0, blocks(rows));
  run_tasks<TileProducts<SoftwareTiles>, uint16_t>(f, 0, blocks(rows) * panels(outputs));
}

// tensors: x, weight, its scale, bias, residual, out and room for what is packed (fused_linear_int8/kernel.h).
extern "C" void fused_linear_int8_amx(const int64_t* sizes, void* const* tensors, int64_t activation, bool bf16) {
  using namespace zs3fast::fused_linear_int8;
  const int64_t rows = sizes[0], outputs = sizes[1], depth = sizes[2];
  const Problem f{rows,
                  outputs,
                  depth,
                  tensors[0],
                  static_cast<const int8_t*>(tensors[1]),
                  static_cast<const float*>(tensors[2]),
                  tensors[3],
                  tensors[4],
                  tensors[5],
                  depth,
                  depth,
                  outputs,
                  outputs,
                  static_cast<Activation>(activation),
                  static_cast<uint8_t*>(tensors[6])};
  using Products = TileProducts<SoftwareTiles, TilesOfInt8>;
  const auto run = [&](auto pack, auto multiply) {
    pack(f, 0, blocks(rows));
    multiply(f, 0, blocks(rows) * panels(outputs));
  };
  bf16 ? run(pack_blocks<uint16_t>, run_tasks<Products, uint16_t>) : run(pack_blocks<float>, run_tasks<Products, float>);
}

// operands: q, output, two runs of k, two of v; of each its address, strides of image, token and head, and its tokens.
extern "C" void encoder_attention_amx(const int64_t* sizes, const int64_t (*operands)[5], float scale) {
  using namespace zs3fast::encoder_attention;
  Problem f;
  f.element = Element::bfloat16;
  f.batches = sizes[0];
  f.heads = sizes[1];
  f.dh = sizes[2];
  f.scale = scale;
  f.q = tokens(operands[0]);
  f.output = tokens(operands[1]);
  for (int run = 0; run < 2; ++run) {
    f.k[run] = tokens(operands[2 + run]);
    f.v[run] = tokens(operands[4 + run]);
  }
  run_tasks<PairProducts<TileProducts<SoftwareTiles>>>(f, 0, tasks_of(f));
}

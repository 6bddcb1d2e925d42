// By AMX.
#include "fused_linear_int8/loops.h"
#include "tiles.h"
#include "tiles_hardware.h"

namespace zs3fast::fused_linear_int8 {
namespace {
using Products = TileProducts<HardwareTiles, TilesOfInt8>;
}
const Kernel kernel_amx{
    "amx", {pack_blocks<float>, pack_blocks<uint16_t>}, {run_tasks<Products, float>, run_tasks<Products, uint16_t>}};
}  // namespace zs3fast::fused_linear_int8

// By AMX.
#include "fused_linear/loops.h"
#include "tiles.h"
#include "tiles_hardware.h"

namespace zs3fast::fused_linear {
const Kernel kernel_amx{"amx", true, pack_blocks<uint16_t>, run_tasks<TileProducts<HardwareTiles>, uint16_t>};
}  // namespace zs3fast::fused_linear

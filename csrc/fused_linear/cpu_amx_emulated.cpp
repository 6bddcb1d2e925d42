// By tiles in software, for tests.
#include "fused_linear/loops.h"
#include "tiles.h"
#include "tiles_software.h"

namespace zs3fast::fused_linear {
const Kernel kernel_amx_emulated{"amx_emulated", true, pack_blocks<uint16_t>, run_tasks<TileProducts<SoftwareTiles>, uint16_t>};
}  // namespace zs3fast::fused_linear

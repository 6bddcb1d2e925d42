// By tiles in software, for tests.
#include "encoder_attention/pairs.h"
#include "tiles.h"
#include "tiles_software.h"

namespace zs3fast::encoder_attention {
const Kernel kernel_amx_emulated{"amx_emulated", true, tasks_of, run_tasks<PairProducts<TileProducts<SoftwareTiles>>>};
}  // namespace zs3fast::encoder_attention

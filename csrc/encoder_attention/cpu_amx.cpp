// By AMX.
#include "encoder_attention/pairs.h"
#include "tiles.h"
#include "tiles_hardware.h"

namespace zs3fast::encoder_attention {
const Kernel kernel_amx{"amx", true, tasks_of, run_tasks<PairProducts<TileProducts<HardwareTiles>>>};
}  // namespace zs3fast::encoder_attention

// What may follow a linear layer. No instruction of any set here.
#pragma once

#include <cstdint>

namespace zs3fast {

enum class Activation : int64_t { none = 0, quick_gelu = 1, gelu = 2, relu = 3 };

}  // namespace zs3fast

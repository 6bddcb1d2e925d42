// Memory that a thread keeps between calls: fresh memory comes from the system page by page, each zeroed and mapped anew,
// which took a tenth of a call.
#pragma once

#include <cstdint>

namespace zs3fast {

// What is larger goes with the next call that needs less. Enough for 1025 rows of 3072 columns in bfloat16.
constexpr int64_t kKeptBytes = int64_t{13} << 19;

// At least `bytes`, aligned to cache lines, not initialised; this thread's until it asks again.
unsigned char* workspace(int64_t bytes);

}  // namespace zs3fast

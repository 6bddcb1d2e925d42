#include "workspace.h"

#include <memory>

#include "scratch.h"

namespace zs3fast {

unsigned char* workspace(int64_t bytes) {
  thread_local std::unique_ptr<ScratchArena> kept;
  thread_local int64_t size = 0;
  if (!kept || bytes > size || (size > kKeptBytes && bytes <= kKeptBytes)) {
    kept.reset();  // before the new one, not beside it
    size = 0;
    kept = std::make_unique<ScratchArena>(bytes);
    size = bytes;
  }
  return kept->bytes();
}

}  // namespace zs3fast

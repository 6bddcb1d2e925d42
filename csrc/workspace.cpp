#include "workspace.h"

#include <utility>

#include "scratch.h"

namespace zs3fast {
namespace {

struct Kept {
  std::unique_ptr<ScratchArena> block;
  int64_t size = 0;
};
thread_local Kept kept;

}  // namespace

Workspace::Workspace(int64_t bytes) : block_(std::move(kept.block)), size_(std::exchange(kept.size, 0)) {
  if (!block_ || size_ < bytes) {
    block_.reset();  // before the new one, not beside it
    block_ = std::make_unique<ScratchArena>(bytes);
    size_ = bytes;
  }
  bytes_ = block_->bytes();
}

Workspace::~Workspace() {
  if (size_ > kKeptBytes || size_ < kept.size) return;
  kept.block = std::move(block_);
  kept.size = size_;
}

}  // namespace zs3fast

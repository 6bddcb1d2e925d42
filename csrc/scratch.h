// Memory of one thread for one call, aligned to cache lines. Not initialised.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace zs3fast {

class ScratchArena {
 public:
  explicit ScratchArena(int64_t bytes) : block_(new (kAlign) unsigned char[bytes > 0 ? bytes : 1]) {}
  ~ScratchArena() { ::operator delete[](block_, kAlign); }
  ScratchArena(const ScratchArena&) = delete;
  ScratchArena& operator=(const ScratchArena&) = delete;

  static ScratchArena of_floats(int64_t count) { return ScratchArena(count * static_cast<int64_t>(sizeof(float))); }
  unsigned char* bytes() { return block_; }
  float* floats() { return reinterpret_cast<float*>(block_); }

 private:
  static constexpr std::align_val_t kAlign{64};
  unsigned char* block_;
};

}  // namespace zs3fast

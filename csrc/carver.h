// Hands out pieces of one block of scratch memory, each on its own cache lines; with a null block it only measures.
#pragma once

#include <cstdint>

namespace zs3fast {
namespace {  // every translation unit has its own: their instructions differ

class Carver {
 public:
  explicit Carver(unsigned char* block) : block_(block) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(block_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* block_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace zs3fast

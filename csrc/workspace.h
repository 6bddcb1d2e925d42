// Memory that a thread keeps between calls: fresh memory comes from the system page by page, each zeroed and mapped anew,
// which took a tenth of a call.
#pragma once

#include <cstdint>
#include <memory>

namespace zs3fast {

class ScratchArena;

// A thread keeps no more. Enough for 1025 rows of 3072 columns in bfloat16.
constexpr int64_t kKeptBytes = int64_t{13} << 19;

// At least `bytes`, aligned to cache lines, not initialised: what the thread kept, or memory of its own if that is too
// small or in use. It is the thread's again with the end of this object, and the system's if it is larger than is kept.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  unsigned char* bytes() const { return bytes_; }

 private:
  std::unique_ptr<ScratchArena> block_;
  int64_t size_;
  unsigned char* bytes_;
};

}  // namespace zs3fast

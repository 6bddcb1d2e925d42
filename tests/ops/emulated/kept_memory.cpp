// What a thread keeps between calls (csrc/workspace.cpp), from inside.
#include "../../../csrc/workspace.cpp"

extern "C" int64_t most_kept() { return zs3fast::kKeptBytes; }
extern "C" int64_t kept() { return zs3fast::kept.block ? zs3fast::kept.size : 0; }

// A call that needs so much.
extern "C" void* use(int64_t bytes) {
  const zs3fast::Workspace room(bytes);
  room.bytes()[0] = room.bytes()[bytes - 1] = 1;
  return room.bytes();
}

// A call within a call: whether the first one's memory is its own all the time.
extern "C" bool use_within(int64_t outer, int64_t inner) {
  const zs3fast::Workspace room(outer);
  for (int64_t i = 0; i < outer; ++i) room.bytes()[i] = static_cast<unsigned char>(i);
  for (int n = 0; n < 2; ++n) {
    const zs3fast::Workspace other(inner);
    if (other.bytes() < room.bytes() + outer && room.bytes() < other.bytes() + inner) return false;
    for (int64_t i = 0; i < inner; ++i) other.bytes()[i] = 255;
  }
  for (int64_t i = 0; i < outer; ++i)
    if (room.bytes()[i] != static_cast<unsigned char>(i)) return false;
  return true;
}

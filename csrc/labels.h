// Labels written as the type that was asked for. Everything is internal to one file: their instructions differ.
#pragma once

#include <cstdint>

namespace zs3fast {
namespace {

template <typename Label>
inline void store_as(void* labels, int64_t at, const int32_t* values, int64_t count) {
  Label* out = static_cast<Label*>(labels) + at;
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Label>(values[i]);
}

inline void store_labels(void* labels, int label_bytes, int64_t at, const int32_t* values, int64_t count) {
  switch (label_bytes) {
    case 8: return store_as<int64_t>(labels, at, values, count);
    case 4: return store_as<int32_t>(labels, at, values, count);
    case 2: return store_as<int16_t>(labels, at, values, count);
    default: return store_as<uint8_t>(labels, at, values, count);
  }
}

}  // namespace
}  // namespace zs3fast

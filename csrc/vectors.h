// Vectors as wide as the instruction set that a file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

namespace zs3fast {
namespace {  // every translation unit has its own: their instructions differ

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef float Float __attribute__((vector_size(kBytes)));
typedef int32_t Int __attribute__((vector_size(kBytes)));

inline Float load(const float* p) {
  Float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Int load(const int32_t* p) {
  Int x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <typename Vector, typename T>
inline void store(T* p, Vector x) {
  std::memcpy(p, &x, sizeof x);
}
inline Float all(float x) { return x - Float{}; }
inline Int all(int32_t x) { return x - Int{}; }

}  // namespace
}  // namespace zs3fast

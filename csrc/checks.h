// What a C++ entry looks at before it indexes: below the public functions, too, no argument is trusted.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <limits>
#include <span>
#include <string>

namespace zs3fast {

constexpr int64_t kMaxSide = int64_t{1} << 24;                             // exact in float32
constexpr int64_t kMaxPixels = std::numeric_limits<int32_t>::max();        // zs3fast/ops/_checks.py has the same
constexpr int64_t kAny = -1;                                               // a size that may be anything

inline std::string shape_text(std::span<const int64_t> sizes) {
  std::string text = "[";
  for (const int64_t n : sizes) text += (text.size() > 1 ? ", " : "") + (n == kAny ? "any" : std::to_string(n));
  return text + "]";
}

// A strided tensor on `device` of that shape.
inline void check_tensor(const char* op, const char* name, const at::Tensor& x, at::DeviceType device,
                         std::initializer_list<int64_t> sizes) {
  TORCH_CHECK_TYPE(x.defined() && x.layout() == at::kStrided && x.device().type() == device, op, ": ", name,
                   ": expected a strided tensor on the ", device, ", got ", x.toString(), " on ", x.device());
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = sizes.begin()[i] == kAny || sizes.begin()[i] == x.size(i);
  TORCH_CHECK_VALUE(fits, op, ": ", name, ": expected ", shape_text({sizes.begin(), sizes.size()}), ", got ", x.sizes());
}

// The same of float32, float16 or bfloat16.
inline void check_floats(const char* op, const char* name, const at::Tensor& x, at::DeviceType device,
                         std::initializer_list<int64_t> sizes) {
  check_tensor(op, name, x, device, sizes);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16, op,
                   ": ", name, ": expected float32, float16 or bfloat16, got ", x.scalar_type());
}

// (height, width), both positive, whose pixels can be counted.
inline void check_size(const char* op, const char* name, at::IntArrayRef size) {
  TORCH_CHECK_VALUE(size.size() == 2 && size[0] >= 1 && size[1] >= 1 && size[0] <= kMaxSide && size[1] <= kMaxSide &&
                        size[0] * size[1] <= kMaxPixels,
                    op, ": ", name, ": expected (height, width) of 1 to 2^24 each and fewer than 2^31 pixels, got ", size);
}

// A dtype of labels that holds 0 to classes - 1.
inline void check_labels(const char* op, at::ScalarType dtype, int64_t classes) {
  const int64_t most = dtype == at::kByte    ? std::numeric_limits<uint8_t>::max()
                       : dtype == at::kShort ? std::numeric_limits<int16_t>::max()
                       : dtype == at::kInt   ? std::numeric_limits<int32_t>::max()
                       : dtype == at::kLong  ? std::numeric_limits<int64_t>::max()
                                             : -1;
  TORCH_CHECK_VALUE(most >= 0, op, ": dtype: expected one of int64, int32, int16, uint8, got ", dtype);
  TORCH_CHECK_VALUE(classes >= 1 && classes - 1 <= most, op, ": dtype ", dtype, " cannot hold ", classes, " classes");
}

}  // namespace zs3fast

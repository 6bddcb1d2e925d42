// The vocabulary of mma.h without a GPU: 32 lanes in lock step, and warps that take turns between barriers.
//
// Values are those of the instructions, but for the last bits of a product's sum (the order in which a tensor core adds
// is not documented) and of exp_2. Registers and shared memory begin as NaN. What a GPU would not report throws here:
// addresses outside the buffers given to `Memory` or off their alignment, two warps that use the same shared bytes, one
// of them writing, without a barrier between them, a barrier that not every warp reaches, copies used before they were
// waited for (they land at the wait, and until then the bytes are NaN). Bank conflicts of matrix loads are counted.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/element.h"

namespace zs3fast::mma {

using cuda::BFloat16;
using cuda::Half;

constexpr int kLanes = 32;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

template <class T>
struct Lanes {
  T at[kLanes];

  Lanes() { std::memset(static_cast<void*>(at), std::is_same_v<T, bool> ? 1 : 0xff, sizeof at); }  // NaN, or -1
  Lanes(T x) { std::fill_n(at, kLanes, x); }

  template <class F>
  static Lanes make(F value_of_lane) {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = value_of_lane(i);
    return r;
  }

#define ZS3FAST_OPERATOR(RESULT, OP)                                  \
  friend RESULT operator OP(const Lanes& a, const Lanes& b) {         \
    return RESULT::make([&](int i) { return a.at[i] OP b.at[i]; });   \
  }
  ZS3FAST_OPERATOR(Lanes, +)
  ZS3FAST_OPERATOR(Lanes, -)
  ZS3FAST_OPERATOR(Lanes, *)
  ZS3FAST_OPERATOR(Lanes, /)
  ZS3FAST_OPERATOR(Lanes, %)
  ZS3FAST_OPERATOR(Lanes, &)
  ZS3FAST_OPERATOR(Lanes, |)
  ZS3FAST_OPERATOR(Lanes, ^)
  ZS3FAST_OPERATOR(Lanes, >>)
  ZS3FAST_OPERATOR(Lanes<bool>, ==)
  ZS3FAST_OPERATOR(Lanes<bool>, !=)
  ZS3FAST_OPERATOR(Lanes<bool>, <)
  ZS3FAST_OPERATOR(Lanes<bool>, >=)
#undef ZS3FAST_OPERATOR
};

inline Lanes<int> lane_index() {
  return Lanes<int>::make([](int i) { return i; });
}

template <class To, class From>
Lanes<To> cast(const Lanes<From>& x) {
  return Lanes<To>::make([&](int i) { return static_cast<To>(x.at[i]); });
}

template <class T>
Lanes<T> select(const Lanes<bool>& condition, const Lanes<T>& a, const std::type_identity_t<Lanes<T>>& b) {
  return Lanes<T>::make([&](int i) { return condition.at[i] ? a.at[i] : b.at[i]; });
}

template <class T>
Lanes<T> shuffle(const Lanes<T>& x, const Lanes<int>& from) {
  return Lanes<T>::make([&](int i) { return x.at[from.at[i] % kLanes]; });
}

template <class T>
Lanes<T> shuffle_xor(const Lanes<T>& x, int with) {
  return Lanes<T>::make([&](int i) { return x.at[i ^ with]; });
}

inline bool any(const Lanes<bool>& x) { return std::find(x.at, x.at + kLanes, true) != x.at + kLanes; }

inline uint32_t ballot(const Lanes<bool>& x) {
  uint32_t votes = 0;
  for (int i = 0; i < kLanes; ++i) votes |= static_cast<uint32_t>(x.at[i]) << i;
  return votes;
}

inline Lanes<float> larger(const Lanes<float>& a, const Lanes<float>& b) {
  return Lanes<float>::make([&](int i) { return std::fmax(a.at[i], b.at[i]); });
}
inline Lanes<float> fused(const Lanes<float>& a, const Lanes<float>& b, const Lanes<float>& c) {
  return Lanes<float>::make([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
}
inline Lanes<float> exp_2(const Lanes<float>& x) {
  return Lanes<float>::make([&](int i) { return cuda::fast_exp2(x.at[i]); });
}
inline Lanes<float> log_2(const Lanes<float>& x) {
  return Lanes<float>::make([&](int i) { return std::log2(x.at[i]); });
}
inline Lanes<uint32_t> as_bits(const Lanes<float>& x) {
  Lanes<uint32_t> r;
  std::memcpy(r.at, x.at, sizeof r.at);
  return r;
}

// 16-bit elements ----------------------------------------------------------------------------------------------------

template <class T>
float half_of(uint32_t pair, int high) {
  return cuda::to_float(T{static_cast<uint16_t>(pair >> (16 * high))});
}

template <bool kHigh>
Lanes<uint32_t> pair_of(const Lanes<uint32_t>& first, const Lanes<uint32_t>& second) {
  return Lanes<uint32_t>::make([&](int i) {
    const uint32_t a = first.at[i], b = second.at[i];
    return kHigh ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
  });
}

template <class T>
Lanes<uint32_t> pack(const Lanes<float>& low, const Lanes<float>& high) {
  return Lanes<uint32_t>::make([&](int i) {
    return cuda::from_float<T>(low.at[i]).bits | static_cast<uint32_t>(cuda::from_float<T>(high.at[i]).bits) << 16;
  });
}

template <class T>
void unpack(const Lanes<uint32_t>& pair, Lanes<float>& low, Lanes<float>& high) {
  for (int i = 0; i < kLanes; ++i) {
    low.at[i] = half_of<T>(pair.at[i], 0);
    high.at[i] = half_of<T>(pair.at[i], 1);
  }
}

template <class T>
void multiply_add(Lanes<float> (&sum)[4], const Lanes<uint32_t> (&a)[4], const Lanes<uint32_t>& b0,
                  const Lanes<uint32_t>& b1) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, place = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        left[group + i % 2 * 8][i / 2 * 8 + 2 * place + half] = half_of<T>(a[i].at[lane], half);
      right[2 * place + half][group] = half_of<T>(b0.at[lane], half);
      right[2 * place + half + 8][group] = half_of<T>(b1.at[lane], half);
    }
  }
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) product[row][column] += left[row][k] * right[k][column];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) sum[i].at[lane] += product[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

// Global memory ------------------------------------------------------------------------------------------------------

// The buffers that a kernel may touch: [begin, end) each.
struct Memory {
  static inline std::vector<std::pair<uintptr_t, uintptr_t>> buffers;

  static void check(const void* address, size_t bytes) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (at % bytes != 0) fail("global address off its alignment of " + std::to_string(bytes) + " bytes");
    for (const auto& [begin, end] : buffers)
      if (begin <= at && at + bytes <= end) return;
    fail("global address outside every buffer");
  }
};

template <int kWords, class T>
void load(Lanes<uint32_t> (&to)[kWords], const T* base, const Lanes<int64_t>& at, const Lanes<bool>& inside) {
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t words[kWords] = {};
    if (inside.at[lane]) {
      Memory::check(base + at.at[lane], sizeof words);
      std::memcpy(words, base + at.at[lane], sizeof words);
    }
    for (int i = 0; i < kWords; ++i) to[i].at[lane] = words[i];
  }
}

template <int kWords, class T>
void store(T* base, const Lanes<int64_t>& at, const Lanes<uint32_t> (&from)[kWords], const Lanes<bool>& inside) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!inside.at[lane]) continue;
    Memory::check(base + at.at[lane], 4 * kWords);
    for (int i = 0; i < kWords; ++i)
      std::memcpy(reinterpret_cast<unsigned char*>(base + at.at[lane]) + 4 * i, &from[i].at[lane], 4);
  }
}

// Blocks -------------------------------------------------------------------------------------------------------------

// Shared memory of a block, and who used each of its words since the last barrier.
class Shared {
 public:
  explicit Shared(int bytes) : bytes_(bytes, 0xff), uses_((bytes + 3) / 4) {}

  unsigned char* use(int warp, int at, int bytes, bool write) {
    if (at < 0 || at % bytes != 0 || at + bytes > static_cast<int>(bytes_.size()))
      fail("shared address " + std::to_string(at) + " for " + std::to_string(bytes) + " bytes");
    for (int word = at / 4; word < (at + bytes) / 4; ++word) {
      Use& use = uses_[word];
      if (use.epoch != epoch_) use = {epoch_, 0, 0};
      const uint32_t others = ~(1u << warp);
      if ((use.writers & others) || (write && (use.readers & others)))
        fail("two warps use shared byte " + std::to_string(4 * word) + " without a barrier between them");
      (write ? use.writers : use.readers) |= 1u << warp;
    }
    return bytes_.data() + at;
  }

  void barrier() { ++epoch_; }

 private:
  struct Use {
    int epoch = -1;
    uint32_t writers = 0, readers = 0;  // bits of warps
  };
  std::vector<unsigned char> bytes_;
  std::vector<Use> uses_;
  int epoch_ = 0;
};

class Block {
 public:
  static inline int64_t matrix_loads = 0, bank_conflicts = 0;

  Block(int warp, Shared& shared, std::function<void()> yield)
      : warp(warp), shared_(shared), yield_(std::move(yield)) {}

  const int warp;

  void sync() { yield_(); }

  void write(const Lanes<int>& at, const Lanes<float>& x, const Lanes<bool>& inside) {
    for (int i = 0; i < kLanes; ++i)
      if (inside.at[i]) std::memcpy(shared_.use(warp, at.at[i], 4, true), &x.at[i], 4);
  }
  Lanes<float> read(const Lanes<int>& at) {
    Lanes<float> x;
    for (int i = 0; i < kLanes; ++i) std::memcpy(&x.at[i], shared_.use(warp, at.at[i], 4, false), 4);
    return x;
  }
  void write(const Lanes<int>& at, const Lanes<float> (&x)[4]) {
    for (int i = 0; i < kLanes; ++i) {
      unsigned char* to = shared_.use(warp, at.at[i], 16, true);
      for (int j = 0; j < 4; ++j) std::memcpy(to + 4 * j, &x[j].at[i], 4);
    }
  }
  void read(Lanes<float> (&x)[4], const Lanes<int>& at) {
    for (int i = 0; i < kLanes; ++i) {
      const unsigned char* from = shared_.use(warp, at.at[i], 16, false);
      for (int j = 0; j < 4; ++j) std::memcpy(&x[j].at[i], from + 4 * j, 4);
    }
  }

  template <class T>
  void copy_async(const Lanes<int>& to, const T* base, const Lanes<int64_t>& at, const Lanes<bool>& inside) {
    for (int i = 0; i < kLanes; ++i) {
      const T* from = inside.at[i] ? base + at.at[i] : nullptr;
      if (from) Memory::check(from, 16);
      std::memset(shared_.use(warp, to.at[i], 16, true), 0xff, 16);
      open_.push_back({to.at[i], from});
    }
  }
  void close_group() { groups_.push_back(std::exchange(open_, {})); }
  template <int kOpen>
  void wait_for_groups() {
    for (; groups_.size() > kOpen; groups_.erase(groups_.begin()))
      for (const Copy& copy : groups_.front()) {
        unsigned char* to = shared_.use(warp, copy.to, 16, true);
        if (copy.from)
          std::memcpy(to, copy.from, 16);
        else
          std::memset(to, 0, 16);
      }
  }

  template <bool kTranspose>
  void load_matrices(Lanes<uint32_t> (&to)[4], const Lanes<int>& at) {
    ++matrix_loads;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      uint32_t banks = 0;
      for (int row = 0; row < 8; ++row) {
        const int from = at.at[8 * matrix + row];
        std::memcpy(element[row], shared_.use(warp, from, 16, false), 16);
        bank_conflicts += banks >> (from / 16 % 8) & 1;
        banks |= 1u << (from / 16 % 8);
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const int a = lane / 4, b = 2 * (lane % 4);
        const uint32_t low = kTranspose ? element[b][a] : element[a][b];
        const uint32_t high = kTranspose ? element[b + 1][a] : element[a][b + 1];
        to[matrix].at[lane] = low | high << 16;
      }
    }
  }

 private:
  struct Copy {
    int to;
    const void* from;  // null: zeros
  };
  Shared& shared_;
  std::function<void()> yield_;
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
};

// Runs body(warp) for every warp of a block, in turns: each as far as it can get, then the next.
class Warps {
 public:
  using Ready = std::function<bool()>;

  Warps(int count, std::function<void(int)> body) : body_(std::move(body)), fibers_(count) {
    for (int warp = 0; warp < count; ++warp) {
      Fiber& fiber = fibers_[warp];
      fiber.warps = this;
      fiber.stack = std::make_unique_for_overwrite<unsigned char[]>(kStack);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      const auto self = reinterpret_cast<uintptr_t>(&fiber);
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Warps::enter), 2, static_cast<unsigned>(self >> 32),
                  static_cast<unsigned>(self));
    }
  }

  // From within the body of a warp: it goes on once `ready` says so.
  void wait(int warp, Ready ready) {
    fibers_[warp].ready = std::move(ready);
    swapcontext(&fibers_[warp].context, &scheduler_);
  }

  // free(): every warp that is not done waits; does something that they may wait for, or throws.
  void run(const std::function<void()>& free) {
    for (;;) {
      bool any_ran = false, any_left = false;
      for (size_t warp = 0; warp < fibers_.size(); ++warp) {
        Fiber& fiber = fibers_[warp];
        if (fiber.done) continue;
        any_left = true;
        if (fiber.ready && !fiber.ready()) continue;
        any_ran = true;
        fiber.ready = nullptr;
        swapcontext(&scheduler_, &fiber.context);
        if (!fiber.error.empty()) fail("warp " + std::to_string(warp) + ": " + fiber.error);
      }
      if (!any_left) return;
      if (!any_ran) free();
    }
  }

 private:
  static constexpr size_t kStack = size_t{1} << 20;

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    Warps* warps;
    Ready ready;  // null: it can run
    bool done = false;
    std::string error;
  };

  static void enter(unsigned high, unsigned low) {
    auto& fiber = *reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
    try {
      fiber.warps->body_(static_cast<int>(&fiber - fiber.warps->fibers_.data()));
    } catch (const std::exception& error) {
      fiber.error = error.what();
    }
    fiber.done = true;
  }

  std::function<void(int)> body_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
};

// A barrier that all warps of a block reach, or none.
class Barrier {
 public:
  Barrier(Warps& warps, int count) : warps_(warps), count_(count) {}

  void wait(int warp) {
    ++waiting_;
    warps_.wait(warp, [this, mine = turn_] { return turn_ != mine; });
  }

  // Whether warps wait here, who go on now.
  bool open() {
    if (waiting_ == 0) return false;
    if (waiting_ != count_) fail("a barrier that not every warp reaches");
    waiting_ = 0;
    ++turn_;
    return true;
  }

 private:
  Warps& warps_;
  int count_, waiting_ = 0, turn_ = 0;
};

// Runs body(Block&) for every warp of a block: each up to the barrier, then the next.
class Launch {
 public:
  Launch(int warps, int shared_bytes, std::function<void(Block&)> body)
      : shared_(shared_bytes),
        warps_(warps,
               [this, body = std::move(body)](int warp) {
                 Block block(warp, shared_, [this, warp] { barrier_.wait(warp); });
                 body(block);
               }),
        barrier_(warps_, warps) {}

  void run() {
    warps_.run([this] {
      barrier_.open();
      shared_.barrier();
    });
  }

 private:
  Shared shared_;
  Warps warps_;
  Barrier barrier_;
};

}  // namespace zs3fast::mma

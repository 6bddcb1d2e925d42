// The vocabulary of wgmma.h without a GPU. A product of a warpgroup is made of what its warps multiply each, so a warp
// runs on its own; that all four of a group issue the same is looked at.
//
// Everything that a GPU may do late is done as late as it can be: copies land when no warp can go on, in any order, and
// their bytes are NaN until then; products are made at the `finish` that waits for them, and their sums are NaN until
// then. Who may know of what is kept as vector clocks: a warp's events have numbers, barriers hand on the numbers that
// those who arrive know of, and every 16 bytes of shared memory remember who read and wrote them. Thus it throws where
// a warp reads what it was not told is there, or lets the copy engine write where somebody may still read: whatever the
// order in which warps happened to take turns. It throws for registers used against the order in wgmma.h too.
#pragma once

#include <array>
#include <map>

namespace zs3fast::wgmma {

using mma::fail;
using mma::kLanes;

// As the engine's: lengths and strides (in bytes) of columns, tokens, heads, images.
struct Map {
  const unsigned char* data;
  std::array<int64_t, 4> length, stride;
  int rows;             // of a box of 64 columns
  bool swizzle = true;  // by 128 bytes
  int head_step = 1, image_step = 1;
};

// What one byte address is swizzled to: `bits` of its bits from 4 on are xored with those 3 further up.
inline uint32_t swizzled(uint32_t address, int bits) { return address ^ (address >> 3 & ((1u << bits) - 1) << 4); }

// The byte at which a descriptor finds the 16-bit element (column, k) of a right operand: PTX ISA, "Canonical Layouts".
inline uint32_t element_address(uint64_t descriptor, bool across, int column, int k) {
  const auto field = [&](int from) { return static_cast<uint32_t>(descriptor >> from & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  constexpr int kBits[] = {0, 3, 2, 1};
  const int bits = kBits[descriptor >> 62], width = 16 << bits;  // bytes that lie together before the pattern repeats
  if (descriptor >> 49 & 7) fail("a descriptor's base offset is not emulated");
  uint32_t at;
  if (across)  // ((8, 2^bits, m), (8, k)) : ((1, 8, LBO), (width, SBO)), or with LBO and SBO exchanged if not swizzled
    at = column % (width / 2) * 2 + column / (width / 2) * (bits ? leading : stride) + k % 8 * width +
         k / 8 * (bits ? stride : leading);
  else if (bits)  // ((8, m), (8, 2 k)) : ((width, SBO), (1, 8))
    at = column % 8 * width + column / 8 * stride + k * 2;
  else
    at = column % 8 * 16 + column / 8 * stride + k % 8 * 2 + k / 8 * leading;
  return swizzled(start + at, bits);
}

// Shared memory of a block, its barriers, and who knows of what.
class Shared {
 public:
  static constexpr uint32_t kBase = 3 * kAtom;  // where it begins
  static constexpr int kWarps = 16, kActors = 48;
  using Clock = std::array<uint32_t, kActors>;  // of every actor (a warp, the copies of a barrier) the last known event

  explicit Shared(int bytes) : bytes_((bytes + 15) / 16 * 16, 0xff), pieces_(bytes_.size() / 16) {
    for (int warp = 0; warp < kWarps; ++warp) clocks_[warp].fill(0), clocks_[warp][warp] = 1;
  }

  // Barriers ----------------------------------------------------------------------------------------------------------

  void start(int warp, int at, int arrivals) {
    if (at % 8 != 0 || at < 0 || at + 8 > static_cast<int>(bytes_.size())) fail("a barrier's address");
    if (barriers_.count(at)) fail("a barrier started twice");
    const int actor = kWarps + static_cast<int>(barriers_.size());
    if (actor >= kActors) fail("too many barriers to emulate");
    Phases phases{};
    phases.actor = actor, phases.starter = warp, phases.expected = phases.left = arrivals;
    write(warp, at / 16 * 16, 16);
    barriers_[at] = phases;
  }
  void publish(int warp) {
    for (auto& [at, phases] : barriers_) phases.published |= phases.starter == warp;
    for (Piece& piece : pieces_) piece.unfenced &= ~(1u << warp);
  }
  void sync() {  // of all warps
    Clock all{};
    for (const Clock& clock : clocks_) join(all, clock);
    for (int warp = 0; warp < kWarps; ++warp) clocks_[warp] = all, ++clocks_[warp][warp];
  }
  void arrive(int warp, int at, int bytes) {
    Phases& phases = known(warp, at);
    phases.bytes += bytes;
    join(phases.gathered, clocks_[warp]);
    ++clocks_[warp][warp];
    if (phases.left-- == 0) fail("more warps arrive at a barrier than it was started for");
    end_if_over(phases);
  }
  bool over(int warp, int at, int phase) { return known(warp, at).ended % 2 != phase; }
  void learn(int warp, int at) { join(clocks_[warp], known(warp, at).told); }

  // Copies ------------------------------------------------------------------------------------------------------------

  void copy(int warp, int to, const Map& map, int barrier, const std::array<int64_t, 4>& from) {
    if (!known(warp, barrier).published) fail("a barrier that the copy engine was not told of");
    if (to % (map.swizzle ? kAtom : kLine) != 0) fail("a copy to a place off its alignment");
    for (int row = 0; row < map.rows; ++row)
      for (int chunk = 0; chunk < kLine / 16; ++chunk) {
        const int at = swizzled_place(to, row, chunk, map.swizzle);
        write(warp, at, 16);
        pieces_[at / 16].landing = true;
        std::memset(&bytes_[at], 0xff, 16);
      }
    copies_.push_back({to, &map, barrier, from});
  }
  // One of the copies that were asked for, if there are any.
  bool land() {
    if (copies_.empty()) return false;
    random_ = random_ * 1664525u + 1013904223u;
    const size_t chosen = (random_ >> 16) % copies_.size();
    const Copy copy = copies_[chosen];
    copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(chosen));
    Phases& phases = barriers_.at(copy.barrier);
    const Map& map = *copy.map;
    const uint32_t event = ++events_[phases.actor];
    for (int row = 0; row < map.rows; ++row)
      for (int chunk = 0; chunk < kLine / 16; ++chunk) {
        const int64_t index[4] = {copy.from[0] + 8 * chunk, copy.from[1] + row, copy.from[2], copy.from[3]};
        const int at = swizzled_place(copy.to, row, chunk, map.swizzle);
        bool inside = true;
        const unsigned char* from = map.data;
        for (int axis = 0; axis < 4; ++axis) {
          inside = inside && index[axis] >= 0 && index[axis] < map.length[axis];
          from += index[axis] * map.stride[axis];
        }
        if (inside) mma::Memory::check(from, 16), std::memcpy(&bytes_[at], from, 16);
        if (!inside) std::memset(&bytes_[at], 0, 16);
        Piece& piece = pieces_[at / 16];
        piece.landing = false, piece.writer = phases.actor, piece.written = event;
      }
    phases.gathered[phases.actor] = event;
    phases.bytes -= int64_t{map.rows} * kLine;
    end_if_over(phases);
    return true;
  }

  // Pieces of 16 bytes ------------------------------------------------------------------------------------------------

  void write(int warp, int at, int bytes) {
    for (int i = at / 16; i < (at + bytes) / 16; ++i) {
      Piece& piece = piece_of(i);
      if (piece.landing || piece.being_read) fail("shared byte " + std::to_string(16 * i) + " is written to in use");
      if (piece.written > clocks_[warp][piece.writer]) fail_unordered(i);
      for (int reader = 0; reader < kWarps; ++reader)
        if (reader != warp && piece.read[reader] > clocks_[warp][reader]) fail_unordered(i);
      piece.writer = warp, piece.written = clocks_[warp][warp], piece.read.fill(0), piece.unfenced = 0;
    }
  }
  // By the warp's own instruction, not the copy engine's: products see it after `publish`.
  unsigned char* store(int warp, int at, int bytes) {
    write(warp, at, bytes);
    for (int i = at / 16; i < (at + bytes) / 16; ++i) pieces_[i].unfenced |= 1u << warp;
    return &bytes_[at];
  }
  // A product that reads it was issued, and was made.
  void begin_read(int warp, int i) {
    Piece& piece = piece_of(i);
    if (piece.landing || piece.written > clocks_[warp][piece.writer])
      fail("shared byte " + std::to_string(16 * i) + " is read and nobody told that it was there");
    if (piece.unfenced) fail("shared byte " + std::to_string(16 * i) + " was not published to products");
    ++piece.being_read;
  }
  void end_read(int warp, int i) {
    --pieces_[i].being_read;
    pieces_[i].read[warp] = clocks_[warp][warp];
  }
  uint16_t element(uint32_t address) const {
    uint16_t x;
    std::memcpy(&x, &bytes_[address - kBase], 2);
    return x;
  }

  // What warp `i` of a group issues is what the first of them issued.
  void issue(int warp, uint64_t what) {
    std::vector<uint64_t>& issued = issued_[warp / kGroupWarps];
    size_t& count = counts_[warp];
    if (count == issued.size()) issued.push_back(what);
    if (issued[count++] != what) fail("the warps of a group issue different products");
  }

 private:
  struct Piece {
    int writer = 0;
    uint32_t written = 0;
    std::array<uint32_t, kWarps> read{};
    bool landing = false;
    int being_read = 0;
    uint32_t unfenced = 0;  // bits of warps
  };
  struct Phases {
    int actor, starter, expected, left;
    int64_t ended, bytes;
    bool published;
    Clock gathered, told;
  };
  struct Copy {
    int to;
    const Map* map;
    int barrier;
    std::array<int64_t, 4> from;
  };

  static void join(Clock& to, const Clock& from) {
    for (int i = 0; i < kActors; ++i) to[i] = std::max(to[i], from[i]);
  }
  static void end_if_over(Phases& phases) {
    if (phases.left != 0 || phases.bytes != 0) return;
    ++phases.ended;
    phases.left = phases.expected;
    join(phases.told, phases.gathered);
  }
  static int swizzled_place(int to, int row, int chunk, bool swizzle) {
    return static_cast<int>(swizzled(kBase + to + row * kLine + chunk * 16, swizzle ? 3 : 0) - kBase);
  }
  [[noreturn]] static void fail_unordered(int i) {
    fail("shared byte " + std::to_string(16 * i) + " is written to and nobody told that it was free");
  }
  Piece& piece_of(int i) {
    if (i < 0 || i >= static_cast<int>(pieces_.size())) fail("shared address " + std::to_string(16 * i));
    return pieces_[i];
  }
  Phases& known(int warp, int at) {
    const auto found = barriers_.find(at);
    if (found == barriers_.end()) fail("no barrier was started at byte " + std::to_string(at));
    const Piece& piece = pieces_[at / 16];
    if (piece.written > clocks_[warp][piece.writer]) fail("a barrier is used and nobody told that it was started");
    return found->second;
  }

  std::vector<unsigned char> bytes_;
  std::vector<Piece> pieces_;
  std::array<Clock, kWarps> clocks_;
  std::array<uint32_t, kActors> events_{};
  std::map<int, Phases> barriers_;
  std::vector<Copy> copies_;
  std::array<std::vector<uint64_t>, kWarps / kGroupWarps> issued_;
  std::array<size_t, kWarps> counts_{};
  uint32_t random_ = 1;
};

class Block {
 public:
  using Wait = std::function<void(std::function<bool()>)>;

  Block(int warp, Shared& shared, std::function<void()> sync, Wait wait)
      : warp(warp), shared_(shared), sync_(std::move(sync)), wait_(std::move(wait)) {}

  const int warp;

  void sync() { sync_(); }
  void start(int barrier, int arrivals) { shared_.start(warp, barrier, arrivals); }
  void publish() { shared_.publish(warp); }
  void expect(int barrier, int bytes) { shared_.arrive(warp, barrier, bytes); }
  void arrive(int barrier) { shared_.arrive(warp, barrier, 0); }
  void wait(int barrier, int phase) {
    if (!shared_.over(warp, barrier, phase)) wait_([=, this] { return shared_.over(warp, barrier, phase); });
    shared_.learn(warp, barrier);
  }
  void copy(int to, const Map& map, int barrier, int column, int token, int head, int image) {
    shared_.copy(warp, to, map, barrier, {column, token, head * map.head_step, image * map.image_step});
  }
  uint64_t operand(int at, int leading, int stride) const { return descriptor(Shared::kBase + at, leading, stride); }

  // 16 bytes a lane, by the warp itself.
  void write(const Lanes<int>& at, const Lanes<uint32_t> (&x)[4]) {
    for (int lane = 0; lane < kLanes; ++lane) {
      unsigned char* to = shared_.store(warp, at.at[lane], 16);
      for (int i = 0; i < 4; ++i) std::memcpy(to + 4 * i, &x[i].at[lane], 4);
    }
  }

  template <class... Registers>
  void fence(Registers&... registers) {
    ((fenced_[&registers] = bits_of(&registers, sizeof registers)), ...);
  }

  template <class T, bool kAcross, int kTiles>
  void multiply(Lanes<float> (&sum)[kTiles][4], const Lanes<uint32_t> (&a)[4], uint64_t right, bool add) {
    shared_.issue(warp, right ^ uint64_t{kTiles} << 50 ^ uint64_t{kAcross} << 56 ^ uint64_t{add} << 57);
    if (!is_fenced(a, sizeof a)) fail("the left operand of a product changed since the last fence");
    if (!sums_.count(&sum)) {
      if (!is_fenced(&sum, sizeof sum)) fail("the sums of a product changed since the last fence");
      sums_[&sum] = {bits_of(&sum, sizeof sum), 0};
      std::memset(static_cast<void*>(&sum), 0xff, sizeof sum);
    }
    ++sums_[&sum].products;

    std::vector<uint32_t> place(8 * kTiles * 16);  // of the right operand
    std::vector<int> pieces;
    for (int column = 0; column < 8 * kTiles; ++column)
      for (int k = 0; k < 16; ++k) {
        const uint32_t at = element_address(right, kAcross, column, k);
        place[column * 16 + k] = at;
        pieces.push_back(static_cast<int>(at - Shared::kBase) / 16);
      }
    std::sort(pieces.begin(), pieces.end());
    pieces.erase(std::unique(pieces.begin(), pieces.end()), pieces.end());
    for (int piece : pieces) shared_.begin_read(warp, piece);

    const auto left = bits_of(a, sizeof a);
    open_.push_back({&sum, sizeof sum, [=, this, &sum, &a, place = std::move(place), pieces = std::move(pieces)] {
      if (bits_of(a, sizeof a) != left) fail("the left operand of a product changed before it was finished");
      auto& values = *reinterpret_cast<Lanes<float>(*)[kTiles][4]>(sums_.at(&sum).values.data());
      if (!add) std::fill_n(&values[0][0], 4 * kTiles, Lanes<float>(0.0f));
      multiply_now<T, kTiles>(values, a, place);
      for (int piece : pieces) shared_.end_read(warp, piece);
    }});
  }

  void commit() { groups_.push_back(std::exchange(open_, {})); }

  template <int kOpen, class... Registers>
  void finish(Registers&... sums) {
    for (; groups_.size() > kOpen; groups_.erase(groups_.begin()))
      for (const Product& product : groups_.front()) {
        check_untouched(product);
        product.make();
        Sums& now = sums_.at(product.sum);
        if (--now.products > 0) continue;
        std::memcpy(product.sum, now.values.data(), product.bytes);
        sums_.erase(product.sum);
        fenced_.erase(product.sum);
      }
    if ((sums_.count(&sums) + ...)) fail("sums that are waited for are of a group that may be open");
  }

  void done() const {
    if (!open_.empty() || !groups_.empty()) fail("a warp ends with products that were not waited for");
  }

 private:
  struct Sums {
    std::vector<unsigned char> values;
    int products;  // that are to be made
  };
  struct Product {
    void* sum;
    size_t bytes;
    std::function<void()> make;
  };

  static std::vector<unsigned char> bits_of(const void* x, size_t bytes) {
    const auto* from = static_cast<const unsigned char*>(x);
    return {from, from + bytes};
  }
  // Whether the registers are some of those that the last fence named, and have not changed.
  bool is_fenced(const void* x, size_t bytes) const {
    const auto* at = static_cast<const unsigned char*>(x);
    for (const auto& [registers, bits] : fenced_) {
      const auto* from = static_cast<const unsigned char*>(registers);
      if (at < from || at + bytes > from + bits.size()) continue;
      if (std::memcmp(at, bits.data() + (at - from), bytes) == 0) return true;
    }
    return false;
  }
  static void check_untouched(const Product& product) {
    const auto* bits = static_cast<const unsigned char*>(product.sum);
    if (std::count(bits, bits + product.bytes, 0xff) != static_cast<std::ptrdiff_t>(product.bytes))
      fail("the sums of a product were written to before it was finished");
  }
  template <class T, int kTiles>
  void multiply_now(Lanes<float> (&sum)[kTiles][4], const Lanes<uint32_t> (&a)[4], const std::vector<uint32_t>& place) {
    float left[16][16];
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 8; ++i)
        left[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + 2 * (lane % 4) + i % 2] =
            mma::half_of<T>(a[i / 2].at[lane], i % 2);
    for (int column = 0; column < 8 * kTiles; ++column) {
      float right[16], product[16] = {};
      for (int k = 0; k < 16; ++k) right[k] = cuda::to_float(T{shared_.element(place[column * 16 + k])});
      for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) product[row] += left[row][k] * right[k];
      for (int row = 0; row < 16; ++row)
        sum[column / 8][row / 8 * 2 + column % 2].at[row % 8 * 4 + column % 8 / 2] += product[row];
    }
  }

  Shared& shared_;
  std::function<void()> sync_;
  Wait wait_;
  std::map<const void*, std::vector<unsigned char>> fenced_;
  std::map<const void*, Sums> sums_;
  std::vector<Product> open_;
  std::vector<std::vector<Product>> groups_;
};

// Runs body(Block&) for every warp of a block.
class Launch {
 public:
  Launch(int warps, int shared_bytes, std::function<void(Block&)> body)
      : shared_(shared_bytes),
        warps_(warps,
               [this, body = std::move(body)](int warp) {
                 Block block(
                     warp, shared_, [this, warp] { barrier_.wait(warp); },
                     [this, warp](std::function<bool()> ready) { warps_.wait(warp, std::move(ready)); });
                 body(block);
                 block.done();
               }),
        barrier_(warps_, warps) {}

  void run() {
    warps_.run([this] {
      if (shared_.land()) return;
      if (!barrier_.open()) fail("every warp waits for a phase that does not end");
      shared_.sync();
    });
  }

 private:
  Shared shared_;
  mma::Warps warps_;
  mma::Barrier barrier_;
};

}  // namespace zs3fast::wgmma

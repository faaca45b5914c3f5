// Rows of the hop in 8 bits and back, in one pass over memory: proto/rounding.py calls these.
//
// Written as loops over a group of known size, which the compiler turns into vectors, for each instruction set anew.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kGroup = 64;  // columns that share a scale

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define BEST_OF_EACH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define BEST_OF_EACH
#endif
#define INLINE inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// `n` numbers of a group, at most kGroup of them; called with a constant they are vectors.
INLINE void load(const char* from, bool bf16, int64_t n, float* x) {
  if (bf16) {
    uint16_t halves[kGroup];
    std::memcpy(halves, from, n * sizeof *halves);
    for (int64_t i = 0; i < n; ++i) x[i] = float_of(static_cast<uint32_t>(halves[i]) << 16);
  } else {
    std::memcpy(x, from, n * sizeof *x);
  }
}

// The largest number becomes 127. Of a group with an infinity or a NaN the scale is one, too.
INLINE float round_group(const char* from, bool bf16, int64_t n, int8_t* steps) {
  float x[kGroup];
  load(from, bf16, n, x);
  uint32_t most = 0;  // sizes of floats are in the order of their bits, and those of NaNs above all
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t size = bits_of(x[i]) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  const float scale = float_of(most) / 127.0f;
  const float factor = 1.0f / (scale > FLT_MIN ? scale : FLT_MIN);
  // To nearest, ties to even: adding 1.5 * 2^23 leaves the whole number in the low bits.
  for (int64_t i = 0; i < n; ++i) steps[i] = static_cast<int8_t>(bits_of(x[i] * factor + 12582912.0f));
  return scale;
}

INLINE void unround_group(const int8_t* steps, float scale, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(steps[i]) * scale;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t moehive_proto_abi() { return 7; }

// `from` [rows, columns] f32 or bf16 of any alignment: steps [rows, columns], scales [rows, groups of 64 columns].
EXPORT BEST_OF_EACH void moehive_round(const char* from, int32_t bf16, int64_t rows, int64_t columns, int8_t* steps,
                                       float* scales) {
  const int64_t width = bf16 ? 2 : 4, whole = columns / kGroup * kGroup;
  for (int64_t row = 0; row < rows; ++row, from += columns * width, steps += columns) {
    if (bf16) {
      for (int64_t at = 0; at < whole; at += kGroup) *scales++ = round_group(from + at * 2, true, kGroup, steps + at);
    } else {
      for (int64_t at = 0; at < whole; at += kGroup) *scales++ = round_group(from + at * 4, false, kGroup, steps + at);
    }
    if (whole < columns) *scales++ = round_group(from + whole * width, bf16 != 0, columns - whole, steps + whole);
  }
}

// out [rows, columns] = steps times their scales, the latter of any alignment. Returns whether all scales are finite.
EXPORT BEST_OF_EACH int32_t moehive_unround(const int8_t* steps, const char* scales, int64_t rows, int64_t columns,
                                            float* out) {
  const int64_t whole = columns / kGroup * kGroup;
  bool finite = true;
  for (int64_t row = 0; row < rows; ++row, steps += columns, out += columns) {
    for (int64_t at = 0; at < columns; at += kGroup, scales += sizeof(float)) {
      float scale;
      std::memcpy(&scale, scales, sizeof scale);
      finite = finite && std::isfinite(scale);
      if (at < whole) {
        unround_group(steps + at, scale, kGroup, out + at);
      } else {
        unround_group(steps + at, scale, columns - at, out + at);
      }
    }
  }
  return finite;
}

// Rows of the hop in 8 bits and back, in one pass over memory: proto/rounding.py calls these.
//
// Written as loops over a group of known size, which the compiler turns into vectors, for each instruction set anew.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kGroup = 64;  // columns that share a scale
constexpr int64_t kTile = 2048;  // columns added up before they are written: what they take stays in the first cache
constexpr int64_t kLanes = 16;

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

// The bits of the `i`th number as f32. Read anew where they are needed: an array of them would be copied in pieces of
// another size than it is read, which waits until they have reached the cache.
INLINE uint32_t bits_at(const char* from, bool bf16, int64_t i) {
  if (bf16) {
    uint16_t half;
    std::memcpy(&half, from + i * sizeof half, sizeof half);
    return static_cast<uint32_t>(half) << 16;
  }
  uint32_t bits;
  std::memcpy(&bits, from + i * sizeof bits, sizeof bits);
  return bits;
}

// `n` numbers of a group, at most kGroup of them; called with a constant they are vectors. The largest becomes 127. Of
// a group with an infinity or a NaN the scale is one, too.
INLINE float round_group(const char* from, bool bf16, int64_t n, int8_t* steps) {
  uint32_t most = 0;  // sizes of floats are in the order of their bits, and those of NaNs above all
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t size = bits_at(from, bf16, i) & 0x7fffffffu;
    most = size > most ? size : most;
  }
  const float scale = float_of(most) / 127.0f;
  const float factor = 1.0f / (scale > FLT_MIN ? scale : FLT_MIN);
  // To nearest, ties to even: adding 1.5 * 2^23 leaves the whole number in the low bits.
  for (int64_t i = 0; i < n; ++i)
    steps[i] = static_cast<int8_t>(bits_of(float_of(bits_at(from, bf16, i)) * factor + 12582912.0f));
  return scale;
}

INLINE float scale_at(const char* scales) {
  float scale;
  std::memcpy(&scale, scales, sizeof scale);
  return scale;
}

// A group's numbers to `sums`, or added to what is there.
INLINE void unround_group(const int8_t* steps, float scale, int64_t n, bool first, float* sums) {
  if (first) {
    for (int64_t i = 0; i < n; ++i) sums[i] = static_cast<float>(steps[i]) * scale;
  } else {
    for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<float>(steps[i]) * scale;
  }
}

// `columns` of a row, from the first of a group on, likewise.
INLINE void unround_columns(const int8_t* steps, const char* scales, int64_t columns, bool first, float* sums) {
  const int64_t whole = columns / kGroup * kGroup;
  for (int64_t at = 0; at < whole; at += kGroup, scales += sizeof(float))
    unround_group(steps + at, scale_at(scales), kGroup, first, sums + at);
  if (whole < columns) unround_group(steps + whole, scale_at(scales), columns - whole, first, sums + whole);
}

// To nearest, ties to even; of an infinity itself. There are no NaNs: scales are finite.
INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t moehive_proto_abi() { return 8; }

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

// out [rows, columns] = steps times their scales, the latter of any alignment.
EXPORT BEST_OF_EACH void moehive_unround(const int8_t* steps, const char* scales, int64_t rows, int64_t columns,
                                         float* out) {
  const int64_t groups = (columns + kGroup - 1) / kGroup;
  for (int64_t row = 0; row < rows; ++row)
    unround_columns(steps + row * columns, scales + row * groups * sizeof(float), columns, true, out + row * columns);
}

// out [rows, columns], f32 or bf16 = what moehive_unround gives of each of `number` parts, added in their order; at
// least one. Returns whether the sum of all squares is finite.
EXPORT BEST_OF_EACH int32_t moehive_add_rounded(const int8_t* const* steps, const char* const* scales, int64_t number,
                                                int64_t rows, int64_t columns, int32_t bf16, char* out) {
  const int64_t groups = (columns + kGroup - 1) / kGroup;
  float squares[kLanes] = {}, sums[kTile];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t at = 0; at < columns; at += kTile) {
      const int64_t wide = columns - at < kTile ? columns - at : kTile, first = row * columns + at;
      const int64_t scale = (row * groups + at / kGroup) * static_cast<int64_t>(sizeof(float));
      unround_columns(steps[0] + first, scales[0] + scale, wide, true, sums);
      for (int64_t p = 1; p < number; ++p) unround_columns(steps[p] + first, scales[p] + scale, wide, false, sums);
      for (int64_t i = wide; i % kLanes != 0; ++i) sums[i] = 0.0f;
      for (int64_t i = 0; i < wide; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) squares[lane] += sums[i + lane] * sums[i + lane];
      if (bf16) {
        for (int64_t i = 0; i < wide; ++i) {
          const uint16_t half = to_bf16(sums[i]);
          std::memcpy(out + (first + i) * sizeof half, &half, sizeof half);
        }
      } else {
        std::memcpy(out + first * sizeof *sums, sums, wide * sizeof *sums);
      }
    }
  }
  float all = 0.0f;
  for (float one : squares) all += one;
  return std::isfinite(all);
}

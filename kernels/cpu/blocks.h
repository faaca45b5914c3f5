// Formats whose numbers share scales, and the computing layout in which a blob holds them.
//
// A projection [rows, columns] is stored in groups of 16 rows; a group is a sequence of blocks, one for each 32 or
// 256 columns, each with the numbers of all 16 rows. So a row is a lane: there are no sums across lanes, one load
// brings the scales of 16 rows, and memory is read from front to back. Rows are padded to 16, columns to blocks.
//
//     block    [16 f16 scales] [16 f16 minimums] [sub-block scales] unit, unit, ...       one unit for each 32 columns
//     unit     [low bits of 32 columns x 16 rows] [high bits]
//
// A vector is 64 bytes: 4 columns of each of 16 rows. Column group i of a unit is its columns 4 i .. 4 i + 3.
//     low 8 bits   vector i is column group i
//     low 4 bits   vector i holds column group 2 i in the lower halves of its bytes, 2 i + 1 in the upper ones
//     low 2 bits   vector i holds column groups 4 i .. 4 i + 3, from the lowest bits up
//     high 2 bits  as low 2 bits
//     high 1 bit   one vector, bit i is column group i
// Sub-block scales of 6 bits are split: 4 lower bits, then 2 upper bits, [scale][row] in either part; see Layout.
#pragma once

#include <cstdint>

namespace moehive {

enum class Format : int32_t {
  f32 = 0, bf16, f16, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs,
  int4_g32, int4_g64, int4_g128, mxfp4, fp8_block,
};

constexpr int64_t kGroupRows = 16, kUnitColumns = 32;
constexpr int64_t kFp8Columns = 128, kFp8Bytes = 16 + kFp8Columns * kGroupRows;  // of a block; see fp8-inl.h

// How sub-block scales are stored, for 16 rows of a block of 256 columns.
enum class Scales : int32_t {
  none,
  nibbles,  // one byte for each 16 columns: scale in the lower half, minimum in the upper (q2_k): 16 x 16 bytes
  pairs6,   // for each 32 columns two numbers of 6 bits: scale and minimum (q4_k, q5_k), or the scales of both halves
            // (q3_k): 8 x 16 bytes of lower bits (first number in the lower half), 4 x 16 of upper bits (four numbers)
  single6,  // one number of 6 bits for each 32 columns (iq4_xs): 4 x 16 bytes of lower bits, 2 x 16 of upper bits
  zeros,    // one byte a row (int4): the code that means 0 in the lower half, in the upper n: the f16 scale is meant
            // times 2^-8n, so that small bf16 scales are exact; no second f16 factor
  e8m0,     // one byte a row (mxfp4): the scale is 2^(byte - 127); no f16 factors at all
  bytes,    // one byte for each 16 columns (q6_k): 16 x 16 bytes
};

constexpr int64_t scales_bytes(Scales kind) {
  switch (kind) {
    case Scales::none: return 0;
    case Scales::zeros: case Scales::e8m0: return 16;
    case Scales::pairs6: return 192;
    case Scales::single6: return 96;
    default: return 256;
  }
}

struct Layout {
  int32_t units;      // of 32 columns in a block
  int32_t low, high;  // bits
  bool minimum;       // a second f16 factor for each row
  Scales scales;

  constexpr int64_t columns() const { return units * kUnitColumns; }
  constexpr int64_t head() const {
    return (scales == Scales::e8m0 ? 0 : 32) + (minimum && scales != Scales::zeros ? 32 : 0) + scales_bytes(scales);
  }
  constexpr int64_t unit_bytes() const { return (low + high) * 64; }
  constexpr int64_t bytes() const { return head() + units * unit_bytes(); }
};

// Valid for the block formats; `units` is 0 for the others.
constexpr Layout layout_of(Format format) {
  switch (format) {
    case Format::q8_0: return {1, 8, 0, false, Scales::none};
    case Format::q4_0: return {1, 4, 0, false, Scales::none};
    case Format::q4_1: return {1, 4, 0, true, Scales::none};
    case Format::q5_0: return {1, 4, 1, false, Scales::none};
    case Format::q5_1: return {1, 4, 1, true, Scales::none};
    case Format::iq4_nl: return {1, 4, 0, false, Scales::none};
    case Format::q2_k: return {8, 2, 0, true, Scales::nibbles};
    case Format::q3_k: return {8, 2, 1, false, Scales::pairs6};
    case Format::q4_k: return {8, 4, 0, true, Scales::pairs6};
    case Format::q5_k: return {8, 4, 1, true, Scales::pairs6};
    case Format::q6_k: return {8, 4, 2, false, Scales::bytes};
    case Format::iq4_xs: return {8, 4, 0, false, Scales::single6};
    case Format::int4_g32: return {1, 4, 0, true, Scales::zeros};
    case Format::int4_g64: return {2, 4, 0, true, Scales::zeros};
    case Format::int4_g128: return {4, 4, 0, true, Scales::zeros};
    case Format::mxfp4: return {1, 4, 0, false, Scales::e8m0};
    default: return {0, 0, 0, false, Scales::none};
  }
}

constexpr bool is_block(Format format) { return layout_of(format).units != 0; }

// A vector of activations in 8 bits: q[k] * d[k / 32]. `q` has padded_units(columns) * 32 numbers, zeros at the end,
// for each unit `d` one scale, `s` two sums (of 16 numbers each), `m` d times the sum of both.
struct Quantized {
  const int8_t* q;
  const float* d;
  const float* m;
  const int32_t* s;
};

// Whole blocks of 256 columns, whatever the format.
constexpr int64_t padded_units(int64_t columns) { return (columns + 255) / 256 * 8; }

// Bytes of one Quantized vector's arrays, aligned to 64.
constexpr int64_t quantized_bytes(int64_t columns) { return (padded_units(columns) * 48 + 63) / 64 * 64; }

// Lays a Quantized out in `memory` (quantized_bytes, aligned to 64).
inline Quantized quantized_at(void* memory, int64_t columns) {
  const int64_t units = padded_units(columns);
  char* at = static_cast<char*>(memory);
  return {reinterpret_cast<const int8_t*>(at), reinterpret_cast<const float*>(at + units * 32),
          reinterpret_cast<const float*>(at + units * 36), reinterpret_cast<const int32_t*>(at + units * 40)};
}

}  // namespace moehive

// From a GGUF file's rows to the computing layout of blocks.h, for ctypes (kernels/formats/blocks.py). The file's blocks
// are those of ggml-common.h; what their bits mean, ggml-quants.c says. The 16 blocks that become one are taken apart
// first, so that what follows is the same for 16 rows at once. Loops over bytes are left to the compiler's vectors.
#include <algorithm>
#include <cstring>

#include "pack.h"

namespace {

using namespace moehive;

// One row's block, taken apart.
struct Parts {
  uint8_t codes[256];   // as many as the block has columns
  uint8_t factors[4];   // d and m, f16
  uint8_t first[16], second[16];  // sub-block numbers, as Scales stores them
};

void halves(const uint8_t* from, int bytes, uint8_t* codes) {
  for (int i = 0; i < bytes; ++i) {
    codes[i] = from[i] & 15;
    codes[bytes + i] = from[i] >> 4;
  }
}

// 4 bits of 32 columns, and a fifth in a little-endian word.
void five(const uint8_t* bits, const uint8_t* from, uint8_t* codes) {
  halves(from, 16, codes);
  for (int k = 0; k < 8; ++k) {
    const uint32_t four = bits[k / 2] >> (4 * (k % 2)) & 15;
    uint32_t word = (four * 0x00204081u & 0x01010101u) << 4;  // bit i to byte i, of a little-endian word
    uint8_t bytes[4];
    std::memcpy(bytes, &word, 4);
    for (int i = 0; i < 4; ++i) codes[4 * k + i] |= bytes[i];
  }
}

void two_bits(const uint8_t* from, uint8_t* codes) {
  for (int half = 0; half < 2; ++half)
    for (int j = 0; j < 4; ++j)
      for (int l = 0; l < 32; ++l) codes[128 * half + 32 * j + l] = from[32 * half + l] >> (2 * j) & 3;
}

void pairs_of_32(const uint8_t* from, uint8_t* codes) {
  for (int i = 0; i < 4; ++i) halves(from + 32 * i, 32, codes + 64 * i);
}

// Bit k of byte l belongs to column 32 k + l.
void add_bits(const uint8_t* from, int shift, uint8_t* codes) {
  for (int k = 0; k < 8; ++k)
    for (int l = 0; l < 32; ++l) codes[32 * k + l] |= (from[l] >> k & 1) << shift;
}

// 12 bytes: scales and minimums of 8 sub-blocks, 6 bits each.
void scales_and_minimums(const uint8_t* from, Parts& to) {
  for (int i = 0; i < 4; ++i) {
    to.first[i] = from[i] & 63;
    to.second[i] = from[4 + i] & 63;
    to.first[4 + i] = (from[8 + i] & 15) | from[i] >> 6 << 4;
    to.second[4 + i] = from[8 + i] >> 4 | from[4 + i] >> 6 << 4;
  }
}

void factors(const uint8_t* d, const uint8_t* m, Parts& to) {
  std::memcpy(to.factors, d, 2);
  if (m) std::memcpy(to.factors + 2, m, 2);
}

void take_apart(Format format, const uint8_t* b, Parts& to) {
  switch (format) {
    case Format::q8_0:
      factors(b, nullptr, to);
      std::memcpy(to.codes, b + 2, 32);
      return;
    case Format::q4_0: case Format::iq4_nl:
      factors(b, nullptr, to);
      return halves(b + 2, 16, to.codes);
    case Format::q4_1:
      factors(b, b + 2, to);
      return halves(b + 4, 16, to.codes);
    case Format::q5_0:
      factors(b, nullptr, to);
      return five(b + 2, b + 6, to.codes);
    case Format::q5_1:
      factors(b, b + 2, to);
      return five(b + 4, b + 8, to.codes);
    case Format::q2_k:
      factors(b + 80, b + 82, to);
      two_bits(b + 16, to.codes);
      std::memcpy(to.first, b, 16);
      return;
    case Format::q3_k:
      factors(b + 108, nullptr, to);
      two_bits(b + 32, to.codes);
      add_bits(b, 2, to.codes);
      for (int k = 0; k < 16; ++k) {  // of the sub-blocks 2 u and 2 u + 1
        const uint8_t low = k < 8 ? b[96 + k] & 15 : b[88 + k] >> 4;
        (k % 2 ? to.second : to.first)[k / 2] = low | (b[104 + k % 4] >> (2 * (k / 4)) & 3) << 4;
      }
      return;
    case Format::q4_k:
      factors(b, b + 2, to);
      scales_and_minimums(b + 4, to);
      return pairs_of_32(b + 16, to.codes);
    case Format::q5_k:
      factors(b, b + 2, to);
      scales_and_minimums(b + 4, to);
      pairs_of_32(b + 48, to.codes);
      return add_bits(b + 16, 4, to.codes);
    case Format::q6_k:
      factors(b + 208, nullptr, to);
      for (int part = 0; part < 4; ++part)
        for (int l = 0; l < 32; ++l) {
          const uint8_t low = b[32 * part + l];
          const uint8_t high = b[128 + 32 * (part / 2) + l] >> (part % 2 * 2);
          uint8_t* codes = to.codes + 128 * (part / 2) + 32 * (part % 2) + l;
          codes[0] = (low & 15) | (high & 3) << 4;
          codes[64] = low >> 4 | (high >> 4 & 3) << 4;
        }
      std::memcpy(to.first, b + 192, 16);
      return;
    case Format::iq4_xs:
      factors(b, nullptr, to);
      for (int k = 0; k < 8; ++k)
        to.first[k] = (b[4 + k / 2] >> (4 * (k % 2)) & 15) | (b[2 + k / 4] >> (2 * (k % 4)) & 3) << 4;
      for (int k = 0; k < 8; ++k) halves(b + 8 + 16 * k, 16, to.codes + 32 * k);
      return;
    case Format::mxfp4:
      to.first[0] = b[0];
      return halves(b + 1, 16, to.codes);
    default: return;
  }
}

void put_scales(Scales kind, const Parts& from, int64_t row, uint8_t* to) {
  switch (kind) {
    case Scales::none: case Scales::zeros: return;  // no file has `zeros`
    case Scales::e8m0:
      to[row] = from.first[0];
      return;
    case Scales::nibbles: case Scales::bytes:
      for (int k = 0; k < 16; ++k) to[16 * k + row] = from.first[k];
      return;
    case Scales::pairs6:
      for (int u = 0; u < 8; ++u) {
        to[16 * u + row] = (from.first[u] & 15) | (from.second[u] & 15) << 4;
        to[128 + 16 * (u / 2) + row] |= (from.first[u] >> 4 | from.second[u] >> 4 << 2) << (4 * (u % 2));
      }
      return;
    case Scales::single6:
      for (int u = 0; u < 8; ++u) {
        to[16 * (u / 2) + row] |= (from.first[u] & 15) << (4 * (u % 2));
        to[64 + 16 * (u / 4) + row] |= from.first[u] >> 4 << (2 * (u % 4));
      }
      return;
  }
}

// The codes of 4 columns in each word: [column group][row].
using Words = uint32_t[kGroupRows];

// 8 column groups into `Bits` vectors of `Bits` bits a code, `shift` bits above the codes' lowest.
template <int Bits>
void put_plane(const Words* codes, int shift, uint8_t* to) {
  constexpr int shared = 8 / Bits;
  constexpr uint32_t mask = ((1 << Bits) - 1) * 0x01010101u;
  for (int vector = 0; vector < Bits; ++vector) {
    uint32_t words[kGroupRows] = {};
    for (int part = 0; part < shared; ++part)
      for (int row = 0; row < kGroupRows; ++row)
        words[row] |= (codes[shared * vector + part][row] >> shift & mask) << (Bits * part);
    std::memcpy(to + 64 * vector, words, 64);
  }
}

void put_unit(const Layout& layout, const Words* codes, uint8_t* to) {
  if (layout.low == 8) put_plane<8>(codes, 0, to);
  if (layout.low == 4) put_plane<4>(codes, 0, to);
  if (layout.low == 2) put_plane<2>(codes, 0, to);
  if (layout.high == 1) put_plane<1>(codes, layout.low, to + 64 * layout.low);
  if (layout.high == 2) put_plane<2>(codes, layout.low, to + 64 * layout.low);
}

// One block of the layout, of the blocks of `rows` (1 to 16) rows, `stride` bytes apart.
void put_block(Format format, const Layout& layout, const uint8_t* from, int64_t stride, int64_t rows, uint8_t* to) {
  alignas(64) Words codes[64];
  const int64_t groups = layout.columns() / 4;
  if (rows < kGroupRows) std::memset(codes, 0, sizeof codes);
  std::memset(to, 0, layout.head());
  for (int64_t row = 0; row < rows; ++row) {
    Parts parts;
    take_apart(format, from + row * stride, parts);
    for (int64_t group = 0; group < groups; ++group) std::memcpy(&codes[group][row], parts.codes + 4 * group, 4);
    if (layout.scales != Scales::e8m0) std::memcpy(to + 2 * row, parts.factors, 2);
    if (layout.minimum) std::memcpy(to + 32 + 2 * row, parts.factors + 2, 2);
    put_scales(layout.scales, parts, row, to + layout.head() - scales_bytes(layout.scales));
  }
  for (int unit = 0; unit < layout.units; ++unit)
    put_unit(layout, codes + 8 * unit, to + layout.head() + unit * layout.unit_bytes());
}

}  // namespace

int64_t moehive::file_bytes(Format format) {
  switch (format) {
    case Format::q8_0: return 34;
    case Format::q4_0: case Format::iq4_nl: return 18;
    case Format::q4_1: return 20;
    case Format::q5_0: return 22;
    case Format::q5_1: return 24;
    case Format::q2_k: return 84;
    case Format::q3_k: return 110;
    case Format::q4_k: return 144;
    case Format::q5_k: return 176;
    case Format::q6_k: return 210;
    case Format::iq4_xs: return 136;
    case Format::mxfp4: return 17;
    default: return 0;
  }
}

int32_t moehive_pack(int32_t number, const uint8_t* from, int64_t rows, int64_t blocks, uint8_t* out) {
  const Format format = static_cast<Format>(number);
  const int64_t size = file_bytes(format);
  if (size == 0 || rows < 0 || blocks < 0) return 1;
  const Layout layout = layout_of(format);
  for (int64_t first = 0; first < rows; first += kGroupRows)
    for (int64_t block = 0; block < blocks; ++block) {
      put_block(format, layout, from + (first * blocks + block) * size, blocks * size,
                std::min(rows - first, kGroupRows), out);
      out += layout.bytes();
    }
  return 0;
}

namespace {

// Eight codes of 4 bits, the first in the lowest bits, as blocks.h has two column groups: those of the first in the
// lower halves of four bytes, of the second in the upper ones.
inline uint32_t in_halves(uint32_t word) {
  const auto spread = [](uint32_t four) {
    four = (four | four << 8) & 0x00FF00FFu;
    return (four | four << 4) & 0x0F0F0F0Fu;
  };
  return spread(word & 0xFFFF) | spread(word >> 16) << 4;
}

}  // namespace

int32_t moehive_pack_words(int32_t number, const uint32_t* words, int64_t row_step, int64_t word_step, int64_t rows,
                           int64_t columns, uint8_t* out) {
  const Layout layout = layout_of(static_cast<Format>(number));
  if (layout.units == 0 || layout.low != 4 || layout.high != 0 || rows < 0 || columns < 0) return 1;
  const int64_t blocks = (columns + layout.columns() - 1) / layout.columns();
  for (int64_t first = 0; first < rows; first += kGroupRows) {
    const int64_t count = std::min(rows - first, kGroupRows);
    for (int64_t block = 0; block < blocks; ++block, out += layout.bytes())
      for (int64_t vector = 0; vector < 4 * layout.units; ++vector) {
        const int64_t at = block * layout.units * 4 + vector;
        const int64_t codes = std::clamp<int64_t>(columns - 8 * at, 0, 8);
        uint32_t lanes[kGroupRows] = {};
        if (codes > 0) {
          const uint32_t* from = words + first * row_step + at * word_step;
          if (row_step == 1 && count == kGroupRows)
            std::memcpy(lanes, from, sizeof lanes);
          else
            for (int64_t row = 0; row < count; ++row) lanes[row] = from[row * row_step];
          const uint32_t mask = 0xFFFFFFFFu >> (4 * (8 - codes));
          for (uint32_t& lane : lanes) lane = in_halves(lane & mask);
        }
        std::memcpy(out + layout.head() + 64 * vector, lanes, sizeof lanes);
      }
  }
  return 0;
}

int32_t moehive_pack_fp8(const uint8_t* codes, int64_t rows, int64_t columns, uint8_t* out) {
  constexpr int64_t tile = 16;  // columns
  uint8_t nan = 0;
  for (int64_t first = 0; first < rows; first += kGroupRows) {
    const int64_t count = std::min(rows - first, kGroupRows);
    for (int64_t block = 0; block < columns; block += kFp8Columns, out += kFp8Bytes)
      for (int64_t start = 0; start < kFp8Columns; start += tile) {
        uint8_t from[kGroupRows][tile] = {};
        const int64_t wide = std::clamp<int64_t>(columns - block - start, 0, tile);
        for (int64_t row = 0; row < count; ++row)
          std::memcpy(from[row], codes + (first + row) * columns + block + start, wide);
        for (int64_t row = 0; row < kGroupRows; ++row)
          for (int64_t column = 0; column < tile; ++column) nan |= (from[row][column] & 127) == 127;
        uint8_t* to = out + 16 + start * kGroupRows;
        for (int64_t column = 0; column < tile; ++column)
          for (int64_t row = 0; row < kGroupRows; ++row) to[column * kGroupRows + row] = from[row][column];
      }
  }
  return nan;
}

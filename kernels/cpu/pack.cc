// From a GGUF file's rows to the computing layout of blocks.h, for ctypes (kernels/formats/blocks.py). The file's blocks
// are those of ggml-common.h; what their bits mean, ggml-quants.c says.
#include <cstring>

#include "blocks.h"

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace moehive;

// One row's block, taken apart.
struct Parts {
  uint8_t codes[256];
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
  for (int k = 0; k < 32; ++k) codes[k] |= (bits[k / 8] >> (k % 8) & 1) << 4;
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

int64_t file_bytes(Format format) {
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
      for (int half = 0; half < 2; ++half)
        for (int l = 0; l < 64; ++l) {
          const uint8_t low = b[64 * half + l];
          const uint8_t high = b[128 + 32 * half + l % 32] >> (l / 32 * 2);
          to.codes[128 * half + l] = (low & 15) | (high & 3) << 4;
          to.codes[128 * half + 64 + l] = low >> 4 | (high >> 4 & 3) << 4;
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

// 8 column groups of `bits` bits from `codes` into `bits` vectors.
template <int Bits>
void put_plane(const uint8_t* codes, int shift, int64_t row, uint8_t* to) {
  constexpr int shared = 8 / Bits;
  for (int vector = 0; vector < Bits; ++vector)
    for (int k = 0; k < 4; ++k) {
      int byte = 0;
      for (int part = 0; part < shared; ++part)
        byte |= (codes[4 * (shared * vector + part) + k] >> shift & ((1 << Bits) - 1)) << (Bits * part);
      to[64 * vector + 4 * row + k] = static_cast<uint8_t>(byte);
    }
}

void put_unit(const Layout& layout, const uint8_t* codes, int64_t row, uint8_t* to) {
  if (layout.low == 8) put_plane<8>(codes, 0, row, to);
  if (layout.low == 4) put_plane<4>(codes, 0, row, to);
  if (layout.low == 2) put_plane<2>(codes, 0, row, to);
  if (layout.high == 1) put_plane<1>(codes, layout.low, row, to + 64 * layout.low);
  if (layout.high == 2) put_plane<2>(codes, layout.low, row, to + 64 * layout.low);
}

}  // namespace

// Lays out `rows` rows of `blocks` file blocks each, one row after the other, into `out` (rows padded to 16, the bytes
// of a padded row zero). Returns 0; 1 for a format that is none of a file's block formats.
MOEHIVE_API int32_t moehive_pack(int32_t number, const uint8_t* from, int64_t rows, int64_t blocks, uint8_t* out) {
  const Format format = static_cast<Format>(number);
  const int64_t size = file_bytes(format);
  if (size == 0 || rows < 0 || blocks < 0) return 1;
  const Layout layout = layout_of(format);
  std::memset(out, 0, (rows + kGroupRows - 1) / kGroupRows * blocks * layout.bytes());
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t block = 0; block < blocks; ++block) {
      Parts parts = {};
      take_apart(format, from + (row * blocks + block) * size, parts);
      uint8_t* to = out + (row / kGroupRows * blocks + block) * layout.bytes();
      const int64_t lane = row % kGroupRows;
      if (layout.scales != Scales::e8m0) std::memcpy(to + 2 * lane, parts.factors, 2);
      if (layout.minimum) std::memcpy(to + 32 + 2 * lane, parts.factors + 2, 2);
      put_scales(layout.scales, parts, lane, to + layout.head() - scales_bytes(layout.scales));
      for (int unit = 0; unit < layout.units; ++unit)
        put_unit(layout, parts.codes + 32 * unit, lane, to + layout.head() + unit * layout.unit_bytes());
    }
  return 0;
}

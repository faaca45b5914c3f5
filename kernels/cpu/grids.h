// The numbers that a block format can express, for who looks for the nearest ones.
//
// A block of a row has sub-blocks, each with a scale and, in some formats, a minimum; both are small integers times the
// block's own factor of 16 bits (llama.cpp's K-quants and IQ4_XS; ggml-common.h says how they are stored):
//
//     number = scale * code - minimum            q2_k, q4_k, q5_k
//     number = scale * (code - offset)           q3_k, q6_k, q8_0
//     number = scale * table[code]               iq4_xs, iq4_nl
#pragma once

#include <stdint.h>

#include "blocks.h"

namespace moehive {

constexpr int32_t kIq4Codes = 16;
constexpr float kIq4[kIq4Codes] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct Grid {
  int32_t columns, sub;    // of a block, of a sub-block
  int32_t levels;          // codes go from 0 to levels - 1
  int32_t low, high;       // of a sub-block's integer; both 1: there is none, the block is one sub-block
  int32_t most_minimum;    // the largest integer of a minimum; 0: there is none
  int32_t offset;
  bool table;
};

constexpr Grid kNoGrid{};

constexpr Grid grid_of(Format format) {
  switch (format) {
    case Format::q2_k: return {256, 16, 4, 0, 15, 15, 0, false};
    case Format::q3_k: return {256, 16, 8, -32, 31, 0, 4, false};
    case Format::iq4_xs: return {256, 32, kIq4Codes, -32, 31, 0, 0, true};
    case Format::q4_k: return {256, 32, 16, 0, 63, 63, 0, false};
    case Format::q5_k: return {256, 32, 32, 0, 63, 63, 0, false};
    case Format::q6_k: return {256, 16, 64, -128, 127, 0, 32, false};
    case Format::q8_0: return {32, 32, 256, 1, 1, 0, 128, false};
    case Format::iq4_nl: return {32, 32, kIq4Codes, 1, 1, 0, 0, true};
    default: return kNoGrid;
  }
}

}  // namespace moehive

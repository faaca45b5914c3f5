// From the rows of files to the computing layout; see pack.cc.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace moehive {

// Bytes of a file's block; 0 for a format that no file has.
int64_t file_bytes(Format format);

}  // namespace moehive

// Lays out `rows` rows of `blocks` file blocks each, one row after the other, into `out` (rows padded to 16, the bytes
// of a padded row zero). Returns 0; 1 for a format that is none of a file's block formats.
extern "C" __attribute__((visibility("default"))) int32_t moehive_pack(int32_t format, const uint8_t* from, int64_t rows,
                                                                       int64_t blocks, uint8_t* out);

// Lays out codes of 4 bits, all but the blocks' heads: of row r and columns 8 w to 8 w + 7, the first in the lowest
// bits, in the word at r * row_step + w * word_step. Returns 0; 1 for a format that has other codes.
extern "C" __attribute__((visibility("default"))) int32_t moehive_pack_words(int32_t format, const uint32_t* words,
                                                                             int64_t row_step, int64_t word_step,
                                                                             int64_t rows, int64_t columns,
                                                                             uint8_t* out);

// Lays out the codes of fp8_block, row after row, all but the blocks' heads. Returns 0; 1 if one is no number.
extern "C" __attribute__((visibility("default"))) int32_t moehive_pack_fp8(const uint8_t* codes, int64_t rows,
                                                                           int64_t columns, uint8_t* out);

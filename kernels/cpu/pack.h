// From a GGUF file's rows to the computing layout; see pack.cc.
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

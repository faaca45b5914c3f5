// Single rows of a matrix in a block format, as floats (kernels/rows.py): a table of tokens' vectors is read so.
//
// A block's numbers are its products with unit vectors: exact, and written once for all formats, in the kernels.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "kernel.h"
#include "linear.h"
#include "pack.h"

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace moehive;

constexpr int64_t kLargest = 256;  // columns of a block, at most

int64_t block_columns(Format format) {
  return format == Format::fp8_block ? kFp8Columns : layout_of(format).columns();
}

// The unit vectors of kLargest columns, as the kernels want their inputs: in 8 bits, and rounded for FP8.
class UnitVectors {
 public:
  explicit UnitVectors(const Kernel& kernel)
      : quantized_(kLargest * quantized_bytes(kLargest) + 64),
        rounded_(kFp8Columns * vector_bytes(Vectors::rounded, kFp8Columns) + 64) {
    char* at = aligned(quantized_);
    for (int64_t k = 0; k < kLargest; ++k, at += quantized_bytes(kLargest)) {
      views_[k] = quantized_at(at, kLargest);
      const_cast<int8_t*>(views_[k].q)[k] = 1;
      const_cast<float*>(views_[k].d)[k / kUnitColumns] = 1.0f;
      const_cast<float*>(views_[k].m)[k / kUnitColumns] = 1.0f;
      const_cast<int32_t*>(views_[k].s)[2 * (k / kUnitColumns) + k % kUnitColumns / 16] = 1;
      of_blocks_[k] = &views_[k];
    }
    at = aligned(rounded_);
    for (int64_t k = 0; k < kFp8Columns; ++k, at += vector_bytes(Vectors::rounded, kFp8Columns)) {
      float unit[kFp8Columns] = {};
      unit[k] = 1.0f;
      kernel.round(unit, kFp8Columns, at);
      of_fp8_[k] = at;
    }
  }
  const void* const* of(Format format) const { return format == Format::fp8_block ? of_fp8_ : of_blocks_; }

 private:
  static char* aligned(std::vector<char>& memory) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  std::vector<char> quantized_, rounded_;
  Quantized views_[kLargest];
  const void* of_blocks_[kLargest];
  const void* of_fp8_[kFp8Columns];
};

// The numbers of `rows` rows of a block each, in their layout: out [the block's columns, rows].
void decode(Format format, const void* groups, int64_t rows, float* out) {
  static const Kernel& kernel = *usable_kernel(0);
  static const UnitVectors units(kernel);
  const int64_t wide = block_columns(format);
  kernel.multiply({format, groups, rows, wide, units.of(format), wide, out, rows, groups});
}

bool has_blocks(int32_t format) {
  return format >= 0 && format <= static_cast<int32_t>(Format::fp8_block) &&
         (is_block(static_cast<Format>(format)) || static_cast<Format>(format) == Format::fp8_block);
}

}  // namespace

// Both: out [count, columns] f32, the rows `ids`. Return 0; 1 if an argument can't be; 2 without memory.

MOEHIVE_API int32_t moehive_rows(const MoehiveMatrix* matrix, const int64_t* ids, int64_t count, float* out) {
  const MoehiveMatrix& m = *matrix;
  if (!has_blocks(m.format)) return 1;
  const Format format = static_cast<Format>(m.format);
  const int64_t wide = block_columns(format), nbytes = rows_bytes(format, kGroupRows, wide);
  alignas(64) float numbers[kGroupRows * kLargest];  // of 16 rows that lie side by side
  try {
    for (int64_t i = 0; i < count; ++i) {
      if (ids[i] < 0 || ids[i] >= m.rows) return 1;
      const int64_t row = ids[i] % kGroupRows;
      const char* block = static_cast<const char*>(m.weights) + rows_bytes(format, ids[i] - row, m.columns);
      for (int64_t first = 0; first < m.columns; first += wide, block += nbytes) {
        decode(format, block, kGroupRows, numbers);
        const int64_t here = std::min(wide, m.columns - first);
        for (int64_t k = 0; k < here; ++k) out[i * m.columns + first + k] = numbers[k * kGroupRows + row];
      }
    }
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

// Of `table`, whose rows are as a GGUF file has them.
MOEHIVE_API int32_t moehive_file_rows(int32_t number, const uint8_t* table, int64_t rows, int64_t columns,
                                      const int64_t* ids, int64_t count, float* out) {
  if (!has_blocks(number)) return 1;
  const Format format = static_cast<Format>(number);
  const int64_t wide = block_columns(format), blocks = columns / wide;
  if (columns % wide || !file_bytes(format)) return 1;
  try {
    thread_local std::vector<uint8_t> packed;
    thread_local std::vector<float> numbers;
    packed.resize(rows_bytes(format, blocks, wide));
    numbers.resize(columns);
    for (int64_t i = 0; i < count; ++i) {
      if (ids[i] < 0 || ids[i] >= rows) return 1;
      // A row's blocks as rows of one block each, so that 16 of them are decoded together.
      moehive_pack(number, table + ids[i] * blocks * file_bytes(format), blocks, 1, packed.data());
      decode(format, packed.data(), blocks, numbers.data());
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t k = 0; k < wide; ++k) out[i * columns + block * wide + k] = numbers[k * blocks + block];
    }
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

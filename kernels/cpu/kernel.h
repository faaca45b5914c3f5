// What one instruction set contributes: the product of stored rows with a few vectors. All else is shared.
#pragma once

#include <cstdint>

#include "blocks.h"

struct MoehiveSpec;

namespace moehive {

// Of the formats that store each number by itself.
inline int64_t weight_bytes(Format format) { return format == Format::f32 ? 4 : 2; }

// Bytes of `rows` rows; a multiple of 16 for the block formats, or the last ones.
inline int64_t rows_bytes(Format format, int64_t rows, int64_t columns) {
  if (format == Format::fp8_block)
    return (rows + kGroupRows - 1) / kGroupRows * ((columns + kFp8Columns - 1) / kFp8Columns) * kFp8Bytes;
  if (!is_block(format)) return rows * columns * weight_bytes(format);
  const Layout layout = layout_of(format);
  return (rows + kGroupRows - 1) / kGroupRows * ((columns + layout.columns() - 1) / layout.columns()) * layout.bytes();
}

// Numbers are summed in 16 lanes: lane l takes the columns l, l + 16, l + 32, ..., each by one fused multiply-add; of bf16
// the pairs of columns l, l + 16, l + 32, ... (bf16-inl.h). Then lanes l and l + 8 are added, l and l + 4, l and l + 2, the
// last two. The order is the same on every instruction set and for any number of tokens, rows and threads, and so are
// the bits of the result (the scalar code alone rounds its products, for a machine without fused multiply-add).
constexpr int64_t kLanes = 16;

inline int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }
inline int64_t padded_pairs(int64_t columns) { return (columns + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

// How a format's products take their vectors.
enum class Vectors {
  floats,   // padded(columns) f32, zeros at the end
  rounded,  // to bf16; see bf16-inl.h
  bytes,    // a Quantized (blocks.h)
};

inline Vectors vectors_of(Format format) {
  if (format == Format::bf16 || format == Format::fp8_block) return Vectors::rounded;
  return is_block(format) ? Vectors::bytes : Vectors::floats;
}

// Bytes of one vector in memory, a multiple of 64. A line more than rounded ones need keeps them apart in caches, whose
// sets are the same for addresses 4 KiB from each other.
inline int64_t vector_bytes(Vectors kind, int64_t columns) {
  if (kind == Vectors::bytes) return quantized_bytes(columns);
  if (kind == Vectors::rounded) return padded_pairs(columns) * static_cast<int64_t>(sizeof(float)) + 64;
  return padded(columns) * static_cast<int64_t>(sizeof(float));
}

// out[t * out_stride + r] = sum over k of weights[r, k] * x[t][k], for t < tokens and r < rows.
// Plain formats: `weights` are rows of `columns` numbers without padding, of any alignment. Block formats: they are groups
// of 16 rows (blocks.h). Each x[t] is as vectors_of(format) says, in memory aligned to 64 bytes; of bytes it points to the
// Quantized.
struct Product {
  Format format;
  const void* weights;
  int64_t rows;
  int64_t columns;
  const void* const* x;
  int64_t tokens;
  float* out;
  int64_t out_stride;
  const void* next;  // the weights that are wanted after these, to be fetched ahead; never read
};

struct Kernel {
  const char* name;
  void (*multiply)(const Product&);
  // x [columns] in 8 bits, into the arrays of quantized_at(memory, columns).
  void (*quantize)(const float* x, int64_t columns, void* memory);
  // x [columns] rounded to bf16, into vector_bytes of memory.
  void (*round)(const float* x, int64_t columns, void* memory);
  // An expert's middles, in place: act(x), or gate = act(gate) * up as `spec` says.
  void (*activate)(const MoehiveSpec& spec, float* x, int64_t n);
  void (*join_gate)(const MoehiveSpec& spec, float* gate, const float* up, int64_t n);
};

extern const Kernel kScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernel kAvx2;
extern const Kernel kAvx512;
extern const Kernel kAvx512Vnni;
extern const Kernel kAvx512Bf16;
#elif defined(__aarch64__)
extern const Kernel kNeon;
#endif

// Those that this processor can run, best first; null after the last.
const Kernel* usable_kernel(int place);

// Whether this processor reads weights faster when they are fetched ahead: all but those of AMD with AVX-512, whose own
// prefetchers go on over pages. Zen 4, one thread, shares of a plain read, means of five block formats and three runs:
// 0.76 fetched, 0.84 not.
extern const bool kFetchesAhead;

}  // namespace moehive

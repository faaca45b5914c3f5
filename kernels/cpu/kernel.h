// What one instruction set contributes: the product of stored rows with a few vectors. All else is shared.
#pragma once

#include <cstdint>

namespace moehive {

enum class Format : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t weight_bytes(Format format) { return format == Format::f32 ? 4 : 2; }

// Numbers are summed in 16 lanes: lane l takes the columns l, l + 16, l + 32, ..., each by one fused multiply-add.
// Then lanes l and l + 8 are added, l and l + 4, l and l + 2, the last two. The order is the same on every
// instruction set and for any number of tokens, rows and threads, and so are the bits of the result (the scalar
// code alone rounds its products, for a machine without fused multiply-add).
constexpr int64_t kLanes = 16;

inline int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

// out[r * out_stride + t] = sum over k of weights[r, k] * x[t][k], for r < rows and t < tokens.
// `weights` are rows of `columns` numbers without padding, of any alignment. Each x[t] has padded(columns)
// floats, zeros at the end, and is aligned to 64 bytes.
struct Product {
  Format format;
  const void* weights;
  int64_t rows;
  int64_t columns;
  const float* const* x;
  int64_t tokens;
  float* out;
  int64_t out_stride;
  const void* next;  // the weights that are wanted after these, to be fetched ahead; never read
};

struct Kernel {
  const char* name;
  void (*multiply)(const Product&);
};

extern const Kernel kScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernel kAvx2;
extern const Kernel kAvx512;
#elif defined(__aarch64__)
extern const Kernel kNeon;
#endif

}  // namespace moehive

// Linear layers in f32, bf16 or f16 for a few tokens, for ctypes (kernels/linear.py): the experts' products.
#include <cstring>
#include <exception>
#include <new>

#include "expert_mlp.h"
#include "kernel.h"
#include "trunk_threads.h"

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

// One matrix, as Python hands it over: [rows, columns] without padding; bias [rows] or null.
struct MoehiveMatrix {
  const void* weights;
  const float* bias;
  int64_t rows, columns;
  int32_t format;  // moehive::Format
};

namespace {

using namespace moehive;

constexpr int64_t kPieceBytes = 64 << 10;  // as in expert_mlp.cc
constexpr int64_t kMaxRows = 64, kMaxTokens = 32;

const Kernel& best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return __builtin_cpu_supports("avx512f") ? kAvx512 : kAvx2;
  return kScalar;
#elif defined(__aarch64__)
  return kNeon;
#else
  return kScalar;
#endif
}

int64_t piece_rows(const MoehiveMatrix& m) {
  const int64_t rows = kPieceBytes / (m.columns * weight_bytes(static_cast<Format>(m.format))) / 16 * 16;
  return rows < 16 ? 16 : rows > kMaxRows ? kMaxRows : rows;
}

}  // namespace

// out[t][...] = the products of x[t] with each of `count` matrices of the same columns, one after the other, plus
// their biases: x [tokens, columns], out [tokens, all rows]. `trunk` is moehive_trunk_create's; at most 32 tokens.
// Returns 0; 1 if an argument can't be; 2 without memory.
MOEHIVE_API int32_t moehive_plain_linear(void* trunk, const MoehiveMatrix* matrices, int64_t count, const float* x,
                                         int64_t tokens, float* out) {
  if (!trunk || tokens < 0 || tokens > kMaxTokens || count < 1) return 1;
  const int64_t columns = matrices[0].columns, stride = padded(columns);
  int64_t all_rows = 0, pieces = 0;
  for (int64_t m = 0; m < count; ++m) {
    if (matrices[m].columns != columns || columns < 1 || matrices[m].format < 0 || matrices[m].format > 2) return 1;
    all_rows += matrices[m].rows;
    pieces += (matrices[m].rows + piece_rows(matrices[m]) - 1) / piece_rows(matrices[m]);
  }
  try {
    thread_local Scratch scratch;
    float* inputs = scratch.floats(tokens * stride);
    const float* input_of[kMaxTokens];
    for (int64_t t = 0; t < tokens; ++t) {
      float* to = inputs + t * stride;
      std::memcpy(to, x + t * columns, columns * sizeof(float));
      for (int64_t i = columns; i < stride; ++i) to[i] = 0.0f;
      input_of[t] = to;
    }
    const Kernel& kernel = best();
    static_cast<Trunk*>(trunk)->each(pieces, all_rows * columns, [&](int64_t item) {
      const MoehiveMatrix* m = matrices;
      int64_t first = 0, step = piece_rows(*m);
      for (int64_t here = (m->rows + step - 1) / step; item >= here; here = (m->rows + step - 1) / step) {
        item -= here;
        first += m->rows;
        step = piece_rows(*++m);
      }
      const int64_t row = item * step, rows = step < m->rows - row ? step : m->rows - row;
      const Format format = static_cast<Format>(m->format);
      const char* weights = static_cast<const char*>(m->weights) + row * columns * weight_bytes(format);
      float* to = out + first + row;
      alignas(64) float buffer[kMaxRows * kMaxTokens];
      float* products = tokens == 1 ? to : buffer;
      kernel.multiply({format, weights, rows, columns, input_of, tokens, products, tokens,
                       weights + rows * columns * weight_bytes(format)});
      if (tokens > 1)
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < rows; ++r) to[t * all_rows + r] = buffer[r * tokens + t];
      if (m->bias)
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < rows; ++r) to[t * all_rows + r] += m->bias[row + r];
    });
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

// Linear layers, for ctypes (kernels/linear.py): the experts' products.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "expert_mlp.h"
#include "kernel.h"
#include "linear.h"
#include "pieces.h"
#include "trunk_threads.h"

namespace {

using namespace moehive;

constexpr int64_t kMaxTokens = 96, kMaxMatrices = 16;

// A matrix, and the pieces of it that threads take: divisions that would be many for each piece.
struct Pieces {
  const MoehiveMatrix* matrix;
  int64_t rows, count;  // rows of one piece
  int64_t first;        // the matrix's first row in a row of the result
};

// The inputs of a call, in the forms that its matrices want.
class Inputs {
 public:
  Inputs(Trunk& trunk, const Kernel& kernel, const float* x, int64_t tokens, int64_t columns, const bool* wanted)
      : tokens_(tokens) {
    thread_local Scratch scratch;
    int64_t bytes = 0;
    for (int kind = 0; kind < kKinds; ++kind)
      if (wanted[kind]) bytes += tokens * vector_bytes(static_cast<Vectors>(kind), columns);
    char* memory = reinterpret_cast<char*>(scratch.floats(bytes / static_cast<int64_t>(sizeof(float)) + 1));
    for (int kind = 0; kind < kKinds; ++kind) {
      if (!wanted[kind]) continue;
      const int64_t each = vector_bytes(static_cast<Vectors>(kind), columns);
      trunk.each(tokens, tokens * columns * 4, [&](int64_t t) {
        make(kernel, static_cast<Vectors>(kind), t, x + t * columns, columns, memory + t * each);
      });
      memory += tokens * each;
    }
  }

  int64_t tokens() const { return tokens_; }
  const void* const* of(Format format) const { return vectors_[static_cast<int>(vectors_of(format))]; }

  static constexpr int kKinds = 3;  // of Vectors

 private:
  void make(const Kernel& kernel, Vectors kind, int64_t token, const float* x, int64_t columns, char* to) {
    vectors_[static_cast<int>(kind)][token] = to;
    switch (kind) {
      case Vectors::floats:
        std::memcpy(to, x, columns * sizeof(float));
        std::memset(to + columns * sizeof(float), 0, (padded(columns) - columns) * sizeof(float));
        break;
      case Vectors::rounded:
        kernel.round(x, columns, to);
        break;
      case Vectors::bytes:
        kernel.quantize(x, columns, to);
        views_[token] = quantized_at(to, columns);
        vectors_[static_cast<int>(kind)][token] = &views_[token];
    }
  }

  int64_t tokens_;
  const void* vectors_[kKinds][kMaxTokens];
  Quantized views_[kMaxTokens];
};

// One piece of one matrix: rows of it, for all tokens.
void multiply_piece(const Kernel& kernel, const Pieces& of, int64_t piece, const Inputs& inputs, float* out,
                    int64_t out_stride) {
  const MoehiveMatrix& m = *of.matrix;
  const int64_t row = piece * of.rows, rows = of.rows < m.rows - row ? of.rows : m.rows - row, tokens = inputs.tokens();
  const Format format = static_cast<Format>(m.format);
  const char* weights = static_cast<const char*>(m.weights) + rows_bytes(format, row, m.columns);
  float* to = out + of.first + row;
  kernel.multiply({format, weights, rows, m.columns, inputs.of(format), tokens, to, out_stride,
                   weights + rows_bytes(format, rows, m.columns)});
  if (m.bias)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < rows; ++r) to[t * out_stride + r] += m.bias[row + r];
}

}  // namespace

int32_t moehive_linear(void* trunk, const MoehiveMatrix* matrices, int64_t count, const float* x, int64_t tokens,
                       float* out) {
  if (!trunk || tokens < 0 || count < 1 || count > kMaxMatrices) return 1;
  const int64_t columns = matrices[0].columns;
  int64_t all_rows = 0;
  bool wanted[Inputs::kKinds] = {};
  for (int64_t m = 0; m < count; ++m) {
    const int32_t format = matrices[m].format;
    if (matrices[m].columns != columns || columns < 1 || format < 0 || format > static_cast<int32_t>(Format::fp8_block))
      return 1;
    wanted[static_cast<int>(vectors_of(static_cast<Format>(format)))] = true;
    all_rows += matrices[m].rows;
  }
  try {
    Trunk& self = *static_cast<Trunk*>(trunk);
    static const Kernel& kernel = *usable_kernel(0);
    for (; tokens > 0; tokens -= kMaxTokens, x += kMaxTokens * columns, out += kMaxTokens * all_rows) {
      const Inputs inputs(self, kernel, x, std::min(tokens, kMaxTokens), columns, wanted);
      Pieces parts[kMaxMatrices];
      int64_t row = 0, pieces = 0;
      for (int64_t m = 0; m < count; ++m) {
        const Format format = static_cast<Format>(matrices[m].format);
        const int64_t rows = inputs.tokens() > 1 ? piece_rows(format, columns)
                                                 : piece_rows_for_one(format, columns, all_rows, self.threads());
        parts[m] = {&matrices[m], rows, (matrices[m].rows + rows - 1) / rows, row};
        row += matrices[m].rows;
        pieces += parts[m].count;
      }
      self.each(pieces, inputs.tokens() * all_rows * columns, [&](int64_t piece) {
        const Pieces* of = parts;
        for (; piece >= of->count; ++of) piece -= of->count;
        multiply_piece(kernel, *of, piece, inputs, out, all_rows);
      });
    }
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

// Linear layers' interface: kernels/linear.py calls it, and layer.cc.
#pragma once

#include <cstdint>

// One matrix [rows, columns], as Python hands it over, laid out as in an expert's blob; bias [rows] or null.
struct MoehiveMatrix {
  const void* weights;
  const float* bias;
  int64_t rows, columns;
  int32_t format;  // moehive::Format
};

// out[t][...] = the products of x[t] with each of `count` matrices (at most 16) of the same columns, one after the
// other, plus their biases: x [tokens, columns], out [tokens, all rows]. `trunk` is moehive_trunk_create's.
// Returns 0; 1 if an argument can't be; 2 without memory.
extern "C" __attribute__((visibility("default"))) int32_t moehive_linear(void* trunk, const MoehiveMatrix* matrices,
                                                                         int64_t count, const float* x, int64_t tokens,
                                                                         float* out);

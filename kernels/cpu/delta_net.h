// Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) after its projections: convolution, recurrence, gated norm.
#pragma once

#include <cstdint>

#include "trunk.h"

// One layer, as Python hands it over (kernels/delta_net.py has the same fields in the same order). Counts are numbers
// of floats. A "row" is what the layer's projections give for one token, in the checkpoint's order.
struct MoehiveDeltaNet {
  int64_t key_heads, value_heads, key_dim, value_dim;  // dimensions are of one head
  int64_t taps;                                        // of the convolution
  int64_t row;                                         // floats from one token's row to the next
  int64_t segments;
  // [segments][3]: channels of the convolution (all queries, then keys, then values): start in the row, first
  // channel, count.
  const int64_t* channels;
  const int64_t* z;         // [value_heads] where each head's gate starts in the row
  const int64_t* b;         // [value_heads] where its write strength is
  const int64_t* a;         // [value_heads] where its decay is
  const int64_t* to;        // [value_heads] where its values go in a row of `out`
  const float* conv;        // [taps][channels], the oldest tap first
  const float* decay;       // [value_heads] -exp(A_log)
  const float* dt_bias;     // [value_heads]
  const float* norm;        // [value_dim]
  float norm_eps;
};

// Tokens of several sequences, each going on from its state.
struct MoehiveDeltaNetCall {
  const float* rows;                 // [tokens][row]
  const MoehiveSequence* sequences;  // `start` and `pages` have no meaning here
  int64_t count;
  float* const* conv;                // [count] → [taps - 1][channels], the oldest first
  float* const* recurrent;           // [count] → [value_heads][blocks of 16 values][key_dim][16]; what pads is 0
  float* mixed;                      // [tokens][channels] to work in
  float* out;                        // [tokens][value_heads * value_dim]
};

// All of the layer between its projections. `trunk` is a handle of moehive_trunk_create.
// Returns 0; 1 if an argument can't be.
extern "C" __attribute__((visibility("default"))) int32_t moehive_trunk_delta_net(void* trunk,
                                                                                  const MoehiveDeltaNet* layer,
                                                                                  const MoehiveDeltaNetCall* call);

namespace moehive {

constexpr int64_t kMaxTaps = 8;
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kBlock = 16;  // values: 64 bytes, so that a block of a head's state is contiguous

inline int64_t conv_channels(const MoehiveDeltaNet& layer) {
  return 2 * layer.key_heads * layer.key_dim + layer.value_heads * layer.value_dim;
}

// What one instruction set contributes.
struct DeltaNetKernel {
  // Convolution and silu of `count` channels of one sequence's tokens; see delta_net-inl.h.
  void (*convolve)(const MoehiveDeltaNet&, const MoehiveDeltaNetCall&, int64_t sequence, int64_t from, int64_t channel,
                   int64_t count);
  // Recurrence, norm and gate of one value head over one sequence's tokens.
  void (*head)(const MoehiveDeltaNet&, const MoehiveDeltaNetCall&, int64_t sequence, int64_t head);
};

extern const DeltaNetKernel kDeltaNetPlain;
#if defined(__x86_64__) || defined(_M_X64)
extern const DeltaNetKernel kDeltaNetAvx2;
#endif

}  // namespace moehive

// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over its compressed cache, in absorbed form: a query is
// taken into the latent space by its head's key matrix, scored against the latents themselves, and the weighted latent
// is taken out by the head's value matrix. No key or value is ever expanded.
#pragma once

#include <cstdint>

#include "trunk.h"

// One layer, as Python hands it over (kernels/mla.py has the same fields in the same order).
struct MoehiveMla {
  // Dimensions of one head's query parts, of the latent, of one head's value; rope and rank are even.
  int64_t heads, nope, rope, rank, value;
  int64_t page_at;    // where this layer's part lies in a page, in bytes: as one key head's keys in attention.h
  const void* up;     // [heads][nope + value][rank]: kv_b_proj
  const float* norm;  // [rank]
  float norm_eps;
  float scale;          // of the scores
  int32_t half_up;      // `up` is bf16, else f32
  int32_t half;         // the cache is bf16, else f32
  int32_t interleaved;  // rotary pairs are neighbours (2i, 2i + 1), not halves (i, i + rope / 2)
};

// Tokens of several sequences, each attending to its own cache and to itself.
struct MoehiveMlaCall {
  const float* queries;     // [tokens][heads][nope + rope]
  const float* compressed;  // [tokens] rows of rank + rope floats: latent and rotary key, neither normed nor rotated
  int64_t compressed_row;   // floats from one of them to the next
  const float* cos;         // [tokens][rope / 2]
  const float* sin;         // [tokens][rope / 2]
  const MoehiveSequence* sequences;
  int64_t count;
  float* absorbed;  // [tokens][heads][rank + rope] to work in
  float* out;       // [tokens][heads][value]
};

// Attention between the projections; the new tokens are written to the sequences' pages. `trunk` is a handle of
// moehive_trunk_create. Returns 0; 1 if an argument can't be; 2 without memory.
extern "C" __attribute__((visibility("default"))) int32_t moehive_trunk_mla(void* trunk, const MoehiveMla* layer,
                                                                            const MoehiveMlaCall* call);

namespace moehive {

constexpr int64_t kMaxRank = 1024;
constexpr int64_t kMaxRope = 256;
constexpr int64_t kMaxNope = 256;
constexpr int64_t kMlaTokens = 16;  // that a thread takes with one head: its matrix is read once for them

// Heads `head` .. `head + heads` of tokens `token` .. `token + tokens` of a sequence: at most kLatentRows. They all share
// each latent that is read.
constexpr int64_t kLatentRows = 64;
struct LatentPart {
  const MoehiveSequence* sequence;
  int64_t token, tokens, head, heads;
  int64_t rows() const { return tokens * heads; }
  int64_t position() const { return sequence->start + token; }
};

// What one instruction set contributes, beside the attention itself (attention.h); see mla-inl.h.
struct MlaKernel {
  // At most kMlaTokens tokens of one head.
  void (*absorb)(const MoehiveMla&, const MoehiveMlaCall&, int64_t head, int64_t token, int64_t tokens);
  void (*append)(const MoehiveMla&, const MoehiveMlaCall&, const MoehiveSequence&, int64_t token);
  void (*expand)(const MoehiveMla&, const MoehiveMlaCall&, int64_t head, int64_t token, int64_t tokens);
};

extern const MlaKernel kMlaPlain;
#if defined(__x86_64__) || defined(_M_X64)
extern const MlaKernel kMlaAvx2;
#endif

}  // namespace moehive

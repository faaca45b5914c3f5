// The trunk's own arithmetic (all but its linear layers): norms, rotary embedding, paged attention (attention.h), router.
//
// All numbers are f32, the KV cache f32 or bf16. What one instruction set contributes is `TrunkKernel`; the schedule
// over threads is in trunk_api.cc. A row's result depends on that row alone, never on what else is in the batch.
#pragma once

#include <cstdint>

// Structs as Python hands them over: kernels/trunk_ops.py has the same fields in the same order.

// One attention layer. A token's row holds queries, keys and values: query head i begins at i * query_stride, its
// output gate (if gate_at >= 0) gate_at behind it; key head i at keys_at + i * head_dim, values likewise.
struct MoehiveAttention {
  int64_t heads, kv_heads, head_dim;  // head_dim is even
  int64_t rotary;  // numbers of a head that are turned, the first ones; even
  int64_t row, query_stride, gate_at, keys_at, values_at;
  int64_t page_at;  // where this layer's part begins in a page, in bytes
  int64_t window;                  // keys that a query sees, itself included; 0: all before it
  const float* query_norm;         // [head_dim], or null
  const float* key_norm;
  const float* sinks;  // [heads], or null
  float eps, scale;
  int32_t interleaved;  // pairs (0, 1), (2, 3), ... are turned, not (0, n / 2), (1, n / 2 + 1), ...
  int32_t half;         // the cache is bf16
};

// Some tokens of one sequence: rows first .. first + tokens of the batch, positions from `start`. `pages` are the
// addresses of the pages that hold positions 0 .. kPage, kPage .. 2 kPage, ...; those behind a window may be 0.
struct MoehiveSequence {
  int64_t first, tokens, start;
  const uint64_t* pages;
};

struct MoehiveRouter {
  int64_t experts, top_k;
  int64_t groups, top_groups;  // 1, 1: no groups
  const float* bias;           // added to the scores for the choice alone; or null
  float scaling;
  int32_t scores;       // 0: softmax; 1: sigmoid; 2: softmax over the chosen logits
  int32_t renormalize;  // chosen weights are divided by their sum
};

// Of trunk_api.cc, which says what they do; `trunk` is moehive_trunk_create's.
extern "C" {
__attribute__((visibility("default"))) void moehive_trunk_rest(void* trunk);
__attribute__((visibility("default"))) void moehive_trunk_add_norm(void* trunk, int64_t tokens, int64_t width,
                                                                   float* hidden, const void* add, int32_t add_half,
                                                                   const float* more, const float* gate,
                                                                   int64_t gate_stride, const float* norm, float eps,
                                                                   float* out, uint16_t* half_out);
__attribute__((visibility("default"))) int32_t moehive_trunk_attend(void* trunk, const MoehiveAttention* layer,
                                                                    float* rows, const MoehiveSequence* sequences,
                                                                    int64_t count, const float* cos, const float* sin,
                                                                    float* out);
__attribute__((visibility("default"))) void moehive_trunk_gate(void* trunk, const float* in, int64_t tokens,
                                                               int64_t middle, int64_t stride, int32_t activation,
                                                               float* out);
__attribute__((visibility("default"))) int32_t moehive_trunk_route(void* trunk, const MoehiveRouter* router,
                                                                   const float* logits, int64_t tokens, int64_t* ids,
                                                                   float* weights);
}

namespace moehive {

// Tokens of a page.
constexpr int64_t kPage = 32;

// hidden += add + more * sigmoid(gate); then, with `norm`, out = hidden / rms(hidden) * norm, also to half_out.
struct AddNorm {
  int64_t tokens, width;
  float* hidden;
  const void* add;  // [tokens, width] f32, or bf16 with add_half; or null
  const float* more;
  const float* gate;  // [tokens] at gate_stride
  const float* norm;
  float* out;
  uint16_t* half_out;
  int64_t gate_stride;
  float eps;
  int32_t add_half;
};

struct TrunkKernel {
  void (*add_norm)(const AddNorm&, int64_t token);
  void (*gate)(const float* in, int64_t middle, int32_t activation, float* out);  // in [gate | up]
  void (*route)(const MoehiveRouter&, const float* logits, float* scratch, int64_t* ids, float* weights);
};

extern const TrunkKernel kTrunkPlain;
#if defined(__x86_64__)
extern const TrunkKernel kTrunkAvx2;
extern const TrunkKernel kTrunkAvx512;
#endif

}  // namespace moehive

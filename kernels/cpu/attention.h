// Attention of query heads over a paged KV cache: what one instruction set contributes, and what its callers must know.
#pragma once

#include "mla.h"
#include "trunk.h"

namespace moehive {

// A page's part of a layer: for each key head its keys, then its values. Keys [head_dim][kPage], so that a register holds
// one number of many tokens; values in blocks of kValueBlock numbers of a head, each [kPage][kValueBlock], the last block less
// wide; head_dim is padded to 16 there. In bf16 these are pairs: keys [head_dim / 2][kPage][2], of a block
// [kPage / 2][kValueBlock][2]. So a head is read from its beginning to its end.
constexpr int64_t kValueBlock = 32;
constexpr int64_t kMaxHead = 512;
constexpr int64_t kMaxQueries = 16;  // rows (query heads and tokens) that pass over a page together
constexpr int64_t kSpan = 16;        // pages that a softmax goes over before it is joined with those before

struct Attend {
  const MoehiveAttention& layer;
  float* rows;  // [tokens, layer.row]; queries are turned in place
  const float* cos;
  const float* sin;  // [tokens, rotary / 2]
  float* out;        // [tokens, heads * head_dim]
};

// Tokens `token` .. `token + tokens` of a sequence and, of the query heads of each key head from `kv_head` on, those from
// `head` on, `heads` of them: at most kMaxQueries rows for a key head, which lie together, token by token.
struct AttendPart {
  const MoehiveSequence* sequence;
  int64_t token, tokens, kv_head, kv_heads, head, heads;
  int64_t rows() const { return kv_heads * tokens * heads; }
  int64_t position() const { return sequence->start + token; }
};

inline constexpr int64_t padded_head(int64_t n) { return (n + 15) / 16 * 16; }

// What query rows have seen of their keys: the largest score, the sum of e^(score - largest), and the sum of values with
// those weights. A power of two between rows would put all of them into a few lines of the first cache.
struct Seen {
  float* sums;     // [rows][stride]
  float* queries;  // [rows][query_stride], in the kernel's form
  float* top;      // [rows]
  float* total;
  int64_t stride, query_stride;

  Seen(float* memory, int64_t rows, int64_t query, int64_t value)
      : sums(memory), queries(sums + rows * stride_of(value)), top(queries + rows * stride_of(query)),
        total(top + rows), stride(stride_of(value)), query_stride(stride_of(query)) {}
  static constexpr int64_t stride_of(int64_t numbers) { return padded_head(numbers) + 16; }
  // Of the memory, a multiple of 16.
  static constexpr int64_t floats(int64_t rows, int64_t query, int64_t value) {
    return rows * (stride_of(query) + stride_of(value)) + (2 * rows + 15) / 16 * 16;
  }
};

struct AttentionKernel {
  // Norms and turns a token of the sequence, and writes its key and value to its page.
  void (*prepare)(const Attend&, const MoehiveSequence&, int64_t token);
  // What a part's rows see in a span.
  void (*attend)(const Attend&, const AttendPart&, int64_t span, const Seen&);
  // What they have seen in all to their output.
  void (*finish)(const Attend&, const AttendPart&, const Seen&);
  // The same of latent attention (mla.h), where absorbed queries become what they sum.
  void (*attend_latent)(const MoehiveMla&, const MoehiveMlaCall&, const LatentPart&, int64_t span, const Seen&);
  void (*finish_latent)(const MoehiveMla&, const MoehiveMlaCall&, const LatentPart&, const Seen&);
  // What rows have seen, and then `more`.
  void (*join)(int64_t rows, const Seen&, const Seen& more);
};

// Of this processor.
const AttentionKernel& attention_kernel();

extern const AttentionKernel kAttentionPlain;
#if defined(__x86_64__)
extern const AttentionKernel kAttentionAvx2;
extern const AttentionKernel kAttentionAvx512;
extern const AttentionKernel kAttentionAvx512Bf16;
#endif

}  // namespace moehive

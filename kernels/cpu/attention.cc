// The schedule of attention over sequences, heads, spans of pages and threads; and its C interface.
#include "attention.h"

#include <algorithm>
#include <exception>
#include <vector>

#include "spans.h"
#include "trunk_threads.h"

namespace moehive {

const AttentionKernel& attention_kernel() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16")) return kAttentionAvx512Bf16;
  if (__builtin_cpu_supports("avx512f")) return kAttentionAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAttentionAvx2;
#endif
  return kAttentionPlain;
}

}  // namespace moehive

namespace {

using namespace moehive;

bool sound(const MoehiveAttention& a) {
  return a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.head_dim > 0 && a.head_dim <= kMaxHead &&
         a.head_dim % 2 == 0 && a.rotary >= 0 && a.rotary <= a.head_dim && a.rotary % 2 == 0 && a.window >= 0;
}

int64_t keys_seen(const MoehiveAttention& a, int64_t position) {
  return a.window && a.window < position + 1 ? a.window : position + 1;
}

struct Job {
  const AttentionKernel& kernel;
  const Attend& p;

  Spans spans(const AttendPart& part) const {
    const int64_t window = p.layer.window, first = part.position();
    return Spans::of(window ? std::max<int64_t>(0, first - window + 1) : 0, first + part.tokens - 1);
  }
  int64_t floats(const AttendPart& part) const {
    return Seen::floats(part.rows(), p.layer.head_dim, p.layer.head_dim);
  }
  Seen seen(const AttendPart& part, float* memory) const {
    return Seen(memory, part.rows(), p.layer.head_dim, p.layer.head_dim);
  }
  void attend(const AttendPart& part, int64_t span, const Seen& seen) const { kernel.attend(p, part, span, seen); }
  void join(const AttendPart& part, const Seen& seen, const Seen& more) const { kernel.join(part.rows(), seen, more); }
  void finish(const AttendPart& part, const Seen& seen) const { kernel.finish(p, part, seen); }
};

}  // namespace

// Norms and turns queries and keys of `rows` (see MoehiveAttention), appends keys and values to the sequences' pages
// and attends: out [tokens, heads * head_dim]. Returns 0; 1 if an argument can't be; 2 without memory.
int32_t moehive_trunk_attend(void* trunk, const MoehiveAttention* layer, float* rows, const MoehiveSequence* sequences,
                             int64_t count, const float* cos, const float* sin, float* out) {
  if (!trunk || !layer || !sound(*layer)) return 1;
  Trunk& self = *static_cast<Trunk*>(trunk);
  static const AttentionKernel& kernel = attention_kernel();
  const MoehiveAttention& a = *layer;
  const Attend p{a, rows, cos, sin, out};
  const Job job{kernel, p};
  const int64_t group = a.heads / a.kv_heads, heads = std::min(group, kMaxQueries), tokens = kMaxQueries / heads;
  try {
    thread_local std::vector<AttendPart> few, many;
    few.clear();
    many.clear();
    int64_t few_work = 0, many_work = 0, spans = 0;
    const auto is_few = [&](const MoehiveSequence& s) { return s.tokens <= tokens; };
    for (const MoehiveSequence* s = sequences; s < sequences + count; ++s) {
      self.each(s->tokens, s->tokens * a.row, [&](int64_t token) { kernel.prepare(p, *s, token); });
      (is_few(*s) ? few_work : many_work) += s->tokens * a.heads * a.head_dim * keys_seen(a, s->start + s->tokens - 1);
      if (is_few(*s)) spans += keys_seen(a, s->start) / (kPage * kSpan) + 1;
    }
    // Few tokens wait for memory: all key heads of a span together are read in one stream, if that leaves each thread
    // two. Many have arithmetic to do, one key head at a time.
    const bool together = spans >= 2 * self.threads();
    for (const MoehiveSequence* s = sequences; s < sequences + count; ++s) {
      const int64_t kv_heads = is_few(*s) && together ? a.kv_heads : 1;
      for (int64_t token = 0; token < s->tokens; token += tokens)
        for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head += kv_heads)
          for (int64_t head = 0; head < group; head += heads)
            (is_few(*s) ? few : many)
                .push_back({s, token, std::min(tokens, s->tokens - token), kv_head, kv_heads, head,
                            std::min(heads, group - head)});
    }
    attend_in_spans(self, job, few, few_work);
    attend_whole(self, job, many, many_work);
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

// The schedule of attention over sequences, heads, spans of pages and threads; and its C interface.
#include "attention.h"

#include <algorithm>
#include <exception>
#include <vector>

#include "trunk_threads.h"

namespace {

using namespace moehive;

const AttentionKernel& best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16")) return kAttentionAvx512Bf16;
  if (__builtin_cpu_supports("avx512f")) return kAttentionAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAttentionAvx2;
#endif
  return kAttentionPlain;
}

bool sound(const MoehiveAttention& a) {
  return a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.head_dim > 0 && a.head_dim <= kMaxHead &&
         a.head_dim % 2 == 0 && a.rotary >= 0 && a.rotary <= a.head_dim && a.rotary % 2 == 0 && a.window >= 0;
}

int64_t keys_seen(const MoehiveAttention& a, int64_t position) {
  return a.window && a.window < position + 1 ? a.window : position + 1;
}

// The spans that a part's rows see: begin .. end.
struct Spans {
  int64_t begin, end;
  Spans(const MoehiveAttention& a, const AttendPart& part) {
    const int64_t first = part.sequence->start + part.token, last = first + part.tokens - 1;
    begin = (a.window ? std::max<int64_t>(0, first - a.window + 1) : 0) / (kPage * kSpan);
    end = last / (kPage * kSpan) + 1;
  }
};

// One span of a part, and where in the call's memory is what its rows see there.
struct Piece {
  const AttendPart* part;
  int64_t span, at;
};

// A part that one thread has for itself, of one key head.
void attend_whole(const AttentionKernel& kernel, const Attend& p, const AttendPart& part) {
  constexpr int64_t kFloats = Seen::floats(kMaxQueries, kMaxHead);
  alignas(64) float memory[2][kFloats];
  const Seen seen(memory[0], part.rows(), p.layer.head_dim), more(memory[1], part.rows(), p.layer.head_dim);
  const Spans spans(p.layer, part);
  kernel.attend(p, part, spans.begin, seen);
  for (int64_t span = spans.begin + 1; span < spans.end; ++span) {
    kernel.attend(p, part, span, more);
    kernel.join(part, seen, more);
  }
  kernel.finish(p, part, seen);
}

// Parts whose spans are given to all threads.
void attend_in_spans(Trunk& self, const AttentionKernel& kernel, const Attend& p, const std::vector<AttendPart>& parts,
                     int64_t work) {
  thread_local std::vector<Piece> pieces;
  thread_local std::vector<float> memory;
  pieces.clear();
  int64_t floats = 16;
  for (const AttendPart& part : parts) {
    const Spans spans(p.layer, part);
    for (int64_t span = spans.begin; span < spans.end; ++span) {
      pieces.push_back({&part, span, floats});
      floats += Seen::floats(part.rows(), p.layer.head_dim);
    }
  }
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  float* const begin = memory.data() - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % 16;  // of a line
  const Piece* list = pieces.data();  // of this thread: the others must not look for their own
  const auto seen = [&](const Piece& it) { return Seen(begin + it.at, it.part->rows(), p.layer.head_dim); };
  self.each(static_cast<int64_t>(pieces.size()), work,
            [&](int64_t i) { kernel.attend(p, *list[i].part, list[i].span, seen(list[i])); });
  for (size_t i = 0, next; i < pieces.size(); i = next) {
    for (next = i + 1; next < pieces.size() && pieces[next].part == pieces[i].part; ++next)
      kernel.join(*pieces[i].part, seen(pieces[i]), seen(pieces[next]));
    kernel.finish(p, *pieces[i].part, seen(pieces[i]));
  }
}

}  // namespace

// Norms and turns queries and keys of `rows` (see MoehiveAttention), appends keys and values to the sequences' pages
// and attends: out [tokens, heads * head_dim]. Returns 0; 1 if an argument can't be; 2 without memory.
int32_t moehive_trunk_attend(void* trunk, const MoehiveAttention* layer, float* rows, const MoehiveSequence* sequences,
                             int64_t count, const float* cos, const float* sin, float* out) {
  if (!trunk || !layer || !sound(*layer)) return 1;
  Trunk& self = *static_cast<Trunk*>(trunk);
  static const AttentionKernel& kernel = best();
  const MoehiveAttention& a = *layer;
  const Attend p{a, rows, cos, sin, out};
  const int64_t group = a.heads / a.kv_heads, heads = std::min(group, kMaxQueries), tokens = kMaxQueries / heads;
  try {
    thread_local std::vector<AttendPart> parts;
    parts.clear();
    int64_t work = 0, spans = 0, most_tokens = 0;
    for (int64_t s = 0; s < count; ++s) {
      const MoehiveSequence& sequence = sequences[s];
      self.each(sequence.tokens, sequence.tokens * a.row, [&](int64_t token) { kernel.prepare(p, sequence, token); });
      work += sequence.tokens * a.heads * a.head_dim * keys_seen(a, sequence.start + sequence.tokens - 1);
      most_tokens = std::max(most_tokens, sequence.tokens);
      spans += keys_seen(a, sequence.start) / (kPage * kSpan) + 1;
    }
    const bool few = most_tokens <= tokens, together = few && spans >= 2 * self.threads();
    const int64_t kv_heads = together ? a.kv_heads : 1;
    for (const MoehiveSequence* s = sequences; s < sequences + count; ++s)
      for (int64_t token = 0; token < s->tokens; token += tokens)
        for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head += kv_heads)
          for (int64_t head = 0; head < group; head += heads)
            parts.push_back(
                {s, token, std::min(tokens, s->tokens - token), kv_head, kv_heads, head, std::min(heads, group - head)});
    if (few) {
      attend_in_spans(self, kernel, p, parts, work);
    } else {
      const AttendPart* list = parts.data();  // of this thread: the others must not look for their own
      self.each(static_cast<int64_t>(parts.size()), work, [&](int64_t i) { attend_whole(kernel, p, list[i]); });
    }
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

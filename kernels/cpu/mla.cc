// The schedule of latent attention over sequences, heads and threads; and its C interface.
#include "mla.h"

#include <algorithm>
#include <exception>
#include <vector>

#include "spans.h"
#include "trunk_threads.h"

namespace {

using namespace moehive;

const MlaKernel& best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kMlaAvx2;
#endif
  return kMlaPlain;
}

bool sound(const MoehiveMla& layer) {
  return layer.heads > 0 && layer.nope > 0 && layer.nope <= kMaxNope && layer.rope > 0 && layer.rope % 2 == 0 && layer.rope <= kMaxRope &&
         layer.rank > 0 && layer.rank % 2 == 0 && layer.rank <= kMaxRank && layer.value > 0;
}

struct Job {
  const AttentionKernel& kernel;
  const MoehiveMla& layer;
  const MoehiveMlaCall& call;

  Spans spans(const LatentPart& part) const { return Spans::of(0, part.position() + part.tokens - 1); }
  int64_t floats(const LatentPart& part) const {
    return Seen::floats(part.rows(), layer.rank + layer.rope, layer.rank);
  }
  Seen seen(const LatentPart& part, float* memory) const {
    return Seen(memory, part.rows(), layer.rank + layer.rope, layer.rank);
  }
  void attend(const LatentPart& part, int64_t span, const Seen& seen) const {
    kernel.attend_latent(layer, call, part, span, seen);
  }
  void join(const LatentPart& part, const Seen& seen, const Seen& more) const { kernel.join(part.rows(), seen, more); }
  void finish(const LatentPart& part, const Seen& seen) const { kernel.finish_latent(layer, call, part, seen); }
};

// Work: multiplications in all. Throws std::bad_alloc.
void attend(Trunk& trunk, const MoehiveMla& layer, const MoehiveMlaCall& call, int64_t work) {
  static const AttentionKernel& kernel = attention_kernel();
  const Job job{kernel, layer, call};
  int64_t spans = 0;
  for (const MoehiveSequence* s = call.sequences; s < call.sequences + call.count; ++s)
    spans += s->tokens * Spans::of(0, s->start).count();
  // A page's latents are laid out as values once for all of a part's rows, so parts are large, if that leaves each
  // thread two.
  const int64_t wanted = std::max<int64_t>(1, 2 * trunk.threads() / std::max<int64_t>(1, spans));
  const int64_t most = std::min(kLatentRows, (layer.heads + wanted - 1) / wanted);
  thread_local std::vector<LatentPart> parts;
  parts.clear();
  const int64_t tokens = std::max<int64_t>(1, kLatentRows / layer.heads);
  for (const MoehiveSequence* s = call.sequences; s < call.sequences + call.count; ++s)
    for (int64_t token = 0; token < s->tokens; token += tokens)
      for (int64_t head = 0; head < layer.heads; head += most)
        parts.push_back({s, token, std::min(tokens, s->tokens - token), head, std::min(most, layer.heads - head)});
  if (static_cast<int64_t>(parts.size()) < 4 * trunk.threads()) {
    attend_in_spans(trunk, job, parts, work);
  } else {
    attend_whole(trunk, job, parts, work);
  }
}

}  // namespace

int32_t moehive_trunk_mla(void* trunk, const MoehiveMla* layer, const MoehiveMlaCall* call) {
  if (!trunk || !sound(*layer)) return 1;
  Trunk& self = *static_cast<Trunk*>(trunk);
  const MlaKernel& kernel = best();
  const int64_t heads = layer->heads, rank = layer->rank;
  int64_t tokens = 0, seen = 0;
  for (int64_t s = 0; s < call->count; ++s) {
    const MoehiveSequence& sequence = call->sequences[s];
    tokens += sequence.tokens;
    seen += sequence.tokens * (sequence.start + sequence.tokens);
    for (int64_t token = 0; token < sequence.tokens; ++token) kernel.append(*layer, *call, sequence, token);
  }
  const int64_t groups = (tokens + kMlaTokens - 1) / kMlaTokens;
  const auto here = [&](int64_t item) { return std::min(kMlaTokens, tokens - item % groups * kMlaTokens); };

  self.each(heads * groups, tokens * heads * layer->nope * rank, [&](int64_t item) {
    kernel.absorb(*layer, *call, item / groups, item % groups * kMlaTokens, here(item));
  });
  try {
    attend(self, *layer, *call, seen * heads * (2 * rank + layer->rope));
  } catch (const std::exception&) {
    return 2;
  }
  self.each(heads * groups, tokens * heads * layer->value * rank, [&](int64_t item) {
    kernel.expand(*layer, *call, item / groups, item % groups * kMlaTokens, here(item));
  });
  return 0;
}

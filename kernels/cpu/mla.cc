// The schedule of latent attention over sequences, heads and threads; and its C interface.
#include "mla.h"

#include <algorithm>

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
         layer.rank > 0 && layer.rank <= kMaxRank && layer.value > 0;
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
  const int64_t fours = (heads + kHeadsTogether - 1) / kHeadsTogether;
  self.each(tokens * fours, seen * heads * (2 * rank + layer->rope), [&](int64_t item) {
    const MoehiveSequence* sequence = call->sequences;
    int64_t token = item / fours;
    for (; token >= sequence->tokens; ++sequence) token -= sequence->tokens;
    kernel.attend(*layer, *call, *sequence, token, item % fours * kHeadsTogether);
  });
  self.each(heads * groups, tokens * heads * layer->value * rank, [&](int64_t item) {
    kernel.expand(*layer, *call, item / groups, item % groups * kMlaTokens, here(item));
  });
  return 0;
}

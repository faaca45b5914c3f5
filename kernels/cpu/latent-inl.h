// Latent attention between absorbed queries and the latents themselves, compiled for each instruction set: all heads have
// the same keys, and a key's first numbers are its value.
#pragma once

#include "attention-inl.h"

namespace moehive {
namespace {

// A page's latents as values in blocks (attention.h), made of its keys. Tokens from `count` on are not used.
inline void values_of(const float* keys, int64_t rank, int64_t count, float* values) {
  for (int64_t first = 0, wide; first < padded_head(rank); first += wide) {
    wide = least(kValueBlock, padded_head(rank) - first);
    float* block = values + first * kPage;
    for (int64_t i = 0; i < wide; ++i)
      for (int64_t t = 0; t < count; ++t) block[t * wide + i] = first + i < rank ? keys[(first + i) * kPage + t] : 0.0f;
  }
}

// Of two tokens' two numbers a0 a1 b0 b1 become a0 b0 a1 b1.
inline void values_of(const uint16_t* keys, int64_t rank, int64_t count, uint16_t* values) {
  for (int64_t first = 0, wide; first < padded_head(rank); first += wide) {
    wide = least(kValueBlock, padded_head(rank) - first);
    uint16_t* block = values + first * kPage;
    for (int64_t i = 0; i < wide; i += 2) {
      const uint16_t* from = keys + (first + i) * kPage;
      for (int64_t t = 0; t < count; t += 2) {
        uint64_t four = 0;
        if (first + i < rank) memcpy(&four, from + 2 * t, sizeof four);
        four = (four & 0xffff00000000ffff) | (four >> 16 & 0xffff0000) | (four << 16 & 0xffff00000000);
        memcpy(block + t * wide + 2 * i, &four, sizeof four);
      }
    }
  }
}

inline float* absorbed_of(const MoehiveMla& layer, const MoehiveMlaCall& call, const LatentPart& part, int64_t row) {
  const int64_t token = part.sequence->first + part.token + row / part.heads, head = part.head + row % part.heads;
  return call.absorbed + (token * layer.heads + head) * (layer.rank + layer.rope);
}

template <class Stored>
void attend_latent_as(const MoehiveMla& layer, const MoehiveMlaCall& call, const LatentPart& part, int64_t span,
                      const Seen& seen) {
  const int64_t rows = part.rows(), full = layer.rank + layer.rope;
  begin(seen, rows);
  for (int64_t r = 0; r < rows; ++r)
    take_query<Stored>(seen, r, absorbed_of(layer, call, part, r), full, layer.scale);
  const int64_t position = part.position(), end = position + part.tokens;
  const int64_t last = least((span + 1) * kSpan, (end - 1) / kPage + 1);
  alignas(64) Stored values[kMaxRank * kPage];
  for (int64_t page = span * kSpan; page < last; ++page) {
    const int64_t base = page * kPage, count = least(kPage, end - base);
    const Stored* keys = reinterpret_cast<const Stored*>(part.sequence->pages[page] + layer.page_at);
    values_of(keys, layer.rank, count, values);
    for (int64_t r = 0; r < rows; r += kMaxQueries)
      attend_page(seen, r, least(kMaxQueries, rows - r), keys, full, values, padded_head(layer.rank), 0, count,
                  [&](int64_t row, int64_t& low, int64_t& high) {
                    low = 0;
                    high = most(0, least(kPage, position + row / part.heads + 1 - base));
                  });
  }
}

void attend_latent(const MoehiveMla& layer, const MoehiveMlaCall& call, const LatentPart& part, int64_t span,
                   const Seen& seen) {
  if (layer.half) {
    attend_latent_as<uint16_t>(layer, call, part, span, seen);
  } else {
    attend_latent_as<float>(layer, call, part, span, seen);
  }
}

void finish_latent(const MoehiveMla& layer, const MoehiveMlaCall& call, const LatentPart& part, const Seen& seen) {
  for (int64_t r = 0; r < part.rows(); ++r) {
    float* to = absorbed_of(layer, call, part, r);
    const float* sums = seen.sums + r * seen.stride;
    const float factor = 1.0f / seen.total[r];
    for (int64_t i = 0; i < layer.rank; ++i) to[i] = sums[i] * factor;
  }
}

}  // namespace
}  // namespace moehive

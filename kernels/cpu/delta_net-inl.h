// The arithmetic of delta_net.h, compiled for each instruction set by the including file.
#pragma once

#include "delta_net.h"
#include "fetch-inl.h"
#include "vec8-inl.h"

namespace moehive {
namespace {

constexpr int64_t kTogether = 16;  // tokens whose queries and keys stay in the first cache while a state is updated

// mixed[t][c] = silu(sum over j of conv[j][c] * x[t - taps + 1 + j][c]), where x before the first token is the state;
// then the state becomes the last taps - 1 inputs.
void convolve(const MoehiveDeltaNet& layer, const MoehiveDeltaNetCall& call, int64_t sequence, int64_t from,
              int64_t channel, int64_t count) {
  const int64_t channels = conv_channels(layer), taps = layer.taps, kept = taps - 1;
  const int64_t first = call.sequences[sequence].first, tokens = call.sequences[sequence].tokens;
  float* state = call.conv[sequence] + channel;
  const float* x = call.rows + first * layer.row + from;
  float* out = call.mixed + first * channels + channel;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* tap[kMaxTaps];
    for (int64_t j = 0; j < taps; ++j) {
      const int64_t at = t - kept + j;
      tap[j] = at < 0 ? state + (at + kept) * channels : x + at * layer.row;
    }
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) {
      V sum = {};
      for (int64_t j = 0; j < taps; ++j) {
        sum = fma(load(layer.conv + j * channels + channel + c), load(tap[j] + c), sum);
      }
      store(out + t * channels + c, silu(sum));
    }
    for (; c < count; ++c) {
      float sum = 0.0f;
      for (int64_t j = 0; j < taps; ++j) sum += layer.conv[j * channels + channel + c] * tap[j][c];
      out[t * channels + c] = sum / (1.0f + expf(-sum));
    }
  }
  for (int64_t j = 0; j < kept; ++j) {  // in place: a row is read before an earlier one would be needed again
    const int64_t at = tokens - kept + j;
    const float* source = at < 0 ? state + (at + kept) * channels : x + at * layer.row;
    memmove(state + j * channels, source, count * sizeof(float));
  }
}

// What one token does to one head's state.
struct Step {
  float decay;  // of the state, before the token reads it
  float beta;
  float key_query;  // the products of its normalized key and query
};

inline void normalize_l2(float* to, const float* from, int64_t n, float scale) {
  const float factor = scale / sqrtf(dot(from, from, n) + 1e-6f);
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
}

inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Reads of a block of 16 values: sums of its rows weighted by the key and by the query.
struct Reads {
  V key[2], query[2];
};

// The state takes up token t and is read by the next, in one pass over its block: state = state * decay + key * delta.
// With kUpdate or kRead off, only the other half. What is added in which order does not depend on the split, so
// neither do the bits depend on how a prompt is cut into chunks. The first read of a block fetches the one behind it,
// since the processor's own prefetcher stops at each page of 4 KiB (Zen 4, 32 heads of 128 x 128, one thread and two:
// 130 and 100 us when fetched into the first cache, so 100 and 85).
template <bool kUpdate, bool kRead>
inline Reads pass(float* block, int64_t rows, float decay, const float* key, const V* delta, const float* next_key,
                  const float* next_query) {
  Reads reads = {};
  for (int64_t i = 0; i < rows; ++i) {
    V low = load(block + i * kBlock), high = load(block + i * kBlock + kWidth);
    if constexpr (!kUpdate) fetch_to_second_cache(block + (rows + i) * kBlock);
    if constexpr (kUpdate) {
      const V k = same(key[i]), d = same(decay);
      low = fma(k, delta[0], low * d);
      high = fma(k, delta[1], high * d);
      store(block + i * kBlock, low);
      store(block + i * kBlock + kWidth, high);
    }
    if constexpr (kRead) {
      const V k = same(next_key[i]), q = same(next_query[i]);
      reads.key[0] = fma(k, low, reads.key[0]);
      reads.key[1] = fma(k, high, reads.key[1]);
      reads.query[0] = fma(q, low, reads.query[0]);
      reads.query[1] = fma(q, high, reads.query[1]);
    }
  }
  return reads;
}

// y = y / sqrt(mean(y²) + eps) * norm * silu(z)
inline void gated_norm(float* y, const float* z, const MoehiveDeltaNet& layer) {
  const int64_t n = layer.value_dim;
  const float scale = 1.0f / sqrtf(dot(y, y, n) / static_cast<float>(n) + layer.norm_eps);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(y + i, load(y + i) * scale * load(layer.norm + i) * silu(load(z + i)));
  }
  for (; i < n; ++i) y[i] = y[i] * scale * layer.norm[i] * (z[i] / (1.0f + expf(-z[i])));
}

void head(const MoehiveDeltaNet& layer, const MoehiveDeltaNetCall& call, int64_t sequence, int64_t number) {
  const int64_t channels = conv_channels(layer), keys = layer.key_dim, values = layer.value_dim;
  const int64_t blocks = (values + kBlock - 1) / kBlock, outs = layer.value_heads * values;
  const int64_t group = number / (layer.value_heads / layer.key_heads);
  const float scale = 1.0f / sqrtf(static_cast<float>(keys));
  float* to = call.out + layer.to[number];
  float* state = call.recurrent[sequence] + number * blocks * keys * kBlock;
  alignas(64) float query[kTogether][kMaxHeadDim], key[kTogether][kMaxHeadDim];
  Step steps[kTogether];

  const int64_t end = call.sequences[sequence].first + call.sequences[sequence].tokens;
  for (int64_t first = call.sequences[sequence].first; first < end; first += kTogether) {
    const int64_t tokens = end - first < kTogether ? end - first : kTogether;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* mixed = call.mixed + (first + t) * channels;
      const float* row = call.rows + (first + t) * layer.row;
      normalize_l2(query[t], mixed + group * keys, keys, scale);
      normalize_l2(key[t], mixed + (layer.key_heads + group) * keys, keys, 1.0f);
      const float dt = softplus(row[layer.a[number]] + layer.dt_bias[number]);
      steps[t] = {expf(layer.decay[number] * dt), 1.0f / (1.0f + expf(-row[layer.b[number]])),
                  dot(key[t], query[t], keys)};
    }
    for (int64_t at = 0; at < values; at += kBlock) {
      float* block = state + at * keys;
      const int64_t width = values - at < kBlock ? values - at : kBlock;
      Reads reads = pass<false, true>(block, keys, 1.0f, nullptr, nullptr, key[0], query[0]);
      for (int64_t t = 0; t < tokens; ++t) {
        const Step& step = steps[t];
        alignas(64) float value[kBlock] = {}, out[kBlock];
        memcpy(value, call.mixed + (first + t) * channels + 2 * layer.key_heads * keys + number * values + at,
               width * sizeof(float));
        V delta[2];
        for (int half = 0; half < 2; ++half) {
          delta[half] = (load(value + half * kWidth) - reads.key[half] * step.decay) * step.beta;
          store(out + half * kWidth, fma(delta[half], same(step.key_query), reads.query[half] * step.decay));
        }
        memcpy(to + (first + t) * outs + at, out, width * sizeof(float));
        if (t + 1 < tokens) {
          reads = pass<true, true>(block, keys, step.decay, key[t], delta, key[t + 1], query[t + 1]);
        } else {
          pass<true, false>(block, keys, step.decay, key[t], delta, nullptr, nullptr);
        }
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const float* z = call.rows + (first + t) * layer.row + layer.z[number];
      gated_norm(to + (first + t) * outs, z, layer);
    }
  }
}

}  // namespace
}  // namespace moehive

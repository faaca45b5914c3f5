// Runs each of this processor's DeltaNet and latent-attention kernels on the same numbers and prints, for each, its name
// and its results in one line.
#include <cmath>
#include <cstdio>
#include <vector>

#include "delta_net.h"
#include "attention.h"
#include "mla.h"

using namespace moehive;

namespace {

uint32_t state = 1;

std::vector<float> numbers(int64_t count, float scale = 1.0f) {
  std::vector<float> all(count);
  for (float& x : all) x = ((state = state * 1664525u + 1013904223u) / 4294967296.0f * 2.0f - 1.0f) * scale;
  return all;
}

void print(const std::vector<float>& values) {
  for (float value : values) std::printf(" %.9g", value);
}

void delta_net(const DeltaNetKernel& kernel) {
  MoehiveDeltaNet layer{};
  layer.key_heads = 2, layer.value_heads = 4, layer.key_dim = 20, layer.value_dim = 24, layer.taps = 4;
  const int64_t channels = conv_channels(layer), outs = layer.value_heads * layer.value_dim, tokens = 23;
  layer.row = channels + outs + 2 * layer.value_heads;
  const int64_t whole[] = {0, 0, channels};
  std::vector<int64_t> z, b, a, to;
  for (int64_t h = 0; h < layer.value_heads; ++h) {
    z.push_back(channels + h * layer.value_dim);
    b.push_back(channels + outs + h);
    a.push_back(channels + outs + layer.value_heads + h);
    to.push_back(h * layer.value_dim);
  }
  const auto conv = numbers(layer.taps * channels), bias = numbers(4), norm = numbers(layer.value_dim);
  auto decay = numbers(4);
  for (float& x : decay) x = -1.0f - x;
  layer.segments = 1, layer.channels = whole, layer.z = z.data(), layer.b = b.data(), layer.a = a.data();
  layer.to = to.data(), layer.conv = conv.data(), layer.decay = decay.data(), layer.dt_bias = bias.data();
  layer.norm = norm.data(), layer.norm_eps = 1e-6f;

  const auto rows = numbers(tokens * layer.row, 2.0f);
  const MoehiveSequence sequence{0, tokens, 0, nullptr};
  std::vector<float> kept((layer.taps - 1) * channels), memory(layer.value_heads * 2 * layer.key_dim * kBlock);
  std::vector<float> mixed(tokens * channels), out(tokens * outs);
  float *conv_state = kept.data(), *recurrent = memory.data();
  const MoehiveDeltaNetCall call{rows.data(), &sequence, 1, &conv_state, &recurrent, mixed.data(), out.data()};
  kernel.convolve(layer, call, 0, 0, 0, channels);
  for (int64_t h = 0; h < layer.value_heads; ++h) kernel.head(layer, call, 0, h);
  print(out);
}

void mla(const MlaKernel& kernel, const AttentionKernel& attention, bool half) {
  MoehiveMla layer{};
  layer.heads = 6, layer.nope = 10, layer.rope = 6, layer.rank = 76, layer.value = 9;
  const int64_t tokens = 40, full = layer.rank + layer.rope;
  const auto up = numbers(layer.heads * (layer.nope + layer.value) * layer.rank, 0.3f), norm = numbers(layer.rank);
  layer.up = up.data(), layer.norm = norm.data(), layer.norm_eps = 1e-6f, layer.scale = 0.25f;
  layer.half = half, layer.interleaved = 1;
  const auto queries = numbers(tokens * layer.heads * (layer.nope + layer.rope), 2.0f);
  const auto compressed = numbers(tokens * full), angles = numbers(tokens * layer.rope);
  std::vector<float> first(kPage * full), second(kPage * full), absorbed(tokens * layer.heads * full);
  std::vector<float> out(tokens * layer.heads * layer.value);
  const uint64_t pages[] = {reinterpret_cast<uint64_t>(first.data()), reinterpret_cast<uint64_t>(second.data())};
  const MoehiveSequence sequence{0, tokens, 0, pages};
  const float* sin = angles.data() + tokens * layer.rope / 2;
  const MoehiveMlaCall call{queries.data(), compressed.data(), full,           angles.data(), sin,
                            &sequence,      1,                 absorbed.data(), out.data()};
  for (int64_t t = 0; t < tokens; ++t) kernel.append(layer, call, sequence, t);
  for (int64_t h = 0; h < layer.heads; ++h)
    for (int64_t t = 0; t < tokens; t += 13) kernel.absorb(layer, call, h, t, t + 13 < tokens ? 13 : tokens - t);
  for (int64_t t = 0; t < tokens; t += 10) {
    const LatentPart part{&sequence, t, 10, 0, layer.heads};
    std::vector<float> memory(Seen::floats(part.rows(), full, layer.rank));
    const Seen seen(memory.data(), part.rows(), full, layer.rank);
    attention.attend_latent(layer, call, part, 0, seen);
    attention.finish_latent(layer, call, part, seen);
  }
  for (int64_t h = 0; h < layer.heads; ++h) kernel.expand(layer, call, h, 0, tokens);
  print(out);
}

void attend(const AttentionKernel& kernel, bool half) {
  MoehiveAttention layer{};
  layer.heads = 14, layer.kv_heads = 2, layer.head_dim = 42, layer.rotary = 20, layer.window = 30;
  layer.query_stride = layer.head_dim, layer.gate_at = -1, layer.keys_at = layer.heads * layer.head_dim;
  layer.values_at = layer.keys_at + layer.kv_heads * layer.head_dim;
  layer.row = layer.values_at + layer.kv_heads * layer.head_dim;
  const int64_t tokens = 40;
  const auto norm = numbers(layer.head_dim), sinks = numbers(layer.heads), angles = numbers(tokens * layer.rotary);
  layer.query_norm = layer.key_norm = norm.data(), layer.sinks = sinks.data();
  layer.eps = 1e-6f, layer.scale = 0.2f, layer.half = half;
  auto rows = numbers(tokens * layer.row, 2.0f);
  std::vector<float> first(2 * kPage * layer.kv_heads * 64), second(first.size());
  std::vector<float> out(tokens * layer.heads * layer.head_dim);
  const uint64_t pages[] = {reinterpret_cast<uint64_t>(first.data()), reinterpret_cast<uint64_t>(second.data())};
  const MoehiveSequence sequence{0, tokens, 0, pages};
  const Attend p{layer, rows.data(), angles.data(), angles.data() + tokens * layer.rotary / 2, out.data()};
  for (int64_t t = 0; t < tokens; ++t) kernel.prepare(p, sequence, t);
  for (int64_t t = 0; t < tokens; t += 2) {
    const AttendPart part{&sequence, t, 2, 0, layer.kv_heads, 0, layer.heads / layer.kv_heads};
    std::vector<float> memory(Seen::floats(part.rows(), layer.head_dim, layer.head_dim));
    const Seen seen(memory.data(), part.rows(), layer.head_dim, layer.head_dim);
    kernel.attend(p, part, 0, seen);
    kernel.finish(p, part, seen);
  }
  print(out);
}

void run(const char* name, const DeltaNetKernel& delta, const MlaKernel& latent, const AttentionKernel& attention) {
  state = 1;
  std::printf("%s", name);
  delta_net(delta);
  for (const bool half : {false, true}) {
    mla(latent, attention, half);
    attend(attention, half);
  }
  std::printf("\n");
}

}  // namespace

int main() {
  run("plain", kDeltaNetPlain, kMlaPlain, kAttentionPlain);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    run("avx2", kDeltaNetAvx2, kMlaAvx2, kAttentionAvx2);
  if (__builtin_cpu_supports("avx512f")) run("avx512", kDeltaNetAvx2, kMlaAvx2, kAttentionAvx512);
#endif
  return 0;
}

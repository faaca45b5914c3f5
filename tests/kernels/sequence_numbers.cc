// Runs each of this processor's DeltaNet and latent-attention kernels on the same numbers and prints, for each, its name
// and its results in one line.
#include <cmath>
#include <cstdio>
#include <vector>

#include "delta_net.h"
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

void mla(const MlaKernel& kernel, bool half) {
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
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < layer.heads; h += kHeadsTogether) kernel.attend(layer, call, sequence, t, h);
  for (int64_t h = 0; h < layer.heads; ++h) kernel.expand(layer, call, h, 0, tokens);
  print(out);
}

void run(const char* name, const DeltaNetKernel& delta, const MlaKernel& latent) {
  state = 1;
  std::printf("%s", name);
  delta_net(delta);
  mla(latent, false);
  mla(latent, true);
  std::printf("\n");
}

}  // namespace

int main() {
  run("plain", kDeltaNetPlain, kMlaPlain);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) run("avx2", kDeltaNetAvx2, kMlaAvx2);
#endif
  return 0;
}

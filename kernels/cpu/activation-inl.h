// What happens between an expert's two projections, as functions of f32 that come out the same on every machine. Written
// once and compiled for each instruction set; without external linkage, as all of multiply-inl.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "expert_mlp.h"
#include "exponential-inl.h"

namespace moehive {
namespace {

// A register at a time, and bounds as choices between vectors: of a choice between numbers GCC makes a branch for each
// bound, then computes all of them, and x / (1 + e^88) is a denormal number, over which Intel's processors spend 150
// cycles.
#if defined(__AVX512F__)
constexpr int64_t kActivated = 16;
#elif defined(__AVX2__)
constexpr int64_t kActivated = 8;
#else
constexpr int64_t kActivated = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kActivated)));

inline Floats silu(Floats x, float alpha) { return x / (1.0f + exponential(-alpha * x)); }

inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

// 0.5 x (1 + tanh u) = x / (1 + e^-2u)
inline Floats gelu_tanh(Floats x) {
  const Floats u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * u));
}

template <class Function>
inline void apply(float* x, int64_t n, Function&& function) {
  for (int64_t i = 0; i < n; ++i) x[i] = function(x[i]);
}

template <class Function>
inline void apply_to_vectors(float* x, int64_t n, Function&& function) {
  Floats some = {};
  int64_t i = 0;
  for (; i + kActivated <= n; i += kActivated) {
    memcpy(&some, x + i, sizeof some);
    some = function(some);
    memcpy(x + i, &some, sizeof some);
  }
  if (i < n) {
    some = Floats{};
    memcpy(&some, x + i, static_cast<size_t>(n - i) * sizeof(float));
    some = function(some);
    memcpy(x + i, &some, static_cast<size_t>(n - i) * sizeof(float));
  }
}

void activate(const MoehiveSpec& spec, float* x, int64_t n) {
  const float alpha = spec.alpha;
  switch (static_cast<Activation>(spec.activation)) {
    case Activation::silu: return apply_to_vectors(x, n, [alpha](Floats v) { return silu(v, alpha); });
    case Activation::gelu: return apply(x, n, gelu);
    case Activation::gelu_tanh: return apply_to_vectors(x, n, gelu_tanh);
    case Activation::relu: return apply(x, n, [](float v) { return v < 0.0f ? 0.0f : v; });
    case Activation::relu2: return apply(x, n, [](float v) { return v < 0.0f ? 0.0f : v * v; });
  }
}

// gate[i] = act(gate) * (up + offset), with the limits of `spec` if it has some. Comparisons let a NaN through.
void join_gate(const MoehiveSpec& spec, float* gate, const float* up, int64_t n) {
  const float limit = spec.limit, offset = spec.up_offset;
  const auto at_most = [limit](float v) { return v > limit ? limit : v; };
  if (spec.has_limit && !spec.limit_after_activation) apply(gate, n, at_most);
  activate(spec, gate, n);
  if (!spec.has_limit) {
    for (int64_t i = 0; i < n; ++i) gate[i] *= up[i] + offset;
    return;
  }
  if (spec.limit_after_activation) apply(gate, n, at_most);
  for (int64_t i = 0; i < n; ++i) {
    const float bounded = up[i] < -limit ? -limit : at_most(up[i]);
    gate[i] *= bounded + offset;
  }
}

}  // namespace
}  // namespace moehive

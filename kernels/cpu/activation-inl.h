// What happens between an expert's two projections, as functions of f32 that come out the same on every machine. Written
// once and compiled for each instruction set; without external linkage, as all of multiply-inl.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "expert_mlp.h"

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
typedef uint32_t Bits __attribute__((vector_size(4 * kActivated)));

inline Floats all(float x) { return x - Floats{}; }

// e^x within 2 units in the last place for -87 <= x <= 88, held at the bounds beyond. The C library's own differs
// between machines, and the compiler can't do several of those at once. After Cephes' expf (Moshier).
inline Floats exponential(Floats x) {
  x = x < all(-87.0f) ? all(-87.0f) : x;
  x = x > all(88.0f) ? all(88.0f) : x;
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the whole number is in the low bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Bits power = (reinterpret_cast<Bits>(shifted) + 127u) << 23;  // 2^n
  return y * reinterpret_cast<Floats>(power);
}

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

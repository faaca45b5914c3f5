// Norms, gates and the router, written once with vectors of the compiler and compiled for each instruction set.
//
// The including file defines kWidth, the floats of a register. As in multiply-inl.h nothing here has external
// linkage, nor uses the standard library's templates. Multiplications and additions are fused where the processor can.
#pragma once

#include "norm-inl.h"
#include "trunk.h"

namespace moehive {
namespace {

void add_norm(const AddNorm& p, int64_t token) {
  const int64_t n = p.width;
  float* hidden = p.hidden + token * n;
  if (p.add && p.add_half) {
    const uint16_t* add = static_cast<const uint16_t*>(p.add) + token * n;
    for (int64_t i = 0; i < n; ++i) hidden[i] += from_bf16(add[i]);
  } else if (p.add) {
    const float* add = static_cast<const float*>(p.add) + token * n;
    for (int64_t i = 0; i < n; ++i) hidden[i] += add[i];
  }
  if (p.more) {
    const float factor = p.gate ? sigmoid(p.gate[token * p.gate_stride]) : 1.0f;
    const float* more = p.more + token * n;
    for (int64_t i = 0; i < n; ++i) hidden[i] += more[i] * factor;
  }
  if (!p.norm) return;
  const float factor = inverse_rms(hidden, n, p.eps);
  float* out = p.out + token * n;
  for (int64_t i = 0; i < n; ++i) out[i] = hidden[i] * factor * p.norm[i];
  if (p.half_out)
    for (int64_t i = 0; i < n; ++i) p.half_out[token * n + i] = to_bf16(out[i]);
}

inline float activated(float x, int32_t activation) {
  switch (activation) {
    case 1: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case 2: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case 3: return x > 0.0f ? x : 0.0f;
    case 4: return x > 0.0f ? x * x : 0.0f;
    default: return x * sigmoid(x);
  }
}

void gate(const float* in, int64_t middle, int32_t activation, float* out) {
  int64_t i = 0;
  if (activation == 0) {
    for (; i + kWidth <= middle; i += kWidth) store(out + i, silu(load(in + i)) * load(in + middle + i));
  }
  for (; i < middle; ++i) out[i] = activated(in[i], activation) * in[middle + i];
}

// The largest of `values` that is not `taken` before place `used`; the first among equals.
inline int64_t largest(const float* values, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (values[i] > values[best]) best = i;
  return best;
}

inline float top_two(const float* values, int64_t n) {
  float first = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] > first) {
      second = first;
      first = values[i];
    } else if (values[i] > second) {
      second = values[i];
    }
  }
  return first + second;
}

// `scratch` [2 * experts + groups]
void route(const MoehiveRouter& p, const float* logits, float* scratch, int64_t* ids, float* weights) {
  float *scores = scratch, *choice = scratch + p.experts, *groups = choice + p.experts;
  if (p.scores == 0) {
    const float top = logits[largest(logits, p.experts)];
    float total = 0.0f;
    for (int64_t e = 0; e < p.experts; ++e) total += scores[e] = expf(logits[e] - top);
    for (int64_t e = 0; e < p.experts; ++e) scores[e] /= total;
  } else {
    for (int64_t e = 0; e < p.experts; ++e) scores[e] = p.scores == 1 ? sigmoid(logits[e]) : logits[e];
  }
  for (int64_t e = 0; e < p.experts; ++e) choice[e] = scores[e] + (p.bias ? p.bias[e] : 0.0f);
  if (p.groups > 1) {
    const int64_t size = p.experts / p.groups;
    for (int64_t g = 0; g < p.groups; ++g) groups[g] = top_two(choice + g * size, size);
    for (int64_t i = 0; i < p.top_groups; ++i) groups[largest(groups, p.groups)] = -INFINITY;
    for (int64_t g = 0; g < p.groups; ++g)
      if (groups[g] != -INFINITY)
        for (int64_t e = g * size; e < (g + 1) * size; ++e) choice[e] = -INFINITY;
  }
  float total = 0.0f;
  for (int64_t i = 0; i < p.top_k; ++i) {
    ids[i] = largest(choice, p.experts);
    choice[ids[i]] = -INFINITY;
    weights[i] = scores[ids[i]];
    if (p.scores == 2) weights[i] = expf(weights[i] - scores[ids[0]]);
    total += weights[i];
  }
  const float sum = p.scores == 1 ? total + 1e-20f : total;
  const float factor = p.renormalize || p.scores == 2 ? p.scaling / sum : p.scaling;
  for (int64_t i = 0; i < p.top_k; ++i) weights[i] *= factor;
}

}  // namespace
}  // namespace moehive

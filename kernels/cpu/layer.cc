// A decoder's layer for few tokens in two calls (kernels/layer.py): up to the choice of experts, and the MLP that is
// computed here while others compute those. What Python does between two calls takes as long as a small layer, and
// longest where the layer's weights have emptied the caches. The results have the bits of the single operations.
#include <chrono>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <new>
#include <vector>

#include "delta_net.h"
#include "linear.h"
#include "mla.h"
#include "trunk.h"
#include "trunk_threads.h"

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

// Field for field as kernels/layer.py has them. A matrix without rows is none.
struct MoehiveMlp {
  MoehiveMatrix up[2];  // gate and up: as many rows, of the input's columns
  MoehiveMatrix down;
  MoehiveMatrix share;  // one row: how much of the result a token takes, before the sigmoid; or none
  int32_t activation;
};

struct MoehiveMixer {
  const void* layer;  // MoehiveAttention, MoehiveDeltaNet or MoehiveMla, as `kind` says: 0, 1, 2
  const MoehiveMatrix* projections;  // of the same input
  int64_t count;
  MoehiveMatrix output;
  MoehiveMatrix queries;    // latent attention: of the input, or with query_norm of its first projection
  const float* query_norm;  // [queries' columns], or null
  int64_t group;            // whose pages hold its part of the cache
  int64_t conv, recurrent;  // DeltaNet: places among a sequence's states
  float query_eps;
  int32_t kind;
};

struct MoehiveLayer {
  const MoehiveLayer* before;  // null: this is the first
  const float* norm;           // [width], before the mixer
  const float* mlp_norm;
  MoehiveMixer mixer;
  MoehiveMatrix router_weights;  // or none: a layer without routed experts
  MoehiveRouter router;
  MoehiveMlp mlp;  // the shared expert, or all there is; `down` without rows: none
  int64_t width;   // of the hidden states
  float eps;       // of both norms
};

struct MoehiveStep;

// The MLP of a layer with routed experts: begun, if a thread is free, when the layer's input is known, so that it is
// computed while its owner asks for the routed ones.
struct MoehiveBeside {
  moehive::Aside aside;
  void* trunk = nullptr;
  const MoehiveLayer* layer = nullptr;  // null: nothing is left to do
  const MoehiveStep* step = nullptr;
  bool handed = false;  // to a thread of the pool, for all that its owner knows
  int32_t status = 0;
  int64_t begun_ns = 0, ended_ns = 0;  // when it was computed, by the steady clock
};

// One forward pass: its sequences, and memory for what passes from call to call.
struct MoehiveStep {
  int64_t tokens, count;                 // `count` sequences
  const MoehiveSequence* sequences;      // [count], without pages
  const MoehiveSequence* const* groups;  // for each group of layers [count], with that group's pages
  const uint64_t* const* states;         // [count] → addresses of a sequence's states
  const float* cos;                      // [tokens, half of the rotary numbers]
  const float* sin;
  float* hidden;    // [tokens, width], the residual stream
  float* x;         // the same, normed
  uint16_t* half;   // x before the MLP, as bf16; or null
  float* added;     // [tokens, width] what the mixer, then the MLP here adds to `hidden`
  float* share;     // [tokens] how much of it
  float* logits;    // [tokens, experts] the router's
  int64_t* ids;     // [tokens, top_k] what it chose
  float* weights;
  MoehiveBeside* beside;
};

namespace {

// Memory of this thread for a call's intermediate results, kept for the next one; each part begins a cache line.
class Room {
 public:
  explicit Room(std::initializer_list<int64_t> parts) {
    thread_local std::vector<float> memory;
    int64_t floats = kLine;
    for (const int64_t part : parts) floats += lines(part);
    if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data()), line = kLine * sizeof(float);
    at_ = reinterpret_cast<float*>((start + line - 1) / line * line);
  }
  float* take(int64_t floats) { return (at_ += lines(floats)) - lines(floats); }

 private:
  static constexpr int64_t kLine = 16;
  static int64_t lines(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }
  float* at_;
};

int64_t rows_of(const MoehiveMixer& mixer) {
  int64_t rows = 0;
  for (int64_t m = 0; m < mixer.count; ++m) rows += mixer.projections[m].rows;
  return rows;
}

// What a mixer makes of step.x, into step.added. These return a status as the functions below do.

int32_t attention(void* trunk, const MoehiveMixer& mixer, const MoehiveStep& step) {
  const MoehiveAttention& layer = *static_cast<const MoehiveAttention*>(mixer.layer);
  const int64_t width = layer.heads * layer.head_dim, tokens = step.tokens;
  if (rows_of(mixer) != layer.row || mixer.output.columns != width) return 1;
  Room room({tokens * layer.row, tokens * width});
  float *const rows = room.take(tokens * layer.row), *const mixed = room.take(tokens * width);
  int32_t status = moehive_linear(trunk, mixer.projections, mixer.count, step.x, tokens, rows);
  if (!status)
    status = moehive_trunk_attend(trunk, &layer, rows, step.groups[mixer.group], step.count, step.cos, step.sin, mixed);
  return status ? status : moehive_linear(trunk, &mixer.output, 1, mixed, tokens, step.added);
}

int32_t delta_net(void* trunk, const MoehiveMixer& mixer, const MoehiveStep& step) {
  const MoehiveDeltaNet& layer = *static_cast<const MoehiveDeltaNet*>(mixer.layer);
  const int64_t width = layer.value_heads * layer.value_dim, tokens = step.tokens;
  const int64_t channels = moehive::conv_channels(layer);
  if (rows_of(mixer) != layer.row || mixer.output.columns != width) return 1;
  thread_local std::vector<float*> states;
  states.resize(2 * step.count);
  float **const conv = states.data(), **const recurrent = conv + step.count;
  for (int64_t s = 0; s < step.count; ++s) {
    conv[s] = reinterpret_cast<float*>(step.states[s][mixer.conv]);
    recurrent[s] = reinterpret_cast<float*>(step.states[s][mixer.recurrent]);
  }
  Room room({tokens * layer.row, tokens * channels, tokens * width});
  float *const rows = room.take(tokens * layer.row), *const mixed = room.take(tokens * channels);
  float* const out = room.take(tokens * width);
  const MoehiveDeltaNetCall call{rows, step.sequences, step.count, conv, recurrent, mixed, out};
  int32_t status = moehive_linear(trunk, mixer.projections, mixer.count, step.x, tokens, rows);
  if (!status) status = moehive_trunk_delta_net(trunk, &layer, &call);
  return status ? status : moehive_linear(trunk, &mixer.output, 1, out, tokens, step.added);
}

int32_t latent_attention(void* trunk, const MoehiveMixer& mixer, const MoehiveStep& step) {
  const MoehiveMla& layer = *static_cast<const MoehiveMla*>(mixer.layer);
  const int64_t tokens = step.tokens, row = rows_of(mixer), full = layer.rank + layer.rope;
  const int64_t latent = mixer.query_norm ? row - full : 0, queried = layer.heads * (layer.nope + layer.rope);
  const int64_t width = layer.heads * layer.value;
  if (row != latent + full || mixer.queries.rows != queried || mixer.output.columns != width) return 1;
  if (mixer.query_norm && mixer.queries.columns != latent) return 1;
  Room room({tokens * row, tokens * latent, tokens * queried, tokens * layer.heads * full, tokens * width});
  float *const rows = room.take(tokens * row), *const latents = room.take(tokens * latent);
  float *const queries = room.take(tokens * queried), *const absorbed = room.take(tokens * layer.heads * full);
  float* const out = room.take(tokens * width);
  int32_t status = moehive_linear(trunk, mixer.projections, mixer.count, step.x, tokens, rows);
  if (status) return status;
  if (mixer.query_norm) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < latent; ++i) latents[t * latent + i] = rows[t * row + i];
    moehive_trunk_add_norm(trunk, tokens, latent, latents, nullptr, 0, nullptr, nullptr, 0, mixer.query_norm,
                           mixer.query_eps, latents, nullptr);
  }
  status = moehive_linear(trunk, &mixer.queries, 1, mixer.query_norm ? latents : step.x, tokens, queries);
  const MoehiveMlaCall call{queries, rows + latent, row, step.cos, step.sin, step.groups[mixer.group], step.count,
                            absorbed, out};
  if (!status) status = moehive_trunk_mla(trunk, &layer, &call);
  return status ? status : moehive_linear(trunk, &mixer.output, 1, out, tokens, step.added);
}

int32_t mix(void* trunk, const MoehiveMixer& mixer, const MoehiveStep& step) {
  switch (mixer.kind) {
    case 0: return attention(trunk, mixer, step);
    case 1: return delta_net(trunk, mixer, step);
    case 2: return latent_attention(trunk, mixer, step);
    default: return 1;
  }
}

// `run` returns a status; 2 where it finds no memory.
template <class Run>
int32_t guarded(Run&& run) {
  try {
    return run();
  } catch (const std::exception&) {
    return 2;
  }
}

// added = down(activation(gate(x)) * up(x)), and its share.
int32_t compute_mlp(void* trunk, const MoehiveLayer& layer, const MoehiveStep& s) {
  const MoehiveMlp& mlp = layer.mlp;
  const int64_t middle = mlp.up[0].rows, tokens = s.tokens;
  if (mlp.up[1].rows != middle || mlp.down.columns != middle || mlp.down.rows != layer.width) return 1;
  Room room({2 * tokens * middle, tokens * middle});
  float *const both = room.take(2 * tokens * middle), *const gated = room.take(tokens * middle);
  int32_t status = moehive_linear(trunk, mlp.up, 2, s.x, tokens, both);
  if (status) return status;
  moehive_trunk_gate(trunk, both, tokens, middle, 2 * middle, mlp.activation, gated);
  status = moehive_linear(trunk, &mlp.down, 1, gated, tokens, s.added);
  return status || !mlp.share.rows ? status : moehive_linear(trunk, &mlp.share, 1, s.x, tokens, s.share);
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void compute_beside(void* context) {
  MoehiveBeside& it = *static_cast<MoehiveBeside*>(context);
  it.begun_ns = now_ns();
  it.status = guarded([&] { return compute_mlp(it.trunk, *it.layer, *it.step); });
  moehive_trunk_rest(it.trunk);  // the nodes compute now
  it.ended_ns = now_ns();
}

moehive::Pool& pool_of(void* trunk) { return static_cast<moehive::Trunk*>(trunk)->pool(); }

// From here on, a thread may compute what `layer` has beside its routed experts.
void begin_beside(void* trunk, const MoehiveLayer& layer, const MoehiveStep& step) {
  MoehiveBeside& it = *step.beside;
  it.trunk = trunk;
  it.layer = &layer;
  it.step = &step;
  it.handed = pool_of(trunk).begin(it.aside, compute_beside, &it);
}

// Computes what was begun unless a thread does, and helps with it then: as long as there is something to help with, or,
// if it must be `over`, to its end.
int32_t finish_beside(const MoehiveStep& step, bool over) {
  MoehiveBeside& it = *step.beside;
  if (!it.layer) return 0;
  moehive::Pool& pool = pool_of(it.trunk);
  if (!it.handed || pool.withdraw(it.aside)) {
    it.handed = false;
    compute_beside(&it);
  } else if (over) {
    pool.wait(it.aside);
  } else {
    pool.help(it.aside);
    return 0;
  }
  it.layer = nullptr;
  return it.status;
}

// hidden += what the layer before has left to add: `add` of its routed experts (or null) and what it computed here;
// then x = its norm.
void finish(void* trunk, const MoehiveLayer* before, const MoehiveStep& step, int64_t width, const void* add,
            int32_t add_half, const float* norm, float eps) {
  const bool here = before && before->mlp.down.rows, shared = here && before->mlp.share.rows;
  moehive_trunk_add_norm(trunk, step.tokens, width, step.hidden, add, add_half, here ? step.added : nullptr,
                         shared ? step.share : nullptr, 1, norm, eps, step.x, nullptr);
}

}  // namespace

// All functions return 0; 1 if an argument can't be; 2 without memory. `add` is the sum of the layer before's routed
// experts [tokens, width], f32 or with add_half bf16; null if it has none.

// From the layer before's sums to this one's choice of experts (step.ids, step.weights), or to the MLP's input.
MOEHIVE_API int32_t moehive_layer_mix(void* trunk, const MoehiveLayer* layer, const MoehiveStep* step, const void* add,
                                      int32_t add_half) {
  const MoehiveLayer& l = *layer;
  const MoehiveStep& s = *step;
  if (l.mixer.output.rows != l.width) return 1;
  return guarded([&] {
    int32_t status = finish_beside(s, true);
    if (status) return status;
    finish(trunk, l.before, s, l.width, add, add_half, l.norm, l.eps);
    status = mix(trunk, l.mixer, s);
    if (status) return status;
    moehive_trunk_add_norm(trunk, s.tokens, l.width, s.hidden, s.added, 0, nullptr, nullptr, 0, l.mlp_norm, l.eps, s.x,
                           s.half);
    if (!l.router_weights.rows) return 0;
    if (l.router_weights.rows != l.router.experts) return 1;
    status = moehive_linear(trunk, &l.router_weights, 1, s.x, s.tokens, s.logits);
    if (!status) status = moehive_trunk_route(trunk, &l.router, s.logits, s.tokens, s.ids, s.weights);
    if (!status && l.mlp.down.rows) begin_beside(trunk, l, s);
    moehive_trunk_rest(trunk);  // the nodes compute now
    return status;
  });
}

// The MLP that is computed here. Of a layer with routed experts, after `mix`: a thread of the pool may have it in hand
// still when this returns, and it is over in the next call of the pass or moehive_layer_drop.
MOEHIVE_API int32_t moehive_layer_mlp(void* trunk, const MoehiveLayer* layer, const MoehiveStep* step) {
  if (layer->router_weights.rows) return finish_beside(*step, false);
  return guarded([&] { return compute_mlp(trunk, *layer, *step); });
}

// A pass ends early: nobody works in its memory any more.
MOEHIVE_API void moehive_layer_drop(const MoehiveStep* step) { finish_beside(*step, true); }

// Null without memory. To be freed by moehive_beside_destroy.
MOEHIVE_API MoehiveBeside* moehive_beside_create() { return new (std::nothrow) MoehiveBeside; }
MOEHIVE_API void moehive_beside_destroy(MoehiveBeside* beside) { delete beside; }

// When a thread of the pool has begun and ended the latest layer's MLP, in nanoseconds of the steady clock; false: it
// has not ended, or none has begun.
MOEHIVE_API bool moehive_beside_times(const MoehiveBeside* beside, int64_t* times) {
  if (!beside->handed || !beside->aside.over()) return false;
  times[0] = beside->begun_ns;
  times[1] = beside->ended_ns;
  return true;
}

// After the last layer: the logits [count, head's rows] of the `count` tokens `wanted`.
MOEHIVE_API int32_t moehive_layers_end(void* trunk, const MoehiveLayer* last, const MoehiveStep* step, const void* add,
                                       int32_t add_half, const float* norm, const MoehiveMatrix* head,
                                       const int64_t* wanted, int64_t count, float* logits) {
  const int64_t width = last->width;
  if (head->columns != width) return 1;
  return guarded([&] {
    const int32_t status = finish_beside(*step, true);
    if (status) return status;
    finish(trunk, last, *step, width, add, add_half, norm, last->eps);
    Room room({count * width});
    float* const x = room.take(count * width);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < width; ++c) x[i * width + c] = step->x[wanted[i] * width + c];
    return moehive_linear(trunk, head, 1, x, count, logits);
  });
}

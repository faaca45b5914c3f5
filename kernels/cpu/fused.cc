// Operations of one layer that follow each other, in one call (kernels/fused.py): what Python does between two calls
// takes as long as a small layer, and longest where the layer's weights have emptied the caches.
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <vector>

#include "delta_net.h"
#include "linear.h"
#include "trunk.h"

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

// Field for field as kernels/fused.py has them.
struct MoehiveMlp {
  MoehiveMatrix up[2];    // gate and up: as many rows, of the input's columns
  MoehiveMatrix down;
  MoehiveMatrix share;    // one row: how much of the result a token takes; no rows: none
  int32_t activation;
};

struct MoehiveMixer {  // what stands around a layer's mixing of tokens
  const MoehiveMatrix* projections;
  int64_t count;
  MoehiveMatrix output;
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

// `run` returns a status; 2 where it finds no memory.
template <class Run>
int32_t guarded(Run&& run) {
  try {
    return run();
  } catch (const std::exception&) {
    return 2;
  }
}

}  // namespace

// All functions return 0; 1 if an argument can't be; 2 without memory. x [tokens, columns] f32.

// A router's product and choice: ids and chosen [tokens, top_k].
MOEHIVE_API int32_t moehive_fused_router(void* trunk, const MoehiveMatrix* weights, const MoehiveRouter* router,
                                         const float* x, int64_t tokens, int64_t* ids, float* chosen) {
  if (weights->rows != router->experts) return 1;
  return guarded([&] {
    float* const logits = Room({tokens * weights->rows}).take(tokens * weights->rows);
    const int32_t status = moehive_linear(trunk, weights, 1, x, tokens, logits);
    return status ? status : moehive_trunk_route(trunk, router, logits, tokens, ids, chosen);
  });
}

// out [tokens, down's rows] = down(activation(gate(x)) * up(x)); share_out [tokens], if the layer has a share.
MOEHIVE_API int32_t moehive_fused_mlp(void* trunk, const MoehiveMlp* mlp, const float* x, int64_t tokens, float* out,
                                      float* share_out) {
  const int64_t middle = mlp->up[0].rows;
  if (mlp->up[1].rows != middle || mlp->down.columns != middle) return 1;
  return guarded([&] {
    Room room({2 * tokens * middle, tokens * middle});
    float *const both = room.take(2 * tokens * middle), *const gated = room.take(tokens * middle);
    int32_t status = moehive_linear(trunk, mlp->up, 2, x, tokens, both);
    if (status) return status;
    moehive_trunk_gate(trunk, both, tokens, middle, 2 * middle, mlp->activation, gated);
    status = moehive_linear(trunk, &mlp->down, 1, gated, tokens, out);
    if (status || !mlp->share.rows) return status;
    return moehive_linear(trunk, &mlp->share, 1, x, tokens, share_out);
  });
}

// out [tokens, output's rows] = the softmax attention of the projections of x; see moehive_trunk_attend.
MOEHIVE_API int32_t moehive_fused_attend(void* trunk, const MoehiveMixer* mixer, const MoehiveAttention* layer,
                                         const float* x, int64_t tokens, const MoehiveSequence* sequences, int64_t count,
                                         const float* cos, const float* sin, float* out) {
  const int64_t width = layer->heads * layer->head_dim;
  if (rows_of(*mixer) != layer->row || mixer->output.columns != width) return 1;
  return guarded([&] {
    Room room({tokens * layer->row, tokens * width});
    float *const rows = room.take(tokens * layer->row), *const mixed = room.take(tokens * width);
    int32_t status = moehive_linear(trunk, mixer->projections, mixer->count, x, tokens, rows);
    if (!status) status = moehive_trunk_attend(trunk, layer, rows, sequences, count, cos, sin, mixed);
    return status ? status : moehive_linear(trunk, &mixer->output, 1, mixed, tokens, out);
  });
}

// The same of Gated DeltaNet; `call`'s own places for rows are filled in here.
MOEHIVE_API int32_t moehive_fused_delta_net(void* trunk, const MoehiveMixer* mixer, const MoehiveDeltaNet* layer,
                                            const MoehiveDeltaNetCall* call, const float* x, int64_t tokens,
                                            float* out) {
  const int64_t width = layer->value_heads * layer->value_dim;
  const int64_t channels = moehive::conv_channels(*layer);
  if (rows_of(*mixer) != layer->row || mixer->output.columns != width) return 1;
  return guarded([&] {
    Room room({tokens * layer->row, tokens * channels, tokens * width});
    MoehiveDeltaNetCall whole = *call;
    float* const rows = room.take(tokens * layer->row);
    whole.rows = rows;
    whole.mixed = room.take(tokens * channels);
    whole.out = room.take(tokens * width);
    int32_t status = moehive_linear(trunk, mixer->projections, mixer->count, x, tokens, rows);
    if (!status) status = moehive_trunk_delta_net(trunk, layer, &whole);
    return status ? status : moehive_linear(trunk, &mixer->output, 1, whole.out, tokens, out);
  });
}

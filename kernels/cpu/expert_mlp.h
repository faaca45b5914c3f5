// Experts of one layer for a few tokens: the schedule over rows, tokens and threads.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "kernel.h"
#include "pool.h"
#include "scratch.h"

// ExpertSpec as Python hands it over (kernels/native.py has the same fields in the same order). Offsets are bytes
// from the start of a blob; those of absent tensors are -1.
struct MoehiveSpec {
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t up, up_bias, down, down_bias, post_norm;
  int32_t up_format;   // moehive::Format
  int32_t down_format;
  int32_t activation;  // moehive::Activation
  int32_t gated;
  int32_t has_limit;
  int32_t limit_after_activation;
  float alpha;
  float limit;
  float up_offset;
  float post_norm_eps;
};

namespace moehive {

enum class Activation : int32_t { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, relu2 = 4 };

// One layer's pairs; see moehive_experts in api.cc.
struct Layer {
  const MoehiveSpec& spec;
  int64_t tokens;
  const uint32_t* offsets;
  const uint64_t* blobs;
  const float* weights;
};

// Hidden states and results in either type; bf16 are widened, and results rounded once, to nearest, ties to even.
struct Rows {
  void* memory;
  bool bf16;
};

// Safe to call from several threads, which wait in line. Throws std::bad_alloc.
class Experts {
 public:
  Experts(const Kernel& kernel, int threads) : kernel_(kernel), pool_(Pool::of(threads)) {}
  // From `from` [tokens, hidden_size] into `to`: [pairs, hidden_size], where pairs that are left out stay as they are,
  // or [tokens, hidden_size] if a token's pairs, none of which is left out then, are to be `added` in the order listed.
  // The states are read before any result is written, so both may lie in the same memory.
  // Needs memory for each pair's middle as its format takes it, in 8 bits, bf16 or f32, and a few MB.
  void run(const Layer& layer, const Rows& from, const Rows& to, bool added);

 private:
  class Call;

  const Kernel& kernel_;
  std::shared_ptr<Pool> pool_;
  std::mutex mutex_;  // of what follows
  Scratch inputs_, widened_, middles_, outputs_;
};

}  // namespace moehive

// The C interface of the library, for ctypes (kernels/native.py). No exception leaves it.
#include <cstring>
#include <exception>
#include <memory>

#include "expert_mlp.h"
#include "sums.h"

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace moehive;

bool known(int32_t format) { return format >= 0 && format <= static_cast<int32_t>(Format::fp8_block); }

bool sound(const MoehiveSpec& spec) {
  return spec.hidden_size > 0 && spec.intermediate_size > 0 && spec.up >= 0 && spec.down >= 0 &&
         known(spec.up_format) && known(spec.down_format) && spec.activation >= 0 && spec.activation <= 4;
}

bool sound(const uint32_t* offsets, int64_t tokens) {
  if (tokens < 0 || offsets[0] != 0) return false;
  for (int64_t t = 0; t < tokens; ++t)
    if (offsets[t] > offsets[t + 1]) return false;
  return true;
}

}  // namespace

// Raised with every change of this file's functions, of answer.cc's, read.cc's or rounding.h's, or of MoehiveSpec.
MOEHIVE_API int32_t moehive_abi() { return 11; }

// Names of the kernels that this machine can run, best first; null after the last.
MOEHIVE_API const char* moehive_kernel(int32_t place) {
  const Kernel* kernel = place < 0 ? nullptr : usable_kernel(place);
  return kernel ? kernel->name : nullptr;
}

// Null if there is no such kernel here, or no memory or threads. To be freed by moehive_destroy.
MOEHIVE_API void* moehive_create(const char* name, int32_t threads) {
  if (threads < 1) return nullptr;
  for (int place = 0; const Kernel* kernel = usable_kernel(place); ++place) {
    if (std::strcmp(kernel->name, name) != 0) continue;
    try {
      return new Experts(*kernel, threads);
    } catch (const std::exception&) {
      return nullptr;
    }
  }
  return nullptr;
}

MOEHIVE_API void moehive_destroy(void* experts) { delete static_cast<Experts*>(experts); }

// Weighted outputs of a layer's (token, expert) pairs, not yet added: out [pairs, hidden_size].
//
// hidden [tokens, hidden_size]; token t has the pairs offsets[t] to offsets[t + 1]; blobs [pairs] are addresses of
// experts' blobs laid out as `spec` says, or 0 for a pair that is left out; weights [pairs] are factors.
// Returns 0; 1 if an argument can't be; 2 without memory.
MOEHIVE_API int32_t moehive_experts(void* experts, const MoehiveSpec* spec, const float* hidden, int64_t tokens,
                                    const uint32_t* offsets, const uint64_t* blobs, const float* weights, float* out) {
  if (!experts || !spec || !sound(*spec) || !sound(offsets, tokens)) return 1;
  try {
    static_cast<Experts*>(experts)->run({*spec, tokens, offsets, blobs, weights}, {const_cast<float*>(hidden), false},
                                        {out, false}, false);
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

// As moehive_experts for all pairs of a layer, from hidden states of f32 or bf16 to rows of the same type: [pairs,
// hidden_size], or with `added` [tokens, hidden_size], each the sum of a token's pairs in the order listed.
MOEHIVE_API int32_t moehive_layer(void* experts, const MoehiveSpec* spec, void* hidden, int32_t bf16, int64_t tokens,
                                  const uint32_t* offsets, const uint64_t* blobs, const float* weights, int32_t added,
                                  void* rows) {
  if (!experts || !spec || !sound(*spec) || !sound(offsets, tokens)) return 1;
  for (uint32_t pair = 0; pair < offsets[tokens]; ++pair)
    if (blobs[pair] == 0) return 1;
  try {
    static_cast<Experts*>(experts)->run({*spec, tokens, offsets, blobs, weights}, {hidden, bf16 != 0},
                                        {rows, bf16 != 0}, added != 0);
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

// sums[t] = pairs[offsets[t]] + pairs[offsets[t] + 1] + ..., in this order; zeros for a token without pairs.
// Returns 0; 1 if an argument can't be.
MOEHIVE_API int32_t moehive_sum_pairs(const float* pairs, const uint32_t* offsets, int64_t tokens, int64_t hidden_size,
                                      float* sums) {
  if (hidden_size < 1 || !sound(offsets, tokens)) return 1;
  sum_pairs(pairs, offsets, tokens, hidden_size, sums);
  return 0;
}

// out[i] = parts[0][i] + parts[1][i] + ..., in this order and in f32, for i < count; parts and out are f32 or bf16, parts
// of any alignment. Returns 1; 0 if a sum is no number, or so large that its square is none.
MOEHIVE_API int32_t moehive_add_rows(const void* const* parts, int64_t number, int32_t bf16, int64_t count, void* out) {
  return add_rows(parts, number, bf16 != 0, count, out);
}

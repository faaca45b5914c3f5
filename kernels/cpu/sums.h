// Sums of experts' results, each in a fixed order.
#pragma once

#include <cstdint>

namespace moehive {

// The sum of `number` rows of `columns` numbers, `stride` apart, in their order; zeros if there are none.
void sum_pairs(const float* rows, int64_t number, int64_t stride, int64_t columns, float* sum);

// sums[t] = pairs[offsets[t]] + pairs[offsets[t] + 1] + ..., in this order; zeros for a token without pairs.
void sum_pairs(const float* pairs, const uint32_t* offsets, int64_t tokens, int64_t hidden_size, float* sums);

// See moehive_add_rows in api.cc.
bool add_rows(const void* const* parts, int64_t number, bool bf16, int64_t count, void* out);

}  // namespace moehive

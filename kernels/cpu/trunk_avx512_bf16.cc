// The trunk's attention for AVX-512 with products of bf16.
namespace moehive {
namespace {
constexpr int kWidth = 16;
}
}  // namespace moehive

#include "attention-inl.h"

namespace moehive {
extern const AttentionKernel kAttentionAvx512Bf16{prepare, attend, join, finish};
}  // namespace moehive

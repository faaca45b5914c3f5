// The trunk's attention for AVX-512 with products of bf16.
namespace moehive {
namespace {
constexpr int kWidth = 16;
}
}  // namespace moehive

#include "latent-inl.h"

namespace moehive {
extern const AttentionKernel kAttentionAvx512Bf16{prepare, attend, finish, attend_latent, finish_latent, join};
}  // namespace moehive

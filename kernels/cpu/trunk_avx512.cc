// The trunk's arithmetic for AVX-512.
namespace moehive {
namespace {
constexpr int kWidth = 16;
}
}  // namespace moehive

#include "latent-inl.h"
#include "trunk-inl.h"

namespace moehive {
extern const TrunkKernel kTrunkAvx512{add_norm, gate, route};
extern const AttentionKernel kAttentionAvx512{prepare, attend, finish, attend_latent, finish_latent, join};
}  // namespace moehive

// The trunk's arithmetic for AVX2 with FMA.
namespace moehive {
namespace {
constexpr int kWidth = 8;
}
}  // namespace moehive

#include "latent-inl.h"
#include "trunk-inl.h"

namespace moehive {
extern const TrunkKernel kTrunkAvx2{add_norm, gate, route};
extern const AttentionKernel kAttentionAvx2{prepare, attend, finish, attend_latent, finish_latent, join};
}  // namespace moehive

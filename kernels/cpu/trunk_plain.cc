// The trunk's arithmetic for what every processor of this architecture has (on aarch64: NEON).
namespace moehive {
namespace {
constexpr int kWidth = 4;
}
}  // namespace moehive

#include "latent-inl.h"
#include "trunk-inl.h"

namespace moehive {
extern const TrunkKernel kTrunkPlain{add_norm, gate, route};
extern const AttentionKernel kAttentionPlain{prepare, attend, finish, attend_latent, finish_latent, join};
}  // namespace moehive

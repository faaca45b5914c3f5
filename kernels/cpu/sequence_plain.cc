// The trunk's recurrent and latent layers for what every processor of this architecture has (on aarch64: NEON).
#include "delta_net-inl.h"
#include "mla-inl.h"

namespace moehive {
extern const DeltaNetKernel kDeltaNetPlain{convolve, head};
extern const MlaKernel kMlaPlain{absorb, append, expand};
}  // namespace moehive

// The trunk's recurrent and latent layers for AVX2 with FMA. Compiled with -mavx2 -mfma.
#include "delta_net-inl.h"
#include "mla-inl.h"

namespace moehive {
extern const DeltaNetKernel kDeltaNetAvx2{convolve, head};
extern const MlaKernel kMlaAvx2{absorb, append, expand};
}  // namespace moehive

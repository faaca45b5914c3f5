// Rounding to block formats for AVX2. Compiled with -mavx2, without fused multiply-adds: the same bits everywhere.
#include "rounding-inl.h"

namespace moehive {
extern const RoundingKernel kRoundingAvx2{round_any};
}  // namespace moehive

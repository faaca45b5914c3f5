// Rounding to block formats for what every processor of this architecture has (on aarch64: NEON).
#include "rounding-inl.h"

namespace moehive {
extern const RoundingKernel kRoundingPlain{round_any};
}  // namespace moehive

// The trunk's arithmetic for AVX2 with FMA.
namespace moehive {
namespace {
constexpr int kWidth = 8;
}
}  // namespace moehive

#include "trunk-inl.h"

namespace moehive {
extern const TrunkKernel kTrunkAvx2{add_norm, prepare, attend, gate, route};
}  // namespace moehive

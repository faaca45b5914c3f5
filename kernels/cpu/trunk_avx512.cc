// The trunk's arithmetic for AVX-512.
namespace moehive {
namespace {
constexpr int kWidth = 16;
}
}  // namespace moehive

#include "trunk-inl.h"

namespace moehive {
extern const TrunkKernel kTrunkAvx512{add_norm, prepare, attend, gate, route};
}  // namespace moehive

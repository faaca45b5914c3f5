// NEON, which every aarch64 processor has: 16 floats in four registers.
#include <arm_neon.h>

#include "kernel.h"

namespace moehive {
namespace {

struct Vec {
  float32x4_t q[4];

  static inline Vec zero() {
    const float32x4_t none = vdupq_n_f32(0.0f);
    return {{none, none, none, none}};
  }
  static inline Vec load(const float* at) {
    return {{vld1q_f32(at), vld1q_f32(at + 4), vld1q_f32(at + 8), vld1q_f32(at + 12)}};
  }
  static inline Vec load_bf16(const uint16_t* at) {
    const uint16x8_t low = vld1q_u16(at), high = vld1q_u16(at + 8);
    return {{widen(vget_low_u16(low)), widen(vget_high_u16(low)), widen(vget_low_u16(high)),
             widen(vget_high_u16(high))}};
  }
  static inline Vec load_f16(const uint16_t* at) {
    const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(at)), high = vreinterpretq_f16_u16(vld1q_u16(at + 8));
    return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_f32_f16(vget_high_f16(low)), vcvt_f32_f16(vget_low_f16(high)),
             vcvt_f32_f16(vget_high_f16(high))}};
  }
  static inline Vec fma(Vec a, Vec b, Vec sum) {
    return {{vfmaq_f32(sum.q[0], a.q[0], b.q[0]), vfmaq_f32(sum.q[1], a.q[1], b.q[1]),
             vfmaq_f32(sum.q[2], a.q[2], b.q[2]), vfmaq_f32(sum.q[3], a.q[3], b.q[3])}};
  }
  static inline float sum(Vec v) {
    const float32x4_t four = vaddq_f32(vaddq_f32(v.q[0], v.q[2]), vaddq_f32(v.q[1], v.q[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }

 private:
  static inline float32x4_t widen(uint16x4_t half) { return vreinterpretq_f32_u32(vshll_n_u16(half, 16)); }
};

// 32 registers: 24 for sums, the rest for weights and vectors.
constexpr int kRowsForOne = 4, kRows = 2, kTokens = 3;

}  // namespace
}  // namespace moehive

#include "multiply-inl.h"

namespace moehive {
extern const Kernel kNeon{"neon", multiply};
}  // namespace moehive

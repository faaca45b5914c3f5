// NEON, which every aarch64 processor has: 16 floats in four registers.
#include <arm_neon.h>

#include "kernel.h"

namespace moehive {
namespace {

// Integer operations for the block formats; see block-inl.h.
struct Int8 {
  struct Bytes {
    uint8x16_t q[4];  // four rows each
  };
  struct Sums {
    int32x4_t q[4];
  };
  using Wide = Sums;
  using Factor = Sums;
  static constexpr bool kNarrow = false;
  static constexpr int kRaised = 0;

  static inline Bytes load(const uint8_t* at) {
    return {{vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)}};
  }
  // The bits `Mask` from bit From of each byte, at bit To.
  template <int From, int To, int Mask>
  static inline Bytes field(Bytes b) {
    for (auto& q : b.q) {
      if constexpr (From > To) q = vshrq_n_u8(q, From - To);
      if constexpr (From < To) q = vshlq_n_u8(q, To - From);
      q = vandq_u8(q, vdupq_n_u8(Mask << To));
    }
    return b;
  }
  static inline Bytes join(Bytes a, Bytes b) {
    for (int i = 0; i < 4; ++i) a.q[i] = vorrq_u8(a.q[i], b.q[i]);
    return a;
  }
  static inline Bytes lookup(Bytes codes, const int8_t* table) {
    const uint8x16_t values = vreinterpretq_u8_s8(vld1q_s8(table));
    for (auto& q : codes.q) q = vqtbl1q_u8(values, q);
    return codes;
  }
  static inline Sums splat(int32_t n) {
    const int32x4_t all = vdupq_n_s32(n);
    return {{all, all, all, all}};
  }
  static inline Wide zero() { return splat(0); }
  // Numbers that are not signed are below 64 and so the same as signed ones.
  template <bool Signed>
  static inline Wide add(Wide w, Bytes b, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
    for (int i = 0; i < 4; ++i) {
      const int8x16_t numbers = vreinterpretq_s8_u8(b.q[i]);
      const int16x8_t low = vmull_s8(vget_low_s8(numbers), vget_low_s8(xs));
      const int16x8_t high = vmull_high_s8(numbers, xs);
      w.q[i] = vaddq_s32(w.q[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
    }
    return w;
  }
  static inline Sums flush(Sums s, Wide w) { return add(s, w); }
  static inline Sums flush(Sums s, Wide w, Factor f) {
    for (int i = 0; i < 4; ++i) s.q[i] = vmlaq_s32(s.q[i], w.q[i], f.q[i]);
    return s;
  }
  static inline Sums add(Sums a, Sums b) {
    for (int i = 0; i < 4; ++i) a.q[i] = vaddq_s32(a.q[i], b.q[i]);
    return a;
  }

  typedef uint8_t Octets __attribute__((vector_size(16)));
  template <bool Signed>
  static inline Factor factor(Octets o) {
    if constexpr (Signed) {
      const int8x16_t all = reinterpret_cast<int8x16_t>(o);
      const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_high_s8(all);
      return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
               vmovl_high_s16(high)}};
    }
    const uint8x16_t all = reinterpret_cast<uint8x16_t>(o);
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(all)));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(all));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
  }
  static inline Sums even(Factor f, int32_t n) {
    for (auto& q : f.q) q = vmulq_n_s32(q, 2 * n);
    return f;
  }
  static inline Sums pairs(Octets a, int32_t n, Octets b, int32_t m) {
    Sums sums = factor<false>(a);
    const Sums others = factor<false>(b);
    for (int i = 0; i < 4; ++i) sums.q[i] = vmlaq_n_s32(vmulq_n_s32(sums.q[i], n), others.q[i], m);
    return sums;
  }
};

struct Vec {
  float32x4_t q[4];

  typedef uint8_t Octets __attribute__((vector_size(16)));
  static inline Vec splat(float n) {
    const float32x4_t all = vdupq_n_f32(n);
    return {{all, all, all, all}};
  }
  static inline Vec mul(Vec a, Vec b) {
    for (int i = 0; i < 4; ++i) a.q[i] = vmulq_f32(a.q[i], b.q[i]);
    return a;
  }
  static inline Vec from_ints(Int8::Sums s) {
    return {{vcvtq_f32_s32(s.q[0]), vcvtq_f32_s32(s.q[1]), vcvtq_f32_s32(s.q[2]), vcvtq_f32_s32(s.q[3])}};
  }
  static inline Vec from_u8(Octets o) { return from_ints(Int8::factor<false>(o)); }
  static inline Vec powers_of_two(Octets o) {
    const Int8::Sums bytes = Int8::factor<false>(o);
    Vec to;
    for (int i = 0; i < 4; ++i) to.q[i] = vreinterpretq_f32_s32(vshlq_n_s32(bytes.q[i], 23));
    return to;
  }
  static inline void store(float* to, Vec v) {
    for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, v.q[i]);
  }

  static inline Vec zero() {
    const float32x4_t none = vdupq_n_f32(0.0f);
    return {{none, none, none, none}};
  }
  static inline Vec load(const float* at) {
    return {{vld1q_f32(at), vld1q_f32(at + 4), vld1q_f32(at + 8), vld1q_f32(at + 12)}};
  }
  // Of 32 numbers of bf16 the odd or the even ones.
  static inline Vec load_odd(const uint16_t* at) {
    Vec to;
    for (int i = 0; i < 4; ++i) to.q[i] = vreinterpretq_f32_u32(vandq_u32(pairs(at + 8 * i), vdupq_n_u32(0xffff0000u)));
    return to;
  }
  static inline Vec load_even(const uint16_t* at) {
    Vec to;
    for (int i = 0; i < 4; ++i) to.q[i] = vreinterpretq_f32_u32(vshlq_n_u32(pairs(at + 8 * i), 16));
    return to;
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
  static inline uint32x4_t pairs(const uint16_t* at) { return vreinterpretq_u32_u16(vld1q_u16(at)); }
};

// 32 registers: 24 for sums, the rest for weights and vectors.
constexpr int kRowsForOne = 4, kRows = 2, kTokens = 3, kBlockTokens = 3;
constexpr int kSumsAtOnce = 0;
constexpr int kStreams = 1, kScaledStreams = 1;
constexpr bool fetches() { return true; }

}  // namespace
}  // namespace moehive

#include "multiply-inl.h"

namespace moehive {
extern const Kernel kNeon{"neon", multiply, quantize, round_vector, activate, join_gate};
}  // namespace moehive

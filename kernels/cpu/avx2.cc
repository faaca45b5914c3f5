// AVX2 with FMA and F16C: 16 floats in two registers. Compiled with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include "kernel.h"

namespace moehive {
namespace {

struct Vec {
  __m256 lo, hi;

  static inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static inline Vec load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
  static inline Vec load_bf16(const uint16_t* at) { return {widen(at), widen(at + 8)}; }
  static inline Vec load_f16(const uint16_t* at) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 8)))};
  }
  static inline Vec fma(Vec a, Vec b, Vec sum) {
    return {_mm256_fmadd_ps(a.lo, b.lo, sum.lo), _mm256_fmadd_ps(a.hi, b.hi, sum.hi)};
  }
  static inline float sum(Vec v) {
    const __m256 eight = _mm256_add_ps(v.lo, v.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

 private:
  static inline __m256 widen(const uint16_t* at) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
};

// 16 registers: 12 for sums, 4 for two rows' weights; vectors come as memory operands.
constexpr int kRowsForOne = 4, kRows = 2, kTokens = 3;

}  // namespace
}  // namespace moehive

#include "multiply-inl.h"

namespace moehive {
extern const Kernel kAvx2{"avx2", multiply};
}  // namespace moehive

// AVX-512 F: 16 floats in one register. Compiled with -mavx512f.
//
// The instruction for bf16 products (dpbf16) is left alone: it needs bf16 activations, and f32 ones are as fast,
// since the memory decides.
#include <immintrin.h>

#include "kernel.h"

namespace moehive {
namespace {

struct Vec {
  __m512 all;

  static inline Vec zero() { return {_mm512_setzero_ps()}; }
  static inline Vec load(const float* at) { return {_mm512_loadu_ps(at)}; }
  static inline Vec load_bf16(const uint16_t* at) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static inline Vec load_f16(const uint16_t* at) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))};
  }
  static inline Vec fma(Vec a, Vec b, Vec sum) { return {_mm512_fmadd_ps(a.all, b.all, sum.all)}; }
  static inline float sum(Vec v) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v.all), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v.all), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

// 32 registers: 16 for sums, 4 for four rows' weights, 4 for the vectors.
constexpr int kRowsForOne = 8, kRows = 4, kTokens = 4;

}  // namespace
}  // namespace moehive

#include "multiply-inl.h"

namespace moehive {
extern const Kernel kAvx512{"avx512", multiply};
}  // namespace moehive

// AVX2 with FMA and F16C: 16 floats in two registers. Compiled with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include "kernel.h"

namespace moehive {
namespace {

// Integer operations for the block formats; see block-inl.h.
struct Int8 {
  struct Bytes {
    __m256i lo, hi;  // rows 0 to 7, rows 8 to 15
  };
  struct Sums {
    __m256i lo, hi;
  };
  struct Wide {
    __m256i lo, hi;  // 16 bits, two for each row
  };
  struct Factor {
    __m256i lo, hi;  // 16 bits, each twice
  };
  static constexpr bool kNarrow = true;
  static constexpr int kRaised = 0;

  static inline Bytes load(const uint8_t* at) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32))};
  }
  // The bits `Mask` from bit From of each byte, at bit To.
  template <int From, int To, int Mask>
  static inline Bytes field(Bytes b) {
    return {moved<From, To, Mask>(b.lo), moved<From, To, Mask>(b.hi)};
  }
  static inline Bytes join(Bytes a, Bytes b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
  static inline Bytes lookup(Bytes codes, const int8_t* table) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(values, codes.lo), _mm256_shuffle_epi8(values, codes.hi)};
  }
  static inline Sums splat(int32_t n) { return {_mm256_set1_epi32(n), _mm256_set1_epi32(n)}; }
  static inline Wide zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  template <bool Signed>
  static inline Wide add(Wide w, Bytes b, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    const __m256i xs = _mm256_set1_epi32(four);
    return {_mm256_add_epi16(w.lo, pairs<Signed>(b.lo, xs)), _mm256_add_epi16(w.hi, pairs<Signed>(b.hi, xs))};
  }
  static inline Sums flush(Sums s, Wide w) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(s.lo, _mm256_madd_epi16(w.lo, ones)),
            _mm256_add_epi32(s.hi, _mm256_madd_epi16(w.hi, ones))};
  }
  static inline Sums flush(Sums s, Wide w, Factor f) {
    return {_mm256_add_epi32(s.lo, _mm256_madd_epi16(w.lo, f.lo)),
            _mm256_add_epi32(s.hi, _mm256_madd_epi16(w.hi, f.hi))};
  }
  static inline Sums add(Sums a, Sums b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }

  typedef uint8_t Octets __attribute__((vector_size(16)));
  template <bool Signed>
  static inline Factor factor(Octets o) {
    const __m256i both = _mm256_broadcastsi128_si256(reinterpret_cast<__m128i>(o));
    if constexpr (Signed) {  // to the upper byte, and down again with its sign
      const __m256i lo = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                                          -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
      const __m256i hi = _mm256_setr_epi8(-1, 8, -1, 8, -1, 9, -1, 9, -1, 10, -1, 10, -1, 11, -1, 11,  //
                                          -1, 12, -1, 12, -1, 13, -1, 13, -1, 14, -1, 14, -1, 15, -1, 15);
      return {_mm256_srai_epi16(_mm256_shuffle_epi8(both, lo), 8), _mm256_srai_epi16(_mm256_shuffle_epi8(both, hi), 8)};
    }
    const __m256i lo = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,  //
                                        4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
    const __m256i hi = _mm256_setr_epi8(8, -1, 8, -1, 9, -1, 9, -1, 10, -1, 10, -1, 11, -1, 11, -1,  //
                                        12, -1, 12, -1, 13, -1, 13, -1, 14, -1, 14, -1, 15, -1, 15, -1);
    return {_mm256_shuffle_epi8(both, lo), _mm256_shuffle_epi8(both, hi)};
  }
  static inline Sums even(Factor f, int32_t n) {
    const __m256i half = _mm256_set1_epi16(static_cast<int16_t>(n));
    return {_mm256_madd_epi16(f.lo, half), _mm256_madd_epi16(f.hi, half)};
  }
  static inline Sums pairs(Octets a, int32_t n, Octets b, int32_t m) {
    const __m128i left = reinterpret_cast<__m128i>(a), right = reinterpret_cast<__m128i>(b);
    const __m256i both = _mm256_set1_epi32(static_cast<int32_t>((n & 0xffff) | static_cast<uint32_t>(m) << 16));
    return {_mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(left, right)), both),
            _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(left, right)), both)};
  }

 private:
  template <int From, int To, int Mask>
  static inline __m256i moved(__m256i b) {
    if constexpr (From > To) b = _mm256_srli_epi16(b, From - To);
    if constexpr (From < To) b = _mm256_slli_epi16(b, To - From);
    return _mm256_and_si256(b, _mm256_set1_epi8(Mask << To));
  }
  template <bool Signed>
  static inline __m256i pairs(__m256i b, __m256i x) {
    if constexpr (Signed) return _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(x, b));
    return _mm256_maddubs_epi16(b, x);
  }
};

struct Vec {
  __m256 lo, hi;

  typedef uint8_t Octets __attribute__((vector_size(16)));
  static inline Vec splat(float n) { return {_mm256_set1_ps(n), _mm256_set1_ps(n)}; }
  static inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static inline Vec from_ints(Int8::Sums s) { return {_mm256_cvtepi32_ps(s.lo), _mm256_cvtepi32_ps(s.hi)}; }
  static inline Vec from_u8(Octets o) {
    const __m128i all = reinterpret_cast<__m128i>(o);
    return from_ints({_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(all, all))});
  }
  static inline Vec powers_of_two(Octets o) {
    const __m128i all = reinterpret_cast<__m128i>(o);
    const __m256i lo = _mm256_cvtepu8_epi32(all), hi = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(all, all));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 23)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 23))};
  }
  static inline void store(float* to, Vec v) {
    _mm256_storeu_ps(to, v.lo);
    _mm256_storeu_ps(to + 8, v.hi);
  }

  static inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static inline Vec load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
  // Of 32 numbers of bf16 the odd or the even ones.
  static inline Vec load_odd(const uint16_t* at) { return {odd(at), odd(at + 16)}; }
  static inline Vec load_even(const uint16_t* at) { return {even(at), even(at + 16)}; }
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
  static inline __m256 odd(const uint16_t* at) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), upper));
  }
  static inline __m256 even(const uint16_t* at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), 16));
  }
};

// 16 registers: 12 for sums, 4 for two rows' weights; vectors come as memory operands.
constexpr int kRowsForOne = 4, kRows = 2, kTokens = 3;
constexpr int kSumsAtOnce = 0;
// Block formats: 4 registers a token for sums, 2 for the numbers, 1 for x.
constexpr int kBlockTokens = 3;
// A core waits for a dozen lines that it fetches itself, but its prefetchers bring several streams at once. Measured on
// Zen 3, one thread, GB/s, one stream fetched 4 KiB ahead / as here: q4_0 13.7 / 18.1, q8_0 12.0 / 17.9, q4_k 15.3 / 17.6,
// q6_k 14.7 / 19.9. Without fetching, four streams gave 10 to 12.
constexpr int kStreams = 4, kScaledStreams = 2;
constexpr bool fetches() { return true; }

}  // namespace
}  // namespace moehive

#include "multiply-inl.h"

namespace moehive {
extern const Kernel kAvx2{"avx2", multiply, quantize, round_vector, activate, join_gate};
}  // namespace moehive

// AVX-512 F and BW: 16 floats or 64 bytes in one register. Compiled three times: as it is, with -mavx512vnni as kAvx512Vnni,
// and with -mavx512bf16 and -mavx512vbmi besides as kAvx512Bf16.
#include <immintrin.h>

#include "kernel.h"

namespace moehive {
namespace {

// Integer operations for the block formats; see block-inl.h.
struct Int8 {
  struct Bytes {
    __m512i all;
  };
  struct Sums {
    __m512i all;
  };
  struct Factor {
    __m512i all;  // 32 bits
  };
#if defined(__AVX512VNNI__)
  using Wide = Sums;  // products of four are added in 32 bits by one instruction
  static constexpr bool kNarrow = false;
  static constexpr int kRaised = 128;
#else
  struct Wide {
    __m512i all;  // 16 bits, two for each row
  };
  static constexpr bool kNarrow = true;
  static constexpr int kRaised = 0;
#endif

  static inline Bytes load(const uint8_t* at) { return {_mm512_loadu_si512(at)}; }
  // The bits `Mask` from bit From of each byte, at bit To.
  template <int From, int To, int Mask>
  static inline Bytes field(Bytes b) {
    if constexpr (From > To) b.all = _mm512_srli_epi16(b.all, From - To);
    if constexpr (From < To) b.all = _mm512_slli_epi16(b.all, To - From);
    return {_mm512_and_si512(b.all, _mm512_set1_epi8(Mask << To))};
  }
  static inline Bytes join(Bytes a, Bytes b) { return {_mm512_or_si512(a.all, b.all)}; }
  static inline Bytes lookup(Bytes codes, const int8_t* table) {
    const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes.all)};
  }
  static inline Sums splat(int32_t n) { return {_mm512_set1_epi32(n)}; }
  static inline Wide zero() { return {_mm512_setzero_si512()}; }
  template <bool Signed>
  static inline Wide add(Wide w, Bytes b, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    const __m512i xs = _mm512_set1_epi32(four);
#if defined(__AVX512VNNI__)
    // A signed byte with its first bit the other way is 128 more, without sign.
    return {_mm512_dpbusd_epi32(w.all, Signed ? _mm512_xor_si512(b.all, _mm512_set1_epi8(-128)) : b.all, xs)};
#else
    if constexpr (Signed) {  // |b| * (x with b's sign)
      const __m512i signs = _mm512_mask_sub_epi8(xs, _mm512_movepi8_mask(b.all), _mm512_setzero_si512(), xs);
      return {_mm512_add_epi16(w.all, _mm512_maddubs_epi16(_mm512_abs_epi8(b.all), signs))};
    }
    return {_mm512_add_epi16(w.all, _mm512_maddubs_epi16(b.all, xs))};
#endif
  }
  static inline Sums flush(Sums s, Wide w) {
#if defined(__AVX512VNNI__)
    return {_mm512_add_epi32(s.all, w.all)};
#else
    return {_mm512_add_epi32(s.all, _mm512_madd_epi16(w.all, _mm512_set1_epi16(1)))};
#endif
  }
  static inline Sums flush(Sums s, Wide w, Factor f) {
    return {_mm512_add_epi32(s.all, _mm512_mullo_epi32(flush(splat(0), w).all, f.all))};
  }
  static inline Sums add(Sums a, Sums b) { return {_mm512_add_epi32(a.all, b.all)}; }

  typedef uint8_t Octets __attribute__((vector_size(16)));
  template <bool Signed>
  static inline Factor factor(Octets o) {
    if constexpr (Signed) return {_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(o))};
    return {_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(o))};
  }
  static inline Sums even(Factor f, int32_t n) { return {_mm512_mullo_epi32(f.all, _mm512_set1_epi32(2 * n))}; }
  static inline Sums pairs(Octets a, int32_t n, Octets b, int32_t m) {
    const __m512i left = _mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(a));
    const __m512i right = _mm512_slli_epi32(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(b)), 16);
    const __m512i both = _mm512_set1_epi32(static_cast<int32_t>((n & 0xffff) | static_cast<uint32_t>(m) << 16));
    return {_mm512_madd_epi16(_mm512_or_si512(left, right), both)};
  }
};

struct Vec {
  __m512 all;

  typedef uint8_t Octets __attribute__((vector_size(16)));
  static inline Vec splat(float n) { return {_mm512_set1_ps(n)}; }
  static inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.all, b.all)}; }
  static inline Vec from_ints(Int8::Sums s) { return {_mm512_cvtepi32_ps(s.all)}; }
  static inline Vec from_u8(Octets o) { return from_ints({_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(o))}); }
  static inline Vec powers_of_two(Octets o) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(o)), 23))};
  }
  static inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v.all); }

  static inline Vec zero() { return {_mm512_setzero_ps()}; }
  static inline Vec load(const float* at) { return {_mm512_loadu_ps(at)}; }
  // Of 32 numbers of bf16 the odd or the even ones.
  static inline Vec load_odd(const uint16_t* at) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(at), upper))};
  }
  static inline Vec load_even(const uint16_t* at) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(at), 16))};
  }
  static inline Vec load_f16(const uint16_t* at) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))};
  }
  static inline Vec fma(Vec a, Vec b, Vec sum) { return {_mm512_fmadd_ps(a.all, b.all, sum.all)}; }
  // As sum(), of 16 at once: a step of it takes two registers into one. Without loops, which GCC would unroll after it has
  // put all of them into memory.
  static inline void sums(const Vec* v, float* to) {
    const auto eighth = [v](int i) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(v[i].all, v[i + 8].all, 0x44),
                           _mm512_shuffle_f32x4(v[i].all, v[i + 8].all, 0xee));
    };
    const auto quarter = [eighth](int i) {
      const __m512 a = eighth(i), b = eighth(i + 4);
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    const auto half = [quarter](int i) {
      const __m512 a = quarter(i), b = quarter(i + 2);
      return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    };
    const __m512 a = half(0), b = half(1);
    const __m512 one = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    // i, i + 8, i + 4, i + 12 have met in registers, then i and i + 2, then i and i + 1: back into their order.
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    _mm512_storeu_ps(to, _mm512_permutexvar_ps(order, one));
  }
  static inline float sum(Vec v) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v.all), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v.all), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

// 32 registers: 16 for sums, 4 for four rows' weights, 4 for the vectors. With one token more rows would be more streams
// than Zen 4 follows: bf16 16 GB/s with eight, 21 with four.
constexpr int kRowsForOne = 4, kRows = 4, kTokens = 4;
constexpr int kSumsAtOnce = 16;
// Block formats: 2 registers a token for sums; 3 where products are first added in 16 bits.
#if defined(__AVX512VNNI__)
constexpr int kBlockTokens = 8;
#else
constexpr int kBlockTokens = 4;
#endif
// Zen 4, one thread, GB/s, one stream / as on AVX2: q4_0 21.8 / 19.0, q8_0 19.3 / 16.3, q4_k 22.8 / 19.3.
constexpr int kStreams = 1, kScaledStreams = 1;
inline bool fetches() { return kFetchesAhead; }

}  // namespace
}  // namespace moehive

#include "multiply-inl.h"

namespace moehive {
#if defined(__AVX512BF16__)
extern const Kernel kAvx512Bf16{"avx512_bf16", multiply, quantize, round_vector, activate, join_gate};
#elif defined(__AVX512VNNI__)
extern const Kernel kAvx512Vnni{"avx512_vnni", multiply, quantize, round_vector, activate, join_gate};
#else
extern const Kernel kAvx512{"avx512", multiply, quantize, round_vector, activate, join_gate};
#endif
}  // namespace moehive

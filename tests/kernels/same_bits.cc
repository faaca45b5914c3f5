// Runs every product kernel of this processor over many shapes and prints, for each, its name and a hash of the bits
// of its results; fails if a result is far from the same sum in doubles, or if a byte outside is touched.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernel.h"

using namespace moehive;

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u; }

float number(Format format, const std::vector<uint8_t>& weights, int64_t i) {
  float result;
  if (format == Format::f32) {
    std::memcpy(&result, &weights[4 * i], 4);
    return result;
  }
  uint16_t half;
  std::memcpy(&half, &weights[2 * i], 2);
  if (format == Format::f16) {
    return std::ldexp((half & 0x8000 ? -1.0f : 1.0f) * (1024 + (half & 0x3ff)), (half >> 10 & 31) - 25);
  }
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Random blocks whose factors are neither very large nor very small: f16 numbers of 2^-9 to 2^-8, powers of two of
// 2^-16 to 2^15, f32 numbers of 1 to 2.
void make_sane(Format format, std::vector<uint8_t>& weights) {
  const Layout layout = layout_of(format);
  if (format == Format::fp8_block) {
    for (uint8_t& code : weights)
      if ((code & 127) == 127) code = 0;  // no number
    for (size_t at = 0; at < weights.size(); at += kFp8Bytes) {
      const uint32_t scale = 0x3f800000u | next() >> 9;
      std::memcpy(&weights[at], &scale, 4);
    }
    return;
  }
  for (size_t at = 0; at < weights.size(); at += layout.bytes()) {
    for (int64_t i = 0; i < 16 && layout.scales == Scales::e8m0; ++i) weights[at + i] = 111 + (next() >> 27);
    for (int64_t i = 0; i < 16 && layout.scales == Scales::zeros; ++i) weights[at + 32 + i] &= 0x1f;
    if (layout.scales == Scales::e8m0) continue;
    for (int64_t i = 0; i < (layout.minimum && layout.scales != Scales::zeros ? 32 : 16); ++i) {
      const uint16_t factor = (next() >> 16 & 0x83ffu) | 0x1800u;
      std::memcpy(&weights[at + 2 * i], &factor, 2);
    }
  }
}

// `count` vectors of `numbers`, as a kernel takes them for a format.
class Inputs {
 public:
  Inputs(const Kernel& kernel, Format format, const std::vector<float>& numbers, int64_t columns, int64_t count)
      : views_(count), x_(count) {
    const Vectors kind = vectors_of(format);
    const int64_t nbytes = vector_bytes(kind, columns);
    memory_.resize(count * nbytes + 64);
    char* at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64);
    for (int64_t t = 0; t < count; ++t, at += nbytes) {
      x_[t] = at;
      const float* vector = &numbers[t * columns];
      if (kind == Vectors::floats) std::memcpy(at, vector, columns * sizeof(float));
      if (kind == Vectors::rounded) kernel.round(vector, columns, at);
      if (kind == Vectors::bytes) {
        kernel.quantize(vector, columns, at);
        views_[t] = quantized_at(at, columns);
        x_[t] = &views_[t];
      }
    }
  }
  const void* const* x() const { return x_.data(); }

 private:
  std::vector<char> memory_;
  std::vector<Quantized> views_;
  std::vector<const void*> x_;
};

std::vector<float> numbers(int64_t count) {
  std::vector<float> made(count);
  for (float& number : made) number = static_cast<float>(static_cast<int32_t>(next())) * 0x1p-31f;
  return made;
}

// x with 8 significant bits, ties to even.
float rounded(float x) { return std::ldexp(std::nearbyint(std::ldexp(x, 7 - std::ilogb(x))), std::ilogb(x) - 7); }

void add(uint64_t& hash, const std::vector<float>& results) {
  for (const float result : results) {
    uint32_t bits;
    std::memcpy(&bits, &result, 4);
    hash = (hash ^ bits) * 1099511628211ull;
  }
}

// Random vectors with such blocks.
uint64_t hash_of_blocks(const Kernel& kernel, Format format) {
  uint64_t hash = static_cast<uint64_t>(format);
  for (int64_t columns : {32, 256, 300, 768})
    for (int64_t rows : {1, 16, 40, 80, 121, 144})
      for (int64_t tokens : {1, 2, 3, 4, 5, 7}) {
        if (rows > 40 && tokens > 1) break;  // so many rows with one token are read as several streams
        std::vector<uint8_t> weights(rows_bytes(format, rows, columns));
        for (uint8_t& byte : weights) byte = next() >> 24;
        make_sane(format, weights);
        const Inputs vectors(kernel, format, numbers(tokens * columns), columns, tokens);
        std::vector<float> out(rows * tokens);
        kernel.multiply(
            {format, weights.data(), rows, columns, vectors.x(), tokens, out.data(), rows, weights.data()});
        add(hash, out);
      }
  return hash;
}

// Weights and vectors of bf16 of all sizes, denormal numbers and sums that become so among them.
uint64_t hash_of_any_bf16(const Kernel& kernel) {
  constexpr int64_t rows = 20, columns = 70, tokens = 9;
  uint64_t hash = 1;
  for (int exponents : {16, 80, 160}) {  // from 2^-127 on
    std::vector<uint8_t> weights(rows * columns * 2);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const uint16_t half = (next() >> 16 & 0x807fu) | (next() >> 16) % exponents << 7;
      std::memcpy(&weights[2 * i], &half, 2);
    }
    std::vector<float> made = numbers(tokens * columns), out(rows * tokens);
    for (int64_t i = 0; i < tokens * columns; ++i)
      made[i] = std::ldexp(made[i], i % 7 ? static_cast<int>((next() >> 16) % 16) - 60 : -126);
    const Inputs vectors(kernel, Format::bf16, made, columns, tokens);
    kernel.multiply(
        {Format::bf16, weights.data(), rows, columns, vectors.x(), tokens, out.data(), rows, weights.data()});
    add(hash, out);
  }
  return hash;
}

}  // namespace

int main() {
  std::vector<const Kernel*> all{&kScalar};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    all.push_back(&kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) all.push_back(&kAvx512);
    if (__builtin_cpu_supports("avx512vnni")) all.push_back(&kAvx512Vnni);
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) all.push_back(&kAvx512Bf16);
  }
#elif defined(__aarch64__)
  all.push_back(&kNeon);
#endif
  for (const Kernel* kernel : all) {
    state = 1;
    uint64_t hash = 14695981039346656037ull;
    for (Format format : {Format::f32, Format::bf16, Format::f16})
      for (int64_t columns : {1, 7, 15, 16, 17, 31, 33, 64, 200})
        for (int64_t rows : {1, 2, 5, 8, 19})
          for (int64_t tokens : {1, 2, 3, 4, 5, 7, 9}) {
            // numbers of about 1/4 to 1 in all three formats, in memory that ends where the last row ends
            std::vector<uint8_t> weights(rows * columns * weight_bytes(format));
            for (int64_t i = 0; i < rows * columns; ++i) {
              const uint32_t random = next();
              uint32_t bits = (random & 0x80ffffffu) | 0x3e800000u;
              if (format == Format::f32) std::memcpy(&weights[4 * i], &bits, 4);
              uint16_t half = bits >> 16;
              if (format == Format::f16) half = (random >> 16 & 0x87ffu) | 0x3400u;
              if (format != Format::f32) std::memcpy(&weights[2 * i], &half, 2);
            }
            std::vector<float> made = numbers(tokens * columns);
            const Inputs vectors(*kernel, format, made, columns, tokens);
            if (format == Format::bf16)
              for (float& number : made) number = rounded(number);
            std::vector<float> out(rows * tokens + 1, 12345.0f);
            kernel->multiply(
                {format, weights.data(), rows, columns, vectors.x(), tokens, out.data(), rows, weights.data()});
            if (out.back() != 12345.0f) return 2;
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t t = 0; t < tokens; ++t) {
                double sum = 0.0;
                for (int64_t k = 0; k < columns; ++k)
                  sum += static_cast<double>(number(format, weights, r * columns + k)) * made[t * columns + k];
                if (!(std::fabs(out[t * rows + r] - sum) < 1e-5)) return 1;
              }
            out.pop_back();
            add(hash, out);
          }
    for (int number = static_cast<int>(Format::q8_0); number <= static_cast<int>(Format::fp8_block); ++number)
      hash = (hash ^ hash_of_blocks(*kernel, static_cast<Format>(number))) * 1099511628211ull;
    hash = (hash ^ hash_of_any_bf16(*kernel)) * 1099511628211ull;
    std::printf("%s %016llx\n", kernel->name, static_cast<unsigned long long>(hash));
  }
}

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
        std::vector<Quantized> vectors;
        std::vector<std::vector<float>> memory(tokens);
        for (int64_t t = 0; t < tokens; ++t) {
          std::vector<float> numbers(columns);
          for (float& number : numbers) number = static_cast<float>(static_cast<int32_t>(next())) * 0x1p-31f;
          if (format == Format::fp8_block) {
            memory[t].assign(numbers.begin(), numbers.end());
            memory[t].resize(padded(columns));
            continue;
          }
          memory[t].resize(quantized_bytes(columns) / sizeof(float));
          kernel.quantize(numbers.data(), columns, memory[t].data());
          vectors.push_back(quantized_at(memory[t].data(), columns));
        }
        std::vector<const void*> x;
        for (const Quantized& vector : vectors) x.push_back(&vector);
        for (int64_t t = 0; t < tokens && vectors.empty(); ++t) x.push_back(memory[t].data());
        std::vector<float> out(rows * tokens);
        kernel.multiply(
            {format, weights.data(), rows, columns, x.data(), tokens, out.data(), tokens, weights.data()});
        for (const float found : out) {
          uint32_t bits;
          std::memcpy(&bits, &found, 4);
          hash = (hash ^ bits) * 1099511628211ull;
        }
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
  }
#elif defined(__aarch64__)
  all.push_back(&kNeon);
#endif
  for (const Kernel* kernel : all) {
    state = 1;
    uint64_t hash = 14695981039346656037ull;
    for (Format format : {Format::f32, Format::bf16, Format::f16})
      for (int64_t columns : {1, 7, 15, 16, 17, 33, 64, 200})
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
            const int64_t stride = padded(columns);
            std::vector<float> memory(tokens * stride + 16);
            float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
            std::vector<const void*> x(tokens);
            for (int64_t t = 0; t < tokens; ++t) {
              x[t] = aligned + t * stride;
              for (int64_t k = 0; k < columns; ++k)
                aligned[t * stride + k] = static_cast<float>(static_cast<int32_t>(next())) * 0x1p-31f;
            }
            std::vector<float> out(rows * tokens + 1, 12345.0f);
            kernel->multiply(
                {format, weights.data(), rows, columns, x.data(), tokens, out.data(), tokens, weights.data()});
            if (out.back() != 12345.0f) return 2;
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t t = 0; t < tokens; ++t) {
                double sum = 0.0;
                for (int64_t k = 0; k < columns; ++k)
                  sum += static_cast<double>(number(format, weights, r * columns + k)) * aligned[t * stride + k];
                const float found = out[r * tokens + t];
                if (!(std::fabs(found - sum) < 1e-5)) return 1;
                uint32_t bits;
                std::memcpy(&bits, &found, 4);
                hash = (hash ^ bits) * 1099511628211ull;
              }
          }
    for (int number = static_cast<int>(Format::q8_0); number <= static_cast<int>(Format::fp8_block); ++number)
      hash = (hash ^ hash_of_blocks(*kernel, static_cast<Format>(number))) * 1099511628211ull;
    std::printf("%s %016llx\n", kernel->name, static_cast<unsigned long long>(hash));
  }
}

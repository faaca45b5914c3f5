// The sum of a layer's rows: [tokens, hidden], added up in f32.
#ifndef MOEHIVE_DISPATCH_SUM_H_
#define MOEHIVE_DISPATCH_SUM_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../../../kernels/cpu/bf16.h"

namespace moehive {

class Sum {
 public:
  // Nothing yet, of rows in bf16 or f32; `out`: where `finish` leaves it, in the same type.
  void start(int64_t tokens, int64_t size, bool bf16, uint8_t* out) {
    out_ = out, size_ = size, count_ = tokens * size, bf16_ = bf16;
    total_ = reinterpret_cast<float*>(out);
    if (bf16) rounded_later_.resize(count_), total_ = rounded_later_.data();
    std::memset(total_, 0, count_ * sizeof(float));
  }

  void add(int64_t token, const uint8_t* row) {
    float* const to = total_ + token * size_;
    if (bf16_) {
      for (int64_t i = 0; i < size_; ++i) {
        uint16_t value;
        std::memcpy(&value, row + 2 * i, sizeof value);
        to[i] += from_bf16(value);
      }
    } else {
      for (int64_t i = 0; i < size_; ++i) {
        float value;
        std::memcpy(&value, row + 4 * i, sizeof value);
        to[i] += value;
      }
    }
  }

  // Whether every sum is a number whose square is one.
  bool finish() {
    if (bf16_)
      for (int64_t i = 0; i < count_; ++i) reinterpret_cast<uint16_t*>(out_)[i] = to_bf16(total_[i]);
    return std::isfinite(sum_of_squares());
  }

 private:
  float sum_of_squares() const {
    float squares[8] = {};
    int64_t i = 0;
    for (; i + 8 <= count_; i += 8)
      for (int j = 0; j < 8; ++j) squares[j] += total_[i + j] * total_[i + j];
    for (; i < count_; ++i) squares[0] += total_[i] * total_[i];
    float square = 0.0f;
    for (float one : squares) square += one;
    return square;
  }

  uint8_t* out_ = nullptr;
  float* total_ = nullptr;
  int64_t size_ = 0, count_ = 0;
  bool bf16_ = false;
  std::vector<float> rounded_later_;
};

}  // namespace moehive

#endif

// Memory to work in that is kept between calls.
#pragma once

#include <cstdint>
#include <new>

namespace moehive {

class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { free(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // `count` floats that begin at a line of the caches, uninitialized; what an earlier call returned is no longer valid.
  // Throws std::bad_alloc.
  float* floats(int64_t count) {
    if (count > capacity_) {
      free();
      memory_ = static_cast<float*>(::operator new(count * sizeof(float), kAlignment));
      capacity_ = count;
    }
    return memory_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  void free() {
    ::operator delete(memory_, kAlignment);
    memory_ = nullptr;
    capacity_ = 0;
  }

  float* memory_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace moehive

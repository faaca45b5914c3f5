// What replies say of a node and its link, and what is to be expected of the next ones: dispatch/speeds.py and
// dispatch/speed.py, which have the same structures field for field and say what they mean.
#ifndef MOEHIVE_DISPATCH_SPEEDS_H_
#define MOEHIVE_DISPATCH_SPEEDS_H_

#include <algorithm>
#include <cstdint>

namespace moehive {

constexpr double kNewest = 0.125;  // weight of a reply among those before it
constexpr int64_t kFewTokens = 32;
constexpr double kUnknownSecondsPerByte = 1e-10;
constexpr int64_t kSamples = 16;
// Up to the first a message's time is the round trip's, from the second it is the bytes'.
constexpr int64_t kSmallBytes = 16 << 10, kLargeBytes = 128 << 10;
// Rounding an f32 row to 8 bits and back, at both ends, costs some 2 ns a byte and saves three quarters of the bytes:
// from 1.6 Gbit/s down that pays, from 2.7 Gbit/s up it does not, and in between it stays as it was.
constexpr double kSlowSecondsPerByte = 5e-9, kFastSecondsPerByte = 3e-9;

struct NodeSpeed {
  double s_per_byte, s_per_pair, best_s_per_byte, backlog_s;
  int64_t heard;

  double read_s_per_byte() const { return s_per_byte != 0.0 ? s_per_byte : kUnknownSecondsPerByte; }

  void note(int64_t tokens, int64_t pairs, int64_t bytes, double seconds, int64_t now) {
    heard = now;
    if (tokens > kFewTokens) {
      const double figure = seconds / std::max<int64_t>(1, pairs);
      s_per_pair = s_per_pair == 0.0 ? figure : s_per_pair + kNewest * (figure - s_per_pair);
      return;
    }
    const double figure = seconds / std::max<int64_t>(1, bytes);
    if (s_per_byte == 0.0) {
      s_per_byte = best_s_per_byte = figure;
      return;
    }
    s_per_byte += kNewest * (figure - s_per_byte);
    best_s_per_byte = std::min(best_s_per_byte * 1.001, figure);
  }
};

struct LinkSpeed {
  double round_trip_s, late_s, s_per_byte;
  int32_t slow, loopback;
  double usual_s;
  int64_t round_trips_seen, rates_seen;
  double round_trips[kSamples], rates[kSamples];

  void note(int64_t largest, int64_t total, double seconds) {
    if (largest < kLargeBytes) usual_s = usual_s != 0.0 ? usual_s + kNewest * (seconds - usual_s) : seconds;
    if (largest <= kSmallBytes) {
      round_trip_s = best(round_trips, round_trips_seen, seconds);
    } else if (largest >= kLargeBytes) {
      s_per_byte = best(rates, rates_seen, std::max(seconds - round_trip_s, 0.0) / total);
      slow = !loopback && s_per_byte > (slow ? kFastSecondsPerByte : kSlowSecondsPerByte);
    }
    late_s = std::max(0.0, usual_s - round_trip_s);
  }

  bool eight_bit(int64_t bytes) const { return slow && bytes * s_per_byte > round_trip_s / 4; }

 private:
  // The least of the last kSamples, `newest` among them.
  static double best(double* samples, int64_t& seen, double newest) {
    samples[seen++ % kSamples] = newest;
    return *std::min_element(samples, samples + std::min(seen, kSamples));
  }
};

struct NodeCounters {
  int64_t requests, expert_calls, compute_ns, failed;
};

}  // namespace moehive

#endif

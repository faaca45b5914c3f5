// Exact dispatch of one batch of one layer: which place computes each expert that the batch hits, so that the last
// place is done as early as can be.
//
// All experts of a layer have one size, so this is bipartite b-matching: start anywhere, and while the place that ends
// last can pass an expert on, along a chain of replicas, to a place that would still end earlier, do it. When no chain
// is left, no other assignment ends earlier (the chains are the augmenting paths of a maximum flow).
#ifndef MOEHIVE_PLACEMENT_DISPATCH_H_
#define MOEHIVE_PLACEMENT_DISPATCH_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "planner.h"

namespace moehive {

constexpr int kMaxPlaces = 64;  // a replica set is the bits of one word
constexpr int kLanes = 16;      // hits of a batch are padded to a multiple of this: whole vectors, no rest
constexpr uint8_t kNowhere = 255;  // where a padding hit is assigned

// What a layer costs on each place, in seconds, for one size of batch.
struct Costs {
  int places, stride;
  const double* times;  // [places, stride]: when a place is done with so many distinct experts

  double finish(int place, int load) const { return times[place * stride + load]; }

  // The place among `replicas` that ends first when it gets one more expert.
  int quickest(uint64_t replicas, const uint16_t* load) const {
    int best = -1;
    double best_time = 0.0;
    for (; replicas != 0; replicas &= replicas - 1) {
      const int place = __builtin_ctzll(replicas);
      const double time = finish(place, load[place] + 1);
      if (best < 0 || time < best_time) best = place, best_time = time;
    }
    return best;
  }
};

// The costs of a layer for each size of batch.
class CostTable {
 public:
  explicit CostTable(const MoehiveLayer& layer) : places_(layer.places) {
    int64_t most = 0;
    for (int64_t batch = 0; batch < layer.batches; ++batch)
      most = std::max(most, layer.offsets[batch + 1] - layer.offsets[batch]);
    stride_ = static_cast<int>(most) + 2;
    times_.reserve(static_cast<size_t>(layer.sizes) * places_ * stride_);
    for (int size = 0; size < layer.sizes; ++size) {
      for (int place = 0; place < places_; ++place) {
        const double always = layer.always[place], base = layer.fixed[size * places_ + place] + always;
        for (int load = 0; load < stride_; ++load)
          times_.push_back(load == 0 && always == 0.0 ? 0.0 : base + load * layer.step[place]);
      }
    }
  }
  Costs of(int32_t size) const {
    return {places_, stride_, times_.data() + static_cast<size_t>(size) * places_ * stride_};
  }

 private:
  int places_, stride_;
  std::vector<double> times_;
};

struct Settled {
  double makespan;
  // The places that no chain leads out of: all experts that are assigned to one of them have all their replicas among
  // them, and each ends no earlier than `makespan` with one more. This proves that the makespan is the least.
  uint64_t tight;
};

inline int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Where the experts that are assigned to `place` could go. Without branches, so that it is done in vectors.
template <typename Mask>
inline Mask reach_of(uint8_t place, const Mask* masks, int width, const uint8_t* assigned) {
  Mask lanes[kLanes] = {};
  for (int at = 0; at < width; at += kLanes)
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] |= masks[at + lane] & static_cast<Mask>(-static_cast<Mask>(assigned[at + lane] == place));
  Mask reach = 0;
  for (int lane = 0; lane < kLanes; ++lane) reach |= lanes[lane];
  return reach;
}

// The first hit that is assigned to `place` and has a replica in `there`; there is one.
template <typename Mask>
inline int one_of(uint8_t place, Mask there, const Mask* masks, const uint8_t* assigned) {
  for (int at = 0;; at += kLanes) {
    uint8_t lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] = static_cast<uint8_t>((assigned[at + lane] == place) & ((masks[at + lane] & there) != 0));
    uint64_t low, high;
    std::memcpy(&low, lanes, 8), std::memcpy(&high, lanes + 8, 8);
    if (low != 0) return at + __builtin_ctzll(low) / 8;
    if (high != 0) return at + 8 + __builtin_ctzll(high) / 8;
  }
}

// Makes an assignment optimal. `masks` [width] are the replicas of a batch's experts, with 0 where it is padded;
// `assigned` [width] and `load` [places] are read and changed. `Mask` has a bit for each place.
template <typename Mask>
Settled settle(const Costs& costs, const Mask* masks, int width, uint8_t* assigned, uint16_t* load) {
  uint8_t queue[kMaxPlaces], from[kMaxPlaces];
  for (;;) {
    int worst = 0;
    double makespan = 0.0;
    for (int place = 0; place < costs.places; ++place) {
      const double time = costs.finish(place, load[place]);
      if (time > makespan) makespan = time, worst = place;
    }
    if (load[worst] == 0) return {makespan, uint64_t{1} << worst};
    const double earlier = makespan * (1.0 - 1e-12);  // rounding must not look like progress
    uint64_t seen = uint64_t{1} << worst;
    int tail = 0, end = -1;
    queue[tail++] = static_cast<uint8_t>(worst);
    for (int head = 0; head < tail && end < 0; ++head) {
      const uint8_t place = queue[head];
      const Mask reach = reach_of(place, masks, width, assigned);
      for (uint64_t fresh = reach & ~seen; fresh != 0; fresh &= fresh - 1) {
        const int next = __builtin_ctzll(fresh);
        seen |= uint64_t{1} << next;
        from[next] = place;
        if (costs.finish(next, load[next] + 1) < earlier) {
          end = next;
          break;
        }
        queue[tail++] = static_cast<uint8_t>(next);
      }
    }
    if (end < 0) return {makespan, seen};
    for (int place = end; place != worst; place = from[place]) {
      const int at = one_of(from[place], static_cast<Mask>(Mask{1} << place), masks, assigned);
      assigned[at] = static_cast<uint8_t>(place);
      ++load[place];
      --load[from[place]];
    }
  }
}

// Assigns a batch anew: experts with few replicas first, each where it ends first; then to the optimum.
template <typename Mask>
Settled dispatch(const Costs& costs, const Mask* masks, int count, uint8_t* assigned, uint16_t* load) {
  std::fill(load, load + costs.places, uint16_t{0});
  std::fill(assigned + count, assigned + padded(count), kNowhere);
  for (int wanted = 1, left = count; left > 0; ++wanted) {
    for (int at = 0; at < count; ++at) {
      if (__builtin_popcountll(masks[at]) != wanted) continue;
      const int place = costs.quickest(masks[at], load);
      assigned[at] = static_cast<uint8_t>(place);
      ++load[place];
      --left;
    }
  }
  return settle(costs, masks, padded(count), assigned, load);
}

}  // namespace moehive

#endif

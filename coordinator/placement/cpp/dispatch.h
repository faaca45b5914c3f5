// Exact dispatch of one batch of one layer: which place computes each expert that the batch hits, so that the last
// place is done as early as can be.
//
// All experts of a layer have one size, so this is bipartite b-matching: start anywhere, and while the place that ends
// last can pass an expert on, along a chain of replicas, to a place that would still end earlier, do it. When no chain
// is left, no other assignment ends earlier (the chains are the augmenting paths of a maximum flow).
#ifndef MOEHIVE_PLACEMENT_DISPATCH_H_
#define MOEHIVE_PLACEMENT_DISPATCH_H_

#include <cstdint>
#include <cstring>

namespace moehive {

constexpr int kMaxPlaces = 64;  // a replica set is the bits of one word

// What a layer costs on each place, in seconds, for one size of batch.
struct Costs {
  int places;
  const double* fixed;   // [places]: paid once if the place is asked for anything
  const double* step;    // [places]: paid for each distinct expert
  const double* always;  // [places]: paid in every batch, as for a shared expert that lives there; mostly 0

  double finish(int place, int load) const {
    if (load == 0 && always[place] == 0.0) return 0.0;
    return fixed[place] + always[place] + load * step[place];
  }

  // The place among `replicas` that ends first when it gets one more expert.
  int quickest(uint64_t replicas, const int32_t* load) const {
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

struct Settled {
  double makespan;
  // The places that no chain leads out of: all experts that are assigned to one of them have all their replicas among
  // them, and each ends no earlier than `makespan` with one more. This proves that the makespan is the least.
  uint64_t tight;
};

// Makes an assignment optimal. `hits` [count] experts, `replicas` by expert; `assigned` [count] and `load` [places] are
// read and changed.
inline Settled settle(const Costs& costs, const uint16_t* hits, int count, const uint64_t* replicas, uint8_t* assigned,
                     int32_t* load) {
  uint8_t queue[kMaxPlaces], from[kMaxPlaces];
  int32_t via[kMaxPlaces];
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
      const int place = queue[head];
      const uint8_t* found = assigned;
      while (end < 0 && (found = static_cast<const uint8_t*>(
                             std::memchr(found, place, static_cast<size_t>(assigned + count - found)))) != nullptr) {
        const int at = static_cast<int>(found++ - assigned);
        for (uint64_t fresh = replicas[hits[at]] & ~seen; fresh != 0; fresh &= fresh - 1) {
          const int next = __builtin_ctzll(fresh);
          seen |= uint64_t{1} << next;
          from[next] = static_cast<uint8_t>(place);
          via[next] = at;
          if (costs.finish(next, load[next] + 1) < earlier) {
            end = next;
            break;
          }
          queue[tail++] = static_cast<uint8_t>(next);
        }
      }
    }
    if (end < 0) return {makespan, seen};
    for (int place = end; place != worst; place = from[place]) {
      assigned[via[place]] = static_cast<uint8_t>(place);
      ++load[place];
      --load[from[place]];
    }
  }
}

}  // namespace moehive

#endif

// Makespans of a plan, and simulated annealing over plans: coordinator/placement/native.py calls these.
#include "planner.h"

#include <new>
#include <vector>

#include "annealer.h"
#include "dispatch.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t moehive_planner_abi() { return 3; }

// Makespan of each batch in seconds, by exact dispatch. Every expert has a replica. 0, or 1: no memory.
EXPORT int32_t moehive_makespans(const MoehiveLayer* layer, const uint64_t* replicas, double* makespans) {
  try {
    const moehive::CostTable costs(*layer);
    const int most = moehive::padded(layer->experts);
    std::vector<uint8_t> assigned(most);
    std::vector<uint64_t> masks(most);
    uint16_t load[moehive::kMaxPlaces];
    for (int64_t batch = 0; batch < layer->batches; ++batch) {
      const uint16_t* hits = layer->hits + layer->offsets[batch];
      const int count = static_cast<int>(layer->offsets[batch + 1] - layer->offsets[batch]);
      for (int at = 0; at < count; ++at) masks[at] = replicas[hits[at]];
      std::fill(masks.begin() + count, masks.begin() + moehive::padded(count), uint64_t{0});
      makespans[batch] =
          moehive::dispatch(costs.of(layer->size[batch]), masks.data(), count, assigned.data(), load).makespan;
    }
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Improves `replicas` [experts] in place; `cost` gets the weighted sum of its makespans. 0, or 1: no memory.
EXPORT int32_t moehive_anneal(const MoehiveLayer* layer, const MoehiveSearch* search, uint64_t* replicas,
                              double* cost) {
  try {
    *cost = layer->places <= 8 ? moehive::Annealer<uint8_t>(*layer, *search, replicas).run()
                               : moehive::Annealer<uint64_t>(*layer, *search, replicas).run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

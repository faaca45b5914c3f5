// The C side of coordinator/placement/native.py.
#ifndef MOEHIVE_PLACEMENT_PLANNER_H_
#define MOEHIVE_PLACEMENT_PLANNER_H_

#include <cstdint>

extern "C" {

// One layer and the batches that it is judged by. `_Layer` of native.py, field for field.
struct MoehiveLayer {
  int32_t experts, places, sizes;
  int32_t reserved;
  int64_t batches;
  const double* fixed;     // [sizes, places] seconds
  const double* step;      // [places] seconds
  const double* always;    // [places] seconds
  const int64_t* offsets;  // [batches + 1] into hits
  const uint16_t* hits;    // distinct experts of each batch
  const int32_t* size;     // [batches]: which row of `fixed`
  const double* weight;    // [batches]: of each batch in the cost
};

// What a search may do. `_Search` of native.py.
struct MoehiveSearch {
  const int32_t* slots;     // [places]: experts that fit
  const uint64_t* pinned;   // [experts]: replicas that must stay
  const uint64_t* present;  // [experts]: replicas that are there now, for `copy_cost`
  double copy_cost;         // of each replica that is not there now, in units of the cost
  double hot, cold;         // first and last temperature, as parts of the first plan's cost
  int64_t moves;
  uint64_t seed;
};

// Batches of one kind, and the multipliers of a proof by one or two sets of places. `_Proof` of native.py.
struct MoehiveProof {
  int32_t experts, sets, kinds, most;
  int32_t nested;  // 1: the first set lies within the second, -1: the second within the first, 0: neither
  int32_t reserved;
  int64_t batches;
  const int64_t* offsets;    // [batches + 1] into hits
  const uint16_t* hits;      // distinct experts of each batch, at most `most`
  const int32_t* kind;       // [batches]: which row of `times`
  const double* times;       // [sets, kinds, most + 1] seconds
  const double* price;       // [sets, experts] seconds
  const double* pair_price;  // [sets] seconds
};
}

#endif

// One evaluation of the lower bound of coordinator/placement/bound.py, which explains it; native.py calls this.
#include <algorithm>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "planner.h"

namespace moehive {
namespace {

// Reads a batch's hits, the cheapest first, and what the first h of them cost. All experts are sorted once; a batch's
// are then found in that order as the bits of a word array.
class Ordered {
 public:
  Ordered(const MoehiveProof& proof, int set) : proof_(proof), pair_price_(proof.pair_price[set]) {
    price_ = proof.price + static_cast<int64_t>(set) * proof.experts;
    by_price_.resize(proof.experts), rank_.resize(proof.experts);
    std::iota(by_price_.begin(), by_price_.end(), uint16_t{0});
    std::sort(by_price_.begin(), by_price_.end(),
              [this](uint16_t a, uint16_t b) { return price_[a] < price_[b] || (price_[a] == price_[b] && a < b); });
    for (int rank = 0; rank < proof.experts; ++rank) rank_[by_price_[rank]] = static_cast<uint16_t>(rank);
    bits_.resize((proof.experts + 63) / 64);
    hits.resize(proof.most), cost.resize(proof.most + 1);
  }

  std::vector<uint16_t> hits;
  std::vector<double> cost;  // [h]

  int read(int64_t batch) {
    std::fill(bits_.begin(), bits_.end(), 0);
    for (int64_t at = proof_.offsets[batch]; at < proof_.offsets[batch + 1]; ++at) {
      const int rank = rank_[proof_.hits[at]];
      bits_[rank / 64] |= uint64_t{1} << rank % 64;
    }
    int count = 0;
    for (size_t word = 0; word < bits_.size(); ++word)
      for (uint64_t rest = bits_[word]; rest != 0; rest &= rest - 1, ++count) {
        hits[count] = by_price_[word * 64 + __builtin_ctzll(rest)];
        cost[count + 1] = cost[count] + price_[hits[count]] + pair_price_ * count;
      }
    return count;
  }

 private:
  const MoehiveProof& proof_;
  const double* price_;
  double pair_price_;
  std::vector<uint16_t> by_price_, rank_;
  std::vector<uint64_t> bits_;
};

double least_sum(const MoehiveProof& proof, int64_t* used, int64_t* pairs) {
  Ordered orders[2] = {{proof, 0}, {proof, proof.sets - 1}};
  double sum = 0.0;
  for (int64_t batch = 0; batch < proof.batches; ++batch) {
    const double* times[2] = {};
    int count = 0;
    for (int set = 0; set < proof.sets; ++set) {
      count = orders[set].read(batch);
      times[set] = proof.times + (static_cast<int64_t>(set) * proof.kinds + proof.kind[batch]) * (proof.most + 1);
    }
    int taken[2] = {0, 0};
    double least = std::numeric_limits<double>::infinity();
    for (int h = 0; h <= count; ++h) {
      const double cost = orders[0].cost[h];
      if (proof.sets == 1) {
        if (times[0][h] + cost < least) least = times[0][h] + cost, taken[0] = h;
        continue;
      }
      // Who has a replica outside the larger of two nested sets has one outside the smaller.
      const int from = proof.nested < 0 ? h : 0, to = proof.nested > 0 ? h : count;
      for (int g = from; g <= to; ++g) {
        const double both = std::max(times[0][h], times[1][g]) + cost + orders[1].cost[g];
        if (both < least) least = both, taken[0] = h, taken[1] = g;
      }
    }
    sum += least;
    for (int set = 0; set < proof.sets; ++set) {
      int64_t* mine = used + static_cast<int64_t>(set) * proof.experts;
      for (int h = 0; h < taken[set]; ++h) ++mine[orders[set].hits[h]];
      pairs[set] += static_cast<int64_t>(taken[set]) * (taken[set] - 1) / 2;
    }
  }
  return sum;
}

}  // namespace
}  // namespace moehive

// The sum over batches of the least time and prices; `used` [sets, experts] and `pairs` [sets], zero before, count what
// the least takes. 0, or 1: no memory.
extern "C" __attribute__((visibility("default"))) int32_t moehive_least_sum(const MoehiveProof* proof, double* sum,
                                                                           int64_t* used, int64_t* pairs) {
  try {
    *sum = moehive::least_sum(*proof, used, pairs);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Adds to `counts` [experts, experts] in how many batches two experts are hit together; each pair counts once, in the
// order in which the batch names them. `offsets` [batches + 1] are into `hits`.
extern "C" __attribute__((visibility("default"))) void moehive_count_pairs(int64_t batches, int64_t experts,
                                                                           const int64_t* offsets,
                                                                           const uint16_t* hits, int32_t* counts) {
  for (int64_t batch = 0; batch < batches; ++batch) {
    for (int64_t i = offsets[batch]; i < offsets[batch + 1]; ++i) {
      int32_t* row = counts + hits[i] * experts;
      for (int64_t j = i + 1; j < offsets[batch + 1]; ++j) ++row[hits[j]];
    }
  }
}

// What changes of single experts cost when a search tried them last, so that it can pick what may be cheap.
#ifndef MOEHIVE_PLACEMENT_ESTIMATES_H_
#define MOEHIVE_PLACEMENT_ESTIMATES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

namespace moehive {

// A change of one expert's replicas: at most one comes, and at most one goes.
struct Change {
  int expert;
  uint64_t before, after;
};

// The cost of a swap is nearly the sum of what its two experts cost alone, since few batches hit both. What was not
// tried yet counts as 0, which is neither good nor bad.
class Estimates {
 public:
  Estimates(int experts, int places) : places_(places), costs_(static_cast<size_t>(experts) * kKinds * places) {}

  double add(int expert, int place) const { return costs_[at(expert, kAdd, place)]; }
  double drop(int expert, int place) const { return costs_[at(expert, kDrop, place)]; }
  double go(int expert, int place) const { return costs_[at(expert, kGo, place)]; }

  // Each trial saw some of the batches only, so an estimate is the mean of the last few.
  void note(const Change& change, double cost) {
    const uint64_t come = change.after & ~change.before, gone = change.before & ~change.after;
    const Kind kind = come == 0 ? kDrop : gone == 0 ? kAdd : kGo;
    float& known = costs_[at(change.expert, kind, __builtin_ctzll(come != 0 ? come : gone))];
    known = static_cast<float>(known == 0.0f ? cost : (known + cost) / 2);
  }

  // It has other replicas now.
  void forget(int expert) {
    const auto first = costs_.begin() + static_cast<std::ptrdiff_t>(at(expert, kAdd, 0));
    std::fill(first, first + kKinds * places_, 0.0f);
  }

 private:
  enum Kind { kAdd, kDrop, kGo, kKinds };  // to a place, from one, to a place and away from another

  size_t at(int expert, Kind kind, int place) const {
    return (static_cast<size_t>(expert) * kKinds + kind) * places_ + place;
  }

  int places_;
  std::vector<float> costs_;
};

}  // namespace moehive

#endif

// Which of its holders computes each expert of a layer: the one that would finish first, fewest holders first, then one
// augmenting pass that takes experts off the node that would finish last.
#ifndef MOEHIVE_DISPATCH_CHOICE_H_
#define MOEHIVE_DISPATCH_CHOICE_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace moehive {

constexpr int kMoves = 8;  // of the augmenting pass, at most

class Choice {
 public:
  // `holders` [experts, most]: the nodes that can be asked for each expert, then -1. A node that is asked finishes
  // `base` seconds plus `per` seconds times its experts' sizes after the start.
  void start(const int32_t* holders, int64_t experts, int64_t most, const double* base, const double* per,
             int64_t nodes) {
    holders_ = holders, most_ = most, per_ = per;
    finish_.assign(base, base + nodes);
    asked_.assign(nodes, 0);
    hit_.assign(experts, 0);
    free_.clear();
    least_ = 0.0;
  }

  // Writes the nodes of the experts that `ids` [pairs] name to `owner` [experts]. An expert's size is 1, or the number
  // of its pairs.
  void run(const int64_t* ids, int64_t pairs, bool by_pairs, int64_t* owner) {
    const int64_t experts = static_cast<int64_t>(hit_.size());
    for (int64_t pair = 0; pair < pairs; ++pair)
      if (ids[pair] >= 0 && ids[pair] < experts) ++hit_[ids[pair]];
    for (int64_t expert = 0; expert < experts; ++expert) {
      if (hit_[expert] == 0) continue;
      const int32_t* mine = holders_ + expert * most_;
      const int64_t count = std::find(mine, mine + most_, -1) - mine;
      const double size = by_pairs ? hit_[expert] : 1.0;
      if (count == 0) continue;
      if (least_ == 0.0 || size < least_) least_ = size;
      if (count > 1) {
        free_.push_back({mine, count, size, expert, -1});
      } else {
        finish_[mine[0]] += per_[mine[0]] * size;
        ++asked_[mine[0]];
      }
    }
    std::sort(free_.begin(), free_.end(), [](const Expert& a, const Expert& b) {
      if (a.count != b.count) return a.count < b.count;
      return a.size != b.size ? a.size > b.size : a.number < b.number;
    });
    for (Expert& one : free_) {
      for (const int32_t* node = one.holders; node != one.holders + one.count; ++node)
        if (one.node < 0 || end_of(*node, one.size) < end_of(one.node, one.size)) one.node = *node;
      finish_[one.node] = end_of(one.node, one.size);
      ++asked_[one.node];
    }
    for (int moves = 0; moves < kMoves && relieve(); ++moves) continue;
    for (const Expert& one : free_) owner[one.number] = one.node;
  }

 private:
  struct Expert {
    const int32_t* holders;
    int64_t count;
    double size;
    int64_t number;
    int32_t node;
  };

  double end_of(int32_t node, double size) const { return finish_[node] + per_[node] * size; }

  void pass_on(Expert* one, int32_t to) {
    finish_[one->node] -= per_[one->node] * one->size;
    finish_[to] += per_[to] * one->size;
    --asked_[one->node], ++asked_[to];
    one->node = to;
  }

  // Takes an expert off the last node: to another holder, or to one that passes one of its own on in exchange.
  bool relieve() {
    int32_t last = -1;
    for (size_t node = 0; node < asked_.size(); ++node)
      if (asked_[node] && (last < 0 || finish_[node] > finish_[last])) last = static_cast<int32_t>(node);
    if (last < 0) return false;
    const double limit = finish_[last];
    bool any = false;
    room_.assign(asked_.size(), 0);
    for (size_t node = 0; node < asked_.size(); ++node)
      any |= room_[node] = static_cast<int32_t>(node) != last && end_of(static_cast<int32_t>(node), least_) < limit;
    if (!any) return false;  // the usual end
    for (Expert& one : free_) {
      if (one.node != last) continue;
      for (const int32_t* node = one.holders; node != one.holders + one.count; ++node)
        if (room_[*node] && end_of(*node, one.size) < limit) return pass_on(&one, *node), true;
    }
    seen_.clear();
    for (Expert& one : free_) {
      if (one.node != last) continue;
      for (const int32_t* node = one.holders; node != one.holders + one.count; ++node) {
        const std::pair<int32_t, double> kind{*node, one.size};
        if (*node == last || std::find(seen_.begin(), seen_.end(), kind) != seen_.end()) continue;
        seen_.push_back(kind);
        const double end = end_of(*node, one.size);
        for (Expert& other : free_) {
          if (other.node != *node || end - per_[*node] * other.size >= limit) continue;
          for (const int32_t* third = other.holders; third != other.holders + other.count; ++third)
            if (*third != *node && room_[*third] && end_of(*third, other.size) < limit)
              return pass_on(&other, *third), pass_on(&one, *node), true;
        }
      }
    }
    return false;
  }

  const int32_t* holders_ = nullptr;
  int64_t most_ = 0;
  const double* per_ = nullptr;
  double least_ = 0.0;
  std::vector<double> finish_;
  std::vector<int32_t> asked_;  // [nodes]: experts that each computes
  std::vector<int64_t> hit_;    // [experts]: their pairs
  std::vector<char> room_;
  std::vector<Expert> free_;  // the experts that more than one holds
  std::vector<std::pair<int32_t, double>> seen_;
};

}  // namespace moehive

#endif

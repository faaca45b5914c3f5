// Simulated annealing over the plans of one layer, on the exact makespans of its batches.
#ifndef MOEHIVE_PLACEMENT_ANNEALER_H_
#define MOEHIVE_PLACEMENT_ANNEALER_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "estimates.h"
#include "planner.h"
#include "states.h"

namespace moehive {

class Random {  // SplitMix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int below(int bound) { return static_cast<int>((next() >> 32) * static_cast<uint64_t>(bound) >> 32); }
  double unit() { return static_cast<double>((next() >> 11) + 1) * (1.0 / 9007199254740993.0); }  // in (0, 1)

 private:
  uint64_t state_;
};

template <typename Mask>
class Annealer {
 public:
  Annealer(const MoehiveLayer& layer, const MoehiveSearch& search, uint64_t* replicas)
      : layer_(layer), search_(search), replicas_(replicas), random_(search.seed), costs_(layer),
        states_(layer, costs_, replicas), members_(layer.places), estimates_(layer.experts, layer.places) {
    for (int expert = 0; expert < layer.experts; ++expert)
      for (int place = 0; place < layer.places; ++place)
        if (replicas[expert] >> place & 1) members_[place].push_back(static_cast<uint16_t>(expert));
    // For each expert the batches that hit it, ascending, and where.
    first_.assign(layer.experts + 1, 0);
    const int64_t hits = layer.offsets[layer.batches];
    for (int64_t at = 0; at < hits; ++at) ++first_[layer.hits[at] + 1];
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    uses_.resize(hits);
    std::vector<int64_t> next(first_.begin(), first_.end() - 1);
    for (int64_t batch = 0; batch < layer.batches; ++batch) {
      for (int64_t at = layer.offsets[batch]; at < layer.offsets[batch + 1]; ++at)
        uses_[next[layer.hits[at]]++] = {states_.first(batch), static_cast<uint32_t>(at - layer.offsets[batch])};
      cost_ += layer.weight[batch] * states_.at(states_.first(batch)).settled.makespan;
    }
  }

  // Leaves the best plan found in `replicas`; returns its cost without `copy_cost`.
  double run() {
    std::vector<uint64_t> best(replicas_, replicas_ + layer_.experts);
    double total = cost_, best_total = cost_, best_cost = cost_;
    const double cooling =
        search_.moves > 1 ? std::pow(search_.cold / search_.hot, 1.0 / static_cast<double>(search_.moves - 1)) : 1.0;
    double temperature = search_.hot * cost_;
    int64_t since = 0;  // moves without a better plan
    for (int64_t move = 0; move < search_.moves; ++move, temperature *= cooling) {
      // So many moves' worth of work is done; the first ones, while all is hot, take more.
      if (const int64_t due = settled_ / kSettled - search_.moves / 2; due > move) {
        temperature *= std::pow(cooling, static_cast<double>(due - move));
        move = due;
        if (move >= search_.moves) break;
      }
      if (++since > search_.moves / 5 && move > search_.moves / 2) break;
      changes_ = 0;
      if (!propose()) continue;
      double copies = 0.0;
      for (int i = 0; i < changes_; ++i) {
        const uint64_t there = search_.present[change_[i].expert];
        copies += search_.copy_cost * (__builtin_popcountll(change_[i].after & ~there) -
                                       __builtin_popcountll(change_[i].before & ~there));
      }
      const double limit = -temperature * std::log(random_.unit()) - copies;
      const double delta = evaluate(limit);
      learn();
      if (delta > limit) {
        for (int i = 0; i < changes_; ++i) replicas_[change_[i].expert] = change_[i].before;
        continue;
      }
      commit();
      cost_ += delta;
      total += delta + copies;
      if (total < best_total * (1.0 - 1e-6)) since = 0;
      if (total < best_total) {
        best_total = total, best_cost = cost_;
        best.assign(replicas_, replicas_ + layer_.experts);
      }
    }
    std::copy(best.begin(), best.end(), replicas_);
    return best_cost;
  }

 private:
  struct Use {
    uint32_t where, at;  // a batch's record, and which of its hits
  };
  struct Moved {
    uint32_t where, at;
    uint8_t from, to;
  };

  int count_of(int64_t batch) const { return static_cast<int>(layer_.offsets[batch + 1] - layer_.offsets[batch]); }
  bool holds(int expert, int place) const { return replicas_[expert] >> place & 1; }
  bool may_drop(int expert, int place) const { return !(search_.pinned[expert] >> place & 1); }
  bool full(int place) const { return static_cast<int>(members_[place].size()) >= search_.slots[place]; }

  void change(int expert, uint64_t after) {
    change_[changes_++] = {expert, replicas_[expert], after};
    replicas_[expert] = after;
  }

  // What to try: an expert, mostly one that holds a batch up, the place that it should leave or be relieved of,
  // and mostly another place that the batch would not have to wait for.
  bool choose(int* expert, int* source, int* target) {
    const int64_t batch = random_.below(static_cast<int>(layer_.batches));
    const int count = count_of(batch);
    if (count == 0) return false;
    Record& record = states_.at(states_.first(batch));
    const Costs costs = costs_.of(record.size);
    const uint16_t* load = states_.load(record);
    const uint8_t* assigned = states_.assigned(record);
    int at = random_.below(count);
    if (random_.below(5) != 0) {
      int worst = 0;
      double last = -1.0;
      for (int place = 0; place < layer_.places; ++place) {
        const double time = costs.finish(place, load[place]);
        if (load[place] > 0 && time > last) last = time, worst = place;
      }
      for (int tries = 0; tries < count && assigned[at] != worst; ++tries) at = at + 1 < count ? at + 1 : 0;
    }
    *expert = layer_.hits[layer_.offsets[batch] + at];
    *source = assigned[at];
    uint64_t ahead = 0;
    if (random_.below(2) != 0) {
      for (int place = 0; place < layer_.places; ++place)
        if (search_.slots[place] > 0 && costs.finish(place, load[place] + 1) < record.settled.makespan)
          ahead |= uint64_t{1} << place;
      ahead &= ~replicas_[*expert];
    }
    if (ahead == 0) {
      *target = random_.below(layer_.places);
      return search_.slots[*target] > 0 && !holds(*expert, *target);
    }
    for (int skip = random_.below(__builtin_popcountll(ahead)); skip > 0; --skip) ahead &= ahead - 1;
    *target = __builtin_ctzll(ahead);
    return true;
  }

  // Which expert makes room at `target`: of three, the one that should cost least. Any three, not rather cold ones: how
  // the hot ones are spread is what most first plans have wrong.
  int choose_victim(int expert, int source, int target) {
    const auto& held = members_[target];
    int best = 0;
    double least = 0.0;
    for (int trial = 0; trial < 3; ++trial) {
      const int victim = held[random_.below(static_cast<int>(held.size()))];
      const bool elsewhere = (replicas_[victim] & ~(uint64_t{1} << target)) != 0;
      const double cost = elsewhere ? estimates_.add(expert, target) + estimates_.drop(victim, target)
                                    : estimates_.go(expert, target) + estimates_.go(victim, source);
      if (trial == 0 || cost < least) least = cost, best = victim;
    }
    return best;
  }

  // A random change that keeps every expert placed and every place within its slots.
  bool propose() {
    int expert, source, target;
    if (!choose(&expert, &source, &target)) return false;
    const uint64_t to = uint64_t{1} << target, from = uint64_t{1} << source;
    if (!full(target)) {
      const bool leave = (random_.next() & 1) && may_drop(expert, source);
      change(expert, (replicas_[expert] | to) & (leave ? ~from : ~uint64_t{0}));
      return true;
    }
    const int victim = choose_victim(expert, source, target);
    if (!may_drop(victim, target)) return false;
    const uint64_t rest = replicas_[victim] & ~to;
    if (rest != 0) {  // the victim has another replica: the expert takes its slot
      change(victim, rest);
      change(expert, replicas_[expert] | to);
      return true;
    }
    if (holds(victim, source) || !may_drop(expert, source)) return false;
    change(victim, rest | from);  // they change places
    change(expert, (replicas_[expert] & ~from) | to);
    return true;
  }

  // Notes what the batches that were looked at say about each of the two experts.
  void learn() {
    for (int i = 0; i < changes_; ++i) {
      const int64_t uses = first_[change_[i].expert + 1] - first_[change_[i].expert];
      if (looked_[i] > 0) estimates_.note(change_[i], part_[i] * static_cast<double>(uses) / looked_[i]);
    }
  }

  // The change of the cost; stops early, with something above `limit`, when the batches so far leave little doubt, or
  // when none of them minds.
  double evaluate(double limit) {
    states_.clear();
    moved_.clear();
    int64_t next[2], end[2];
    int64_t total = 0, done = 0;
    for (int i = 0; i < changes_; ++i) {
      next[i] = first_[change_[i].expert], end[i] = first_[change_[i].expert + 1];
      total += end[i] - next[i];
      part_[i] = 0.0, looked_[i] = 0;
    }
    double delta = 0.0, squares = 0.0;
    int64_t look = 16;  // when to judge next
    for (;;) {
      uint32_t where = UINT32_MAX;
      for (int i = 0; i < changes_; ++i)
        if (next[i] < end[i]) where = std::min(where, uses_[next[i]].where);
      if (where == UINT32_MAX) return delta;
      uint32_t at[2];
      int which[2], uses = 0;
      uint64_t after[2];
      for (int i = 0; i < changes_; ++i) {
        if (next[i] >= end[i] || uses_[next[i]].where != where) continue;
        if (next[i] + kAhead < end[i]) states_.fetch(uses_[next[i] + kAhead].where);
        at[uses] = uses_[next[i]++].at;
        which[uses] = i;
        after[uses++] = change_[i].after;
      }
      done += uses;
      Record& record = states_.at(where);
      const double more = record.weight * change_of(where, record, at, after, uses);
      for (int i = 0; i < uses; ++i) part_[which[i]] += more / uses, ++looked_[which[i]];
      delta += more, squares += more * more;
      if (done < look || done >= total) continue;
      look = done + kStep;
      if (done >= 64 && squares == 0.0) return INFINITY;  // it makes no difference: not worth all its batches
      if (delta <= limit) continue;
      const double rest = static_cast<double>(total - done) / static_cast<double>(done);
      const double expected = delta * (1.0 + rest);
      if (expected - kDoubt * std::sqrt(squares * rest) > limit) return expected;
    }
  }

  // Seconds that a batch takes more when the experts at `at` have the replicas `after`; notes its new state.
  double change_of(uint32_t where, Record& record, const uint32_t* at, const uint64_t* after, int uses) {
    const Settled old = record.settled;
    const uint8_t* was = states_.assigned(record);
    bool stands = true;  // who may stay stays, and the tight places still prove the old makespan: the usual case
    for (int i = 0; i < uses && stands; ++i) {
      const int place = was[at[i]];
      stands = (after[i] >> place & 1) && (!(old.tight >> place & 1) || (after[i] & ~old.tight) == 0);
    }
    if (stands) return 0.0;
    const Costs costs = costs_.of(record.size);
    uint16_t load[kMaxPlaces];
    std::copy_n(states_.load(record), layer_.places, load);
    uint8_t place[2];
    for (int i = 0; i < uses; ++i) {
      place[i] = was[at[i]];
      if (after[i] >> place[i] & 1) continue;
      --load[place[i]];
      place[i] = static_cast<uint8_t>(costs.quickest(after[i], load));
      ++load[place[i]];
    }
    const double earlier = old.makespan * (1.0 - 1e-12);
    bool same = true, fewer = false;  // `fewer`: a tight place may have less to do
    for (int i = 0; i < uses && same; ++i) {
      const int from = was[at[i]], to = place[i];
      same = !(old.tight >> to & 1) || (after[i] & ~old.tight) == 0;
      if (from == to) continue;
      same = same && costs.finish(to, load[to]) <= old.makespan;
      if (!(old.tight >> from & 1)) continue;
      fewer = true;
      same = same && costs.finish(from, load[from] + 1) >= earlier;
    }
    if (same && fewer) {
      double last = 0.0;
      for (uint64_t rest = old.tight; rest != 0; rest &= rest - 1) {
        const int p = __builtin_ctzll(rest);
        last = std::max(last, costs.finish(p, load[p]));
      }
      same = last == old.makespan;
    }
    if (same) {
      for (int i = 0; i < uses; ++i)
        if (place[i] != was[at[i]]) moved_.push_back({where, at[i], was[at[i]], place[i]});
      return 0.0;
    }
    ++settled_;
    Record& now = states_.attempt(where);
    Mask* masks = states_.masks(now);
    uint8_t* assigned = states_.assigned(now);
    std::copy_n(load, layer_.places, states_.load(now));
    for (int i = 0; i < uses; ++i) assigned[at[i]] = place[i], masks[at[i]] = static_cast<Mask>(after[i]);
    now.settled = settle(costs, masks, now.width, assigned, states_.load(now));
    return now.settled.makespan - old.makespan;
  }

  void commit() {
    for (const Moved& m : moved_) {
      Record& record = states_.at(m.where);
      states_.assigned(record)[m.at] = m.to;
      --states_.load(record)[m.from];
      ++states_.load(record)[m.to];
    }
    states_.keep();
    for (int i = 0; i < changes_; ++i) {
      const int expert = change_[i].expert;
      estimates_.forget(expert);
      const Mask after = static_cast<Mask>(change_[i].after);
      for (int64_t use = first_[expert]; use < first_[expert + 1]; ++use)
        states_.masks(states_.at(uses_[use].where))[uses_[use].at] = after;
      for (uint64_t gone = change_[i].before & ~change_[i].after; gone != 0; gone &= gone - 1) {
        auto& held = members_[__builtin_ctzll(gone)];
        *std::find(held.begin(), held.end(), static_cast<uint16_t>(expert)) = held.back();
        held.pop_back();
      }
      for (uint64_t come = change_[i].after & ~change_[i].before; come != 0; come &= come - 1)
        members_[__builtin_ctzll(come)].push_back(static_cast<uint16_t>(expert));
    }
  }

  static constexpr int64_t kAhead = 4;  // uses of an expert that memory is asked for in advance
  static constexpr int64_t kStep = 8;   // uses between two judgements of a move
  // Batches that are dispatched anew for a move, on average: a search that needs more makes fewer moves. Only nodes that
  // are alike need more, up to ten times, since no move between them is clearly bad; and there a first plan is good.
  static constexpr int64_t kSettled = 400;
  static constexpr double kDoubt = 1.0;  // larger: fewer good moves are dropped, and each takes longer

  const MoehiveLayer& layer_;
  const MoehiveSearch& search_;
  uint64_t* replicas_;
  Random random_;
  const CostTable costs_;
  States<Mask> states_;
  double cost_ = 0.0;
  int64_t settled_ = 0;  // batches that were dispatched anew, for all moves
  std::vector<std::vector<uint16_t>> members_;
  Estimates estimates_;
  std::vector<int64_t> first_;
  std::vector<Use> uses_;
  std::vector<Moved> moved_;
  Change change_[2];  // what is being tried, how many uses of each were looked at, and what they cost
  int changes_ = 0;
  int64_t looked_[2];
  double part_[2];
};

}  // namespace moehive

#endif

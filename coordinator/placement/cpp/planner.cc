// Makespans of a plan, and simulated annealing over plans: coordinator/placement/native.py calls these.
#include "planner.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "dispatch.h"

namespace moehive {
namespace {

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

Costs costs_of(const MoehiveLayer& layer, int64_t batch) {
  return {layer.places, layer.fixed + static_cast<int64_t>(layer.size[batch]) * layer.places, layer.step,
          layer.always};
}

// Assigns a batch anew: experts with few replicas first, each where it ends first; then to the optimum.
Settled dispatch(const Costs& costs, const uint16_t* hits, int count, const uint64_t* replicas, uint8_t* assigned,
                int32_t* load) {
  std::fill(load, load + costs.places, 0);
  for (int wanted = 1, left = count; left > 0; ++wanted) {
    for (int at = 0; at < count; ++at) {
      if (__builtin_popcountll(replicas[hits[at]]) != wanted) continue;
      const int place = costs.quickest(replicas[hits[at]], load);
      assigned[at] = static_cast<uint8_t>(place);
      ++load[place];
      --left;
    }
  }
  return settle(costs, hits, count, replicas, assigned, load);
}

class Annealer {
 public:
  Annealer(const MoehiveLayer& layer, const MoehiveSearch& search, uint64_t* replicas)
      : layer_(layer), search_(search), replicas_(replicas), random_(search.seed) {
    const int64_t hits = layer.offsets[layer.batches];
    assigned_.resize(hits);
    loads_.resize(layer.batches * layer.places);
    settled_.resize(layer.batches);
    members_.resize(layer.places);
    for (int expert = 0; expert < layer.experts; ++expert)
      for (int place = 0; place < layer.places; ++place)
        if (replicas[expert] >> place & 1) members_[place].push_back(static_cast<uint16_t>(expert));
    // For each expert the batches that hit it, ascending, and where.
    first_.assign(layer.experts + 1, 0);
    for (int64_t at = 0; at < hits; ++at) ++first_[layer.hits[at] + 1];
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    uses_.resize(hits);
    std::vector<int64_t> next(first_.begin(), first_.end() - 1);
    for (int64_t batch = 0; batch < layer.batches; ++batch)
      for (int64_t at = layer.offsets[batch]; at < layer.offsets[batch + 1]; ++at)
        uses_[next[layer.hits[at]]++] = {static_cast<int32_t>(batch), static_cast<int32_t>(at - layer.offsets[batch])};
    for (int64_t batch = 0; batch < layer.batches; ++batch) {
      settled_[batch] = dispatch(costs_of(layer, batch), hits_of(batch), count_of(batch), replicas,
                                 assigned_.data() + layer.offsets[batch], loads_of(batch));
      cost_ += layer.weight[batch] * settled_[batch].makespan;
    }
  }

  // Leaves the best plan found in `replicas`; returns its cost without `copy_cost`.
  double run() {
    std::vector<uint64_t> best(replicas_, replicas_ + layer_.experts);
    double total = cost_, best_total = cost_, best_cost = cost_;
    const double cooling =
        search_.moves > 1 ? std::pow(search_.cold / search_.hot, 1.0 / static_cast<double>(search_.moves - 1)) : 1.0;
    double temperature = search_.hot;
    int64_t since = 0;  // moves without a better plan
    for (int64_t move = 0; move < search_.moves; ++move, temperature *= cooling) {
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
    int32_t batch, at;
  };
  struct Change {
    int expert;
    uint64_t before, after;
  };
  struct Touched {
    int32_t batch;
    Settled settled;
    size_t assigned, load;  // where its new state begins
  };
  struct Moved {
    int32_t batch, at;
    uint8_t from, to;
  };

  const uint16_t* hits_of(int64_t batch) const { return layer_.hits + layer_.offsets[batch]; }
  int count_of(int64_t batch) const { return static_cast<int>(layer_.offsets[batch + 1] - layer_.offsets[batch]); }
  int32_t* loads_of(int64_t batch) { return loads_.data() + batch * layer_.places; }
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
    const Costs costs = costs_of(layer_, batch);
    const int32_t* load = loads_of(batch);
    const uint8_t* assigned = assigned_.data() + layer_.offsets[batch];
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
    *expert = hits_of(batch)[at];
    *source = assigned[at];
    uint64_t ahead = 0;
    if (random_.below(4) != 0) {
      for (int place = 0; place < layer_.places; ++place)
        if (search_.slots[place] > 0 && costs.finish(place, load[place] + 1) < settled_[batch].makespan)
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
    const auto& held = members_[target];
    // Any, not rather a cold one: how the hot ones are spread is what most first plans have wrong.
    const int victim = held[random_.below(static_cast<int>(held.size()))];
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

  // The change of the cost; stops early, with something above `limit`, when the batches so far leave little doubt, or
  // when none of them minds.
  double evaluate(double limit) {
    new_assigned_.clear(), new_loads_.clear(), touched_.clear(), moved_.clear();
    int64_t next[2], end[2];
    int64_t total = 0, done = 0;
    for (int i = 0; i < changes_; ++i) {
      next[i] = first_[change_[i].expert], end[i] = first_[change_[i].expert + 1];
      total += end[i] - next[i];
    }
    double delta = 0.0, squares = 0.0;
    for (;;) {
      int32_t batch = INT32_MAX;
      for (int i = 0; i < changes_; ++i)
        if (next[i] < end[i]) batch = std::min(batch, uses_[next[i]].batch);
      if (batch == INT32_MAX) return delta;
      int at[2], uses = 0;
      uint64_t after[2];
      for (int i = 0; i < changes_; ++i) {
        if (next[i] >= end[i] || uses_[next[i]].batch != batch) continue;
        at[uses] = uses_[next[i]++].at;
        after[uses++] = change_[i].after;
      }
      done += uses;
      const double part = layer_.weight[batch] * change_of(batch, at, after, uses);
      delta += part, squares += part * part;
      if (done >= 64 && squares == 0.0) return INFINITY;  // it makes no difference: not worth all its batches
      if (done >= 16 && delta > limit && done < total) {
        const double more = static_cast<double>(total - done) / static_cast<double>(done);
        const double expected = delta * (1.0 + more);
        if (expected - 2.5 * std::sqrt(squares * more) > limit) return expected;
      }
    }
  }

  // Seconds that a batch takes more when the experts at `at` have the replicas `after`; notes its new state.
  double change_of(int32_t batch, const int* at, const uint64_t* after, int uses) {
    const Costs costs = costs_of(layer_, batch);
    const Settled& old = settled_[batch];
    const uint8_t* was = assigned_.data() + layer_.offsets[batch];
    bool stands = true;  // who may stay stays, and the tight places still prove the old makespan: the usual case
    for (int i = 0; i < uses && stands; ++i) {
      const int place = was[at[i]];
      stands = (after[i] >> place & 1) && (!(old.tight >> place & 1) || (after[i] & ~old.tight) == 0);
    }
    if (stands) return 0.0;
    int32_t load[kMaxPlaces];
    std::copy_n(loads_of(batch), layer_.places, load);
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
        if (place[i] != was[at[i]]) moved_.push_back({batch, at[i], was[at[i]], place[i]});
      return 0.0;
    }
    const int count = count_of(batch);
    const size_t a = new_assigned_.size(), l = new_loads_.size();
    new_assigned_.insert(new_assigned_.end(), was, was + count);
    new_loads_.insert(new_loads_.end(), load, load + layer_.places);
    for (int i = 0; i < uses; ++i) new_assigned_[a + at[i]] = place[i];
    const Settled now = settle(costs, hits_of(batch), count, replicas_, new_assigned_.data() + a, new_loads_.data() + l);
    touched_.push_back({batch, now, a, l});
    return now.makespan - old.makespan;
  }

  void commit() {
    for (const Moved& m : moved_) {
      assigned_[layer_.offsets[m.batch] + m.at] = m.to;
      --loads_of(m.batch)[m.from];
      ++loads_of(m.batch)[m.to];
    }
    for (const Touched& t : touched_) {
      settled_[t.batch] = t.settled;
      std::memcpy(assigned_.data() + layer_.offsets[t.batch], new_assigned_.data() + t.assigned, count_of(t.batch));
      std::copy_n(new_loads_.data() + t.load, layer_.places, loads_of(t.batch));
    }
    for (int i = 0; i < changes_; ++i) {
      const uint16_t expert = static_cast<uint16_t>(change_[i].expert);
      for (uint64_t gone = change_[i].before & ~change_[i].after; gone != 0; gone &= gone - 1) {
        auto& held = members_[__builtin_ctzll(gone)];
        *std::find(held.begin(), held.end(), expert) = held.back();
        held.pop_back();
      }
      for (uint64_t come = change_[i].after & ~change_[i].before; come != 0; come &= come - 1)
        members_[__builtin_ctzll(come)].push_back(expert);
    }
  }

  const MoehiveLayer& layer_;
  const MoehiveSearch& search_;
  uint64_t* replicas_;
  Random random_;
  double cost_ = 0.0;
  std::vector<uint8_t> assigned_, new_assigned_;
  std::vector<int32_t> loads_, new_loads_;
  std::vector<Settled> settled_;
  std::vector<std::vector<uint16_t>> members_;
  std::vector<int64_t> first_;
  std::vector<Use> uses_;
  std::vector<Touched> touched_;
  std::vector<Moved> moved_;
  Change change_[2];
  int changes_ = 0;
};

}  // namespace
}  // namespace moehive

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t moehive_planner_abi() { return 2; }

// Makespan of each batch in seconds, by exact dispatch. Every expert has a replica. 0, or 1: no memory.
EXPORT int32_t moehive_makespans(const MoehiveLayer* layer, const uint64_t* replicas, double* makespans) {
  try {
    std::vector<uint8_t> assigned(layer->experts);
    int32_t load[moehive::kMaxPlaces];
    for (int64_t batch = 0; batch < layer->batches; ++batch) {
      const int count = static_cast<int>(layer->offsets[batch + 1] - layer->offsets[batch]);
      makespans[batch] = moehive::dispatch(moehive::costs_of(*layer, batch), layer->hits + layer->offsets[batch], count,
                                           replicas, assigned.data(), load)
                             .makespan;
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
    *cost = moehive::Annealer(*layer, *search, replicas).run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// How each batch of a layer is dispatched, and how it would be after a change that is being tried.
#ifndef MOEHIVE_PLACEMENT_STATES_H_
#define MOEHIVE_PLACEMENT_STATES_H_

#include <cstring>
#include <vector>

#include "dispatch.h"
#include "planner.h"

namespace moehive {

// The state of one batch. In memory it is followed by the loads of the places, and for each hit by where it is assigned
// and where it could be, so that a batch is looked at in one or two lines of the cache.
struct Record {
  Settled settled;
  double weight;
  int32_t size;   // which kind of batch
  int32_t width;  // hits, padded
};

template <typename Mask>
class States {
 public:
  States(const MoehiveLayer& layer, const CostTable& costs, const uint64_t* replicas)
      : loads_(sizeof(Record)), assigned_(loads_ + round_up(layer.places * sizeof(uint16_t))) {
    first_.reserve(layer.batches);
    size_t bytes = 0;
    for (int64_t batch = 0; batch < layer.batches; ++batch) {
      first_.push_back(static_cast<uint32_t>(bytes / kUnit));
      bytes += bytes_of(padded(static_cast<int>(layer.offsets[batch + 1] - layer.offsets[batch])));
    }
    records_.resize(bytes / sizeof(Line) + 1);
    for (int64_t batch = 0; batch < layer.batches; ++batch) {
      const int64_t from = layer.offsets[batch];
      const int count = static_cast<int>(layer.offsets[batch + 1] - from);
      Record& record = at(first_[batch]);
      record.weight = layer.weight[batch], record.size = layer.size[batch], record.width = padded(count);
      Mask* held = masks(record);
      std::fill(held, held + record.width, Mask{0});
      for (int hit = 0; hit < count; ++hit) held[hit] = static_cast<Mask>(replicas[layer.hits[from + hit]]);
      record.settled = dispatch(costs.of(record.size), held, count, assigned(record), load(record));
    }
  }

  uint32_t first(int64_t batch) const { return first_[batch]; }  // where its record is
  Record& at(uint32_t where) { return *reinterpret_cast<Record*>(bytes(records_) + size_t{where} * kUnit); }
  void fetch(uint32_t where) {  // which will be looked at soon
    const char* record = bytes(records_) + size_t{where} * kUnit;
    __builtin_prefetch(record);
    __builtin_prefetch(record + sizeof(Line));
  }
  uint16_t* load(Record& record) { return reinterpret_cast<uint16_t*>(bytes(record) + loads_); }
  uint8_t* assigned(Record& record) { return reinterpret_cast<uint8_t*>(bytes(record) + assigned_); }
  Mask* masks(Record& record) { return reinterpret_cast<Mask*>(bytes(record) + assigned_ + record.width); }

  // Forgets what was tried.
  void clear() {
    tried_.clear();
    used_ = 0;
  }

  // A copy of a record, to try something with.
  Record& attempt(uint32_t where) {
    Record& old = at(where);
    const size_t size = bytes_of(old.width);
    if (used_ + size > scratch_.size() * sizeof(Line)) scratch_.resize(2 * scratch_.size() + size / sizeof(Line) + 1);
    char* to = bytes(scratch_) + used_;
    std::memcpy(to, &old, size);
    tried_.push_back({where, used_});
    used_ += size;
    return *reinterpret_cast<Record*>(to);
  }

  // What was tried is how things are.
  void keep() {
    for (const Tried& tried : tried_) {
      Record& now = at(tried.where);
      std::memcpy(&now, bytes(scratch_) + tried.from, bytes_of(now.width));
    }
  }

 private:
  static constexpr size_t kUnit = 16;  // bytes
  struct alignas(64) Line {
    char bytes[64];
  };
  struct Tried {
    uint32_t where;
    size_t from;  // of the scratch
  };

  static size_t round_up(size_t count) { return (count + kUnit - 1) / kUnit * kUnit; }
  static char* bytes(std::vector<Line>& lines) { return reinterpret_cast<char*>(lines.data()); }
  static char* bytes(Record& record) { return reinterpret_cast<char*>(&record); }
  size_t bytes_of(int width) const { return assigned_ + width * (1 + sizeof(Mask)); }

  size_t loads_, assigned_;  // where they begin, from the record on
  std::vector<uint32_t> first_;
  std::vector<Line> records_, scratch_;
  std::vector<Tried> tried_;
  size_t used_ = 0;  // of the scratch
};

}  // namespace moehive

#endif

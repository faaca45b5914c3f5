// How a layer is asked for until somebody comes or goes, and who is asked for each of its experts then.
#ifndef MOEHIVE_DISPATCH_WAY_H_
#define MOEHIVE_DISPATCH_WAY_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "choice.h"
#include "peer.h"

namespace moehive {

// flight.py has it, field for field.
struct Way {
  const int32_t* holders;  // [experts, most]: who can be asked, then -1
  const int64_t* first;    // [experts]: the first of each
  Peer* const* peers;      // [nodes]; null: it can't be asked
  int64_t experts, most, nodes, local, k, hidden_size, expert_bytes;
  uint64_t epoch, id_step;
  uint32_t layer, reduction, has_choice;
};

class Owners {
 public:
  // [experts]: the node of each that `ids` [pairs] name.
  const int64_t* choose(const Way& way, const int64_t* ids, int64_t pairs) {
    if (!way.has_choice) return way.first;
    expect(way);
    owner_.assign(way.first, way.first + way.experts);
    choice_.start(way.holders, way.experts, way.most, base_.data(), per_.data(), way.nodes);
    choice_.run(ids, pairs, false, owner_.data());
    return owner_.data();
  }

 private:
  // routes.py's rule: what is in hand, the round trip and how late a node is beyond all nodes' lateness, and its reads.
  void expect(const Way& way) {
    base_.assign(way.nodes, 0.0), per_.assign(way.nodes, 0.0);
    double late = -1.0;
    for (int64_t node = 0; node < way.nodes; ++node)
      if (const Peer* peer = way.peers[node]; peer && peer->link)
        late = late < 0.0 ? peer->link->late_s : std::min(late, peer->link->late_s);
    for (int64_t node = 0; node < way.nodes; ++node) {
      const Peer* peer = way.peers[node];
      if (!peer) continue;
      base_[node] = peer->speed->backlog_s;
      if (peer->link) base_[node] += peer->link->round_trip_s + (peer->link->late_s - late);
      per_[node] = peer->speed->read_s_per_byte() * way.expert_bytes;
    }
  }

  Choice choice_;
  std::vector<double> base_, per_;  // [nodes]: seconds, see Choice::start
  std::vector<int64_t> owner_;
};

}  // namespace moehive

#endif

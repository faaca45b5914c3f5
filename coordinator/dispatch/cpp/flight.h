// A layer of few tokens on its way to the nodes and back: chosen, split and written, answers taken and added up, and
// what they say of nodes and links noted, without Python in between (dispatch/flights.py).
#ifndef MOEHIVE_DISPATCH_FLIGHT_H_
#define MOEHIVE_DISPATCH_FLIGHT_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../../../proto/cpp/inlet.h"
#include "peer.h"
#include "reply.h"
#include "request.h"
#include "split.h"
#include "sum.h"
#include "view.h"
#include "way.h"

namespace moehive {

constexpr int64_t kMaxStates = 256 << 10;  // bytes; larger ones are better not copied

class Flight {
 public:
  View view{};

  // Asks for a layer; ids and weights [tokens, k]. Whether it is one for here: else nothing has happened.
  bool ask(const Request& request, const int64_t* ids, const float* weights) {
    const Way& way = request.way;
    tokens_ = request.tokens, k_ = way.k, size_ = way.hidden_size, width_ = request.row_bytes();
    bf16_ = request.bf16, exact_ = way.reduction == kPerExpert;
    if (tokens_ > kFewTokens || tokens_ * width_ > kMaxStates) return false;
    const int64_t n = tokens_ * k_;
    block_.resize(Block::size(n, way.experts));
    const Block block(block_.data(), n, way.experts);
    const int64_t* const owner = owners_.choose(way, ids, n);
    const int64_t count = split_.run(ids, weights, tokens_, k_, owner, way.experts, block);
    if (count > kMaxShares || !askable(way, block, count)) return false;
    lay_out(way, block, count);
    write(request, block);
    send();
    look_around();
    return true;
  }

  // Takes a reply to a share; whether it is as long as it must be, else nothing has happened.
  bool take(int64_t share, const PlainReply& reply, Times* times, int64_t layers) {
    const Share& one = shares_[share];
    if (reply.rows != static_cast<uint64_t>(one.results) || reply.values_bytes != reply.rows * width_) return false;
    if (reply.values_bytes) std::memcpy(rows_.data() + one.at, reply.values, reply.values_bytes);
    Trip& trip = view.trip[share];
    trip.sent = one.sent_at;
    trip.read = times->came_at ? times->came_at : times->read_at;  // what one reading brought is taken one by one
    trip.came = times->came_at = now();
    trip.began = reply.began_ns, trip.reading = reply.reading_ns, trip.waited = reply.waited_ns;
    trip.computed = reply.compute_ns, trip.wrote = reply.wrote_ns;
    note(one, trip, layers);
    settle(share, kTaken);
    return true;
  }

  // Whether nothing but this flight's answers is to come where they come, as usual.
  bool alone() const {
    for (int64_t i = 0; i < view.shares; ++i) {
      const Peer& peer = *shares_[i].peer;
      if (view.state[i] == kAsked && !(peer.inlet && peer.inlet->usual && peer.others == 0)) return false;
      if (view.state[i] == kHere || view.state[i] == kFailed) return false;
    }
    return true;
  }

  // Reads what has come of its answers; kNothing, or whether it was answers alone.
  int64_t read() {
    int64_t came = kNothing;
    for (int64_t i = 0; i < view.shares; ++i) {
      if (view.state[i] != kAsked) continue;
      Inlet& inlet = *shares_[i].peer->inlet;
      const int64_t some = inlet.read();
      if (some == 0) return 0;
      came = std::max(came, some);
      view.owed = std::max(view.owed, inlet.taken);
    }
    return came;
  }

  // The rows of a share that was computed here.
  void put(int64_t share, const uint8_t* rows) {
    const Share& one = shares_[share];
    std::memcpy(rows_.data() + one.at, rows, one.results * width_);
    settle(share, kTaken);
  }

  // A share is over.
  void settle(int64_t share, State state) {
    const Share& one = shares_[share];
    if (view.state[share] != kAsked && view.state[share] != kHere) return;
    if (view.state[share] == kAsked) --one.peer->flying, one.peer->speed->backlog_s -= one.expected;
    view.state[share] = state;
    --view.waiting;
  }

  void give_up() {
    for (size_t share = 0; share < shares_.size(); ++share) settle(share, kFailed);
  }

  uint64_t id(int64_t share) const { return shares_[share].id; }
  const Peer* peer(int64_t share) const { return shares_[share].peer; }
  const uint8_t* rows(int64_t share) const { return rows_.data() + shares_[share].at; }

  // Adds up all shares, in their order, or with PER_EXPERT in the order of the router's top-k, see Sum.
  bool sum(uint8_t* out) {
    sum_.start(tokens_, size_, bf16_, out);
    if (exact_) {
      from_.assign(tokens_ * k_, nullptr);
      for (const Share& share : shares_)
        for (int64_t i = 0; i < share.pairs; ++i) from_[share.pair[i]] = rows_.data() + share.at + i * width_;
      for (int64_t i = 0; i < tokens_ * k_; ++i)
        if (from_[i]) sum_.add(i / k_, from_[i]);
    } else {
      for (const Share& share : shares_)
        for (int64_t i = 0; i < share.rows; ++i) sum_.add(share.token[i], rows_.data() + share.at + i * width_);
    }
    return sum_.finish();
  }

 private:
  struct Share {
    Peer* peer;
    uint64_t id;
    const int64_t *pair, *token;  // where its pairs stand, and which tokens it has
    int64_t pairs, rows;
    int64_t bytes;    // of the experts that it reads
    int64_t at;       // where its results are
    int64_t results;  // rows of them
    double expected;
    int64_t sent_at;  // nanoseconds
  };

  static int64_t now() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
  }

  // Whether all nodes can be asked by plain messages.
  bool askable(const Way& way, const Block& block, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const ShareHead& head = block.heads[i];
      if (head.node < 0 || way.peers[head.node] == nullptr) return false;
      const Peer& peer = *way.peers[head.node];
      if (head.node == way.local) continue;
      if (peer.flying + peer.others >= kMaxInFlight) return false;
      if (!exact_ && peer.link->eight_bit(head.rows * width_)) return false;
    }
    return true;
  }

  // Makes the shares, and room for their messages and results.
  void lay_out(const Way& way, const Block& block, int64_t count) {
    view.shares = view.waiting = count, view.here = -1, view.expected_s = 0.0;
    view.unknown = view.unsent = view.owed = 0;
    view.block = block_.data();
    shares_.resize(count);
    const int64_t start = now();
    int64_t pair = 0, row = 0, messages = 0, results = 0;
    for (int64_t i = 0; i < count; ++i) {
      const ShareHead& head = block.heads[i];
      Share& share = shares_[i];
      const int64_t read = head.rows == 1 ? head.pairs : distinct(block.experts + pair, head.pairs, way.experts);
      share = {way.peers[head.node], 0, block.pairs + pair, block.rows + row, head.pairs, head.rows,
               way.expert_bytes * read, results, exact_ ? head.pairs : head.rows, 0.0, start};
      view.node[i] = head.node, view.state[i] = kHere;
      if (head.node == way.local) view.here = i, view.message[i] = view.size[i] = 0;
      pair += head.pairs, row += head.rows;
      messages += Request::kRoom + head.rows * width_ + head.bytes, results += share.results * width_;
    }
    if (static_cast<int64_t>(messages_.size()) < messages) messages_.resize(messages);
    rows_.resize(results);
  }

  int64_t distinct(const uint32_t* experts, int64_t count, int64_t most) {
    seen_.assign(most, 0);
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i)
      if (!seen_[experts[i]]) seen_[experts[i]] = 1, ++found;
    return found;
  }

  // Writes the messages of all shares but this process's own, and what they add to their nodes' work.
  void write(const Request& request, const Block& block) {
    const uint8_t* routing = block.fields(view.shares);
    uint8_t* to = messages_.data();
    for (int64_t i = 0; i < view.shares; routing += block.heads[i++].bytes) {
      if (i == view.here) continue;
      Share& share = shares_[i];
      share.id = share.peer->next_id;
      share.peer->next_id += request.way.id_step;
      uint8_t* const message = to + kFrameHead;
      to = request.write(message, share.id, share.token, share.rows, routing, block.heads[i].bytes);
      view.message[i] = reinterpret_cast<int64_t>(message), view.size[i] = to - message;
      view.state[i] = kAsked;
      ++share.peer->flying;
      expect(&share);
    }
  }

  void expect(Share* share) {
    const Peer& peer = *share->peer;
    share->expected = share->bytes * peer.speed->s_per_byte;
    if (share->expected == 0.0) view.unknown = 1;
    peer.speed->backlog_s += share->expected;
    view.expected_s = std::max(view.expected_s, peer.speed->backlog_s + peer.link->round_trip_s);
  }

  // Sends all messages, last to those that wait for this thread: so the others begin meanwhile.
  void send() {
    for (int64_t waits : {0, 1}) {
      for (int64_t i = 0; i < view.shares; ++i) {
        if (view.state[i] != kAsked || shares_[i].peer->waits != waits) continue;
        const Outlet& outlet = shares_[i].peer->outlet;
        uint8_t* const message = reinterpret_cast<uint8_t*>(view.message[i]);
        view.sent[i] = outlet.send ? outlet.send(outlet.sending, outlet.windows, message, view.size[i]) : kNotSent;
        view.unsent += view.sent[i] != view.size[i] + kFrameHead;
      }
    }
  }

  // Finds out which nodes ran last on the processor that this thread has. A message starts another node at once, but
  // those only when this thread leaves (expert_node/courtesy.py), so they are asked last the next time.
  void look_around() {
    const int here = this_processor();
    for (int64_t i = 0; i < view.shares; ++i) {
      Peer& peer = *shares_[i].peer;
      if (view.state[i] == kAsked && peer.inlet && peer.link->loopback) peer.waits = peer.inlet->sender() == here;
    }
  }

  // What an answer says of its node and link.
  void note(const Share& share, const Trip& trip, int64_t layers) const {
    Peer& peer = *share.peer;
    const double took = trip.computed / 1e9;
    if (peer.flying + peer.others == 1) {  // else others shared the link, and the time says nothing
      const int64_t sent = share.rows * width_, came = share.results * width_;
      peer.link->note(std::max(sent, came), sent + came, (trip.came - trip.sent) / 1e9 - took);
    }
    ++peer.counters->requests;
    peer.counters->expert_calls += share.pairs;
    peer.counters->compute_ns += trip.computed;
    peer.speed->note(share.rows, share.pairs, share.bytes, took, layers);
  }

  int64_t tokens_ = 0, k_ = 0, size_ = 0, width_ = 0;  // width_: bytes of a row
  bool bf16_ = false, exact_ = false;
  Owners owners_;
  Split split_;
  Sum sum_;
  std::vector<int64_t> block_;
  std::vector<char> seen_;
  std::vector<uint8_t> messages_, rows_;
  std::vector<const uint8_t*> from_;  // [tokens * k]: each pair's row
  std::vector<Share> shares_;
};

}  // namespace moehive

#endif

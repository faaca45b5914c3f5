// Layers of few tokens on their way to the nodes and back (dispatch/flights.py): chosen, split and written, answers read
// and added up, and what they say of nodes and links noted, without Python in between.
#ifndef MOEHIVE_DISPATCH_FLIGHT_H_
#define MOEHIVE_DISPATCH_FLIGHT_H_

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../../../proto/cpp/inlet.h"
#include "choice.h"
#include "speeds.h"
#include "split.h"

namespace moehive {

constexpr int64_t kMaxShares = 64;
constexpr int64_t kMaxStates = 256 << 10;  // bytes; larger ones are better not copied
constexpr int32_t kMaxInFlight = 64;       // link.py's MAX_IN_FLIGHT
constexpr int64_t kNotPlain = -1;
constexpr int64_t kNotSent = -1;           // as proto/cpp/socket.h's kWouldBlock
constexpr int64_t kFrameHead = 14;         // room before a message for its head, proto/wire/windows.py's HEAD_BYTES

// How messages leave on a node's stream: proto/cpp/messages.cc's moehive_send. link.py has it, field for field.
struct Outlet {
  int64_t (*send)(void* sending, void* windows, uint8_t* message, int64_t size);  // null: Python sends
  void *sending, *windows;
};

// A node as dispatch asks it; link.py has the same, field for field.
struct Peer {
  LinkSpeed* link;  // null: this process's own memory
  NodeSpeed* speed;
  NodeCounters* counters;
  uint64_t next_id;
  int32_t others;  // requests on the link that are no flight's
  int32_t flying;  // those that are
  Outlet outlet;
  Inlet* inlet;   // null: only the event loop reads what it sends
  int64_t waits;  // whether it begins only when this thread leaves its processor, see look_around
};

class Flights;

// Who takes a node's replies as they are read; link.py has the same, field for field.
struct Landing {
  Flights* flights;
  const Peer* peer;
};

// How one layer is asked for until somebody comes or goes; flight.py has the same, field for field.
struct Way {
  const int32_t* holders;  // [experts, most]: who can be asked, then -1
  const int64_t* first;    // [experts]: the first of each
  Peer* const* peers;      // [nodes]; null: it can't be asked
  int64_t experts, most, nodes, local, k, hidden_size, expert_bytes;
  uint64_t epoch, id_step;
  uint32_t layer, reduction, has_choice;
};

// What came of waiting for a flight's answers.
enum Landed : int64_t {
  kNotFinite,  // they are there, and their sum is no number
  kFinite,     // they are added up
  kLater,      // the event loop waits for them
  kOdd,        // it does, once it has gone on with what the inlets have left to it
};

enum State : int64_t { kAsked, kHere, kTaken, kFailed };  // of a share; kHere: this process is to compute it

// When a share was asked for and answered, nanoseconds: the first three of this process's monotonic clock, `began` of
// the node's; the others are what the node says it took (proto/experts.proto). flight.py has it, field for field.
struct Trip {
  int64_t sent, read, came;
  int64_t began, reading, waited, computed, wrote;
};

// What Python sees of a flight.
struct View {
  int64_t shares, waiting;  // and those of them that are not over
  int64_t here;             // the share of this process's own experts, or -1
  int64_t unknown;          // whether nobody knows how long some node takes
  int64_t unsent;           // messages that did not leave whole
  int64_t owed;             // the most bytes that one of its nodes' inlets has read, and nobody has counted
  double expected_s;        // until the last answer, by what is known
  const int64_t* block;     // see moehive_split
  int64_t state[kMaxShares], node[kMaxShares];
  int64_t message[kMaxShares], size[kMaxShares];  // a message's address and bytes, behind room for its head
  int64_t sent[kMaxShares];                       // what the outlet said, or kNotSent
  Trip trip[kMaxShares];                          // of a share that is taken, if a node was asked
};

class Flight {
 public:
  View view{};

  // Whether it is one: else nothing has happened.
  bool ask(const Way& way, uint64_t step, const uint8_t* hidden, const int64_t* ids, const float* weights,
           int64_t tokens, bool bf16) {
    tokens_ = tokens, k_ = way.k, size_ = way.hidden_size, bf16_ = bf16, exact_ = way.reduction == kPerExpert;
    width_ = size_ * (bf16 ? 2 : 4);
    const int64_t n = tokens * way.k;
    if (tokens > kFewTokens || tokens * width_ > kMaxStates) return false;
    const int64_t* owner = way.first;
    if (way.has_choice) owner = choose(way, ids, n);
    block_.resize(Split::block_size(n, way.experts));
    const int64_t count = split_.run(ids, weights, tokens, way.k, owner, way.experts, block_.data());
    if (count > kMaxShares) return false;
    const ShareHead* const heads = reinterpret_cast<const ShareHead*>(block_.data() + 2 * n);
    int64_t room = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t node = heads[i].node;
      if (node < 0 || way.peers[node] == nullptr) return false;
      const Peer& peer = *way.peers[node];
      if (node == way.local) continue;
      if (peer.flying + peer.others >= kMaxInFlight) return false;
      if (!exact_ && peer.link->eight_bit(heads[i].rows * width_)) return false;
      room += heads[i].rows * width_ + heads[i].bytes + kHeadRoom;
    }
    view.shares = view.waiting = count, view.here = -1, view.expected_s = 0.0;
    view.unknown = view.unsent = view.owed = 0;
    view.block = block_.data();
    shares_.resize(count);
    if (static_cast<int64_t>(messages_.size()) < room) messages_.resize(room);
    const uint32_t* const experts = reinterpret_cast<const uint32_t*>(heads + std::min(n, way.experts));
    const uint8_t* routing = reinterpret_cast<const uint8_t*>(experts + 2 * n);
    int64_t pairs = 0, rows = 0;
    for (int64_t i = 0; i < count; ++i) pairs += heads[i].pairs, rows += heads[i].rows;
    routing += 4 * (rows + count);
    uint8_t* to = messages_.data();
    const int64_t start = now();
    int64_t pair = 0, row = 0, out = 0;
    for (int64_t i = 0; i < count; ++i) {
      const ShareHead& head = heads[i];
      Share& share = shares_[i];
      const int64_t results = exact_ ? head.pairs : head.rows;
      share = {way.peers[head.node], 0, block_.data() + pair, block_.data() + n + row, head.pairs, head.rows,
               0, out, results, 0.0, start};
      share.bytes = way.expert_bytes * (head.rows == 1 ? head.pairs : distinct(experts + pair, head.pairs, way.experts));
      view.node[i] = head.node, view.state[i] = kHere;
      if (head.node == way.local) {
        view.here = i, view.message[i] = view.size[i] = 0;
      } else {
        to = write(way, step, hidden, head, routing, &share, i, to);
      }
      routing += head.bytes;
      pair += head.pairs, row += head.rows, out += results * width_;
    }
    rows_.resize(out);
    send();
    look_around();
    return true;
  }

  // Takes a reply to the share that asked with `id`; whether it was a plain one, else nothing has happened.
  bool take(int64_t share, const uint8_t* message, int64_t size, Times* times, int64_t layers) {
    Share& one = shares_[share];
    Trip trip{};
    uint64_t nanoseconds = 0, rows = 0, length = 0;
    const uint8_t *at = message, *const end = message + size, *values = nullptr;
    while (at < end) {
      uint64_t tag, value;
      if (!get_varint(at, end, tag) || !get_varint(at, end, value)) return false;
      if (tag == 1 << 3) {
        continue;
      } else if (tag == 2 << 3) {
        nanoseconds = value;
      } else if (tag == 3 << 3) {
        rows = value;
      } else if (tag == (4 << 3 | 2) && value <= static_cast<uint64_t>(end - at)) {
        values = at, length = value, at += value;
      } else if (tag == 9 << 3) {
        trip.began = static_cast<int64_t>(value);
      } else if (tag == 10 << 3) {
        trip.reading = static_cast<int64_t>(value);
      } else if (tag == 11 << 3) {
        trip.waited = static_cast<int64_t>(value);
      } else if (tag == 12 << 3) {
        trip.wrote = static_cast<int64_t>(value);
      } else {
        return false;
      }
    }
    if (rows != static_cast<uint64_t>(one.results) || length != rows * width_) return false;
    if (length) std::memcpy(rows_.data() + one.at, values, length);
    Peer& peer = *one.peer;
    const double took = nanoseconds / 1e9;
    // What one reading brought is taken one after the other.
    trip.sent = one.sent_at, trip.read = times->came_at ? times->came_at : times->read_at;
    trip.came = times->came_at = now();
    trip.computed = static_cast<int64_t>(nanoseconds);
    view.trip[share] = trip;
    if (peer.flying + peer.others == 1) {  // else others shared the link, and the time says nothing
      const int64_t sent = one.rows * width_, came = static_cast<int64_t>(length);
      peer.link->note(std::max(sent, came), sent + came, (trip.came - trip.sent) / 1e9 - took);
    }
    ++peer.counters->requests;
    peer.counters->expert_calls += one.pairs;
    peer.counters->compute_ns += static_cast<int64_t>(nanoseconds);
    peer.speed->note(one.rows, one.pairs, one.bytes, took, layers);
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
    Share& one = shares_[share];
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

  // Adds up all shares, in f32 and in their order, or with PER_EXPERT in the order of the router's top-k: [tokens,
  // hidden] in the hidden states' own type. Whether every sum is a number whose square is one.
  bool sum(uint8_t* out) {
    float* total = reinterpret_cast<float*>(out);
    if (bf16_) sums_.resize(tokens_ * size_), total = sums_.data();
    std::memset(total, 0, tokens_ * size_ * sizeof(float));
    if (exact_) {
      from_.assign(tokens_ * k_, nullptr);
      for (const Share& share : shares_)
        for (int64_t i = 0; i < share.pairs; ++i) from_[share.pair[i]] = rows_.data() + share.at + i * width_;
      for (int64_t i = 0; i < tokens_ * k_; ++i)
        if (from_[i]) add(total + i / k_ * size_, from_[i]);
    } else {
      for (const Share& share : shares_)
        for (int64_t i = 0; i < share.rows; ++i)
          add(total + share.token[i] * size_, rows_.data() + share.at + i * width_);
    }
    float squares[8] = {};
    const int64_t count = tokens_ * size_;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      for (int j = 0; j < 8; ++j) squares[j] += total[i + j] * total[i + j];
    for (; i < count; ++i) squares[0] += total[i] * total[i];
    float square = 0.0f;
    for (float one : squares) square += one;
    if (bf16_)
      for (i = 0; i < count; ++i) reinterpret_cast<uint16_t*>(out)[i] = to_bf16(total[i]);
    return std::isfinite(square);
  }

 private:
  static constexpr uint32_t kPerExpert = 2;  // proto/experts.proto's REDUCTION_PER_EXPERT
  static constexpr int64_t kHeadRoom = 128;  // more than a message's head and its fields but its arrays take

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

  static bool get_varint(const uint8_t*& at, const uint8_t* end, uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 64 && at < end; shift += 7) {
      const uint8_t byte = *at++;
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  static uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  void add(float* to, const uint8_t* row) const {
    if (bf16_) {
      for (int64_t i = 0; i < size_; ++i) {
        uint16_t stored;
        std::memcpy(&stored, row + 2 * i, sizeof stored);
        const uint32_t bits = static_cast<uint32_t>(stored) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        to[i] += value;
      }
    } else {
      for (int64_t i = 0; i < size_; ++i) {
        float value;
        std::memcpy(&value, row + 4 * i, sizeof value);
        to[i] += value;
      }
    }
  }

  // routes.py's rule: what is in hand, the round trip and how late a node is beyond all nodes' lateness, and its reads.
  const int64_t* choose(const Way& way, const int64_t* ids, int64_t n) {
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
    owner_.assign(way.first, way.first + way.experts);
    choice_.start(way.holders, way.experts, way.most, base_.data(), per_.data(), way.nodes);
    choice_.run(ids, n, false, owner_.data());
    return owner_.data();
  }

  int64_t distinct(const uint32_t* experts, int64_t count, int64_t most) {
    seen_.assign(most, 0);
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i)
      if (!seen_[experts[i]]) seen_[experts[i]] = 1, ++found;
    return found;
  }

  // The message of a share that a node is asked for; returns where the next one begins.
  uint8_t* write(const Way& way, uint64_t step, const uint8_t* hidden, const ShareHead& head, const uint8_t* routing,
                 Share* share, int64_t number, uint8_t* to) {
    to += kFrameHead;
    uint8_t* const start = to;
    const auto put = [&to](uint8_t field, uint64_t value) {
      *to++ = static_cast<uint8_t>(field << 3);
      to = put_varint(to, value);
    };
    Peer& peer = *share->peer;
    share->id = peer.next_id;
    peer.next_id += way.id_step;
    put(kEpoch, way.epoch), put(kStep, step), put(kLayer, way.layer), put(kTokens, head.rows);
    put(kHiddenSize, way.hidden_size), put(kDtype, bf16_ ? 2 : 1), put(kReduction, way.reduction);
    put(kRequestId, share->id);
    *to++ = kHiddenStates << 3 | 2;
    to = put_varint(to, head.rows * width_);
    if (head.rows == tokens_) {
      std::memcpy(to, hidden, tokens_ * width_);
    } else {
      for (int64_t i = 0; i < head.rows; ++i) std::memcpy(to + i * width_, hidden + share->token[i] * width_, width_);
    }
    to += head.rows * width_;
    std::memcpy(to, routing, head.bytes);
    to += head.bytes;
    view.message[number] = reinterpret_cast<int64_t>(start), view.size[number] = to - start;
    view.state[number] = kAsked;
    ++peer.flying;
    share->expected = share->bytes * peer.speed->s_per_byte;
    if (share->expected == 0.0) view.unknown = 1;
    view.expected_s =
        std::max(view.expected_s, peer.speed->backlog_s + share->expected + peer.link->round_trip_s);
    peer.speed->backlog_s += share->expected;
    return to;
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

  int64_t tokens_ = 0, k_ = 0, size_ = 0, width_ = 0;  // width_: bytes of a row
  bool bf16_ = false, exact_ = false;
  Choice choice_;
  Split split_;
  std::vector<double> base_, per_;
  std::vector<int64_t> owner_, block_;
  std::vector<char> seen_;
  std::vector<uint8_t> messages_, rows_;
  std::vector<float> sums_;
  std::vector<const uint8_t*> from_;
  std::vector<Share> shares_;
};

// All layers on their way, by a number that is used again. Use it on one thread.
class Flights {
 public:
  // `layers`: dispatched since the start.
  int64_t ask(const Way& way, uint64_t step, const uint8_t* hidden, const int64_t* ids, const float* weights,
              int64_t tokens, bool bf16, int64_t layers) {
    layers_ = layers;
    if (free_.empty()) {
      flights_.push_back(std::make_unique<Flight>());
      free_.push_back(static_cast<int64_t>(flights_.size()) - 1);
    }
    const int64_t number = free_.back();
    if (!at(number).ask(way, step, hidden, ids, weights, tokens, bf16)) return kNotPlain;
    free_.pop_back();
    for (int64_t share = 0; share < at(number).view.shares; ++share)
      if (at(number).view.state[share] == kAsked) open_.push_back({number, share});
    return number;
  }

  // The share in flight that `peer` was asked for with `id` (null: any one), see `named`; or kNotPlain.
  int64_t find(const Peer* peer, const uint64_t* id) const {
    for (const Open& one : open_) {
      const Flight& flight = *flights_[one.flight];
      if (flight.peer(one.share) == peer && (!id || flight.id(one.share) == *id)) return named(one);
    }
    return kNotPlain;
  }

  // As `find`, once the reply was taken.
  int64_t reply(const Peer* peer, const uint8_t* message, int64_t size, Times* times) {
    uint64_t tag, id;
    const uint8_t* where = message;
    // Replies begin with their id, as nodes write them; others are left to Python.
    if (size < 2 || *where != 1 << 3 || !varint(where, message + size, tag, id)) return kNotPlain;
    const int64_t found = find(peer, &id);
    if (found == kNotPlain) return found;
    if (!at(found >> 7).take(found & 127, message, size, times, layers_)) return kNotPlain;
    return close({found >> 7, found & 127}), found;
  }

  void settle(int64_t flight, int64_t share) {
    at(flight).settle(share, kFailed);
    close({flight, share});
  }

  void release(int64_t number) {
    at(number).give_up();
    open_.erase(std::remove_if(open_.begin(), open_.end(), [number](const Open& one) { return one.flight == number; }),
                open_.end());
    free_.push_back(number);
  }

  // Waits for a flight's answers, looking for so many nanoseconds first, and adds them up as Flight::sum does.
  Landed land(int64_t number, const Eyes* eyes, int64_t look, uint8_t* out) {
    sched_yield();  // nodes on this machine that were just asked go first: the layer waits for them
    Flight& flight = at(number);
    if (!flight.alone()) return kLater;
    for (bool came = false;; came = true) {
      const int64_t read = flight.read();
      if (read == 0) return kOdd;
      if (flight.view.waiting == 0) return flight.sum(out) ? kFinite : kNotFinite;
      if (came && read == kNothing) return kLater;  // something else has
      if (!eyes || !eyes->wait(look)) return kLater;
    }
  }

  Flight& at(int64_t number) { return *flights_[number]; }

 private:
  struct Open {
    int64_t flight, share;
  };

  static int64_t named(const Open& one) { return one.flight << 7 | one.share; }

  static bool varint(const uint8_t* at, const uint8_t* end, uint64_t& tag, uint64_t& value) {
    tag = *at++, value = 0;
    for (int shift = 0; shift < 64 && at < end; shift += 7) {
      value |= static_cast<uint64_t>(*at & 0x7f) << shift;
      if (*at++ < 0x80) return true;
    }
    return false;
  }

  void close(const Open& gone) {
    for (Open& one : open_)
      if (one.flight == gone.flight && one.share == gone.share) {
        one = open_.back();
        open_.pop_back();
        return;
      }
  }

  int64_t layers_ = 0;
  std::vector<std::unique_ptr<Flight>> flights_;
  std::vector<int64_t> free_;
  std::vector<Open> open_;
};

}  // namespace moehive

#endif

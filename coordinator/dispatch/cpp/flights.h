// All layers on their way to the nodes, and how one is waited for.
#ifndef MOEHIVE_DISPATCH_FLIGHTS_H_
#define MOEHIVE_DISPATCH_FLIGHTS_H_

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../../../proto/cpp/inlet.h"
#include "flight.h"
#include "reply.h"

namespace moehive {

constexpr int64_t kNotPlain = -1;

// What came of waiting for a flight's answers.
enum Landed : int64_t {
  kNotFinite,  // they are there, and their sum is no number
  kFinite,     // they are added up
  kLater,      // the event loop waits for them
  kOdd,        // it does, once it has gone on with what the inlets have left to it
};

// Flights by a number that is used again. Use it on one thread.
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
    if (!at(number).ask({way, step, hidden, tokens, bf16}, ids, weights)) return kNotPlain;
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

  // As `find`, once the reply was taken; others are left to Python.
  int64_t reply(const Peer* peer, const uint8_t* message, int64_t size, Times* times) {
    PlainReply reply;
    if (!reply.read(message, size)) return kNotPlain;
    const int64_t found = find(peer, &reply.id);
    if (found == kNotPlain) return found;
    if (!at(found >> 7).take(found & 127, reply, times, layers_)) return kNotPlain;
    return close({found >> 7, found & 127}), found;
  }

  void settle(int64_t flight, int64_t share) {
    at(flight).settle(share, kFailed);
    close({flight, share});
  }

  void release(int64_t number) {
    at(number).give_up();
    const auto gone = [number](const Open& one) { return one.flight == number; };
    open_.erase(std::remove_if(open_.begin(), open_.end(), gone), open_.end());
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

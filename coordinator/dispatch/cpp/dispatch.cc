// What the dispatcher does for each layer of a step: coordinator/dispatch/native.py calls these, on one thread at a
// time for each loop. Scratch memory is kept for the next layer.
#include <cstdint>
#include <new>

#include "choice.h"
#include "flights.h"
#include "speeds.h"
#include "split.h"

using moehive::Flights;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t moehive_dispatch_abi() { return 7; }

// See Choice; `owner` [experts] also gets the first holder of each expert that `ids` does not name. 0, or 1: no memory.
EXPORT int32_t moehive_choose(const int32_t* holders, int64_t experts, int64_t most, const double* base,
                              const double* per, int64_t nodes, const int64_t* ids, int64_t pairs, int32_t by_pairs,
                              int64_t* owner) {
  try {
    thread_local moehive::Choice choice;
    for (int64_t expert = 0; expert < experts; ++expert) owner[expert] = holders[expert * most];
    choice.start(holders, experts, most, base, per, nodes);
    choice.run(ids, pairs, by_pairs != 0, owner);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Splits `ids` and `weights` [tokens, k] by `owner` [experts], a node or -1 for each; ids outside the experts are left
// out. Nodes, and a node's pairs, come in ascending order. `block` gets, one after the other, with n = tokens * k:
//   int64 [n]                  where each pair stands
//   int64 [n]                  the tokens of each node
//   int64 [min(n, experts), 4] each node, its pairs, its tokens, its bytes of the last array
//   uint32 [n]                 the pairs' experts
//   float [n]                  their weights
//   uint32 [n + nodes]         for each node where its tokens' pairs begin and end, one more than it has tokens
//   bytes                      the same three of each node as a ComputeRequest says them; 12 n + 24 nodes at most
// The number of nodes, or -1: no memory.
EXPORT int64_t moehive_split(const int64_t* ids, const float* weights, int64_t tokens, int64_t k, const int64_t* owner,
                             int64_t experts, int64_t* block) {
  try {
    thread_local moehive::Split split;
    return split.run(ids, weights, tokens, k, owner, experts, {block, tokens * k, experts});
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

EXPORT void moehive_note_node(moehive::NodeSpeed* speed, int64_t tokens, int64_t pairs, int64_t bytes, double seconds,
                              int64_t now) {
  speed->note(tokens, pairs, bytes, seconds, now);
}

EXPORT void moehive_note_link(moehive::LinkSpeed* speed, int64_t largest, int64_t total, double seconds) {
  speed->note(largest, total, seconds);
}

// Layers on their way. A share in flight is named flight * 128 + share; -1: none.

EXPORT Flights* moehive_flights() { return new (std::nothrow) Flights; }

EXPORT void moehive_flights_end(Flights* flights) { delete flights; }

// Writes the messages of a layer; hidden [tokens, hidden] f32 or bf16, ids and weights [tokens, k]. The flight, or -1:
// it is not one for here. `layers`: dispatched since the start.
EXPORT int64_t moehive_flight_ask(Flights* flights, const moehive::Way* way, uint64_t step, const uint8_t* hidden,
                                  const int64_t* ids, const float* weights, int64_t tokens, int32_t bf16,
                                  int64_t layers) {
  try {
    return flights->ask(*way, step, hidden, ids, weights, tokens, bf16 != 0, layers);
  } catch (const std::bad_alloc&) {
    return moehive::kNotPlain;
  }
}

EXPORT moehive::View* moehive_flight_view(Flights* flights, int64_t flight) { return &flights->at(flight).view; }

// Takes a reply of `peer`; -1: it answers no flight, or not as usual.
EXPORT int64_t moehive_flight_reply(Flights* flights, const moehive::Peer* peer, const uint8_t* message, int64_t size,
                                    moehive::Times* times) {
  return flights->reply(peer, message, size, times);
}

// The same as who reads a connection natively calls it (proto/cpp/messages.cc's Take): whether it was taken.
EXPORT int32_t moehive_flight_take(const moehive::Landing* landing, const uint8_t* message, int64_t size,
                                   moehive::Times* times, uint8_t**, int64_t* answer) {
  *answer = 0;
  return landing->flights && landing->flights->reply(landing->peer, message, size, times) >= 0;
}

// A share that `peer` was asked for with `id`, or with any.
EXPORT int64_t moehive_flight_find(Flights* flights, const moehive::Peer* peer, uint64_t id) {
  return flights->find(peer, &id);
}
EXPORT int64_t moehive_flight_any(Flights* flights, const moehive::Peer* peer) {
  return flights->find(peer, nullptr);
}

// Takes the rows of the share that this process computes.
EXPORT void moehive_flight_put(Flights* flights, int64_t flight, int64_t share, const uint8_t* rows) {
  flights->at(flight).put(share, rows);
}

// A share is over without an answer that was taken.
EXPORT void moehive_flight_settle(Flights* flights, int64_t flight, int64_t share) { flights->settle(flight, share); }

// Where the rows of a share lie that was taken.
EXPORT const uint8_t* moehive_flight_rows(Flights* flights, int64_t flight, int64_t share) {
  return flights->at(flight).rows(share);
}

// See Flight::sum; -1: no memory.
EXPORT int32_t moehive_flight_sum(Flights* flights, int64_t flight, uint8_t* out) {
  try {
    return flights->at(flight).sum(out);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

// See Flights::land, -1: no memory. `eyes`: null, it does not wait.
EXPORT int64_t moehive_flight_land(Flights* flights, int64_t flight, const moehive::Eyes* eyes, int64_t look,
                                   uint8_t* out) {
  try {
    return flights->land(flight, eyes, look, out);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

// The flight is over, whatever is still on its way.
EXPORT void moehive_flight_release(Flights* flights, int64_t flight) { flights->release(flight); }

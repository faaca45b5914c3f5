// A made-up network: cables that delay and limit what passes, between hosts with one network card each.
//
// A connection is two flows. Bytes of a flow are read when they come, a piece at a time, and lie in the flow's ring.
// When a piece has arrived follows from the cards that it passes; until then it waits in line at the receiver's. One
// thread does everything and sleeps while nothing is due. It takes its time from the processors that are measured: two
// waits, one receive and one send for a piece, nearly all of it the kernel's.
#ifndef MOEHIVE_COORDINATOR_BENCH_NETWORK_H_
#define MOEHIVE_COORDINATOR_BENCH_NETWORK_H_

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "byte_ring.h"
#include "clock.h"
#include "poll.h"
#include "receive.h"

namespace moehive {

constexpr int64_t kPieceBytes = 16 << 10;  // read and passed on at once: 0.13 ms at 1 Gbit/s

// _NativeCable of ../slow_link.py, field for field.
struct Cable {
  int32_t listener;        // a listening socket that does not block: the cable's own end
  int32_t port;            // where `target` listens, on 127.0.0.1
  int32_t source, target;  // numbers of hosts
};

// One direction of one connection.
struct Flow {
  Flow(int near, int far, int32_t sender, int32_t receiver) : source(near), target(far), from(sender), to(receiver) {}

  // While the ring has no room for a piece, the sender's own TCP waits.
  bool reads() const { return !ended && ring.room() >= kPieceBytes; }

  const int source, target;  // sockets
  const int32_t from, to;    // hosts
  ByteRing ring;             // what was read and not yet passed on
  int64_t due = 0;           // of the ring's bytes: these have arrived, and leave as the receiver has room
  bool end_is_due = false;   // nothing follows them
  bool ended = false;        // nothing more is read
  bool over = false;         // nothing more is passed on
};

struct Piece {
  std::shared_ptr<Flow> flow;
  int64_t bytes;  // 0: the flow's end
  int64_t due;    // ns
};

struct Host {
  int64_t out_free = 0, in_free = 0;  // ns: when its card can send and receive more
  std::deque<Piece> arriving;         // one after the other: none is due before those in front of it
};

// A socket of a connection.
struct End {
  std::shared_ptr<Flow> in, out;  // what is read from it, what is written to it
  uint32_t watched = 0;           // the events that epoll looks for
};

class Network {
 public:
  // Takes no socket over. `hosts`: how many.
  Network(const Cable* cables, int64_t count, int64_t hosts, int64_t delay_ns, double ns_per_byte)
      : delay_(delay_ns), ns_per_byte_(ns_per_byte), hosts_(hosts) {
    for (int64_t i = 0; i < count; ++i) listeners_.emplace(cables[i].listener, cables[i]);
  }

  ~Network() {
    for (const auto& end : ends_) close(end.first);
  }

  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  // Works until `stop` can be read or has ended: 0, else an errno.
  int run(int stop) {
    if (!poll_.control(EPOLL_CTL_ADD, stop, EPOLLIN)) return errno;
    for (const auto& listener : listeners_) {
      if (!poll_.control(EPOLL_CTL_ADD, listener.first, EPOLLIN)) return errno;
    }
    for (;;) {
      epoll_event events[64];
      const int count = poll_.wait(events, 64, next_due());
      if (count < 0 && errno != EINTR) return errno;
      for (int i = 0; i < count; ++i) {
        const int descriptor = events[i].data.fd;
        if (descriptor == stop) return 0;
        const auto listener = listeners_.find(descriptor);
        if (listener == listeners_.end()) {
          go_on(descriptor, events[i].events);
        } else if (const int error = accept_one(listener->second)) {
          return error;
        }
      }
      deliver();
    }
  }

 private:
  int64_t next_due() const {
    int64_t due = kNever;
    for (const Host& host : hosts_) {
      if (!host.arriving.empty()) due = std::min(due, host.arriving.front().due);
    }
    return due;
  }

  // 0, or an errno with which nothing can go on. Where nobody listens, the connection ends.
  int accept_one(const Cable& cable) {
    const int near = accept4(cable.listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (near < 0) return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED ? 0 : errno;
    const int far = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (far < 0) {
      const int error = errno;
      close(near);
      return error;
    }
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(cable.port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(far, reinterpret_cast<const sockaddr*>(&address), sizeof address) < 0) {
      close(near);
      close(far);
      return 0;
    }
    fcntl(far, F_SETFL, O_NONBLOCK);
    for (const int end : {near, far}) {
      const int on = 1;
      setsockopt(end, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      note_arrivals(end);
    }
    const auto there = std::make_shared<Flow>(near, far, cable.source, cable.target);
    const auto back = std::make_shared<Flow>(far, near, cable.target, cable.source);
    ends_[near] = End{there, back};
    ends_[far] = End{back, there};
    watch(near);
    watch(far);
    return 0;
  }

  // With what epoll has found at a socket; one that another event has closed is not there any more.
  void go_on(int descriptor, uint32_t events) {
    const auto found = ends_.find(descriptor);
    if (found == ends_.end()) return;
    const std::shared_ptr<Flow> in = found->second.in, out = found->second.out;  // which this may close
    if (out->due > 0) pass_on(*out);
    if (in->reads() && events & ~static_cast<uint32_t>(EPOLLOUT)) read(in);
  }

  // Looks for what can go on at a socket: something to read, or room for what is due.
  void watch(int descriptor) {
    End& end = ends_.at(descriptor);
    const uint32_t wanted = (end.in->reads() ? EPOLLIN : 0u) | (end.out->due > 0 ? EPOLLOUT : 0u);
    if (wanted == end.watched) return;
    // Where nothing is wanted it is taken out, or epoll would report forever that the other side has hung up.
    poll_.control(!wanted ? EPOLL_CTL_DEL : end.watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, descriptor, wanted);
    end.watched = wanted;
  }

  // Reads a piece and puts it in line.
  void read(const std::shared_ptr<Flow>& flow) {
    const ByteRing::Span space = flow->ring.free(kPieceBytes);
    const int64_t read_at = now();
    int64_t came = read_at;
    int64_t count = receive(flow->source, space.at, space.bytes, &came);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
    count = std::max<int64_t>(count, 0);  // an error ends a flow, too
    flow->ring.put(count);
    flow->ended = count == 0;
    // What waited for the ring to have room came long ago, but is sent only now.
    came = std::clamp(came, read_at - delay_, read_at);
    Host &from = hosts_[flow->from], &to = hosts_[flow->to];
    const int64_t took = std::llround(static_cast<double>(count) * ns_per_byte_);
    from.out_free = std::max(came, from.out_free) + took;
    // Bits are passed on as they come: the receiver's card is busy at the same time, unless others were first.
    to.in_free = std::max(from.out_free, to.in_free + took);
    to.arriving.push_back({flow, count, to.in_free + delay_});
    watch(flow->source);
  }

  // Takes what is due out of line.
  void deliver() {
    const int64_t until = now();
    for (Host& host : hosts_) {
      while (!host.arriving.empty() && host.arriving.front().due <= until) {
        const Piece piece = std::move(host.arriving.front());
        host.arriving.pop_front();
        if (piece.flow->over) continue;
        piece.flow->due += piece.bytes;
        piece.flow->end_is_due = piece.bytes == 0;
        pass_on(*piece.flow);
      }
    }
  }

  // Passes on what is due, as far as the receiver has room for it.
  void pass_on(Flow& flow) {
    bool gone = false;
    while (flow.due > 0) {
      const ByteRing::Span span = flow.ring.first(flow.due);
      const int64_t count = send(flow.target, span.at, span.bytes, MSG_NOSIGNAL);
      if (count < 0 && errno == EINTR) continue;
      gone = count < 0 && errno != EAGAIN;
      if (count < 0) break;
      flow.ring.take(count);
      flow.due -= count;
    }
    if (flow.due == 0 && flow.end_is_due) {
      flow.over = true;
      gone = shutdown(flow.target, SHUT_WR) < 0;
    }
    if (gone) {  // the receiver is: what is left has nowhere to go
      flow.over = flow.ended = true;
      flow.due = 0;
    }
    if (flow.over && ends_.at(flow.source).out->over) {
      for (const int end : {flow.source, flow.target}) {
        ends_.erase(end);
        close(end);  // which takes it out of epoll
      }
      return;
    }
    watch(flow.source);
    watch(flow.target);
  }

  const int64_t delay_;  // ns
  const double ns_per_byte_;
  std::vector<Host> hosts_;
  std::unordered_map<int, Cable> listeners_;  // by socket
  std::unordered_map<int, End> ends_;         // by socket
  Poll poll_;
};

}  // namespace moehive

#endif

// Messages of gRPC on a connection's busiest stream, read, answered and sent without Python in between: a frame's header,
// a message's prefix, the windows (RFC 9113, 5.2 and 6.9). Whatever is not one whole message in one frame of that
// stream, or is not taken, is left to Python (proto/wire/serving.py), in the order in which it came.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "inlet.h"
#include "socket.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace moehive {

constexpr int64_t kHeaderBytes = 9, kPrefixBytes = 5;
constexpr int64_t kKeptBytes = 64 << 10;
constexpr int64_t kStay = 10'000'000;  // nanoseconds without Python, whose timers are as late
constexpr int64_t kHeadBytes = kHeaderBytes + kPrefixBytes;  // of a frame that is one message

// Takes a message: whether it did. A reply's bytes are at `*reply`, none if there are no bytes, and before them are
// `kHeadBytes` of room.
using Take = int32_t (*)(void* taker, const uint8_t* message, int64_t size, Times* times, uint8_t** reply,
                         int64_t* reply_size);

// proto/wire/windows.py has both, field for field. Of a connection:
struct Sending {
  Socket* socket;         // null: it is closed
  int64_t window;         // bytes that the other side takes, of all streams
  int64_t largest_frame;  // that it takes
  int64_t waiting;        // whether earlier bytes still wait to leave
};

// Of a stream:
struct Windows {
  int64_t number;   // the stream's
  int64_t send;     // bytes that the other side takes
  int64_t receive;  // bytes that it may still send
  int64_t largest;  // bytes of a message that is taken
};

namespace {

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void write_head(uint8_t* to, int64_t number, int64_t size) {
  const int64_t length = size + kPrefixBytes;
  const uint8_t head[kHeadBytes] = {
      static_cast<uint8_t>(length >> 16), static_cast<uint8_t>(length >> 8), static_cast<uint8_t>(length), 0, 0,
      static_cast<uint8_t>(number >> 24), static_cast<uint8_t>(number >> 16), static_cast<uint8_t>(number >> 8),
      static_cast<uint8_t>(number), 0, static_cast<uint8_t>(size >> 24), static_cast<uint8_t>(size >> 16),
      static_cast<uint8_t>(size >> 8), static_cast<uint8_t>(size)};
  std::memcpy(to, head, sizeof head);
}

bool fits(const Sending& sending, const Windows& stream, int64_t size) {
  const int64_t length = size + kPrefixBytes;
  return !sending.waiting && length <= stream.send && length <= sending.window && length <= sending.largest_frame;
}

// Sends a message that `fits`, before which there is room for its head. How many bytes of its frame were taken, and
// kWaits, or kBroken.
int64_t send(Sending& sending, Windows& stream, uint8_t* message, int64_t size) {
  write_head(message - kHeadBytes, stream.number, size);
  stream.send -= size + kPrefixBytes;
  sending.window -= size + kPrefixBytes;
  const int64_t taken = sending.socket->write(message - kHeadBytes, size + kHeadBytes, false);
  if (taken != size + kHeadBytes) sending.waiting = 1;
  return taken == kWouldBlock ? kWaits : taken;
}

// Bytes of the frame at `at`, of which `rest` are there, if it is one whole message of the stream that may be taken;
// else 0.
int64_t message_frame(const Windows& stream, const uint8_t* at, int64_t rest) {
  if (rest < kHeadBytes || at[3] || at[4] || at[9]) return 0;
  const int64_t length = at[0] << 16 | at[1] << 8 | at[2];
  const int64_t number = (int64_t{at[5] & 0x7f} << 24) | at[6] << 16 | at[7] << 8 | at[8];
  const int64_t size = (int64_t{at[10]} << 24) | at[11] << 16 | at[12] << 8 | at[13];
  const bool taken = number == stream.number && length == size + kPrefixBytes && size <= stream.largest &&
                     length <= stream.receive;
  return taken ? kHeadBytes + size : 0;
}

}  // namespace
}  // namespace moehive

using namespace moehive;

// Reads what has come behind the `filled` bytes of `buffer`, which begin with a frame, and has `take` take the messages
// at its front; its replies leave at once. The beginning of another such message stays for the next call. Bytes that
// came, or kEnd, kWouldBlock, kBroken.
EXPORT int64_t moehive_serve(Sending* sending, Windows* stream, Times* times, Take take, void* taker, uint8_t* buffer,
                             int64_t room, int64_t filled, Served* served) {
  Socket* const socket = sending->socket;
  if (!socket) return kBroken;
  if (filled == 0) times->read_at = now();  // else the beginning of a message is there
  times->came_at = 0;
  *served = {};
  served->filled = filled;
  const int64_t came = socket->read(buffer + filled, room - filled);
  if (came <= 0) return came;
  filled += came;
  int64_t at = 0;
  for (;;) {
    const int64_t frame = message_frame(*stream, buffer + at, filled - at);
    if (frame == 0) break;
    if (frame > filled - at) {
      if (frame > kKeptBytes) break;  // it is received where it will stay
      std::memmove(buffer, buffer + at, filled - at);
      served->kept = 1, filled -= at, at = 0;
      break;
    }
    uint8_t* reply = nullptr;
    int64_t size = 0;
    if (!take(taker, buffer + at + kHeadBytes, frame - kHeadBytes, times, &reply, &size)) break;
    at += frame;
    stream->receive -= frame - kHeaderBytes;
    served->taken += frame - kHeaderBytes;
    ++served->messages;
    if (!size) continue;
    served->unsent_at = reply, served->unsent = size, served->refused = 1;
    if (!fits(*sending, *stream, size)) break;
    const int64_t sent = send(*sending, *stream, reply, size);
    if (sent == kBroken) return kBroken;
    const int64_t left = sent & ~kWaits;
    served->unsent_at = reply - kHeadBytes + left, served->unsent = size + kHeadBytes - left, served->refused = 0;
    if (sending->waiting) break;
    times->sent_at = now();
  }
  served->filled = filled, served->consumed = at;
  return came;
}

// As moehive_serve, and goes on while nothing but such messages comes, each waited for as Eyes::wait does; `eyes`: null,
// it does not. `served` then counts the messages of all readings.
EXPORT int64_t moehive_serve_on(Sending* sending, Windows* stream, Times* times, Take take, void* taker, uint8_t* buffer,
                                int64_t room, int64_t filled, Served* served, const Eyes* eyes, int64_t look) {
  const int64_t start = now();
  int64_t came = moehive_serve(sending, stream, times, take, taker, buffer, room, filled, served);
  if (!eyes) return came;
  while (came > 0 && served->all() && !sending->waiting && now() - start < kStay) {
    const Served before = *served;
    if (!eyes->wait(look)) break;
    const int64_t more = moehive_serve(sending, stream, times, take, taker, buffer, room, 0, served);
    if (more <= 0) {  // the next reading says it
      *served = before;
      break;
    }
    came = more;
    served->taken += before.taken, served->messages += before.messages;
  }
  return came;
}

// Sends a message of `size` bytes, before which there is room for its head. How many bytes of its frame were taken, and
// kWaits, kWouldBlock when the windows, or what waits, do not let it through, or kBroken.
EXPORT int64_t moehive_send(Sending* sending, Windows* stream, uint8_t* message, int64_t size) {
  if (!sending->socket) return kBroken;
  return fits(*sending, *stream, size) ? send(*sending, *stream, message, size) : kWouldBlock;
}

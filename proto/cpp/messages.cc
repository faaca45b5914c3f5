// Messages of gRPC on a connection's busiest stream, read, answered and sent without Python in between: a frame's header,
// a message's prefix, the windows (RFC 9113, 5.2 and 6.9). Whatever is not one whole message in one frame of that
// stream, or is not taken, is left to Python (proto/wire/serving.py), in the order in which it came.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "socket.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace moehive {

constexpr int64_t kHeaderBytes = 9, kPrefixBytes = 5;
constexpr int64_t kKeptBytes = 64 << 10;
constexpr int64_t kHeadBytes = kHeaderBytes + kPrefixBytes;  // of a frame that is one message

// proto/wire/windows.py has these, field for field. When a stream's latest message came and its latest reply went,
// nanoseconds of this process's monotonic clock; 0: not yet.
struct Times {
  int64_t read_at;   // the reading of its bytes began
  int64_t came_at;   // it was there; who takes the first of what one reading brought says so
  int64_t ready_at;  // the latest reply's content was there; who takes says so
  int64_t sent_at;   // a reply's bytes had left
};

// Takes a message: whether it did. A reply's bytes are at `*reply`, none if there are no bytes, and before them are
// `kHeadBytes` of room.
using Take = int32_t (*)(void* taker, const uint8_t* message, int64_t size, Times* times, uint8_t** reply,
                         int64_t* reply_size);

// Of a connection:
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

// What `serve` found; proto/wire/windows.py has it, field for field.
struct Served {
  int64_t filled, consumed;  // bytes in the buffer, and those of them that are done with
  int64_t taken, messages;   // bytes of data of the messages that were taken, and those
  int64_t unsent;            // bytes of the last reply's frame that did not leave, see `unsent_at`
  const uint8_t* unsent_at;
  int64_t kept;              // whether the buffer begins with a message that is not whole yet
  int64_t refused;           // the last reply, without its head, is at `unsent_at`: the windows do not let it through
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

// Sends a message of `size` bytes, before which there is room for its head. How many bytes of its frame were taken, and
// kWaits, kWouldBlock when the windows, or what waits, do not let it through, or kBroken.
EXPORT int64_t moehive_send(Sending* sending, Windows* stream, uint8_t* message, int64_t size) {
  if (!sending->socket) return kBroken;
  return fits(*sending, *stream, size) ? send(*sending, *stream, message, size) : kWouldBlock;
}

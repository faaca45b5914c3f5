// One end of a TCP connection that never blocks, with TLS by OpenSSL or without: proto/wire/transport.py.
#ifndef MOEHIVE_PROTO_SOCKET_H_
#define MOEHIVE_PROTO_SOCKET_H_

#include <cstdint>
#include <string>
#include <vector>

#include "openssl.h"

namespace moehive {

// What a call returns besides a number of bytes.
constexpr int64_t kEnd = 0, kWouldBlock = -1, kBroken = -2, kWantsRead = -3, kWantsWrite = -4;
constexpr int64_t kWaits = int64_t{1} << 62;  // added to bytes that were taken: some of them wait for `write`

class Socket {
 public:
  // Takes neither `descriptor` nor `context` over; no `context`: without TLS. `name`: a caller's, of the other side's
  // certificate; null: this end answers.
  Socket(int descriptor, SSL_CTX* context, const char* name);
  ~Socket();
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;

  bool sound() const { return !tls_ || ssl_; }

  // 0 once it is done; else kWantsRead, kWantsWrite, or kBroken.
  int64_t shake_hands();

  // Bytes that came, at most `room`, kEnd, kWouldBlock or kBroken. More may have come when it is `room`.
  int64_t read(uint8_t* to, int64_t room);

  // How many bytes were taken, and kWaits, kWouldBlock or kBroken. With `more` others follow at once. What waits leaves
  // with the next call, of no bytes too.
  int64_t write(const uint8_t* from, int64_t size, bool more);

  // Says that nothing more will come from here.
  void say_end();

  const std::string& error() const { return error_; }
  SSL* ssl() const { return ssl_; }

 private:
  static int keep(bio_st* out, const char* bytes, int size);

  bool flush();  // false: broken
  int64_t failed(int result);

  const int descriptor_;
  const bool tls_;
  const OpenSsl* const open_;
  SSL* ssl_ = nullptr;
  std::vector<uint8_t> out_;  // what OpenSSL has encrypted, several records at once to the system
  size_t gone_ = 0;           // of that
  bool blocked_ = false;      // the system does not take the rest now
  bool broken_ = false;  // OpenSSL is not to be asked any more
  std::string error_;    // why it is broken
};

}  // namespace moehive

#endif

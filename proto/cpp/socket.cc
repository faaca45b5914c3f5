#include "socket.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace moehive {
namespace {

// Of OpenSSL's headers, which keep them as they are.
constexpr int kErrorSsl = 1, kErrorWantRead = 2, kErrorWantWrite = 3, kErrorSyscall = 5, kErrorZeroReturn = 6;
constexpr int kSetHostName = 55;                  // SSL_CTRL_SET_TLSEXT_HOSTNAME
constexpr unsigned kNoPartialWildcards = 4, kNeverCheckSubject = 0x20;
constexpr int64_t kMostAtOnce = 1 << 30;

#ifdef MSG_NOSIGNAL
constexpr int kNoSignal = MSG_NOSIGNAL;
#else
constexpr int kNoSignal = 0;
#endif
#ifdef MSG_MORE
constexpr int kMore = MSG_MORE;
#else
constexpr int kMore = 0;
#endif

constexpr int kWholeRecord = 16 << 10;
constexpr int64_t kEncryptedAtOnce = 96 << 10;  // the other side decrypts it while the next is encrypted
constexpr int kFlush = 11;                      // BIO_CTRL_FLUSH

long flushes(bio_st*, int command, long, void*) { return command == kFlush; }

// Of what takes the bytes that OpenSSL sends; null: without memory.
const bio_method_st* make_method(const OpenSsl& open, int (*keep)(bio_st*, const char*, int)) {
  constexpr int kSourceSink = 0x0400;
  bio_method_st* const made = open.BIO_meth_new(kSourceSink, "moehive");
  return made && open.BIO_meth_set_write(made, keep) && open.BIO_meth_set_ctrl(made, flushes) ? made : nullptr;
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK; }

}  // namespace

Socket::Socket(int descriptor, SSL_CTX* context, const char* name)
    : descriptor_(descriptor), tls_(context != nullptr), open_(tls_ ? openssl() : nullptr) {
  if (!open_) return;
  SSL* const ssl = open_->SSL_new(context);
  if (!ssl) return;
  static const bio_method_st* const method = make_method(*open_, keep);
  bio_st* const out = method && open_->SSL_set_fd(ssl, descriptor) == 1 ? open_->BIO_new(method) : nullptr;
  bool right = out != nullptr;
  if (right) {
    open_->BIO_set_data(out, this);
    open_->BIO_set_init(out, 1);
    open_->SSL_set0_wbio(ssl, out);
  }
  if (name) {
    open_->SSL_set_hostflags(ssl, kNoPartialWildcards | kNeverCheckSubject);
    right = right && open_->SSL_set1_host(ssl, name) == 1 &&
            open_->SSL_ctrl(ssl, kSetHostName, 0, const_cast<char*>(name)) == 1;
    open_->SSL_set_connect_state(ssl);
  } else {
    open_->SSL_set_accept_state(ssl);
  }
  if (right) {
    ssl_ = ssl;
  } else {
    open_->SSL_free(ssl);
  }
}

Socket::~Socket() {
  if (ssl_) open_->SSL_free(ssl_);
}

int Socket::keep(bio_st* out, const char* bytes, int size) {
  auto& kept = static_cast<Socket*>(openssl()->BIO_get_data(out))->out_;
  try {
    kept.insert(kept.end(), bytes, bytes + size);
  } catch (const std::bad_alloc&) {
    return -1;
  }
  return size;
}

bool Socket::flush() {
  while (gone_ < out_.size()) {
    const ssize_t some = send(descriptor_, out_.data() + gone_, out_.size() - gone_, kNoSignal);
    if (some < 0) {
      if (errno == EINTR) continue;
      if (would_block()) return blocked_ = true;
      broken_ = true, error_ = std::strerror(errno);
      return false;
    }
    gone_ += some;
  }
  out_.clear(), gone_ = 0, blocked_ = false;
  return true;
}

int64_t Socket::shake_hands() {
  if (!ssl_) return 0;
  if (broken_) return kBroken;
  open_->ERR_clear_error();
  const int result = open_->SSL_do_handshake(ssl_);
  int64_t why = result == 1 ? 0 : failed(result);
  const std::string reason = error_;
  if (!flush() && why >= kWouldBlock) return kBroken;
  if (why == kBroken) error_ = reason;
  if (result != 1 && why == kEnd) {
    error_ = "the other side ended the handshake";
    return kBroken;
  }
  return why != kBroken && blocked_ ? kWantsWrite : why;
}

int64_t Socket::read(uint8_t* to, int64_t room) {
  if (broken_) return kBroken;
  room = std::min(room, kMostAtOnce);
  if (!ssl_) {
    ssize_t got;
    do got = recv(descriptor_, to, room, 0);
    while (got < 0 && errno == EINTR);
    if (got >= 0) return got;
    if (would_block()) return kWouldBlock;
    broken_ = true, error_ = std::strerror(errno);
    return kBroken;
  }
  int64_t got = 0;
  while (got < room) {
    open_->ERR_clear_error();
    const int some = open_->SSL_read(ssl_, to + got, static_cast<int>(room - got));
    if (some <= 0) {
      const int64_t why = failed(some);
      if (!out_.empty()) flush();  // OpenSSL has an alert to send, or a key's update
      if (got) break;              // the next read says it
      return why == kWantsRead || why == kWantsWrite ? kWouldBlock : why;
    }
    got += some;
    if (some < kWholeRecord && !open_->SSL_has_pending(ssl_)) break;  // the system is not asked for what has not come
  }
  return got;
}

int64_t Socket::write(const uint8_t* from, int64_t size, bool more) {
  if (broken_) return kBroken;
  int64_t taken = 0;
  if (!ssl_) {
    while (taken < size) {
      const ssize_t some = send(descriptor_, from + taken, std::min(size - taken, kMostAtOnce), kNoSignal | (more ? kMore : 0));
      if (some < 0) {
        if (errno == EINTR) continue;
        if (would_block()) break;
        broken_ = true, error_ = std::strerror(errno);
        return kBroken;
      }
      taken += some;
    }
    return taken || !size ? taken : kWouldBlock;
  }
  // Else what is there may go with what comes.
  if (blocked_ || !size) {
    if (!flush()) return kBroken;
    if (blocked_) return size ? kWouldBlock : kWaits;
  }
  while (taken < size) {
    const int64_t part = std::min(size - taken, kEncryptedAtOnce);
    for (int64_t done = 0; done < part;) {
      open_->ERR_clear_error();
      const int some = open_->SSL_write(ssl_, from + taken + done, static_cast<int>(part - done));
      if (some <= 0) {
        failed(some);
        broken_ = true;
        return kBroken;
      }
      done += some;
    }
    taken += part;
    if (more && taken == size && static_cast<int64_t>(out_.size()) < kEncryptedAtOnce) break;
    if (!flush()) return kBroken;
    if (blocked_) return taken | kWaits;
  }
  return taken;
}

void Socket::say_end() {
  if (!ssl_ || broken_) return;
  open_->ERR_clear_error();
  open_->SSL_shutdown(ssl_);
  flush();
}

// Why OpenSSL returned `result`, which is no success.
int64_t Socket::failed(int result) {
  const int saved = errno;
  switch (open_->SSL_get_error(ssl_, result)) {
    case kErrorWantRead:
      return kWantsRead;
    case kErrorWantWrite:
      return kWantsWrite;
    case kErrorZeroReturn:
      return kEnd;
    case kErrorSyscall:
      broken_ = true;
      if (saved == 0) return kEnd;
      error_ = std::strerror(saved);
      return kBroken;
    default:
      broken_ = true;
  }
  const long verified = open_->SSL_get_verify_result(ssl_);
  const unsigned long code = open_->ERR_get_error();
  const char* const reason = code ? open_->ERR_reason_error_string(code) : nullptr;
  if (reason && std::string(reason) == "unexpected eof while reading") return kEnd;
  if (verified != 0) {
    error_ = std::string("certificate: ") + open_->X509_verify_cert_error_string(verified);
  } else {
    error_ = reason ? reason : "TLS failed";
  }
  return kBroken;
}

}  // namespace moehive

using moehive::Socket;

// See Socket; null: without memory, or without OpenSSL.
EXPORT Socket* moehive_socket(int32_t descriptor, ssl_ctx_st* context, const char* name) {
  Socket* const made = new (std::nothrow) Socket(descriptor, context, name);
  if (made && made->sound()) return made;
  delete made;
  return nullptr;
}

EXPORT void moehive_socket_end(Socket* socket) { delete socket; }
EXPORT int64_t moehive_socket_shake_hands(Socket* socket) { return socket->shake_hands(); }
EXPORT int64_t moehive_socket_read(Socket* socket, uint8_t* to, int64_t room) { return socket->read(to, room); }
EXPORT int64_t moehive_socket_write(Socket* socket, const uint8_t* from, int64_t size, int32_t more) {
  return socket->write(from, size, more != 0);
}
EXPORT void moehive_socket_say_end(Socket* socket) { socket->say_end(); }

// Why it is broken; until the next call.
EXPORT const char* moehive_socket_error(const Socket* socket) { return socket->error().c_str(); }

// The other side's certificate in DER: its bytes, of which `room` go to `to`; 0: none.
EXPORT int64_t moehive_socket_certificate(const Socket* socket, uint8_t* to, int64_t room) {
  if (!socket->ssl()) return 0;
  const moehive::OpenSsl& open = *moehive::openssl();
  x509_st* const certificate = open.SSL_get1_peer_certificate(socket->ssl());
  if (!certificate) return 0;
  int64_t size = open.i2d_X509(certificate, nullptr);
  if (size > 0 && size <= room) {
    unsigned char* end = to;
    size = open.i2d_X509(certificate, &end);
  }
  open.X509_free(certificate);
  return std::max<int64_t>(size, 0);
}

// Whether both sides agreed on HTTP/2.
EXPORT int32_t moehive_socket_speaks_http2(const Socket* socket) {
  if (!socket->ssl()) return 1;
  const unsigned char* name = nullptr;
  unsigned size = 0;
  moehive::openssl()->SSL_get0_alpn_selected(socket->ssl(), &name, &size);
  return size == 2 && std::memcmp(name, "h2", 2) == 0;
}

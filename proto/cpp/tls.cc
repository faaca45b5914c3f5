// What an end of a connection shows and whom it believes, as OpenSSL wants it: proto/wire/tls.py.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "openssl.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace moehive {
namespace {

// Of OpenSSL's headers, which keep them as they are.
constexpr int kMode = 33, kReadAhead = 41, kSessionCache = 44, kChainCertificate = 89, kLeastVersion = 123;
constexpr long kPartialWrites = 1, kMovingBuffer = 2, kTls13 = 0x0304;
constexpr int kVerifyPeer = 1, kFailWithoutCertificate = 2;
constexpr int kAlpnOk = 0, kAlpnFatal = 2;
constexpr int kMostCertificates = 16;
constexpr size_t kReadBytes = 64 << 10;  // at once from the system: four records

constexpr unsigned char kHttp2[] = {2, 'h', '2'};

int choose_http2(SSL*, const unsigned char** out, unsigned char* size, const unsigned char* offered, unsigned length,
                 void*) {
  for (unsigned at = 0; at < length; at += 1 + offered[at])
    if (offered[at] == 2 && at + 3 <= length && std::memcmp(offered + at + 1, "h2", 2) == 0)
      return *out = offered + at + 1, *size = 2, kAlpnOk;
  return kAlpnFatal;
}

bool believe(const OpenSsl& open, SSL_CTX* context, const char* pem) {
  bio_st* const text = open.BIO_new_mem_buf(pem, -1);
  int found = 0;
  while (text && found < kMostCertificates) {
    X509* const one = open.PEM_read_bio_X509(text, nullptr, nullptr, nullptr);
    if (!one) break;
    if (open.X509_STORE_add_cert(open.SSL_CTX_get_cert_store(context), one) == 1) ++found;
    open.X509_free(one);
  }
  if (text) open.BIO_free(text);
  return found > 0;
}

// The first certificate is this side's own, the others lead to its authority.
bool show(const OpenSsl& open, SSL_CTX* context, const char* chain_pem, const char* key_pem) {
  bio_st* const text = open.BIO_new_mem_buf(chain_pem, -1);
  int found = 0;
  bool right = text != nullptr;
  while (right && found < kMostCertificates) {
    X509* const one = open.PEM_read_bio_X509(text, nullptr, nullptr, nullptr);
    if (!one) break;
    // The context has a hold of its own on each.
    right = found == 0 ? open.SSL_CTX_use_certificate(context, one) == 1
                       : open.SSL_CTX_ctrl(context, kChainCertificate, 1, one) == 1;
    open.X509_free(one);
    ++found;
  }
  if (text) open.BIO_free(text);
  if (!right || found == 0) return false;
  bio_st* const secret = open.BIO_new_mem_buf(key_pem, -1);
  evp_pkey_st* const key = secret ? open.PEM_read_bio_PrivateKey(secret, nullptr, nullptr, nullptr) : nullptr;
  right = key && open.SSL_CTX_use_PrivateKey(context, key) == 1 && open.SSL_CTX_check_private_key(context) == 1;
  if (key) open.EVP_PKEY_free(key);
  if (secret) open.BIO_free(secret);
  return right;
}

SSL_CTX* make(const OpenSsl& open, bool server, const char* key_pem, const char* chain_pem, const char* ca_pem) {
  open.ERR_clear_error();
  SSL_CTX* const context = open.SSL_CTX_new(server ? open.TLS_server_method() : open.TLS_client_method());
  if (!context) return nullptr;
  open.SSL_CTX_ctrl(context, kLeastVersion, kTls13, nullptr);  // members run this software: none is older
  open.SSL_CTX_ctrl(context, kMode, kPartialWrites | kMovingBuffer, nullptr);
  open.SSL_CTX_ctrl(context, kReadAhead, 1, nullptr);
  open.SSL_CTX_set_default_read_buffer_len(context, kReadBytes);
  open.SSL_CTX_ctrl(context, kSessionCache, 0, nullptr);
  open.SSL_CTX_set_verify(context, kVerifyPeer | kFailWithoutCertificate, nullptr);
  if (server) {
    open.SSL_CTX_set_num_tickets(context, 0);
    open.SSL_CTX_set_alpn_select_cb(context, choose_http2, nullptr);
  } else {
    open.SSL_CTX_set_alpn_protos(context, kHttp2, sizeof kHttp2);
  }
  if (believe(open, context, ca_pem) && show(open, context, chain_pem, key_pem)) return context;
  open.SSL_CTX_free(context);
  return nullptr;
}

}  // namespace
}  // namespace moehive

// Whether this system has OpenSSL 3.
EXPORT int32_t moehive_tls_there() { return moehive::openssl() != nullptr; }

// For connections that this side begins, or answers; each end shows a certificate. Null, and 160 bytes of `why`, for a
// key, a certificate or an authority (PEM, ending in 0) that OpenSSL does not take.
EXPORT ssl_ctx_st* moehive_tls_context(int32_t server, const char* key_pem, const char* chain_pem, const char* ca_pem,
                                       char* why) {
  const moehive::OpenSsl& open = *moehive::openssl();
  ssl_ctx_st* const made = moehive::make(open, server != 0, key_pem, chain_pem, ca_pem);
  if (made) return made;
  const unsigned long code = open.ERR_get_error();
  const char* const reason = code ? open.ERR_reason_error_string(code) : nullptr;
  std::snprintf(why, 160, "%s", reason ? reason : "it is not in PEM");
  return nullptr;
}

EXPORT void moehive_tls_context_end(ssl_ctx_st* context) { moehive::openssl()->SSL_CTX_free(context); }

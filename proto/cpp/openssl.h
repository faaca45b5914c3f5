// The system's OpenSSL 3, found when the first connection is made: nothing of it is needed to build, and its security
// updates are the system's. Python's own `ssl` is usually linked to the same library.
#ifndef MOEHIVE_PROTO_OPENSSL_H_
#define MOEHIVE_PROTO_OPENSSL_H_

#include <cstddef>

// OpenSSL's types, of which only addresses pass through here.
struct ssl_st;
struct ssl_ctx_st;
struct ssl_method_st;
struct x509_st;
struct x509_store_st;
struct evp_pkey_st;
struct bio_st;
struct bio_method_st;

namespace moehive {

using SSL = ssl_st;
using SSL_CTX = ssl_ctx_st;
using X509 = x509_st;

// Each function that is used, as OpenSSL's manual has it.
#define MOEHIVE_SSL_FUNCTIONS(F)                                                                                      \
  F(const ssl_method_st*, TLS_client_method, ())                                                                      \
  F(const ssl_method_st*, TLS_server_method, ())                                                                      \
  F(SSL_CTX*, SSL_CTX_new, (const ssl_method_st*))                                                                    \
  F(void, SSL_CTX_free, (SSL_CTX*))                                                                                   \
  F(long, SSL_CTX_ctrl, (SSL_CTX*, int, long, void*))                                                                 \
  F(void, SSL_CTX_set_verify, (SSL_CTX*, int, int (*)(int, void*)))                                                   \
  F(int, SSL_CTX_use_certificate, (SSL_CTX*, X509*))                                                                  \
  F(int, SSL_CTX_use_PrivateKey, (SSL_CTX*, evp_pkey_st*))                                                            \
  F(int, SSL_CTX_check_private_key, (const SSL_CTX*))                                                                 \
  F(x509_store_st*, SSL_CTX_get_cert_store, (const SSL_CTX*))                                                         \
  F(int, SSL_CTX_set_alpn_protos, (SSL_CTX*, const unsigned char*, unsigned))                                         \
  F(void, SSL_CTX_set_alpn_select_cb,                                                                                 \
    (SSL_CTX*, int (*)(SSL*, const unsigned char**, unsigned char*, const unsigned char*, unsigned, void*), void*))   \
  F(int, SSL_CTX_set_num_tickets, (SSL_CTX*, size_t))                                                                 \
  F(void, SSL_CTX_set_default_read_buffer_len, (SSL_CTX*, size_t))                                                    \
  F(SSL*, SSL_new, (SSL_CTX*))                                                                                        \
  F(void, SSL_free, (SSL*))                                                                                           \
  F(int, SSL_set_fd, (SSL*, int))                                                                                     \
  F(void, SSL_set0_wbio, (SSL*, bio_st*))                                                                             \
  F(void, SSL_set_accept_state, (SSL*))                                                                               \
  F(void, SSL_set_connect_state, (SSL*))                                                                              \
  F(int, SSL_do_handshake, (SSL*))                                                                                    \
  F(int, SSL_read, (SSL*, void*, int))                                                                                \
  F(int, SSL_write, (SSL*, const void*, int))                                                                         \
  F(int, SSL_get_error, (const SSL*, int))                                                                            \
  F(int, SSL_has_pending, (const SSL*))                                                                               \
  F(int, SSL_shutdown, (SSL*))                                                                                        \
  F(long, SSL_ctrl, (SSL*, int, long, void*))                                                                         \
  F(int, SSL_set1_host, (SSL*, const char*))                                                                          \
  F(void, SSL_set_hostflags, (SSL*, unsigned))                                                                        \
  F(long, SSL_get_verify_result, (const SSL*))                                                                        \
  F(X509*, SSL_get1_peer_certificate, (const SSL*))                                                                   \
  F(void, SSL_get0_alpn_selected, (const SSL*, const unsigned char**, unsigned*))

#define MOEHIVE_CRYPTO_FUNCTIONS(F)                                                                                   \
  F(bio_st*, BIO_new_mem_buf, (const void*, int))                                                                     \
  F(int, BIO_free, (bio_st*))                                                                                         \
  F(bio_method_st*, BIO_meth_new, (int, const char*))                                                                 \
  F(int, BIO_meth_set_write, (bio_method_st*, int (*)(bio_st*, const char*, int)))                                    \
  F(int, BIO_meth_set_ctrl, (bio_method_st*, long (*)(bio_st*, int, long, void*)))                                    \
  F(bio_st*, BIO_new, (const bio_method_st*))                                                                         \
  F(void, BIO_set_data, (bio_st*, void*))                                                                             \
  F(void*, BIO_get_data, (bio_st*))                                                                                   \
  F(void, BIO_set_init, (bio_st*, int))                                                                               \
  F(X509*, PEM_read_bio_X509, (bio_st*, X509**, int (*)(char*, int, int, void*), void*))                              \
  F(evp_pkey_st*, PEM_read_bio_PrivateKey, (bio_st*, evp_pkey_st**, int (*)(char*, int, int, void*), void*))          \
  F(void, X509_free, (X509*))                                                                                         \
  F(void, EVP_PKEY_free, (evp_pkey_st*))                                                                              \
  F(int, X509_STORE_add_cert, (x509_store_st*, X509*))                                                                \
  F(int, i2d_X509, (const X509*, unsigned char**))                                                                    \
  F(const char*, X509_verify_cert_error_string, (long))                                                               \
  F(unsigned long, ERR_get_error, ())                                                                                 \
  F(void, ERR_clear_error, ())                                                                                        \
  F(const char*, ERR_reason_error_string, (unsigned long))

struct OpenSsl {
#define MOEHIVE_POINTER(result, name, arguments) result(*name) arguments;
  MOEHIVE_SSL_FUNCTIONS(MOEHIVE_POINTER)
  MOEHIVE_CRYPTO_FUNCTIONS(MOEHIVE_POINTER)
#undef MOEHIVE_POINTER
};

// Null when the system has none.
const OpenSsl* openssl();

}  // namespace moehive

#endif

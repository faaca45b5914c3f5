#include "openssl.h"

#include <dlfcn.h>

namespace moehive {
namespace {

#ifdef __APPLE__
constexpr const char *kSsl = "libssl.3.dylib", *kCrypto = "libcrypto.3.dylib";
#else
constexpr const char *kSsl = "libssl.so.3", *kCrypto = "libcrypto.so.3";
#endif

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool load(OpenSsl& functions) {
  void* const ssl = dlopen(kSsl, RTLD_NOW | RTLD_LOCAL);
  void* const crypto = dlopen(kCrypto, RTLD_NOW | RTLD_LOCAL);
  if (!ssl || !crypto) return false;
#define MOEHIVE_FIND_SSL(result, name, arguments) \
  if (!find(ssl, #name, functions.name)) return false;
  MOEHIVE_SSL_FUNCTIONS(MOEHIVE_FIND_SSL)
#undef MOEHIVE_FIND_SSL
#define MOEHIVE_FIND_CRYPTO(result, name, arguments) \
  if (!find(crypto, #name, functions.name)) return false;
  MOEHIVE_CRYPTO_FUNCTIONS(MOEHIVE_FIND_CRYPTO)
#undef MOEHIVE_FIND_CRYPTO
  return true;
}

}  // namespace

const OpenSsl* openssl() {
  static OpenSsl functions;
  static const bool there = load(functions);
  return there ? &functions : nullptr;
}

}  // namespace moehive

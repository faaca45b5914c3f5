// The AVX-512 kernel with dot products of four bytes (dpbusd). Compiled with -mavx512vnni.
#include "avx512.cc"

// The AVX-512 kernel with dot products of two bf16 numbers (vdpbf16ps). Compiled with -mavx512bf16, -mavx512vbmi and
// -mavx512vnni.
#include "avx512.cc"

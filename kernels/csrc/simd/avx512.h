// AVX-512 with VNNI: the eight lanes of simd/avx2.h, with the integer dot products in one instruction.
// Sums of integers are exact, so results are those of AVX2 bit by bit.
#pragma once

#if !defined(__AVX512VNNI__) || !defined(__AVX512VL__)
#error "compile with -mavx512vl -mavx512vnni"
#endif
#include "avx2.h"

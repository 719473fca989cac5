// The kernels for products of bfloat16 pairs in AVX-512. The pragma stays in force to the end of the file, where
// templates are instantiated.
#include "tile_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>  // before the pragma, which its ordinary functions must not see
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in that header: GCC bug 105593
#endif
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif

#define SSD_CORE_ISA avx512bf16
#define SSD_CORE_VECTOR_BYTES 64
#define SSD_CORE_PANEL_VECTORS 4
#define SSD_CORE_BFLOAT16
#include "tile_kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

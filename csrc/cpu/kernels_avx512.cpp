// The kernels for AVX-512 (F, BW, DQ, VL). The pragma stays in force to the end of the file, where templates are
// instantiated.
#include "row_kernels.h"
#include "sample_kernel.h"
#include "tile_kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#define SSD_CORE_ISA avx512
#define SSD_CORE_VECTOR_BYTES 64
#define SSD_CORE_PANEL_VECTORS 4
#include "row_kernels.inc.h"
#include "sample_kernel.inc.h"
#include "tile_kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

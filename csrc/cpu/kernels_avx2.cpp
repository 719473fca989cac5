// The kernels for AVX2 with FMA. The pragma stays in force to the end of the file, where templates are
// instantiated.
#include "row_kernels.h"
#include "sample_kernel.h"
#include "tile_kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define SSD_CORE_ISA avx2
#define SSD_CORE_VECTOR_BYTES 32
#define SSD_CORE_PANEL_VECTORS 2
#include "row_kernels.inc.h"
#include "sample_kernel.inc.h"
#include "tile_kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

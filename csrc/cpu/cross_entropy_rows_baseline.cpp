// The kernels for the compiler's default target: SSE2 on x86-64, NEON on AArch64.
#include "cross_entropy_rows_kernel.h"

#define SSD_CORE_ISA baseline
#include "cross_entropy_rows_kernel.inc.h"

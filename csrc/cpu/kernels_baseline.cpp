// The kernels for any machine of this architecture.
#include "row_kernels.h"
#include "sample_kernel.h"
#include "tile_kernels.h"

#define SSD_CORE_ISA baseline
#define SSD_CORE_VECTOR_BYTES 16
#if defined(__aarch64__)
#define SSD_CORE_PANEL_VECTORS 4  // of 32 registers
#else
#define SSD_CORE_PANEL_VECTORS 2  // of 16
#endif
#include "row_kernels.inc.h"
#include "sample_kernel.inc.h"
#include "tile_kernels.inc.h"

#define EMSPLAT_ISA baseline
#define EMSPLAT_VECTOR_BYTES 16
#include "splat_kernels.hpp"

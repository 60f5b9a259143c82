#define EMSPLAT_ISA avx2
#define EMSPLAT_VECTOR_BYTES 32
#include "splat_kernels.hpp"

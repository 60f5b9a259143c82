#define EMSPLAT_ISA avx512
#define EMSPLAT_VECTOR_BYTES 64
#include "splat_kernels.hpp"

// The CPU kernels of INT16 integer convolutions, built once for each CPU level.
#include "integer_conv/cpu_pointwise.h"
#include "integer_conv/cpu_weight.h"

namespace viops::integer_conv {

extern const CpuKernels VIOPS_LEVEL_NAME(kernels);
const CpuKernels VIOPS_LEVEL_NAME(kernels) = {largest,      quantize,        packed_bytes,   pack,
                                              convolve_any, convolve_floats, weight_gradient};

}  // namespace viops::integer_conv

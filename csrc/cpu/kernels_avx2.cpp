#include "generic.h"

namespace comoe {

const Kernels kAvx2Kernels = {"avx2", false,         multiply, load,
                              store,  prepare_group, activate, unpack_tile};

}  // namespace comoe

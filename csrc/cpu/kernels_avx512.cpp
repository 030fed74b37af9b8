#include "generic.h"

namespace comoe {

const Kernels kAvx512Kernels = {"avx512", false,         multiply, load,
                                store,    prepare_group, activate, unpack_tile};

}  // namespace comoe

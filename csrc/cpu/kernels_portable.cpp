#include "generic.h"

namespace comoe {

const Kernels kPortableKernels = {"portable",    false,    multiply,    load,    store,
                                  prepare_group, activate, unpack_tile, project, attend};

}  // namespace comoe

#include "generic.h"

namespace comoe {

const Kernels kVnniKernels = {"avx512_vnni_bf16", false, tile, load, store, prepare_group, activate, unpack_tile};

}  // namespace comoe

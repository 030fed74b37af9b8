// What cuda/driver.h declares by itself is what the toolkit's header declares.
#include <cuda.h>

#include <type_traits>

#include "driver.h"

namespace comoe {

static_assert(sizeof(CuAllocationProp) == sizeof(CUmemAllocationProp));
static_assert(offsetof(CuAllocationProp, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(CuAllocationProp, flags) == offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(CuAccessDesc) == sizeof(CUmemAccessDesc));
static_assert(offsetof(CuAccessDesc, flags) == offsetof(CUmemAccessDesc, flags));
static_assert(sizeof(CUresult) == sizeof(CuResult) && sizeof(CUdeviceptr) == sizeof(uint64_t));
static_assert(sizeof(CUmemGenericAllocationHandle) == sizeof(unsigned long long));
static_assert(CUDA_ERROR_OUT_OF_MEMORY == kCuOutOfMemory && CUDA_ERROR_NOT_READY == kCuNotReady);
static_assert(CU_DEVICE_ATTRIBUTE_INTEGRATED == 18 &&
              CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING == 41 &&
              CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED == 102 &&
              CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS == 122);
static_assert(CU_MEM_ALLOCATION_TYPE_PINNED == 1 && CU_MEM_LOCATION_TYPE_DEVICE == 1 &&
              CU_MEM_ACCESS_FLAGS_PROT_READWRITE == 3 && CU_STREAM_NON_BLOCKING == 1);
static_assert((CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP) == 3 &&
              (CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP) == 3);

}  // namespace comoe

// The CUDA driver, opened when it is asked for: no toolkit is needed to build this, and no driver
// to run without a GPU. Declared here as far as it is used; cuda/driver_check.cu compares it with
// the toolkit's header where there is one. The tests put functions of their own into the table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "../device/device_api.h"

namespace comoe {

using CuResult = int;
constexpr CuResult kCuSuccess = 0, kCuOutOfMemory = 2, kCuNotReady = 600;
constexpr int kOldestDriver = 12000;  // CUDA 12.0, as cuDriverGetVersion counts

struct CuLocation {
  int type, id;
};
struct CuAllocationProp {
  int type, handle_types;
  CuLocation location;
  void* win32;
  unsigned char flags[8];
};
struct CuAccessDesc {
  CuLocation location;
  int flags;
};

// Members are named as the driver's symbols, without "cu"; `load_driver` says which versions.
struct DriverTable {
  CuResult (*Init)(unsigned);
  CuResult (*DriverGetVersion)(int*);
  CuResult (*GetErrorString)(CuResult, const char**);
  CuResult (*DeviceGetCount)(int*);
  CuResult (*DeviceGet)(int*, int);
  CuResult (*DeviceGetName)(char*, int, int);
  CuResult (*DeviceGetAttribute)(int*, int, int);
  CuResult (*DevicePrimaryCtxRetain)(void**, int);
  CuResult (*DevicePrimaryCtxRelease)(int);
  CuResult (*CtxSetCurrent)(void*);
  CuResult (*CtxGetStreamPriorityRange)(int*, int*);
  CuResult (*MemGetInfo)(size_t*, size_t*);
  CuResult (*MemGetAllocationGranularity)(size_t*, const CuAllocationProp*, int);
  CuResult (*MemAddressReserve)(uint64_t*, size_t, size_t, uint64_t, unsigned long long);
  CuResult (*MemAddressFree)(uint64_t, size_t);
  CuResult (*MemCreate)(unsigned long long*, size_t, const CuAllocationProp*, unsigned long long);
  CuResult (*MemRelease)(unsigned long long);
  CuResult (*MemMap)(uint64_t, size_t, size_t, unsigned long long, unsigned long long);
  CuResult (*MemUnmap)(uint64_t, size_t);
  CuResult (*MemSetAccess)(uint64_t, size_t, const CuAccessDesc*, size_t);
  CuResult (*MemHostRegister)(void*, size_t, unsigned);
  CuResult (*MemHostUnregister)(void*);
  CuResult (*MemHostAlloc)(void**, size_t, unsigned);
  CuResult (*MemFreeHost)(void*);
  CuResult (*MemAlloc)(uint64_t*, size_t);
  CuResult (*MemFree)(uint64_t);
  CuResult (*MemsetD8)(uint64_t, unsigned char, size_t);
  CuResult (*MemcpyAsync)(uint64_t, uint64_t, size_t, void*);
  CuResult (*StreamCreateWithPriority)(void**, unsigned, int);
  CuResult (*StreamDestroy)(void*);
  CuResult (*StreamQuery)(void*);
  CuResult (*StreamSynchronize)(void*);
  CuResult (*StreamWriteValue32)(void*, uint64_t, uint32_t, unsigned);
  CuResult (*StreamWriteValue64)(void*, uint64_t, uint64_t, unsigned);
};

// Throws DeviceError where there is no driver, or one that lacks a function. `library`: for tests.
const DriverTable& load_driver(const char* library = "libcuda.so.1");

// Device `index` through the driver, in its primary context (that of torch). Throws DeviceError
// with what to do: no device, a driver that is too old, one that cannot map memory.
std::unique_ptr<DeviceApi> make_driver_device(const DriverTable& driver, int index);

}  // namespace comoe

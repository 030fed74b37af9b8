// The CUDA device through a driver of this test's own: what it asks for, and what it says when that
// fails. Where there is a GPU, COMOE_TEST_GPU=1 also runs the engine's stress on it.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "../cuda/driver.h"
#include "../device/device_backend.h"
#include "check.h"

using namespace comoe;

namespace {

// State of the driver that the functions below pretend to be.
struct Pretended {
  int version = 12040, devices = 1, integrated = 0, maps = 1;
  CuResult stream_state = kCuSuccess, init = kCuSuccess, create = kCuSuccess, host = kCuSuccess;
  CuResult access = kCuSuccess;
  int64_t created = 0, released = 0, mapped = 0, registered = 0, retained = 0, streams = 0;
  int priority = 0;
  size_t free = size_t{1} << 30;
} p;

DriverTable pretend() {
  DriverTable t{};
  t.Init = [](unsigned) { return p.init; };
  t.DriverGetVersion = [](int* v) { return *v = p.version, 0; };
  t.GetErrorString = [](CuResult r, const char** s) {
    *s = r == 3 ? "initialization error" : "an illegal address was met";
    return 0;
  };
  t.DeviceGetCount = [](int* n) { return *n = p.devices, 0; };
  t.DeviceGet = [](int* d, int i) { return *d = i, 0; };
  t.DeviceGetName = [](char* s, int, int) { return std::strcpy(s, "Pretended GPU"), 0; };
  t.DeviceGetAttribute = [](int* v, int which, int) {
    *v = which == 18 ? p.integrated : which == 102 ? p.maps : 1;
    return 0;
  };
  t.DevicePrimaryCtxRetain = [](void** c, int) { return *c = &p, ++p.retained, 0; };
  t.DevicePrimaryCtxRelease = [](int) { return --p.retained, 0; };
  t.CtxSetCurrent = [](void* c) { return c == &p ? 0 : 1; };
  t.CtxGetStreamPriorityRange = [](int* least, int* greatest) {
    return *least = 0, *greatest = -5, 0;
  };
  t.MemGetInfo = [](size_t* f, size_t* total) { return *f = p.free, *total = size_t{2} << 30, 0; };
  t.MemGetAllocationGranularity = [](size_t* g, const CuAllocationProp* prop, int) {
    CHECK(prop->type == 1 && prop->location.type == 1);
    return *g = size_t{2} << 20, 0;
  };
  t.MemAddressReserve = [](uint64_t* a, size_t, size_t, uint64_t, unsigned long long) {
    return *a = uint64_t{1} << 40, 0;
  };
  t.MemAddressFree = [](uint64_t, size_t) { return 0; };
  t.MemCreate = [](unsigned long long* h, size_t, const CuAllocationProp*, unsigned long long) {
    if (p.create == kCuSuccess) ++p.created;
    return *h = 7, p.create;
  };
  t.MemRelease = [](unsigned long long) { return ++p.released, 0; };
  t.MemMap = [](uint64_t, size_t, size_t, unsigned long long, unsigned long long) {
    return ++p.mapped, 0;
  };
  t.MemUnmap = [](uint64_t, size_t) { return --p.mapped, 0; };
  t.MemSetAccess = [](uint64_t, size_t, const CuAccessDesc* a, size_t) {
    CHECK(a->flags == 3);
    return p.access;
  };
  t.MemHostRegister = [](void*, size_t, unsigned) {
    if (p.host == kCuSuccess) ++p.registered;
    return p.host;
  };
  t.MemHostUnregister = [](void*) { return --p.registered, 0; };
  t.MemHostAlloc = [](void** h, size_t n, unsigned) { return *h = std::calloc(1, n), p.host; };
  t.MemFreeHost = [](void* h) { return std::free(h), 0; };
  t.MemAlloc = [](uint64_t* a, size_t n) {
    return *a = reinterpret_cast<uint64_t>(std::malloc(n)), 0;
  };
  t.MemFree = [](uint64_t a) { return std::free(reinterpret_cast<void*>(a)), 0; };
  t.MemsetD8 = [](uint64_t a, unsigned char v, size_t n) {
    return std::memset(reinterpret_cast<void*>(a), v, n), 0;
  };
  t.MemcpyAsync = [](uint64_t to, uint64_t from, size_t n, void*) {
    return std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), n), 0;
  };
  t.StreamCreateWithPriority = [](void** s, unsigned, int priority) {
    return *s = &p, ++p.streams, p.priority = priority, 0;
  };
  t.StreamDestroy = [](void*) { return --p.streams, 0; };
  t.StreamQuery = [](void*) { return p.stream_state; };
  t.StreamSynchronize = [](void*) { return 0; };
  t.StreamWriteValue32 = [](void*, uint64_t a, uint32_t v, unsigned) {
    return *reinterpret_cast<uint32_t*>(a) = v, 0;
  };
  t.StreamWriteValue64 = [](void*, uint64_t a, uint64_t v, unsigned) {
    return *reinterpret_cast<uint64_t*>(a) = v, 0;
  };
  return t;
}

const DriverTable table = pretend();

void test_memory_and_copies() {
  p = {};
  {
    auto device = make_driver_device(table, 0);
    CHECK(device->name() == "Pretended GPU" && !device->unified());
    CHECK(device->granularity() == 2 << 20 && device->free_bytes() == int64_t{1} << 30);
    CHECK(p.priority == -5);  // copies before kernels
    const uint64_t at = device->reserve(8 << 20);
    CHECK(device->map(at, 2 << 20) && p.mapped == 1 && p.released == p.created);
    p.create = kCuOutOfMemory;
    CHECK(!device->map(at + (2 << 20), 2 << 20) && p.mapped == 1);
    p.create = kCuSuccess;
    p.access = kCuOutOfMemory;
    CHECK(!device->map(at + (2 << 20), 2 << 20) && p.mapped == 1 && p.released == p.created);
    device->unmap(at, 2 << 20);
    CHECK(p.mapped == 0);
    const uint64_t small = device->allocate(64);
    void* const host = device->allocate_mapped(64);
    std::memcpy(host, "twelve bytes", 12);
    const DeviceCopy copy{small, reinterpret_cast<uint64_t>(host), 12};
    device->copy(&copy, 1);
    CHECK(device->mark() == 1 && device->reached() == 1 && device->mark() == 2);
    CHECK(std::memcmp(reinterpret_cast<void*>(small), "twelve bytes", 12) == 0);
    device->write_count(small, 77);
    CHECK(*reinterpret_cast<uint64_t*>(small) == 77);
    p.stream_state = kCuNotReady;
    CHECK(device->reached() == 2);  // still under way
    p.stream_state = 700;
    CHECK_THROWS(device->reached(), DeviceError, "cuStreamQuery failed: an illegal address");
    p.stream_state = kCuSuccess;
    p.host = 2;
    CHECK(!device->pin(host, 64));
    p.host = kCuSuccess;
    device->free_mapped(host);
    device->free(small);
  }
  CHECK(p.retained == 0 && p.streams == 0);
}

void test_what_is_wrong_is_said() {
  CHECK_THROWS(load_driver("libcomoe_no_such_driver.so"), DeviceError, "there is no NVIDIA driver");
  if (dlopen("libc.so.6", RTLD_NOW))  // not there where all is linked in, as for an emulator
    CHECK_THROWS(load_driver("libc.so.6"), DeviceError, "has no cuInit: it is too old");
  p = {};
  p.version = 11080;
  CHECK_THROWS(make_driver_device(table, 0), DeviceError, "made for CUDA 11.8, comoe needs 12.0");
  p = {};
  p.devices = 0;
  CHECK_THROWS(make_driver_device(table, 0), DeviceError, "one of the 0 CUDA devices");
  p = {};
  CHECK_THROWS(make_driver_device(table, 1), DeviceError, "got number 1");
  p.maps = 0;
  CHECK_THROWS(make_driver_device(table, 0), DeviceError, "cannot map memory");
  p = {};
  p.init = 3;
  CHECK_THROWS(make_driver_device(table, 0), DeviceError, "cuInit failed: initialization error");
  p = {};
  p.host = 2;  // no pinned memory for the counter
  CHECK_THROWS(make_driver_device(table, 0), DeviceError, "cuMemHostAlloc failed");
  CHECK(p.retained == 0 && p.streams == 0);
}

void test_budget_above_the_card() {
  p = {};
  auto device = make_driver_device(table, 0);
  EngineConfig config;
  config.page_bytes = 4096;
  config.slab_bytes = 2 << 20;
  config.budget_bytes = int64_t{3} << 30;
  config.level_masks = {1};
  DeviceConfig d;
  d.host_bytes = 8 << 20;
  CHECK_THROWS(DeviceBackend(config, d, device.get()), BudgetError,
               "at most the 1073741824 bytes that are free of the 2147483648 of Pretended GPU");
  config.budget_bytes = 8 << 20;
  config.slab_bytes = 1 << 20;
  CHECK_THROWS(DeviceBackend(config, d, device.get()), std::invalid_argument,
               "slab_bytes: expected a multiple of 2097152");
}

}  // namespace

int main() {
  test_memory_and_copies();
  test_what_is_wrong_is_said();
  test_budget_above_the_card();
  return check_failures != 0;
}

#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

namespace comoe {
namespace {

constexpr int kIntegrated = 18, kUnifiedAddressing = 41, kMapsMemory = 102;  // CUdevice_attribute
constexpr int kWrites64 = 122;  // CAN_USE_64_BIT_STREAM_MEM_OPS
constexpr int kPinned = 1, kOnDevice = 1, kReadWrite = 3;
constexpr unsigned kPortableMapped = 3;  // of cuMemHostAlloc and cuMemHostRegister
constexpr unsigned kNonBlocking = 1;

class DriverDevice final : public DeviceApi {
 public:
  DriverDevice(const DriverTable& driver, int index) : d_(driver) {
    int version = 0, count = 0;
    check(d_.Init(0), "cuInit");
    check(d_.DriverGetVersion(&version), "cuDriverGetVersion");
    if (version < kOldestDriver)
      throw DeviceError("the NVIDIA driver here is made for CUDA " + dotted(version) +
                        ", comoe needs " + dotted(kOldestDriver) +
                        " or later: update the driver, or use device=\"cpu\"");
    check(d_.DeviceGetCount(&count), "cuDeviceGetCount");
    if (index < 0 || index >= count)
      throw DeviceError("device: expected one of the " + std::to_string(count) +
                        " CUDA devices that the driver shows, got number " + std::to_string(index));
    check(d_.DeviceGet(&device_, index), "cuDeviceGet");
    char name[256] = "";
    check(d_.DeviceGetName(name, sizeof(name) - 1, device_), "cuDeviceGetName");
    name_ = name;
    unified_ = attribute(kIntegrated) != 0;
    if (attribute(kUnifiedAddressing) == 0 || attribute(kMapsMemory) == 0 ||
        attribute(kWrites64) == 0)
      throw DeviceError(name_ +
                        " cannot map memory at chosen addresses or write flags from a stream, "
                        "which comoe needs: update the driver, or use device=\"cpu\"");
    check(d_.DevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
    try {
      check(d_.CtxSetCurrent(context_), "cuCtxSetCurrent");
      prop_ = {kPinned, 0, {kOnDevice, device_}, nullptr, {}};
      size_t granularity = 0;
      check(d_.MemGetAllocationGranularity(&granularity, &prop_, 0),
            "cuMemGetAllocationGranularity");
      granularity_ = static_cast<int64_t>(granularity);
      int least = 0, greatest = 0;
      check(d_.CtxGetStreamPriorityRange(&least, &greatest), "cuCtxGetStreamPriorityRange");
      // Copies go before kernels that could run at the same time: they are what others wait for.
      check(d_.StreamCreateWithPriority(&stream_, kNonBlocking, greatest),
            "cuStreamCreateWithPriority");
      void* counter = nullptr;
      check(d_.MemHostAlloc(&counter, sizeof(uint64_t), kPortableMapped), "cuMemHostAlloc");
      reached_ = static_cast<uint64_t*>(counter);
      *reached_ = 0;
    } catch (...) {
      if (stream_ != nullptr) d_.StreamDestroy(stream_);
      d_.DevicePrimaryCtxRelease(device_);
      throw;
    }
  }
  ~DriverDevice() override {  // errors: nothing can be done about them
    d_.CtxSetCurrent(context_);
    d_.StreamSynchronize(stream_);
    d_.StreamDestroy(stream_);
    d_.MemFreeHost(reached_);
    d_.DevicePrimaryCtxRelease(device_);
  }

  std::string name() const override { return name_; }
  int64_t total_bytes() const override { return memory().second; }
  int64_t free_bytes() const override { return memory().first; }
  bool unified() const override { return unified_; }
  int64_t granularity() const override { return granularity_; }

  uint64_t reserve(int64_t bytes) override {
    enter();
    uint64_t address = 0;
    check(d_.MemAddressReserve(&address, size(bytes), 0, 0, 0), "cuMemAddressReserve");
    return address;
  }
  void release(uint64_t address, int64_t bytes) override {
    d_.CtxSetCurrent(context_);
    d_.MemAddressFree(address, size(bytes));
  }
  bool map(uint64_t address, int64_t bytes) override {
    enter();
    unsigned long long handle = 0;
    const CuResult made = d_.MemCreate(&handle, size(bytes), &prop_, 0);
    if (made == kCuOutOfMemory) return false;  // another process has it
    check(made, "cuMemCreate");
    const CuAccessDesc access{{kOnDevice, device_}, kReadWrite};
    CuResult result = d_.MemMap(address, size(bytes), 0, handle, 0);
    if (result == kCuSuccess) {
      result = d_.MemSetAccess(address, size(bytes), &access, 1);
      if (result != kCuSuccess) d_.MemUnmap(address, size(bytes));
    }
    d_.MemRelease(handle);  // the mapping keeps it
    if (result == kCuOutOfMemory) return false;
    check(result, "cuMemMap");
    return true;
  }
  void unmap(uint64_t address, int64_t bytes) override {
    enter();
    check(d_.MemUnmap(address, size(bytes)), "cuMemUnmap");
  }
  bool pin(void* host, int64_t bytes) override {
    d_.CtxSetCurrent(context_);
    return d_.MemHostRegister(host, size(bytes), kPortableMapped) == kCuSuccess;
  }
  void unpin(void* host, int64_t) override {
    d_.CtxSetCurrent(context_);
    d_.MemHostUnregister(host);
  }
  uint64_t allocate(int64_t bytes) override {
    enter();
    uint64_t address = 0;
    check(d_.MemAlloc(&address, size(bytes)), "cuMemAlloc");
    check(d_.MemsetD8(address, 0, size(bytes)), "cuMemsetD8");
    return address;
  }
  void free(uint64_t address) override {
    d_.CtxSetCurrent(context_);
    d_.MemFree(address);
  }
  void* allocate_mapped(int64_t bytes) override {
    enter();
    void* host = nullptr;
    check(d_.MemHostAlloc(&host, size(bytes), kPortableMapped), "cuMemHostAlloc");
    __builtin_memset(host, 0, size(bytes));
    return host;
  }
  void free_mapped(void* host) override {
    d_.CtxSetCurrent(context_);
    d_.MemFreeHost(host);
  }

  void copy(const DeviceCopy* copies, int count) override {
    enter();
    for (int i = 0; i < count; ++i)
      check(d_.MemcpyAsync(copies[i].to, copies[i].from, size(copies[i].bytes), stream_),
            "cuMemcpyAsync");
  }
  // Both write behind a fence that makes all earlier work of the stream visible (the default).
  void write_word(uint64_t address, uint32_t value) override {
    enter();
    check(d_.StreamWriteValue32(stream_, address, value, 0), "cuStreamWriteValue32");
  }
  void write_count(uint64_t address, uint64_t value) override {
    enter();
    check(d_.StreamWriteValue64(stream_, address, value, 0), "cuStreamWriteValue64");
  }
  uint64_t mark() override {
    enter();
    std::lock_guard<std::mutex> lock(mutex_);
    check(d_.StreamWriteValue64(stream_, reinterpret_cast<uint64_t>(reached_), ++marks_, 0),
          "cuStreamWriteValue64");
    return marks_;
  }
  uint64_t reached() override {
    const uint64_t reached = __atomic_load_n(reached_, __ATOMIC_ACQUIRE);
    enter();
    const CuResult state = d_.StreamQuery(stream_);  // a lost device says so here
    if (state != kCuNotReady) check(state, "cuStreamQuery");
    return reached;
  }

 private:
  static size_t size(int64_t bytes) { return static_cast<size_t>(bytes); }
  static std::string dotted(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  }
  void enter() const { check(d_.CtxSetCurrent(context_), "cuCtxSetCurrent"); }
  int attribute(int which) const {
    int value = 0;
    check(d_.DeviceGetAttribute(&value, which, device_), "cuDeviceGetAttribute");
    return value;
  }
  std::pair<int64_t, int64_t> memory() const {
    enter();
    size_t free = 0, total = 0;
    check(d_.MemGetInfo(&free, &total), "cuMemGetInfo");
    return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
  }
  void check(CuResult result, const char* call) const {
    if (result == kCuSuccess) return;
    const char* text = nullptr;
    if (d_.GetErrorString(result, &text) != kCuSuccess || text == nullptr) text = "unknown error";
    throw DeviceError(std::string(call) + " failed: " + text + " (error " + std::to_string(result) +
                      (name_.empty() ? "" : ", " + name_) +
                      "); the device's state is lost: end the process and start it again, or use "
                      "device=\"cpu\"");
  }

  const DriverTable& d_;
  int device_ = 0;
  std::string name_;
  bool unified_ = false;
  void* context_ = nullptr;
  void* stream_ = nullptr;
  CuAllocationProp prop_{};
  int64_t granularity_ = 0;
  std::mutex mutex_;  // marks are in the stream in their order
  uint64_t marks_ = 0;
  uint64_t* reached_ = nullptr;  // mapped: the stream writes the marks that it has passed
};

}  // namespace

const DriverTable& load_driver(const char* library) {
  static std::mutex mutex;
  static std::map<std::string, DriverTable> loaded;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = loaded.find(library);
  if (found != loaded.end()) return found->second;
  void* const handle = dlopen(library, RTLD_NOW);
  if (handle == nullptr)
    throw DeviceError(std::string("there is no NVIDIA driver on this machine (") + dlerror() +
                      "): install it, or use device=\"cpu\"");
  DriverTable table{};
  const auto load = [&](auto& function, const char* symbol) {
    void* const at = dlsym(handle, symbol);
    if (at == nullptr)
      throw DeviceError(std::string("the NVIDIA driver ") + library + " has no " + symbol +
                        ": it is too old; update it, or use device=\"cpu\"");
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(at);
  };
  load(table.Init, "cuInit");
  load(table.DriverGetVersion, "cuDriverGetVersion");
  load(table.GetErrorString, "cuGetErrorString");
  load(table.DeviceGetCount, "cuDeviceGetCount");
  load(table.DeviceGet, "cuDeviceGet");
  load(table.DeviceGetName, "cuDeviceGetName");
  load(table.DeviceGetAttribute, "cuDeviceGetAttribute");
  load(table.DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  load(table.DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
  load(table.CtxSetCurrent, "cuCtxSetCurrent");
  load(table.CtxGetStreamPriorityRange, "cuCtxGetStreamPriorityRange");
  load(table.MemGetInfo, "cuMemGetInfo_v2");
  load(table.MemGetAllocationGranularity, "cuMemGetAllocationGranularity");
  load(table.MemAddressReserve, "cuMemAddressReserve");
  load(table.MemAddressFree, "cuMemAddressFree");
  load(table.MemCreate, "cuMemCreate");
  load(table.MemRelease, "cuMemRelease");
  load(table.MemMap, "cuMemMap");
  load(table.MemUnmap, "cuMemUnmap");
  load(table.MemSetAccess, "cuMemSetAccess");
  load(table.MemHostRegister, "cuMemHostRegister_v2");
  load(table.MemHostUnregister, "cuMemHostUnregister");
  load(table.MemHostAlloc, "cuMemHostAlloc");
  load(table.MemFreeHost, "cuMemFreeHost");
  load(table.MemAlloc, "cuMemAlloc_v2");
  load(table.MemFree, "cuMemFree_v2");
  load(table.MemsetD8, "cuMemsetD8_v2");
  load(table.MemcpyAsync, "cuMemcpyAsync");
  load(table.StreamCreateWithPriority, "cuStreamCreateWithPriority");
  load(table.StreamDestroy, "cuStreamDestroy_v2");
  load(table.StreamQuery, "cuStreamQuery");
  load(table.StreamSynchronize, "cuStreamSynchronize");
  load(table.StreamWriteValue32, "cuStreamWriteValue32_v2");
  load(table.StreamWriteValue64, "cuStreamWriteValue64_v2");
  return loaded.emplace(library, table).first->second;
}

std::unique_ptr<DeviceApi> make_driver_device(const DriverTable& driver, int index) {
  return std::make_unique<DriverDevice>(driver, index);
}

}  // namespace comoe

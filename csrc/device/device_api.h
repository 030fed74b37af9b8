// What the engine needs of a GPU: memory that can be given back, host memory that both see, and one
// stream of copies. The CUDA driver's is cuda/driver_device.h; tests use tests/fake_device.h.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace comoe {

// The device is lost or refuses to work: everything on it is gone. The text says what to do.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceCopy {
  uint64_t to;  // address on either side: one address space
  uint64_t from;
  int64_t bytes;
};

// Calls may come from any thread. Failures throw DeviceError, but for memory that is refused.
class DeviceApi {
 public:
  virtual ~DeviceApi() = default;

  virtual std::string name() const = 0;
  virtual int64_t total_bytes() const = 0;
  virtual int64_t free_bytes() const = 0;
  // The device computes in the host's own memory: one arena serves both.
  virtual bool unified() const = 0;

  // Address space, and memory mapped into it in multiples of granularity().
  virtual int64_t granularity() const = 0;
  virtual uint64_t reserve(int64_t bytes) = 0;
  virtual void release(uint64_t address, int64_t bytes) = 0;
  virtual bool map(uint64_t address, int64_t bytes) = 0;  // false: there is no more memory
  virtual void unmap(uint64_t address, int64_t bytes) = 0;

  // Memory of the caller that copies may use from now on, at the same address on the device where
  // unified(). False: the system lets no more be pinned.
  virtual bool pin(void* host, int64_t bytes) = 0;
  virtual void unpin(void* host, int64_t bytes) = 0;

  // Small allocations, zeroed, for the plane. mapped: on the host, at the same address for both.
  virtual uint64_t allocate(int64_t bytes) = 0;
  virtual void free(uint64_t address) = 0;
  virtual void* allocate_mapped(int64_t bytes) = 0;
  virtual void free_mapped(void* host) = 0;

  // The copy stream: done in the order of the calls, each seen by the device before the next.
  virtual void copy(const DeviceCopy* copies, int count) = 0;
  virtual void write_word(uint64_t address, uint32_t value) = 0;
  virtual void write_count(uint64_t address, uint64_t value) = 0;
  // A place in the stream, from 1 on; and how far it has got.
  virtual uint64_t mark() = 0;
  virtual uint64_t reached() = 0;
};

}  // namespace comoe

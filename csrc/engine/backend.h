// What the engine asks of a device: memory for pages, reads into them, and a count of the steps
// that may still look at them. The CPU's is cpu_backend.h; tests use fake_backend.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "types.h"

namespace comoe {

class RemoteReader;

enum class ReadStatus : uint8_t { ok, failed, corrupt };

// Whether a page that left the residency table may be written again: at once, when what runs now
// has gone on, or only after the step that runs now, which reads it.
enum class Reuse : uint8_t { now, later, held };

// One record on its way into its pages. `pages` stays valid until the read has been reported done.
struct ReadJob {
  int32_t record;
  RecordInfo info;
  uint8_t* const* pages;  // [ceil(bytes / page_bytes)] addresses
  bool demand;
};

struct BackendStats {
  int64_t bytes_from_disk = 0;  // padding and repeated reads included
  int64_t buffered_reads = 0;   // chunks that went through the page cache, O_DIRECT being refused
  int64_t retries = 0;
  double busy_seconds = 0;   // in which something was being read
  int64_t remote_bytes = 0;  // payload of records that were handed in (storage/remote_reader.h)
  int64_t remote_records = 0;
  int64_t remote_refused = 0;  // times that what was handed in had a wrong checksum
  int64_t cache_failures = 0;  // records whose local copy could not be used
  const char* io = "";         // how reads are kept in flight: "uring" or "threads"
};

class BackendEvents {
 public:
  virtual ~BackendEvents() = default;
  // `error` says file, offset, what the system said and what to do; empty when status is ok.
  virtual void read_done(int32_t record, ReadStatus status, const std::string& error) = 0;
  virtual void step_passed() = 0;  // completed() has grown
};

// Calls come from under the engine's lock (but for start, stop and stats), so none may wait for an
// event to be handled, and none may report one before it has returned.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual void start(BackendEvents* events) = 0;  // before any other call
  virtual int32_t add_file(const std::string& path) = 0;
  // `path` is a local copy of a remote file, of its size and with the bytes that are here already
  // at their places. Its records are fetched through remote(), but for those that set_local names.
  virtual int32_t add_remote_file(const std::string& path) { return add_file(path); }
  virtual RemoteReader* remote() { return nullptr; }  // null: this device has none
  // Whether the record's bytes are in the local copy. One that cannot be read or has a wrong
  // checksum there is not any more: its read then goes on as a remote one.
  virtual void set_local(int32_t record, bool local) {}
  virtual int64_t file_bytes(int32_t file) const = 0;
  virtual BackendStats stats() const = 0;

  // Memory. Slab s holds pages [s * pages_per_slab, (s + 1) * pages_per_slab).
  virtual int max_slabs() const = 0;
  virtual bool map_slab(int slab) = 0;  // false: the system gives no memory
  virtual void unmap_slab(int slab) = 0;
  virtual uint8_t* page_address(int32_t page) = 0;
  virtual void copy_page(int32_t from, int32_t to) = 0;
  // The first bytes of a page, for tests and tools.
  virtual void read_page(const uint8_t* page, int64_t bytes, uint8_t* out) const {
    std::memcpy(out, page, static_cast<size_t>(bytes));
  }

  // Reads. Never fails itself: errors come back through read_done.
  virtual void start_read(const ReadJob& job) = 0;
  virtual void promote_read(int32_t record) = 0;  // a running prefetch is demanded now
  // True if the read had not begun: it never will, and no event comes of it.
  virtual bool cancel_read(int32_t record) = 0;

  // A device that chooses records itself looks them up in a table; `pages` is null when a record
  // leaves.
  virtual void publish(int32_t record, const std::vector<uint8_t*>* pages) = 0;
  // Steps that may read pages without a pin: a page that was unpublished while launched() was n may
  // be reused when completed() >= n.
  virtual uint64_t launched() const = 0;
  virtual uint64_t completed() const = 0;
  // The same for a device whose steps say which records they read (device/reclaim.h): it may free
  // pages out of turn. step_passed() is called whenever an answer changes.
  virtual Reuse reuse(uint64_t step) const {
    return completed() >= step ? Reuse::now : Reuse::later;
  }

  virtual void stop() = 0;  // ends all reads; no event comes after it has returned
};

}  // namespace comoe

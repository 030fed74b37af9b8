// The engine: keeps records of the store resident in a paged pool under a budget, and hands them to
// compute. State machine, locking and the argument why nothing deadlocks: docs/engine.md.
//
// CONTRACT SKETCH: signatures below are what the MoE operator and the bindings rely on.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace comoe {

enum class Priority : uint8_t { demand = 0, prefetch = 1, upgrade = 2 };

struct EngineConfig {
  int64_t page_bytes = 0;        // multiple of 4096
  int64_t slab_bytes = 0;        // multiple of page_bytes
  int64_t budget_bytes = 0;      // all slabs + staging that the engine maps
  int io_threads = 4;
  bool direct_io = true;
  bool verify = true;            // check crc32c of each record when read
};

struct RecordInfo {
  int32_t file;
  int64_t offset;       // 4096-aligned
  int64_t bytes;        // payload bytes; the extent is padded to 4096
  uint32_t crc32c;      // of the payload
};

// A need: one expert, whose records are first_record + r. level_mask[l] (engine-wide table, set once)
// says which r level l requires.
struct Need {
  int32_t first_record;
  uint8_t min_level;    // compute may start at this level ...
  uint8_t want_level;   // ... and uses the highest complete level up to this one
};
struct Ready {
  int32_t need;         // index into the needs given
  uint8_t level;        // level to compute at: its records are resident and pinned
};

class Engine;

// The needs of one MoE layer, served in any order as they become ready; admits in waves when they do
// not all fit. Destroying it releases everything it still holds.
class Session {
 public:
  ~Session();
  // Blocks until at least one need is ready or all are done; fills `ready` (cleared first) with all that
  // are ready now; returns false when every need has been handed out. Throws on a failed read.
  bool next(std::vector<Ready>& ready);
  void done(int32_t need);  // unpins
};

}  // namespace comoe

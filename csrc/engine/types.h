// Words shared by all parts of the engine.
#pragma once

#include <cstdint>

namespace comoe {

enum class Priority : uint8_t { demand = 0, prefetch = 1, upgrade = 2 };

// Where the bytes of a record lie in the store.
struct RecordInfo {
  int32_t file;
  int64_t offset;   // 4096-aligned
  int64_t bytes;    // payload bytes; the extent is padded to 4096
  uint32_t crc32c;  // of the payload
};

// A need: one expert, a row of the table [experts, records per expert] of record ids (-1: it has no
// such record). level_masks[l] (set once per engine) says which columns level l requires.
struct Need {
  int32_t expert;
  uint8_t min_level;   // compute may start at this level ...
  uint8_t want_level;  // ... and uses the highest complete level up to this one
};

struct Ready {
  int32_t need;   // index into the needs given
  uint8_t level;  // level to compute at: its records are resident and pinned
};

}  // namespace comoe

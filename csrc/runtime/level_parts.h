// Which parts a level makes of an expert's records: the same rules as comoe/store/parts.py.
#pragma once

#include <cstdint>
#include <vector>

#include "../ladder/coded.h"

namespace comoe {

// As in the store's record table; `present` false: the expert has no such record.
struct RecordMeta {
  enum Kind : uint8_t { plane, replacement, shared_base, low_rank, mean, alias };
  Kind kind;
  uint8_t bits;
  bool present;
  int32_t parent;
  uint16_t ranks[kMaxMatrices];
  bool is_coded() const { return kind != low_rank && kind != mean; }
};

// Record numbers of the expert instead of pages.
struct LevelParts {
  struct Coded {
    int num_planes = 0;  // 0: exact, of `exact_record`
    int record[kNumPlanes] = {};
    uint8_t first_plane[kNumPlanes] = {};
  };
  std::vector<Coded> coded;
  std::vector<int> low_rank, means;
};

constexpr int kExactRecord = kNumRecords - 1;

// The parts of `mask`, all of whose records are present. Throws std::invalid_argument if they make
// no expert.
LevelParts level_parts(const RecordMeta* records, int num_records, uint32_t mask);

// Payload bytes that a record must have for its expert's geometry; throws as above.
int64_t record_bytes(const ExpertGeometry& geometry, const RecordMeta* records, int record);

}  // namespace comoe

#include "level_parts.h"

#include <stdexcept>
#include <string>

namespace comoe {
namespace {

[[noreturn]] void fail(int record, const char* problem) {
  throw std::invalid_argument("MoeOp: record " + std::to_string(record) + ": " + problem +
                              "; the store is damaged: pack or aggregate again");
}

// Planes known before a coded record, and after it.
struct Depths {
  int before, after;
};
Depths depths_of(const RecordMeta* records, int record) {
  int bits = 0;
  for (int r = records[record].parent, child = record; r >= 0; child = r, r = records[r].parent) {
    if (r >= child || !records[r].is_coded() || r == kExactRecord)
      fail(record, "its parent must be an earlier coded record");
    bits += records[r].bits;
  }
  const Depths d{depth_of_bits(bits), depth_of_bits(bits + records[record].bits)};
  if (d.before < 0 || d.after <= d.before) fail(record, "bits do not fit what it adds to");
  return d;
}

}  // namespace

LevelParts level_parts(const RecordMeta* records, int num_records, uint32_t mask) {
  LevelParts parts;
  std::vector<int> last;  // record of each chain so far
  for (int r = 0; r < num_records; ++r) {
    if (!(mask >> r & 1)) continue;
    const RecordMeta& record = records[r];
    if (r == kExactRecord) {
      if (mask != uint32_t{1} << r) fail(r, "exact must be its level's only record");
      parts.coded.push_back({});
      return parts;
    }
    if (record.parent >= 0 && !(mask >> record.parent & 1)) fail(r, "its level lacks its parent");
    if (record.kind == RecordMeta::mean) {
      parts.means.push_back(r);
    } else if (record.kind == RecordMeta::low_rank) {
      parts.low_rank.push_back(r);
    } else {
      const Depths d = depths_of(records, r);
      size_t chain = 0;
      while (chain < last.size() && last[chain] != record.parent) ++chain;
      if (chain == last.size()) {
        if (record.parent >= 0) fail(r, "two records of its level add to one");
        parts.coded.push_back({});
        last.push_back(r);
      }
      LevelParts::Coded& coded = parts.coded[chain];
      last[chain] = r;
      coded.num_planes = d.after;
      for (int p = d.before; p < d.after; ++p) {
        coded.record[p] = r;
        coded.first_plane[p] = static_cast<uint8_t>(d.before);
      }
    }
  }
  return parts;
}

int64_t record_bytes(const ExpertGeometry& geometry, const RecordMeta* records, int record) {
  const RecordMeta& r = records[record];
  if (record == kExactRecord) return geometry.record_bytes(kExactRecord);
  if (r.kind == RecordMeta::mean) return mean_bytes(geometry);
  if (r.kind == RecordMeta::low_rank) {
    const int planes = depth_of_bits(r.bits);
    if (planes < 1) fail(record, "factors must have 2, 3, 4 or 8 bits");
    for (int m = 0; m < kMaxMatrices; ++m) {
      if (r.ranks[m] > kMaxRank || (m >= geometry.num_matrices() && r.ranks[m]))
        fail(record, "a rank is out of range");
    }
    return low_rank_layout(geometry, r.ranks).record_bytes(0, planes);
  }
  const Depths d = depths_of(records, record);
  return coded_layout(geometry).record_bytes(d.before, d.after);
}

}  // namespace comoe

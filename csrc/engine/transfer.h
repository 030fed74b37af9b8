// Transfers that nobody waits for yet: prefetches, nearest layer first, then upgrades; each in the
// order of asking. What is demanded never queues here: it starts at once (core.h), and the backend
// reads it first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "types.h"

namespace comoe {

class TransferQueue {
 public:
  void resize(int32_t num_records) { entries_.resize(num_records); }

  // False if the record is queued already; then the more urgent of the two requests stays.
  bool push(int32_t record, Priority priority, int32_t distance);
  bool erase(int32_t record);  // false if it was not queued
  int64_t erase_all(Priority priority);

  bool empty() const { return order_.empty(); }
  size_t size() const { return order_.size(); }
  int32_t front() const { return std::get<3>(*order_.begin()); }
  bool contains(int32_t record) const { return entries_[record].queued; }
  Priority priority(int32_t record) const { return entries_[record].priority; }
  std::vector<int32_t> records() const;  // in order

 private:
  struct Entry {
    bool queued = false;
    Priority priority = Priority::upgrade;
    int32_t distance = 0;
    uint64_t sequence = 0;
  };
  using Key = std::tuple<Priority, int32_t, uint64_t, int32_t>;
  Key key(int32_t record) const;

  std::vector<Entry> entries_;  // [num_records]
  std::set<Key> order_;
  uint64_t sequence_ = 0;
};

}  // namespace comoe

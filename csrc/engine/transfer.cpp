#include "transfer.h"

namespace comoe {

TransferQueue::Key TransferQueue::key(int32_t record) const {
  const Entry& e = entries_[record];
  return {e.priority, e.distance, e.sequence, record};
}

bool TransferQueue::push(int32_t record, Priority priority, int32_t distance) {
  Entry& e = entries_[record];
  if (!e.queued) {
    e = {true, priority, distance, sequence_++};
    order_.insert(key(record));
    return true;
  }
  if (std::tie(priority, distance) < std::tie(e.priority, e.distance)) {
    order_.erase(key(record));
    e.priority = priority;
    e.distance = distance;
    order_.insert(key(record));
  }
  return false;
}

bool TransferQueue::erase(int32_t record) {
  if (!entries_[record].queued) return false;
  order_.erase(key(record));
  entries_[record].queued = false;
  return true;
}

int64_t TransferQueue::erase_all(Priority priority) {
  int64_t erased = 0;
  for (auto it = order_.begin(); it != order_.end();) {
    if (std::get<0>(*it) != priority) {
      ++it;
      continue;
    }
    entries_[std::get<3>(*it)].queued = false;
    it = order_.erase(it);
    ++erased;
  }
  return erased;
}

std::vector<int32_t> TransferQueue::records() const {
  std::vector<int32_t> records;
  for (const Key& k : order_) records.push_back(std::get<3>(k));
  return records;
}

}  // namespace comoe

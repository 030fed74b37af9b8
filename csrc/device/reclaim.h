// When pages that a record has left may be written again, on a device that looks records up itself
// and holds no pin that the host could count. Logic only: no lock, no device.
//
// A page that left at *ticket* t is free once
//   - its residency word's clearing has reached the device; `begun` was read after it: b visits may
//     have seen the record, later ones cannot; and
//   - each of those b visits is completed, or is the running one, has sent its list of experts, and
//     the record is none of theirs.
// The last rule is what keeps a visit from waiting for itself: it misses something, room is made
// for it, and the pages that are given up were in the table when it began.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "../engine/backend.h"

namespace comoe {

class Reclaimer {
 public:
  // The record has been unpublished or its pages replaced. Tickets are 1, 2, ...
  uint64_t retire(int32_t record) {
    tickets_.push_back({record, kNotLanded});
    return last();
  }
  uint64_t last() const { return first_ + tickets_.size() - 1; }
  // The device sees it; `begun` was read afterwards. In the order of the tickets.
  void landed(uint64_t ticket, uint64_t begun) {
    if (ticket >= first_) tickets_[ticket - first_].begun = begun;
    drop_free();
  }
  // The list of visit `visit` has come: records of the experts that it may read.
  void received(uint64_t visit, std::vector<int32_t> records) {
    std::sort(records.begin(), records.end());
    records_ = std::move(records);
    received_ = visit;
    drop_free();
  }
  void completed(uint64_t visit) {
    completed_ = std::max(completed_, visit);
    drop_free();
  }
  uint64_t completed() const { return completed_; }

  Reuse reuse(uint64_t ticket) const {
    if (ticket < first_) return Reuse::now;
    const Ticket& t = tickets_[ticket - first_];
    if (t.begun == kNotLanded) return Reuse::later;
    if (t.begun <= completed_) return Reuse::now;
    if (received_ < t.begun) return Reuse::later;
    return std::binary_search(records_.begin(), records_.end(), t.record) ? Reuse::held
                                                                          : Reuse::now;
  }

 private:
  static constexpr uint64_t kNotLanded = ~uint64_t{0};
  struct Ticket {
    int32_t record;
    uint64_t begun;
  };
  void drop_free() {
    while (!tickets_.empty() && reuse(first_) == Reuse::now) {
      tickets_.pop_front();
      ++first_;
    }
  }

  std::deque<Ticket> tickets_;
  uint64_t first_ = 1;  // number of tickets_.front()
  std::vector<int32_t> records_;
  uint64_t received_ = 0, completed_ = 0;
};

}  // namespace comoe

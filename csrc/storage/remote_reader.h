// Records whose bytes come from elsewhere: they are queued here until somebody takes them, fetches
// them and hands them in. The fetching is not ours (comoe/tiers): no thread, no socket, no retry.
//
// One take gives records that lie near one another in one file, so that one request brings them
// all; what is not taken can be overtaken and cancelled. Bytes are believed only with the right
// checksum: wrong ones are refused and may be handed in again from another source.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../engine/backend.h"

namespace comoe {

// One record to be fetched. A ticket is of one asking: the record's next one has another.
struct RemoteRequest {
  int64_t ticket;
  int32_t record;
  int32_t file;
  int64_t offset, bytes;  // payload
  bool demand;
};

enum class Handed {
  wrong,   // not the record's checksum: the ticket stays open
  taken,   // the record is in its pages
  closed,  // the ticket was closed before; nothing was looked at
};

struct RemoteStats {
  int64_t bytes = 0, records = 0;  // handed in, with the right checksum
  int64_t refused = 0;             // with a wrong one
  int64_t failed = 0;
};

class RemoteReader {
 public:
  RemoteReader(int64_t page_bytes, BackendEvents* events)
      : page_bytes_(page_bytes), events_(events) {}
  ~RemoteReader() { stop(); }

  void submit(const ReadJob& job);
  void promote(int32_t record);
  bool cancel(int32_t record);  // true if nobody had taken it: then it is forgotten
  void stop();                  // wakes those who take; nothing is reported after it has returned

  // Waits for work, at most `timeout_seconds`. The most urgent record, and those of its class and
  // file that lie at most `gap` bytes from what is chosen already, `most_bytes` from the first to
  // the last of them (the first is taken whatever its size); ordered by offset. Empty: none came.
  // Takes of prefetches and upgrades are refused while `most_others` of them are under way.
  std::vector<RemoteRequest> take(double timeout_seconds, int64_t gap, int64_t most_bytes,
                                  int most_others);
  bool stopped() const;
  bool has_demand() const;  // that nobody has taken

  Handed done(int64_t ticket, const uint8_t* data, int64_t bytes);
  void failed(int64_t ticket, const std::string& message);  // the record fails like any read
  // Fails those of these records that are demanded, taken or not (null: all of them); whoever
  // fetches them may go on, for a cache. Returns how many.
  int expire(const int32_t* records, int64_t count, const std::string& message);
  bool is_open(int64_t ticket) const;
  bool is_demanded(int64_t ticket) const;  // now: a prefetch may have become demand

  RemoteStats stats() const;

 private:
  struct Open {
    ReadJob job;
    int64_t take;  // number of the take that it belongs to
  };

  void end_ticket(std::map<int64_t, Open>::iterator at);  // with the lock held
  // Copies and reports without the lock, which is held before and after.
  void report(std::unique_lock<std::mutex>& lock, const ReadJob& job, ReadStatus status,
              const std::string& error, const uint8_t* data);
  void copy_into_pages(const ReadJob& job, const uint8_t* data) const;

  const int64_t page_bytes_;
  BackendEvents* const events_;
  mutable std::mutex mutex_;
  std::condition_variable work_, idle_;
  bool stopping_ = false;
  std::deque<ReadJob> demand_, others_;
  std::map<int64_t, Open> open_;        // by ticket
  std::map<int64_t, int> others_left_;  // open tickets of takes of prefetches and upgrades
  int64_t next_ticket_ = 1, next_take_ = 1;
  int reporting_ = 0;
  RemoteStats stats_;
};

}  // namespace comoe

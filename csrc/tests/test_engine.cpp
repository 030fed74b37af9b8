// What the engine promises, one promise at a time: on the fake device where the order of events
// matters, on files and threads where they do. Every interleaving of small cases:
// test_engine_model.cpp.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "../engine/engine.h"
#include "check.h"
#include "engine_store.h"
#include "fake_backend.h"

using namespace comoe;

namespace {

// ---- On the fake device ------------------------------------------------------------------------

struct Bench {
  FakeBackend backend;
  Core core;
  Bench(std::vector<uint32_t> masks, const std::vector<int>& record_pages, int pages_per_slab,
        int slabs, int64_t speculation_pages = 100, int64_t slack_pages = 0)
      : backend(pages_per_slab, slabs),
        core({1, pages_per_slab, std::move(masks), slack_pages, speculation_pages}, &backend) {
    std::vector<RecordInfo> infos;
    for (int pages : record_pages) infos.push_back({0, 0, pages, 0});
    core.add_records(infos.data(), static_cast<int64_t>(infos.size()));
    add_rows(core, core.num_records());
    core.set_target_slabs(slabs);
  }
  void finish(int32_t record, ReadStatus status = ReadStatus::ok) {
    backend.fill(record, status == ReadStatus::ok);
    core.read_done(record, status, status == ReadStatus::ok ? "" : "the disk says no");
    core.check_invariants();
  }
  void finish_all() {
    while (!backend.running.empty()) finish(backend.running.begin()->first);
  }
  std::vector<int32_t> running() const {
    std::vector<int32_t> records;
    for (const auto& entry : backend.running) records.push_back(entry.first);
    return records;
  }
  std::vector<int32_t> resident() const {
    std::vector<int32_t> records;
    for (int32_t r = 0; r < core.num_records(); ++r)
      if (core.state(r) == RecordState::resident) records.push_back(r);
    return records;
  }
  int32_t open(std::vector<Need> needs) {
    return core.open_session(needs.data(), static_cast<int64_t>(needs.size()));
  }
  std::vector<Ready> take(int32_t session, Next expected) {
    std::vector<Ready> ready;
    const Next got = core.next(session, ready);
    CHECK(got == expected);
    return ready;
  }
  void request(std::vector<int32_t> records, Priority priority, int32_t distance = 0) {
    for (int32_t r : records) core.request(r, priority, distance);
    core.pump();
    core.check_invariants();
  }
  // Uses them at the lowest level in a session of their own, which then ends.
  void use(std::vector<int32_t> experts) {
    std::vector<Need> needs;
    for (int32_t e : experts) needs.push_back({e, 0, 0});
    const int32_t session = open(needs);
    finish_all();
    for (size_t given = 0; given < experts.size();) {
      const auto ready = take(session, Next::ready);
      for (const Ready& r : ready) core.done(session, r.need);
      given += ready.size();
      if (ready.empty()) break;
      finish_all();
    }
    core.close_session(session);
  }
};

using Records = std::vector<int32_t>;

// Experts 0 and 1 share record 0 (a base); expert 2 has none of level 0's records.
void test_shared_and_absent_records() {
  const std::vector<uint32_t> masks{1, 3, 4};
  Bench b(masks, {}, 10, 1);
  const std::vector<RecordInfo> infos{{0, 0, 3, 0}, {0, 0, 1, 0}, {0, 0, 2, 0},
                                      {0, 0, 1, 0}, {0, 0, 2, 0}, {0, 0, 4, 0}};
  b.core.add_records(infos.data(), 6);
  const int32_t table[]{0, 1, 2, 0, 3, -1, -1, -1, 5};
  CHECK(b.core.add_experts(table, 3) == 0);
  CHECK(b.core.num_experts() == 3);
  CHECK(b.core.has_level(0, 2) && !b.core.has_level(1, 2) && !b.core.has_level(2, 0));

  int32_t s = b.open({{0, 1, 2}, {1, 0, 2}, {2, 0, 2}});
  // One read of the base for both; expert 0 takes record 2, which is less than base and plane;
  // expert 2 starts at the least level that it has.
  CHECK((b.running() == Records{0, 2, 5}));
  b.finish_all();
  auto ready = b.take(s, Next::ready);
  CHECK(ready.size() == 3);
  for (const Ready& r : ready) CHECK(r.level == (r.need == 1 ? 0 : 2));
  CHECK(b.core.stats().bytes_read == 3 + 2 + 4);
  for (const Ready& r : ready) b.core.done(s, r.need);
  b.core.close_session(s);

  s = b.open({{0, 0, 0}, {1, 0, 0}});
  CHECK(b.core.evict(0) == 0);  // pinned by both
  ready = b.take(s, Next::ready);
  CHECK(ready.size() == 2 && b.core.stats().hits == 2);
  b.core.done(s, 0);
  CHECK(b.core.evict(0) == 0);  // still by one
  b.core.done(s, 1);
  CHECK(b.core.evict(0) == 3);
  b.core.close_session(s);
  b.core.check_invariants();

  CHECK_THROWS(b.open({{2, 0, 1}}), std::invalid_argument, "expert 2 has no level from 0 to 1");
  CHECK_THROWS(b.open({{1, 2, 2}}), std::invalid_argument, "has no level from 2 to 2");
  const int32_t bad[]{0, 1, 6};
  CHECK_THROWS(b.core.add_experts(bad, 1), std::invalid_argument, "got 6");
  CHECK(b.core.largest_need_pages(0) == 4);  // of expert 2, whose lowest level is 2
  CHECK(b.core.largest_need_pages(1) == 4);
}

// 32 levels over 32 records: the last bit of a mask counts.
void test_many_levels() {
  std::vector<uint32_t> masks;
  for (int l = 0; l < 32; ++l) masks.push_back(uint32_t{1} << l);
  Bench b(masks, std::vector<int>(64, 1), 10, 4);
  CHECK(b.core.num_experts() == 2);
  const int32_t s = b.open({{1, 31, 31}, {0, 0, 31}});
  CHECK((b.running() == Records{0, 63}));
  b.finish_all();
  for (const Ready& r : b.take(s, Next::ready)) CHECK(r.level == (r.need == 0 ? 31 : 0));
  b.core.close_session(s);
}

void test_levels() {
  // Level 0 needs record 0, level 1 records 0 and 1, level 2 record 2.
  Bench b({1, 3, 4}, {1, 1, 2, 1, 1, 2}, 10, 1);
  int32_t s = b.open({{0, 0, 2}});
  CHECK(b.running() == Records{0});  // the least that min_level needs
  CHECK(b.core.stats().misses == 1);
  b.take(s, Next::wait);
  b.finish(0);
  auto ready = b.take(s, Next::ready);
  CHECK(ready.size() == 1 && ready[0].need == 0 && ready[0].level == 0);
  b.take(s, Next::end);
  b.core.done(s, 0);
  b.core.close_session(s);

  b.request({1}, Priority::upgrade);
  b.finish(1);
  s = b.open({{0, 0, 2}, {0, 0, 1}, {0, 0, 0}});  // the highest that is here, never above want
  ready = b.take(s, Next::ready);
  CHECK(ready.size() == 3 && ready[0].level == 1 && ready[1].level == 1 && ready[2].level == 0);
  CHECK(b.core.stats().partial_hits == 1 && b.core.stats().hits == 2);
  CHECK(b.running().empty());  // `want` is not waited for
  b.core.close_session(s);

  s = b.open({{0, 2, 2}});  // a level whose records are others altogether
  CHECK(b.running() == Records{2});
  b.finish(2);
  CHECK(b.take(s, Next::ready)[0].level == 2);
  b.core.close_session(s);

  // What is on its way already is joined, though min_level alone would ask for another record.
  b.request({5}, Priority::prefetch);
  s = b.open({{1, 0, 2}});
  CHECK(b.running() == Records{5} && b.core.stats().joined == 1);
  CHECK(b.backend.running[5].demand);  // and now read first
  b.finish(5);
  CHECK(b.take(s, Next::ready)[0].level == 2);
  b.core.close_session(s);

  // More may arrive between being ready and being taken.
  CHECK(b.core.evict(5) == 2);
  s = b.open({{1, 0, 1}});
  b.request({4}, Priority::prefetch);
  b.finish(3);
  b.finish(4);
  CHECK(b.take(s, Next::ready)[0].level == 1);
  b.core.close_session(s);
  CHECK(b.core.pool().used_pages(0) == 6);
}

void test_bad_needs() {
  Bench b({1, 3}, {1, 1}, 10, 1);
  CHECK_THROWS(b.open({{0, 1, 0}}), std::invalid_argument, "min_level <= want_level");
  CHECK_THROWS(b.open({{0, 0, 2}}), std::invalid_argument, "want_level < 2");
  CHECK_THROWS(b.open({{1, 0, 0}}), std::invalid_argument, "an expert in [0, 1)");
  CHECK_THROWS(b.open({{-1, 0, 0}}), std::invalid_argument, "got -1");
  CHECK(b.core.num_sessions() == 0);
  const int32_t s = b.open({});
  b.take(s, Next::end);
  CHECK_THROWS(b.core.done(s, 0), std::invalid_argument, "session.done");
  b.core.close_session(s);
}

void test_waves() {
  Bench b({1}, {2, 2, 2, 2}, 2, 2);  // two of four fit
  const int32_t s = b.open({{0, 0, 0}, {1, 0, 0}, {2, 0, 0}, {3, 0, 0}});
  CHECK((b.running() == Records{0, 1}) && b.core.stats().waves == 1);
  b.finish(1);
  CHECK(b.take(s, Next::ready)[0].need == 1);
  b.take(s, Next::wait);  // 0 is on its way
  b.finish(0);
  CHECK(b.take(s, Next::ready)[0].need == 0);
  b.take(s, Next::hold);  // nothing more can come while both are held
  b.core.done(s, 1);
  CHECK(b.running() == Records{2});  // its pages go to the next
  b.core.done(s, 0);
  CHECK((b.running() == Records{2, 3}));
  b.finish_all();
  CHECK(b.take(s, Next::ready).size() == 2);
  b.take(s, Next::end);
  b.core.close_session(s);
  CHECK((b.resident() == Records{2, 3}));
}

void test_first_come_first_served() {
  Bench b({1}, {2, 2, 1, 1}, 1, 4);
  const int32_t holder = b.open({{0, 0, 0}, {2, 0, 0}});  // 3 of 4 pages
  b.finish_all();
  CHECK(b.take(holder, Next::ready).size() == 2);
  const int32_t large = b.open({{1, 0, 0}});  // wants 2 pages, one is free
  const int32_t small = b.open({{3, 0, 0}});  // wants 1, and may not overtake for ever
  CHECK(b.running().empty());
  const int32_t hit = b.open({{2, 0, 0}});  // takes no page from anyone
  CHECK(b.take(hit, Next::ready).size() == 1);
  b.core.close_session(hit);
  b.core.done(holder, 0);
  CHECK((b.running() == Records{1, 3}));
  b.finish_all();
  CHECK(b.take(large, Next::ready).size() == 1 && b.take(small, Next::ready).size() == 1);
  for (int32_t s : {holder, large, small}) b.core.close_session(s);
}

void test_too_large() {
  Bench b({1, 3}, {2, 3, 1, 1}, 1, 4);
  const int32_t s = b.open({{0, 1, 1}, {1, 0, 0}});  // 5 pages of 4
  b.take(s, Next::failed);
  CHECK(b.core.is_budget_error(s));
  CHECK(b.core.error(s).find("takes 5 pages (5 bytes), but the budget leaves 4 pages") !=
        std::string::npos);
  b.core.close_session(s);
  CHECK(b.core.largest_need_pages(0) == 2 && b.core.largest_need_pages(1) == 5);
  b.use({1});
}

void test_eviction_order() {
  Bench b({1}, {1, 1, 1, 1, 1}, 4, 1);
  b.use({0});
  b.use({1});
  b.use({2});
  b.use({3});
  b.use({0});
  b.use({4});  // the least recently used goes
  CHECK((b.resident() == Records{0, 2, 3, 4}));
  b.core.set_value(2, 1.0f);
  b.core.values_changed();
  b.use({1});  // 2 is worth more, though older
  CHECK((b.resident() == Records{0, 1, 2, 4}));
  b.core.set_value(2, -1.0f);
  b.core.values_changed();
  b.use({3});  // worth less than the others now, though as recent
  CHECK((b.resident() == Records{0, 1, 3, 4}));
  b.core.pin(0, true);
  b.use({2});
  CHECK((b.resident() == Records{0, 1, 2, 3}));  // 0 was the oldest
  CHECK(b.core.evict(0) == 0);
  b.core.pin(0, false);
  CHECK(b.core.evict(0) == 1 && b.core.evict(0) == 0);
  CHECK(b.core.stats().evictions == 5);
}

void test_finest_rung_goes_first() {
  Bench b({1, 3, 7}, {1, 1, 1, 1, 1, 1}, 4, 1);
  int32_t s = b.open({{0, 2, 2}});
  b.finish_all();
  b.take(s, Next::ready);
  b.core.close_session(s);
  s = b.open({{1, 1, 1}});  // one page short: of three records of equal use, the finest goes
  CHECK((b.resident() == Records{0, 1}));
  b.core.close_session(s);
  b.finish_all();
}

void test_own_records_stay() {
  // The half of a need that is here is not thrown out for the other half, though it is the coldest.
  Bench b({1, 3}, {1, 2, 1, 1}, 3, 1);
  b.use({0});
  b.use({1});
  const int32_t s = b.open({{0, 1, 1}});
  CHECK((b.running() == Records{1}) && b.resident() == Records{0});
  b.finish(1);
  CHECK(b.take(s, Next::ready)[0].level == 1);
  b.core.close_session(s);
}

void test_speculation() {
  Bench b({1}, {1, 1, 1, 1, 1, 1}, 3, 1);
  b.request({0, 0, 1}, Priority::prefetch);
  CHECK((b.running() == Records{0, 1}) && b.core.stats().coalesced == 1);
  b.finish_all();
  b.request({2, 3}, Priority::upgrade);
  CHECK(b.running() == Records{2});  // an upgrade pushes out nothing of equal worth
  CHECK(b.core.stats().dropped == 1);
  b.finish_all();
  b.request({3}, Priority::prefetch);  // nor a prefetch what came since the last session began
  CHECK(b.running().empty() && b.core.stats().dropped == 2);

  int32_t s = b.open({{0, 0, 0}});
  b.request({3}, Priority::prefetch);  // 1 and 2 were not used in this step
  CHECK((b.running() == Records{3}) && (b.resident() == Records{0, 1}));
  b.finish(3);
  CHECK(b.core.stats().wasted_prefetch_bytes == 1);
  CHECK(b.core.stats().prefetch_used_bytes == 1);  // 0
  b.request({4}, Priority::prefetch);
  b.finish(4);
  b.request({5}, Priority::prefetch);  // 0 is in use; 3 and 4 came in this step
  CHECK(b.running().empty() && (b.resident() == Records{0, 3, 4}));
  CHECK(b.core.queue().size() == 1);  // it waits for the step to end
  b.core.close_session(s);
  CHECK((b.running() == Records{5}) &&
        (b.resident() == Records{3, 4}));  // those are still to be used
  b.finish(5);

  // Value decides before time: a hot record is pushed out by no prefetch of less worth.
  for (int32_t r : {3, 4, 5}) b.core.set_value(r, 1.0f);
  b.core.values_changed();
  b.use({3, 4, 5});
  b.request({1}, Priority::prefetch);
  CHECK(b.running().empty());
  b.core.set_value(1, 2.0f);
  b.request({1}, Priority::upgrade);
  CHECK(b.running() == Records{1});
  b.finish(1);
}

void test_prefetch_order_and_cancel() {
  Bench b({1}, std::vector<int>(8, 1), 8, 1, 1);  // one speculative page at a time
  b.request({0}, Priority::prefetch, 1);
  b.request({1}, Priority::upgrade);
  b.request({2}, Priority::prefetch, 3);
  b.request({3}, Priority::prefetch, 2);
  b.request({4}, Priority::prefetch, 2);
  b.request({5}, Priority::prefetch, 9);
  b.request({1}, Priority::prefetch, 2);  // wanted sooner than thought
  CHECK(b.running() == Records{0});
  CHECK((b.core.queue().records() == Records{1, 3, 4, 2, 5}));
  b.core.cancel(3, Priority::upgrade);  // it is a prefetch
  b.core.cancel(4, Priority::prefetch);
  CHECK((b.core.queue().records() == Records{1, 3, 2, 5}) && b.core.stats().cancelled == 1);
  // Demand does not queue behind them, and takes its record out of the queue.
  const int32_t s = b.open({{2, 0, 0}});
  CHECK((b.running() == Records{0, 2}) && b.backend.running[2].demand &&
        !b.backend.running[0].demand);
  b.finish(2);
  b.finish(0);
  CHECK(b.running() == Records{1});
  b.core.cancel_all(Priority::prefetch);
  b.finish(1);
  CHECK(b.running().empty() && b.core.stats().cancelled == 3);
  b.core.close_session(s);
  CHECK(b.core.stats().prefetch_reads == 2 && b.core.stats().demand_reads == 1);
}

void test_wrong_guesses_go_first() {
  Bench b({1}, std::vector<int>(8, 1), 4, 1);
  for (int32_t r = 0; r < 4; ++r) b.use({r});
  const int32_t s = b.open({{3, 0, 0}});
  b.request({1, 4}, Priority::prefetch);  // 4 takes the place of 0, the coldest
  b.finish(4);
  b.core.cancel(4, Priority::prefetch);
  b.core.cancel(1, Priority::prefetch);  // and 1 is again as cold as it was
  b.request({5}, Priority::prefetch);    // takes the place of 4, which nobody ever used
  CHECK(b.core.state(4) == RecordState::absent && b.core.state(1) == RecordState::resident);
  b.finish(5);
  b.request({6}, Priority::prefetch);  // 5 is still expected, so 1 goes
  CHECK(b.core.state(5) == RecordState::resident && b.core.state(1) == RecordState::absent);

  // A read that has not begun never does, and its pages are free; one that has goes on.
  b.core.cancel(6, Priority::prefetch);
  CHECK(b.core.state(6) == RecordState::loading);
  b.backend.reads_begin_late = true;
  b.core.cancel(6, Priority::upgrade);  // it is a prefetch
  CHECK(b.core.state(6) == RecordState::loading);
  b.core.cancel(6, Priority::prefetch);
  CHECK(b.core.state(6) == RecordState::absent && b.core.pool().free_pages() == 1);
  CHECK(b.core.loading() == 0 && b.core.stats().cancelled == 1);
  b.core.check_invariants();
  // What a need waits for is not cancelled.
  b.request({7}, Priority::prefetch);
  const int32_t other = b.open({{7, 0, 0}});
  b.core.cancel(7, Priority::prefetch);
  CHECK(b.running() == Records{7});
  b.finish(7);
  b.core.close_session(other);
  b.core.close_session(s);
}

void test_speculation_leaves_room() {
  // 6 pages; the largest need takes 4: reads that may not be wanted never hold more than 2 of them.
  Bench b({1}, {4, 1, 1, 1, 1, 1, 3}, 6, 1);
  b.use({0});
  CHECK(b.core.evict(0) == 4);
  b.request({6}, Priority::prefetch);
  CHECK(b.running().empty() && b.core.stats().dropped == 1);
  b.request({1, 2, 3}, Priority::prefetch);
  CHECK((b.running() == Records{1, 2}));
  const int32_t s = b.open({{0, 0, 0}});
  CHECK((b.running() == Records{0, 1, 2}));  // demand finds its room
  b.finish_all();
  b.core.close_session(s);
  Bench slack({1}, {1, 1, 1, 1}, 4, 1, 100, 2);
  slack.request({0, 1, 2}, Priority::prefetch);
  CHECK((slack.running() == Records{0, 1}));  // two stay free
}

void test_demand_waits_first() {
  Bench b({1}, {2, 2, 1}, 3, 1);
  const int32_t first = b.open({{0, 0, 0}});
  const int32_t second = b.open({{1, 0, 0}});
  b.request({2}, Priority::prefetch);
  CHECK(b.running() == Records{0});  // a page is free, but demand is waiting for two
  b.finish(0);
  b.core.close_session(first);
  CHECK((b.running() == Records{1, 2}));
  b.finish_all();
  b.core.close_session(second);
}

void test_read_errors() {
  for (ReadStatus status : {ReadStatus::failed, ReadStatus::corrupt}) {
    Bench b({1}, {2, 2, 2}, 6, 1);
    const int32_t s = b.open({{0, 0, 0}, {1, 0, 0}});
    const int32_t other = b.open({{0, 0, 0}, {2, 0, 0}});
    const int32_t unharmed = b.open({{2, 0, 0}});
    b.finish(1);
    b.finish(0, status);
    b.take(s, Next::failed);  // though need 1 was ready
    CHECK(b.core.error(s) == "the disk says no" && !b.core.is_budget_error(s));
    b.take(other, Next::failed);
    b.finish(2);
    CHECK(b.take(unharmed, Next::ready).size() == 1);
    CHECK(b.core.pool().free_pages() == 2);
    for (int32_t id : {s, other, unharmed}) b.core.close_session(id);
    b.use({0});  // it is asked for anew, and this time it comes
    CHECK(b.core.stats().failed_prefetches == 0);
    CHECK(b.core.stats().failed_reads + b.core.stats().corrupt_reads == 1);
    // A prefetch that fails is silent.
    b.core.evict(1);
    b.request({1}, Priority::prefetch);
    b.finish(1, status);
    CHECK(b.core.stats().failed_prefetches == 1 && b.core.state(1) == RecordState::absent);
    // What is held already stays valid when another need fails.
    const int32_t held = b.open({{0, 0, 0}, {1, 0, 0}});
    CHECK(b.take(held, Next::ready).size() == 1);
    b.finish(1, status);
    b.take(held, Next::failed);
    CHECK(b.core.is_pinned(0));
    b.core.done(held, 0);
    CHECK(!b.core.is_pinned(0));
    b.core.close_session(held);
  }
}

void test_shrink_moves_what_is_hot() {
  Bench b({1}, {1, 1, 1, 1}, 2, 3);
  b.use({0, 1, 2, 3});
  b.use({3});
  b.use({1});
  CHECK(b.backend.mapped_slabs() == 2);  // mapped when needed
  b.core.set_target_slabs(1);
  CHECK((b.resident() == Records{1, 3}) && b.backend.mapped_slabs() == 1);
  b.core.check_invariants();
  for (int32_t r : {1, 3})
    CHECK((b.backend.tag(b.core.page_list(r)[0]) == FakeBackend::Tag{r, 0, true}));

  // What is pinned stays until it is done; the new budget holds for the rest at once.
  b.core.set_target_slabs(3);
  const int32_t s = b.open({{0, 0, 0}, {1, 0, 0}, {2, 0, 0}, {3, 0, 0}});
  b.finish_all();
  CHECK(b.take(s, Next::ready).size() == 4);
  b.core.set_target_slabs(1);
  CHECK(b.backend.mapped_slabs() == 2 && !b.core.target_reached());
  b.core.done(s, 0);
  b.core.done(s, 1);
  CHECK(b.core.pool().draining_slabs() == 1);
  b.core.done(s, 2);
  b.core.done(s, 3);
  CHECK(b.core.target_reached() && b.backend.mapped_slabs() == 1);
  b.core.close_session(s);
  b.core.check_invariants();
}

// Pages that the running step reads are not on their way: room is made elsewhere, since the step
// may be the one that waits for it.
void test_pages_that_a_step_holds_are_no_room() {
  for (bool held : {false, true}) {
    Bench b({1}, {1, 1, 1, 1, 1}, 4, 1);
    b.use({0, 1, 2, 3});
    b.backend.launch_step();
    b.backend.steps_hold = held;
    CHECK(b.core.evict(0) == 1 && b.core.reclaiming_pages() == 1);
    const int32_t s = b.open({{4, 0, 0}});
    CHECK(b.core.stats().evictions == (held ? 2 : 1));
    b.core.check_invariants();
    b.backend.complete_step();
    b.core.step_passed();
    CHECK(b.running() == Records{4});
    b.core.close_session(s);
  }
}

void test_empty_records() {
  // A ladder may lack a record (no `exact`, say): zero bytes, always here.
  Bench b({1, 3}, {1, 0, 1, 0}, 2, 1);
  const int32_t s = b.open({{0, 1, 1}});
  CHECK(b.running() == Records{0});
  b.finish(0);
  CHECK(b.take(s, Next::ready)[0].level == 1);
  b.core.close_session(s);
  CHECK(b.core.evict(1) == 0);
}

// ---- On files and threads ----------------------------------------------------------------------

int64_t resident_memory() {
  long total = 0, resident = 0;
  FILE* f = std::fopen("/proc/self/statm", "r");
  if (f == nullptr || std::fscanf(f, "%ld %ld", &total, &resident) != 2) std::abort();
  std::fclose(f);
  return resident * sysconf(_SC_PAGESIZE);
}

std::unique_ptr<Session> open(Engine& engine, std::vector<Need> needs) {
  return engine.open_session(needs.data(), static_cast<int64_t>(needs.size()));
}

// Runs a session as the MoE operator does; how many needs it got.
int serve(const Store& store, Engine& engine, const std::vector<Need>& needs) {
  auto session = open(engine, needs);
  std::vector<Ready> ready;
  int served = 0;
  while (session->next(ready))
    for (const Ready& r : ready) {
      const Need& n = needs[r.need];
      CHECK(r.level >= n.min_level && r.level <= n.want_level);
      CHECK(store.holds(engine, n.expert, r.level));
      session->done(r.need);
      ++served;
    }
  return served;
}

void test_engine_serves() {
  Store store(12);
  for (const char* io : {"threads", "uring", "device", "unified"}) {
    auto engine = store.engine(4, io);
    std::vector<Need> needs;
    for (int32_t e = 0; e < 12; ++e) needs.push_back({e, static_cast<uint8_t>(e % 5), 4});
    for (int i = 0; i < 3; ++i) CHECK(serve(store, *engine, needs) == 12);
    const EngineStats stats = engine->stats();
    CHECK(stats.mapped_bytes <= stats.budget_bytes && stats.core.waves > 0);
    CHECK(stats.core.misses + stats.core.hits + stats.core.partial_hits + stats.core.joined == 36);
    CHECK(engine->wait_idle(10));
  }
}

void test_engine_bad_arguments() {
  Store store(2);
  EngineConfig config;
  config.page_bytes = 4096;
  config.slab_bytes = 8192;
  config.budget_bytes = 8192;
  config.level_masks = kMasks;
  auto with = [&](auto change) {
    EngineConfig c = config;
    change(c);
    Engine engine(c);
  };
  CHECK_THROWS(with([](auto& c) { c.page_bytes = 1000; }), std::invalid_argument, "page_bytes");
  CHECK_THROWS(with([](auto& c) { c.slab_bytes = 6000; }), std::invalid_argument, "slab_bytes");
  CHECK_THROWS(with([](auto& c) { c.budget_bytes = 8191; }), BudgetError,
               "at least one slab (8192)");
  CHECK_THROWS(with([](auto& c) { c.level_masks = {}; }), std::invalid_argument, "level_masks");
  CHECK_THROWS(with([](auto& c) { c.level_masks = {1, 0}; }), std::invalid_argument, "level_masks");
  CHECK_THROWS(with([](auto& c) { c.io_threads = 0; }), std::invalid_argument, "io_threads");
  CHECK_THROWS(with([](auto& c) { c.io = "dma"; }), std::invalid_argument, "got dma");
  Engine engine(config);
  CHECK_THROWS(engine.add_file(store.path + ".missing"), std::runtime_error,
               "missing: No such file");
  engine.add_file(store.path);
  auto infos = store.infos;
  auto add = [&](auto change, int64_t count = kPerExpert) {
    auto changed = infos;
    change(changed[1]);
    engine.add_records(changed.data(), count);
  };
  CHECK_THROWS(add([](auto& i) { i.file = 1; }), std::invalid_argument, "file: expected an id");
  CHECK_THROWS(add([](auto& i) { i.file = -1; }), std::invalid_argument, "file: expected an id");
  CHECK_THROWS(add([](auto& i) { i.offset = 512; }), std::invalid_argument, "multiple of 4096");
  CHECK_THROWS(add([](auto& i) { i.offset = -4096; }), std::invalid_argument, "offset");
  CHECK_THROWS(add([](auto& i) { i.offset = INT64_MAX / 4096 * 4096; }), std::invalid_argument,
               "truncated");
  CHECK_THROWS(add([](auto& i) { i.bytes = -1; }), std::invalid_argument, "nbytes");
  CHECK_THROWS(add([](auto& i) { i.bytes = INT64_MAX; }), std::invalid_argument, "nbytes");
  CHECK_THROWS(add([](auto& i) { i.bytes = 100 << 20; }), std::invalid_argument, "truncated");
  engine.add_records(infos.data(), 10);
  add_rows(engine, 10);
  const int32_t bad = 10, good = 1;
  CHECK_THROWS(engine.request(&bad, 1, Priority::prefetch), std::invalid_argument,
               "record in [0, 10), got 10");
  CHECK_THROWS(engine.request(&good, 1, Priority::demand), std::invalid_argument,
               "only a session demands");
  CHECK_THROWS(engine.evict(&bad, 1), std::invalid_argument, "evict");
  CHECK_THROWS(engine.pin(&bad, 1, true), std::invalid_argument, "pin");
  const float nan = std::nanf("");
  CHECK_THROWS(engine.set_value(&good, &nan, 1), std::invalid_argument, "nan");
}

void test_engine_budget() {
  Store store(8);
  auto engine = store.engine(20);
  CHECK(engine->minimum_budget() == 8 * 4096);       // level 0: 3 pages
  CHECK(engine->minimum_budget(4) == 3 * 8 * 4096);  // exact: 18 pages
  CHECK(engine->minimum_budget(3) == 2 * 8 * 4096);
  CHECK_THROWS(engine->set_budget(8 * 4096 - 1), BudgetError, "at least 32768");
  std::vector<Need> needs;
  for (int32_t e = 0; e < 8; ++e) needs.push_back({e, 4, 4});
  CHECK(serve(store, *engine, needs) == 8);
  CHECK(engine->minimum_budget() == 3 * 8 * 4096);  // sessions want `exact`
  CHECK_THROWS(engine->set_budget(2 * 8 * 4096), BudgetError, "at least 98304");
  for (int slabs : {5, 3, 17, 4}) {
    engine->set_budget(slabs * 8 * 4096);
    CHECK(engine->stats().slabs <= slabs);
    CHECK(serve(store, *engine, needs) == 8);
    CHECK(engine->stats().slabs <= slabs);
  }
  // Pinned records keep their room, and count for the least budget.
  const int32_t exact = 4;
  CHECK_THROWS(engine->pin(&exact, 1, true), BudgetError, "must stay for the largest need");
  engine->set_budget(5 * 8 * 4096);
  engine->pin(&exact, 1, true);
  CHECK_THROWS(engine->set_budget(4 * 8 * 4096), BudgetError, "what is pinned");
  const int32_t more[] = {9, 14};
  CHECK_THROWS(engine->pin(more, 2, true), BudgetError, "unpin others");
  engine->pin(more, 2, false);  // the first of them did not stay pinned
  CHECK(engine->minimum_budget() == 5 * 8 * 4096);
}

void test_engine_lower_levels_need_less() {
  Store store(8);
  auto engine = store.engine(20);
  CHECK(serve(store, *engine, {{0, 4, 4}}) == 1);
  const std::vector<Need> held{{1, 4, 4}};
  auto session = engine->open_session(held.data(), 1);
  engine->forget_largest_need();
  session->close();
  engine->forget_largest_need();
  CHECK(engine->minimum_budget() == 8 * 4096);
  std::vector<Need> needs;
  for (int32_t e = 0; e < 8; ++e) needs.push_back({e, 0, 0});
  for (int slabs : {1, 20, 1}) {
    engine->set_budget(slabs * 8 * 4096);
    CHECK(engine->stats().slabs <= slabs);
    CHECK(serve(store, *engine, needs) == 8);
  }
}

// Who still waits when it is forgotten must get his room all the same.
void test_forgotten_needs_of_open_sessions() {
  Store store(8);
  auto engine = store.engine(3);  // room for one at `exact`
  const std::vector<Need> first{{0, 4, 4}}, second{{1, 4, 4}};
  auto holder = engine->open_session(first.data(), 1);
  std::vector<Ready> ready;
  CHECK(holder->next(ready) && ready.size() == 1);
  auto waiter = engine->open_session(second.data(), 1);
  engine->forget_largest_need();
  CHECK_THROWS(engine->set_budget(2 * 8 * 4096), BudgetError, "at least 98304");
  holder->done(ready[0].need);
  CHECK(waiter->next(ready) && ready.size() == 1);
  engine->forget_largest_need();
  CHECK(engine->minimum_budget() == 8 * 4096);
}

void test_engine_gives_memory_back() {
  constexpr int64_t kMiB = 1 << 20;
  Store store(3, {16 * kMiB, 1, 1, 1, 1});
  EngineConfig config;
  config.page_bytes = 64 << 10;
  config.slab_bytes = 16 * kMiB;
  config.budget_bytes = 64 * kMiB;
  config.level_masks = kMasks;
  Engine engine(config);
  const int64_t before = resident_memory();
  engine.add_file(store.path);
  engine.add_records(store.infos.data(), 3 * kPerExpert);
  add_rows(engine, 3 * kPerExpert);
  CHECK(engine.stats().mapped_bytes == 0 && resident_memory() - before < 8 * kMiB);
  const std::vector<Need> needs{{0, 0, 0}, {1, 0, 0}, {2, 0, 0}};
  CHECK(serve(store, engine, needs) == 3);
  const int64_t full = resident_memory();
  CHECK(engine.stats().mapped_bytes == 48 * kMiB && full - before > 44 * kMiB);
  engine.set_budget(16 * kMiB);
  CHECK(engine.stats().mapped_bytes == 16 * kMiB && full - resident_memory() > 30 * kMiB);
  CHECK(serve(store, engine, needs) == 3);

  // While another thread holds records: a clear error after the timeout, and memory comes when it
  // is done.
  engine.set_budget(64 * kMiB);
  auto session = open(engine, needs);
  std::vector<Ready> ready;
  for (size_t held = 0; held < 3; held += ready.size()) CHECK(session->next(ready));
  CHECK_THROWS(engine.set_budget(16 * kMiB, 0.05), std::runtime_error,
               "2 slabs (33554432 bytes) are still in use");
  std::thread finisher([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    for (int32_t i = 0; i < 3; ++i) session->done(i);
  });
  engine.set_budget(16 * kMiB, 60);
  CHECK(engine.stats().mapped_bytes <= 16 * kMiB);
  finisher.join();
}

void test_engine_read_errors() {
  Store store(3);
  store.infos[5].crc32c ^= 1;
  auto engine = store.engine(6);
  CHECK_THROWS(serve(store, *engine, {{0, 0, 0}, {1, 0, 0}}), ReadError, "wrong checksum");
  CHECK_THROWS(serve(store, *engine, {{1, 0, 0}}), ReadError, store.path.c_str());
  CHECK(serve(store, *engine, {{0, 3, 3}, {2, 4, 4}}) == 2);
  const int32_t damaged = 5;
  engine->request(&damaged, 1, Priority::prefetch);
  CHECK(engine->wait_idle(30));
  CHECK(engine->stats().core.failed_prefetches == 1 && engine->stats().core.corrupt_reads == 3);
  // The file shrinks under a running engine.
  CHECK(truncate(store.path.c_str(), 0) == 0);
  CHECK_THROWS(serve(store, *engine, {{1, 0, 0}}), ReadError, "truncated");
  CHECK(serve(store, *engine, {{0, 3, 3}}) == 1);  // what is here is still good
}

struct Interrupted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void test_engine_interrupts_and_close() {
  Store store(3);
  auto engine = store.engine(1);
  auto holder = open(*engine, {{0, 0, 0}, {1, 0, 0}});
  std::vector<Ready> ready;
  for (size_t held = 0; held < 2; held += ready.size()) CHECK(holder->next(ready));
  CHECK(!holder->next(ready) && ready.empty());

  auto waiting = open(*engine, {{2, 0, 0}});  // 3 pages, 2 are free
  Engine::set_interrupt_check([] { throw Interrupted("Ctrl-C"); });
  CHECK_THROWS(waiting->next(ready), Interrupted, "Ctrl-C");
  Engine::set_interrupt_check(nullptr);
  // It can be waited for again.
  std::atomic<bool> got{false};
  std::thread waiter([&] {
    std::vector<Ready> mine;
    CHECK(waiting->next(mine) && mine.size() == 1);
    got = true;
    waiting->done(0);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!got);
  holder->done(0);
  waiter.join();
  holder.reset();
  waiting.reset();

  holder = open(*engine, {{0, 0, 0}, {1, 0, 0}});
  for (size_t held = 0; held < 2; held += ready.size()) CHECK(holder->next(ready));
  waiting = open(*engine, {{2, 0, 0}});
  std::thread closer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    engine->close();
  });
  CHECK_THROWS(waiting->next(ready), EngineClosed, "closed");
  closer.join();
  CHECK_THROWS(open(*engine, {{0, 0, 0}}), EngineClosed, "closed");
  CHECK(store.holds(*engine, 0, 0));  // what a session holds stays until it is done
  engine->close();
  engine.reset();
  holder->done(0);  // sessions may outlive the engine
}

// The session lets another thread's wait end when it is closed under it.
void test_session_close() {
  Store store(3);
  auto engine = store.engine(1);
  auto holder = open(*engine, {{0, 0, 0}, {1, 0, 0}});
  std::vector<Ready> ready;
  for (size_t held = 0; held < 2; held += ready.size()) CHECK(holder->next(ready));
  auto waiting = open(*engine, {{2, 0, 0}});
  std::thread closer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    waiting->close();
  });
  CHECK(!waiting->next(ready));
  closer.join();
  waiting->close();
  waiting->done(0);
}

// Threads with sessions, one that speculates and evicts, one that moves the budget: every byte that
// is handed out is checked, nothing hangs, and in the end nothing is left over.
void test_stress(const char* io, double seconds) {
  Store store(24);
  auto engine = store.engine(12, io);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> served{0};
  const int32_t num_records = 24 * kPerExpert;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      std::vector<Ready> ready;
      while (!stop) {
        std::vector<Need> needs(random() % 9);
        for (Need& n : needs) {
          n.expert = static_cast<int32_t>(random() % 24);
          n.min_level = static_cast<uint8_t>(random() % 5);
          n.want_level = static_cast<uint8_t>(n.min_level + random() % (5 - n.min_level));
        }
        if (random() % 8 == 0) {  // give up in the middle
          auto session = open(*engine, needs);
          if (session->next(ready) && !ready.empty()) session->done(ready[0].need);
          continue;
        }
        served += serve(store, *engine, needs);
      }
    });
  threads.emplace_back([&] {
    std::mt19937 random(100);
    while (!stop) {
      std::vector<int32_t> ids(random() % 6);
      std::vector<float> values(ids.size());
      for (size_t i = 0; i < ids.size(); ++i) {
        ids[i] = static_cast<int32_t>(random() % num_records);
        values[i] = static_cast<float>(random() % 3);
      }
      const auto count = static_cast<int64_t>(ids.size());
      const Priority priority = random() % 2 ? Priority::prefetch : Priority::upgrade;
      switch (random() % 6) {
        case 0:
          engine->evict(ids.data(), count);
          break;
        case 1:
          engine->cancel(priority, ids.data(), count);
          break;
        case 2:
          engine->set_value(ids.data(), values.data(), count);
          break;
        case 3:
          engine->cancel_all(priority);
          break;
        default:
          engine->request(ids.data(), count, priority, static_cast<int32_t>(random() % 4));
      }
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    }
  });
  threads.emplace_back([&] {
    std::mt19937 random(200);
    const int32_t pinned[] = {0, 7};
    while (!stop) {
      const int64_t slabs = 4 + static_cast<int64_t>(random() % 10);
      engine->set_budget(slabs * 8 * 4096, 60);
      const EngineStats stats = engine->stats();
      CHECK(stats.slabs <= slabs);
      engine->pin(pinned, 2, random() % 2);
      std::this_thread::sleep_for(std::chrono::milliseconds(random() % 10));
    }
    engine->pin(pinned, 2, false);
  });
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  stop = true;
  for (auto& thread : threads) thread.join();
  CHECK(served > 0);
  engine->cancel_all(Priority::prefetch);
  engine->cancel_all(Priority::upgrade);
  CHECK(engine->wait_idle(60));
  std::vector<int32_t> all(num_records);
  for (int32_t r = 0; r < num_records; ++r) all[r] = r;
  engine->evict(all.data(), num_records);
  // On a device pages are free when its copy stream has cleared the table.
  for (int i = 0; i < 5000 && engine->stats().pages_reclaiming > 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const EngineStats stats = engine->stats();
  CHECK(stats.pages_used == 0 && stats.resident_bytes == 0 && stats.sessions == 0);
  std::printf("stress %s: %lld needs, %lld reads, %lld evictions, %lld pages moved\n", io,
              static_cast<long long>(served), static_cast<long long>(stats.core.reads),
              static_cast<long long>(stats.core.evictions),
              static_cast<long long>(stats.core.relocated_pages));
}

}  // namespace

int main() {
  test_levels();
  test_shared_and_absent_records();
  test_many_levels();
  test_bad_needs();
  test_waves();
  test_first_come_first_served();
  test_too_large();
  test_eviction_order();
  test_finest_rung_goes_first();
  test_own_records_stay();
  test_speculation();
  test_prefetch_order_and_cancel();
  test_wrong_guesses_go_first();
  test_speculation_leaves_room();
  test_demand_waits_first();
  test_read_errors();
  test_shrink_moves_what_is_hot();
  test_pages_that_a_step_holds_are_no_room();
  test_empty_records();
  test_engine_serves();
  test_engine_bad_arguments();
  test_engine_budget();
  test_engine_lower_levels_need_less();
  test_forgotten_needs_of_open_sessions();
  test_engine_gives_memory_back();
  test_engine_read_errors();
  test_engine_interrupts_and_close();
  test_session_close();
  for (const char* io : {"threads", "uring", "device", "unified"}) test_stress(io, 1);
  return check_failures != 0;
}

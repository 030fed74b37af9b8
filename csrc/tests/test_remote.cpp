// Records that come from elsewhere: the queue by itself, and the engine over a local copy with
// holes and damage in it.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../engine/engine.h"
#include "../storage/crc32c.h"
#include "../storage/remote_reader.h"
#include "check.h"

using namespace comoe;

constexpr int64_t kPage = 4096;

struct Results final : BackendEvents {
  std::mutex mutex;
  std::map<int32_t, std::pair<ReadStatus, std::string>> done;
  void read_done(int32_t record, ReadStatus status, const std::string& error) override {
    std::lock_guard<std::mutex> lock(mutex);
    CHECK(done.emplace(record, std::make_pair(status, error)).second);
  }
  void step_passed() override {}
};

static std::vector<uint8_t> payload_of(int32_t record, int64_t bytes) {
  std::vector<uint8_t> data(bytes);
  uint32_t state = 77 + record;
  for (uint8_t& byte : data) byte = (state = state * 1664525 + 1013904223) >> 24;
  return data;
}

// Records of `bytes` one after the other in file 0, each with pages of its own.
struct Jobs {
  std::vector<std::vector<uint8_t>> payloads;
  std::vector<std::vector<uint8_t>> memory;
  std::vector<std::vector<uint8_t*>> pages;
  std::vector<RecordInfo> infos;
  Jobs(int count, int64_t bytes) {
    for (int i = 0; i < count; ++i) {
      payloads.push_back(payload_of(i, bytes));
      const int64_t whole = (bytes + kPage - 1) / kPage * kPage;
      memory.emplace_back(whole, 0xA5);
      pages.emplace_back();
      for (int64_t at = 0; at < whole; at += kPage) pages.back().push_back(&memory.back()[at]);
      infos.push_back({0, i * whole, bytes, crc32c(payloads.back().data(), bytes)});
    }
  }
  ReadJob job(int i, bool demand) const { return {i, infos[i], pages[i].data(), demand}; }
  bool holds(int i) const {
    if (std::memcmp(memory[i].data(), payloads[i].data(), payloads[i].size()) != 0) return false;
    return std::all_of(memory[i].begin() + static_cast<int64_t>(payloads[i].size()),
                       memory[i].end(), [](uint8_t byte) { return byte == 0; });
  }
};

static std::vector<int32_t> records_of(const std::vector<RemoteRequest>& taken) {
  std::vector<int32_t> records;
  for (const RemoteRequest& request : taken) records.push_back(request.record);
  return records;
}
using Ids = std::vector<int32_t>;

static void test_order_and_merging() {
  Results results;
  RemoteReader remote(kPage, &results);
  Jobs jobs(10, 5000);  // extents of 8192
  CHECK(remote.take(0, 0, 1 << 20, 9).empty());
  for (int i : {7, 0, 2, 1}) remote.submit(jobs.job(i, false));
  remote.submit(jobs.job(9, true));
  remote.submit(jobs.job(4, true));
  // Demand goes first and alone; padding is a gap.
  CHECK(records_of(remote.take(0, 4096, 1 << 20, 9)) == Ids{9});
  CHECK(remote.has_demand());
  CHECK(records_of(remote.take(0, 4096, 1 << 20, 0)) == Ids{4});
  CHECK(!remote.has_demand());
  CHECK(remote.take(0, 4096, 1 << 20, 0).empty());  // no more speculation is allowed
  remote.submit(jobs.job(8, false));
  // The first asked for, and its neighbour; the rest stays.
  CHECK((records_of(remote.take(0, 4096, 1 << 20, 1)) == Ids{7, 8}));
  CHECK(remote.take(0, 4096, 1 << 20, 1).empty());  // that take is still open
  CHECK((records_of(remote.take(0, 4096, 1 << 20, 2)) == Ids{0, 1, 2}));
  // Size and gap are limits, but the first always goes.
  for (int i : {5, 6, 3}) remote.submit(jobs.job(i, true));
  CHECK((records_of(remote.take(0, 4096, 8192 + 5000, 9)) == Ids{5, 6}));
  CHECK((records_of(remote.take(0, 4096, 1, 9)) == Ids{3}));
}

static void test_promote_and_cancel() {
  Results results;
  RemoteReader remote(kPage, &results);
  Jobs jobs(6, 4096);
  for (int i : {0, 2, 4}) remote.submit(jobs.job(i, false));
  CHECK(remote.cancel(2) && !remote.cancel(2));
  remote.promote(4);
  CHECK(!remote.cancel(4));  // it is demanded
  const auto first = remote.take(0, 0, 1, 1);
  CHECK(records_of(first) == Ids{4} && first[0].demand);
  const auto second = remote.take(0, 0, 1, 1);
  CHECK(records_of(second) == Ids{0} && !second[0].demand);
  CHECK(!remote.cancel(0) && !remote.is_demanded(second[0].ticket));
  remote.promote(0);
  CHECK(remote.is_demanded(second[0].ticket));
}

static void test_checksums() {
  Results results;
  RemoteReader remote(kPage, &results);
  Jobs jobs(3, 5000);
  for (int i : {0, 1, 2}) remote.submit(jobs.job(i, true));
  const auto taken = remote.take(0, 4096, 1 << 20, 1);
  CHECK(taken.size() == 3);
  auto wrong = jobs.payloads[0];
  wrong[4999] ^= 1;
  CHECK(remote.done(taken[0].ticket, wrong.data(), 5000) == Handed::wrong);
  CHECK(remote.done(taken[0].ticket, jobs.payloads[0].data(), 4999) == Handed::wrong);  // cut off
  CHECK(remote.done(taken[0].ticket, jobs.payloads[1].data(), 5000) == Handed::wrong);  // another's
  CHECK(results.done.empty() && remote.is_open(taken[0].ticket));
  CHECK(jobs.memory[0][0] == 0xA5);  // nothing was written that was not verified
  CHECK(remote.done(taken[0].ticket, jobs.payloads[0].data(), 5000) == Handed::taken);
  CHECK(results.done.at(0).first == ReadStatus::ok && jobs.holds(0));
  CHECK(remote.done(taken[0].ticket, wrong.data(), 5000) == Handed::closed);  // too late: of no use
  CHECK(jobs.holds(0) && !remote.is_open(taken[0].ticket));
  remote.failed(taken[1].ticket, "no source has it");
  remote.failed(taken[1].ticket, "again");
  CHECK(results.done.at(1).first == ReadStatus::failed);
  CHECK(results.done.at(1).second == "fetching record 1: no source has it");
  const RemoteStats stats = remote.stats();
  CHECK(stats.records == 1 && stats.bytes == 5000 && stats.refused == 3 && stats.failed == 1);
  // After the end nothing is reported, and those who wait go home.
  std::thread waiter([&] { CHECK(remote.take(60, 0, 1, 1).empty()); });
  remote.stop();
  waiter.join();
  CHECK(remote.stopped());
  CHECK(remote.done(taken[2].ticket, jobs.payloads[2].data(), 5000) == Handed::closed);
  remote.failed(taken[2].ticket, "late");
  remote.submit(jobs.job(2, true));
  CHECK(results.done.count(2) == 0 && remote.take(0, 0, 1, 1).empty());
}

// Demand that came too late fails at once, whether somebody fetches it or not; the rest stays.
static void test_expire() {
  Results results;
  RemoteReader remote(kPage, &results);
  Jobs jobs(5, 4096);
  remote.submit(jobs.job(0, true));
  remote.submit(jobs.job(1, false));
  const auto taken = remote.take(0, 0, 1, 9);
  const auto other = remote.take(0, 0, 1, 9);
  remote.submit(jobs.job(2, true));
  remote.submit(jobs.job(3, false));
  const int32_t some[] = {1, 2, 4};
  CHECK(remote.expire(some, 0, "late") == 0);
  CHECK(remote.expire(some, 3, "late") == 1 && results.done.count(2) == 1);
  CHECK(remote.expire(nullptr, 0, "late") == 1);
  CHECK(results.done.size() == 2 && results.done.at(0).second == "fetching record 0: late");
  CHECK(results.done.at(2).first == ReadStatus::failed);
  CHECK(remote.done(taken[0].ticket, jobs.payloads[0].data(), 4096) == Handed::closed);
  CHECK(remote.is_open(other[0].ticket) && !remote.has_demand());
  remote.promote(1);
  remote.promote(3);
  CHECK(remote.expire(nullptr, 0, "late") == 2 && !remote.is_open(other[0].ticket));
  CHECK(remote.take(0, 0, 1, 1).empty());
}

// ---- The engine over remote files --------------------------------------------------------------

constexpr int kRecords = 24;
constexpr int64_t kBytes = 10000;  // 3 pages

// A file with holes where records are not here yet, and what a server would have.
struct RemoteFile {
  std::string path;
  std::vector<std::vector<uint8_t>> payloads;
  std::vector<RecordInfo> infos;
  int fd;
  RemoteFile() {
    const char* folder = std::getenv("TMPDIR");
    path = std::string(folder ? folder : "/tmp") + "/comoe_test_remote_XXXXXX";
    fd = mkstemp(path.data());
    if (fd < 0 || ftruncate(fd, kRecords * 3 * kPage) != 0)
      throw std::runtime_error("mkstemp " + path);
    for (int i = 0; i < kRecords; ++i) {
      payloads.push_back(payload_of(i, kBytes));
      infos.push_back({0, i * 3 * kPage, kBytes, crc32c(payloads[i].data(), kBytes)});
    }
  }
  ~RemoteFile() {
    close(fd);
    unlink(path.c_str());
  }
  void write(int record, const std::vector<uint8_t>& bytes) const {
    if (pwrite(fd, bytes.data(), bytes.size(), infos[record].offset) !=
        static_cast<ssize_t>(bytes.size()))
      throw std::runtime_error("write " + path);
  }
  void add_to(Engine& engine) {
    const int32_t file = engine.add_remote_file(path);
    for (RecordInfo& info : infos) info.file = file;
    engine.add_records(infos.data(), kRecords);
    std::vector<int32_t> ids(kRecords);
    for (int i = 0; i < kRecords; ++i) ids[i] = i;
    engine.add_experts(ids.data(), kRecords);
  }
};

static EngineConfig engine_config(int slabs, const std::string& io) {
  EngineConfig config;
  config.page_bytes = kPage;
  config.slab_bytes = 6 * kPage;
  config.budget_bytes = slabs * config.slab_bytes;
  config.level_masks = {1};
  config.io = io;
  return config;
}

// Fetches what is asked for until the engine is closed; every `bad`-th answer is wrong at first.
static void serve(Engine& engine, const RemoteFile& file, int bad, std::atomic<int>& fetched) {
  int answers = 0;
  while (!engine.remote().stopped())
    for (const RemoteRequest& request : engine.remote().take(0.05, 4096, 1 << 20, 2)) {
      auto data = file.payloads[request.record];
      if (bad > 0 && ++answers % bad == 0) {
        data[answers % kBytes] ^= 0x40;
        CHECK(engine.remote().done(request.ticket, data.data(), kBytes) == Handed::wrong);
        data = file.payloads[request.record];
      }
      ++fetched;
      CHECK(engine.remote().done(request.ticket, data.data(), kBytes) != Handed::wrong);
    }
}

static bool use(Engine& engine, const RemoteFile& file, int32_t record) {
  const Need need{record, 0, 0};
  auto session = engine.open_session(&need, 1);
  std::vector<Ready> ready;
  if (!session->next(ready) || ready.size() != 1) return false;
  std::vector<uint8_t> out(kBytes);
  engine.copy_out(record, kBytes, out.data());
  return out == file.payloads[record];
}

static void test_local_copies(const std::string& io) {
  RemoteFile file;
  Engine engine(engine_config(kRecords, io));
  file.add_to(engine);
  std::atomic<int> fetched{0};
  std::thread server([&] { serve(engine, file, 0, fetched); });
  CHECK(use(engine, file, 0) && fetched == 1);  // a hole
  file.write(1, file.payloads[1]);
  auto damaged = file.payloads[2];
  damaged[17] ^= 1;
  file.write(2, damaged);
  const int32_t ids[] = {1, 2, 3};
  engine.set_local(ids, 3, true);
  CHECK(use(engine, file, 1) && fetched == 1);  // from the copy
  CHECK(use(engine, file, 2) && fetched == 2);  // damaged there
  CHECK(use(engine, file, 3) && fetched == 3);  // punched out meanwhile
  CHECK(engine.stats().backend.cache_failures == 2);
  CHECK(engine.stats().core.corrupt_reads == 0);
  engine.evict(ids, 3);
  CHECK(use(engine, file, 2) && fetched == 4);  // not believed a second time
  CHECK(use(engine, file, 1) && fetched == 4);
  CHECK(engine.stats().backend.remote_records == 4);
  engine.close();
  server.join();
}

// A failure reaches the one who waits, and the engine stays usable.
static void test_failure() {
  RemoteFile file;
  Engine engine(engine_config(4, "threads"));
  file.add_to(engine);
  std::thread server([&] {
    std::vector<RemoteRequest> taken;
    while (taken.empty()) taken = engine.remote().take(1, 0, 1, 1);
    engine.remote().failed(taken[0].ticket, "the link is down");
    for (taken.clear(); taken.empty();) taken = engine.remote().take(1, 0, 1, 1);
    engine.remote().done(taken[0].ticket, file.payloads[5].data(), kBytes);
  });
  CHECK_THROWS(use(engine, file, 5), ReadError, "fetching record 5: the link is down");
  CHECK(use(engine, file, 5));
  server.join();
}

// Threads that use, read ahead, cancel, evict and mark copies, over several that fetch.
static void test_threads() {
  RemoteFile file;
  for (int i = 0; i < kRecords; i += 3) file.write(i, file.payloads[i]);
  Engine engine(engine_config(4, "threads"));  // 8 records of 24
  file.add_to(engine);
  std::atomic<int> fetched{0};
  std::vector<std::thread> threads, servers;
  for (int s = 0; s < 3; ++s) servers.emplace_back([&, s] { serve(engine, file, 5 + s, fetched); });
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      uint32_t state = 11 + t;
      for (int i = 0; i < 300; ++i) {
        state = state * 1664525 + 1013904223;
        const int32_t other = static_cast<int32_t>((state >> 8) % kRecords);
        const int32_t next = (other + 1) % kRecords;
        engine.request(&next, 1, Priority::prefetch);
        if (i % 3 == 0) engine.cancel(Priority::prefetch, &next, 1);
        if (i % 4 == 0) engine.set_local(&other, 1, i % 8 == 0);
        CHECK(use(engine, file, other));
        if (i % 5 == 0) engine.evict(&other, 1);
      }
    });
  for (std::thread& thread : threads) thread.join();
  engine.close();
  for (std::thread& server : servers) server.join();
  CHECK(fetched > 0);
}

int main() {
  test_order_and_merging();
  test_promote_and_cancel();
  test_checksums();
  test_expire();
  for (const char* io : {"threads", "auto"}) test_local_copies(io);
  test_failure();
  test_threads();
  return check_failures != 0;
}

// Checksums, and readers over real files with faults put between them and the kernel.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "../storage/crc32c.h"
#include "../storage/raw_read.h"
#include "../storage/reader.h"
#include "check.h"

using namespace comoe;

// One bit at a time, straight from the polynomial.
static uint32_t crc32c_ref(const uint8_t* p, size_t bytes) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < bytes; ++i) {
    crc ^= p[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0u);
  }
  return ~crc;
}

static void test_crc32c() {
  CHECK(crc32c("123456789", 9) == 0xE3069283);  // the polynomial's published check value
  CHECK(crc32c("", 0) == 0);
  std::vector<uint8_t> data(20000);
  uint32_t state = 1;
  for (auto& byte : data) byte = (state = state * 1664525 + 1013904223) >> 24;
  // Every length around the loops' borders (8, 3072), from every alignment.
  for (size_t align = 0; align < 8; ++align)
    for (size_t bytes :
         {0, 1, 7, 8, 9, 63, 1023, 1024, 3071, 3072, 3073, 3080, 6143, 6144, 9217, 19991}) {
      const uint8_t* p = data.data() + align;
      const uint32_t expected = crc32c_ref(p, bytes);
      CHECK(crc32c(p, bytes) == expected);
      CHECK(crc32c_table(p, bytes) == expected);
      const size_t cut = bytes * 3 / 7;
      CHECK(crc32c(p + cut, bytes - cut, crc32c(p, cut)) == expected);
      CHECK(crc32c_table(p + cut, bytes - cut, crc32c_table(p, cut)) == expected);
    }
}

// ---- Readers -----------------------------------------------------------------------------------

// A file of records with random bytes, in the current folder or $TMPDIR.
struct Store {
  std::string path;
  std::vector<RecordInfo> infos;
  std::vector<std::vector<uint8_t>> payloads;

  explicit Store(const std::vector<int64_t>& sizes) {
    const char* folder = std::getenv("TMPDIR");
    path = std::string(folder ? folder : "/tmp") + "/comoe_test_storage_XXXXXX";
    const int fd = mkstemp(path.data());
    if (fd < 0) throw std::runtime_error("mkstemp " + path);
    int64_t offset = 0;
    uint32_t state = 7;
    for (int64_t bytes : sizes) {
      std::vector<uint8_t> data((bytes + 4095) / 4096 * 4096, 0xEE);
      for (int64_t i = 0; i < bytes; ++i) data[i] = (state = state * 1664525 + 1013904223) >> 24;
      if (pwrite(fd, data.data(), data.size(), offset) != static_cast<ssize_t>(data.size()))
        throw std::runtime_error("write " + path);
      infos.push_back({0, offset, bytes, crc32c(data.data(), bytes)});
      offset += static_cast<int64_t>(data.size());
      data.resize(bytes);
      payloads.push_back(std::move(data));
    }
    close(fd);
  }
  ~Store() { unlink(path.c_str()); }
};

struct Results final : BackendEvents {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<int32_t, std::pair<ReadStatus, std::string>> done;
  std::vector<int32_t> order;
  void read_done(int32_t record, ReadStatus status, const std::string& error) override {
    std::lock_guard<std::mutex> lock(mutex);
    CHECK(done.emplace(record, std::make_pair(status, error)).second);
    order.push_back(record);
    changed.notify_all();
  }
  void step_passed() override {}
  void wait_for(size_t count) {
    std::unique_lock<std::mutex> lock(mutex);
    while (done.size() < count) changed.wait(lock);
  }
};

// Pages of a record, scattered: contiguous ones and gaps, in falling and rising order, sentinels
// around.
struct Pages {
  int64_t page_bytes;
  uint8_t* memory;
  int64_t bytes;
  std::vector<uint8_t*> pages;
  Pages(int64_t page_bytes, int64_t record_bytes) : page_bytes(page_bytes) {
    const int64_t count = (record_bytes + page_bytes - 1) / page_bytes;
    bytes = (2 * count + 2) * page_bytes;
    memory = static_cast<uint8_t*>(std::aligned_alloc(4096, bytes));
    std::memset(memory, 0xA5, bytes);
    for (int64_t i = 0; i < count; ++i)
      pages.push_back(memory + page_bytes * (i % 3 == 1 ? i + 1 : 2 * count - i));
  }
  ~Pages() { std::free(memory); }
  bool holds(const std::vector<uint8_t>& payload) const {
    for (size_t at = 0; at < payload.size(); at += page_bytes)
      if (std::memcmp(pages[at / page_bytes], payload.data() + at,
                      std::min<size_t>(page_bytes, payload.size() - at)) != 0)
        return false;
    return true;
  }
  // Nothing was written outside the record's extent.
  bool sentinels_stand(int64_t extent) const {
    std::vector<bool> inside(bytes, false);
    for (size_t p = 0; p < pages.size(); ++p) {
      const int64_t used = std::min(page_bytes, extent - static_cast<int64_t>(p) * page_bytes);
      std::fill_n(inside.begin() + (pages[p] - memory), used, true);
    }
    for (int64_t i = 0; i < bytes; ++i)
      if (!inside[i] && memory[i] != 0xA5) return false;
    return true;
  }
};

static std::unique_ptr<Reader> reader_of(const ReaderConfig& config, Results& results) {
  auto reader = make_reader(config, &results);
  if (config.kind == "uring" && std::string(reader->kind()) != "uring")
    std::printf("no io_uring here\n");
  return reader;
}

static void test_reads(const std::string& kind, bool direct) {
  // Sizes around the borders of blocks (4096), pages and chunks; one of more than IOV_MAX pieces.
  Store store({1, 4095, 4096, 4097, 12288, 65536, 262143, 262144, 262145, 1000003, 5000000});
  for (int64_t page_bytes : {4096, 12288, 73728})
    for (int64_t chunk_bytes : {4096, 262144, 8 << 20}) {
      ReaderConfig config;
      config.page_bytes = page_bytes;
      config.chunk_bytes = chunk_bytes;
      config.kind = kind;
      config.direct = direct;
      Results results;
      auto reader = reader_of(config, results);
      CHECK(reader->add_file(store.path) == 0);
      std::vector<std::unique_ptr<Pages>> pages;
      for (size_t i = 0; i < store.infos.size(); ++i) {
        pages.push_back(std::make_unique<Pages>(page_bytes, store.infos[i].bytes));
        reader->submit(
            {static_cast<int32_t>(i), store.infos[i], pages[i]->pages.data(), i % 2 == 0});
        if (i % 3 == 0) reader->promote(static_cast<int32_t>(i));
      }
      results.wait_for(store.infos.size());
      for (size_t i = 0; i < store.infos.size(); ++i) {
        const auto& [status, error] = results.done[static_cast<int32_t>(i)];
        CHECK(status == ReadStatus::ok && error.empty());
        CHECK(pages[i]->holds(store.payloads[i]));
        CHECK(pages[i]->sentinels_stand((store.infos[i].bytes + 4095) / 4096 * 4096));
      }
      const BackendStats stats = reader->stats();
      if (!direct) CHECK(stats.buffered_reads > 0);
      reader->stop();
      reader->stop();
    }
}

// The kernel's part, played by the test: what to do instead of the next call.
static std::atomic<int> fault_errno{0}, faults_left{0}, calls{0};
static std::atomic<int64_t> longest_read{INT64_MAX};
static ssize_t faulty_preadv(int fd, const iovec* iov, int count, off_t offset) {
  ++calls;
  if (faults_left.load() > 0 && faults_left.fetch_sub(1) > 0) {
    errno = fault_errno;
    return -1;
  }
  if (longest_read != INT64_MAX) {  // a short read, at any length the kernel may choose
    iovec first = iov[0];
    first.iov_len = std::min<size_t>(first.iov_len, static_cast<size_t>(longest_read));
    return ::preadv(fd, &first, 1, offset);
  }
  return ::preadv(fd, iov, count, offset);
}

static void test_faults() {
  Store store({100000, 300000});
  auto run = [&](int error, int times, int64_t longest, ReadStatus expected, const char* text,
                 bool direct) {
    fault_errno = error;
    faults_left = times;
    longest_read = longest;
    ReaderConfig config;
    config.page_bytes = 8192;
    config.chunk_bytes = 65536;
    config.num_threads = 2;
    config.kind = "threads";
    config.direct = direct;
    config.preadv = faulty_preadv;
    Results results;
    auto reader = reader_of(config, results);
    reader->add_file(store.path);
    Pages first(8192, 100000), second(8192, 300000);
    reader->submit({0, store.infos[0], first.pages.data(), true});
    results.wait_for(1);
    faults_left = 0;
    longest_read = INT64_MAX;
    CHECK(results.done[0].first == expected);
    if (expected == ReadStatus::ok) CHECK(first.holds(store.payloads[0]));
    if (results.done[0].second.find(text) == std::string::npos) {
      std::fprintf(stderr, "expected \"%s\" in: %s\n", text, results.done[0].second.c_str());
      ++check_failures;
    }
    // The reader is none the worse for it.
    reader->submit({1, store.infos[1], second.pages.data(), true});
    results.wait_for(2);
    CHECK(results.done[1].first == ReadStatus::ok && second.holds(store.payloads[1]));
    return reader->stats();
  };
  CHECK(run(EINTR, 2, INT64_MAX, ReadStatus::ok, "", true).retries == 2);
  CHECK(run(EAGAIN, 3, INT64_MAX, ReadStatus::ok, "", true).retries == 3);
  CHECK(run(EIO, 1, INT64_MAX, ReadStatus::ok, "", true).retries == 1);
  run(0, 0, 4096, ReadStatus::ok, "", true);  // short reads that end on a block
  run(0, 0, 4096, ReadStatus::ok, "", false);
  run(0, 0, 1000, ReadStatus::failed, "truncated", true);  // never a whole block: no progress
  run(EIO, 1000, INT64_MAX, ReadStatus::failed, std::strerror(EIO), true);
  run(EIO, 1000, INT64_MAX, ReadStatus::failed, "record 0 from ", true);
  // A file system that takes O_DIRECT at open and refuses it at the first read.
  CHECK(run(EINVAL, 1, INT64_MAX, ReadStatus::ok, "", true).buffered_reads > 0);
}

static void test_damage(const std::string& kind) {
  Store store({50000, 50000});
  ReaderConfig config;
  config.page_bytes = 4096;
  config.kind = kind;
  for (bool verify : {true, false}) {
    config.verify = verify;
    Results results;
    auto reader = reader_of(config, results);
    reader->add_file(store.path);
    Pages first(4096, 50000), second(4096, 50000);
    RecordInfo wrong = store.infos[0];
    wrong.crc32c ^= 1;
    reader->submit({0, wrong, first.pages.data(), true});
    reader->submit({1, store.infos[1], second.pages.data(), true});
    results.wait_for(2);
    CHECK(results.done[0].first == (verify ? ReadStatus::corrupt : ReadStatus::ok));
    CHECK((results.done[0].second.find("wrong checksum") != std::string::npos) == verify);
    CHECK(results.done[1].first == ReadStatus::ok);
    CHECK(reader->stats().retries == verify);  // read once more, in case the bit flipped on its way
  }
  // The file is cut while the engine runs.
  Results results;
  auto reader = reader_of(config, results);
  reader->add_file(store.path);
  CHECK(truncate(store.path.c_str(), 60000) == 0);
  Pages pages(4096, 50000);
  reader->submit({1, store.infos[1], pages.pages.data(), false});
  results.wait_for(1);
  CHECK(results.done[1].first == ReadStatus::failed);
  CHECK(results.done[1].second.find("truncated") != std::string::npos);
}

// With one request in flight, what is demanded overtakes what is not, also in the middle of a
// record.
static std::mutex gate_mutex;
static std::condition_variable gate_changed;
static int gate_open = 0, gate_waiting = 0;
static ssize_t gated_preadv(int fd, const iovec* iov, int count, off_t offset) {
  {
    std::unique_lock<std::mutex> lock(gate_mutex);
    ++gate_waiting;
    gate_changed.notify_all();
    while (gate_open == 0) gate_changed.wait(lock);
    --gate_open;
    --gate_waiting;
  }
  return ::preadv(fd, iov, count, offset);
}

static void test_order() {
  Store store({40000, 40000, 40000, 40000, 40000});
  ReaderConfig config;
  config.page_bytes = 4096;
  config.chunk_bytes = 8192;
  config.num_threads = 1;
  config.kind = "threads";
  config.preadv = gated_preadv;
  Results results;
  auto reader = reader_of(config, results);
  reader->add_file(store.path);
  std::vector<std::unique_ptr<Pages>> pages;
  for (int i = 0; i < 5; ++i) pages.push_back(std::make_unique<Pages>(4096, 40000));
  auto submit = [&](int i, bool demand) {
    reader->submit({i, store.infos[i], pages[i]->pages.data(), demand});
  };
  submit(0, false);
  {
    std::unique_lock<std::mutex> lock(gate_mutex);
    while (gate_waiting == 0) gate_changed.wait(lock);  // the first chunk of 0 is with the kernel
  }
  submit(1, false);
  submit(2, false);
  submit(3, true);
  submit(4, false);
  reader->promote(2);
  CHECK(reader->cancel(4) && !reader->cancel(4));
  CHECK(!reader->cancel(0) && !reader->cancel(3));  // it has begun; it is demanded
  {
    std::lock_guard<std::mutex> lock(gate_mutex);
    gate_open = 1000;
    gate_changed.notify_all();
  }
  results.wait_for(4);
  CHECK((results.order == std::vector<int32_t>{3, 2, 0, 1}));
  reader->stop();
  gate_open = 0;
}

// Speculation fills half of what may be in flight, so that demand always finds the other half.
static void test_room_for_demand() {
  gate_open = gate_waiting = 0;
  Store store({40000, 40000, 40000});
  ReaderConfig config;
  config.page_bytes = 4096;
  config.chunk_bytes = 8192;
  config.num_threads = 4;
  config.kind = "threads";
  config.preadv = gated_preadv;
  Results results;
  auto reader = reader_of(config, results);
  reader->add_file(store.path);
  std::vector<std::unique_ptr<Pages>> pages;
  for (int i = 0; i < 3; ++i) pages.push_back(std::make_unique<Pages>(4096, 40000));
  for (int i = 0; i < 3; ++i) {
    reader->submit({i, store.infos[i], pages[i]->pages.data(), i == 2});
    std::unique_lock<std::mutex> lock(gate_mutex);
    const int expected = i < 2 ? 2 : 4;
    while (gate_waiting < expected) gate_changed.wait(lock);
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // time to do wrong
    lock.lock();
    CHECK(gate_waiting == expected);
  }
  {
    std::lock_guard<std::mutex> lock(gate_mutex);
    gate_open = 1000;
    gate_changed.notify_all();
  }
  results.wait_for(3);
  for (int i = 0; i < 3; ++i) CHECK(pages[i]->holds(store.payloads[i]));
  reader->stop();
}

static void test_files() {
  ReaderConfig config;
  config.page_bytes = 4096;
  Results results;
  auto reader = make_reader(config, &results);
  CHECK_THROWS(reader->add_file("/nonexistent/layer-00000.bin"), std::runtime_error,
               "layer-00000.bin");
  CHECK_THROWS(reader->add_file("/tmp"), std::runtime_error, "regular file");
  CHECK_THROWS(reader->file_bytes(0), std::out_of_range, "");
}

// Stopping with much to do neither hangs nor reports afterwards.
static void test_stop(const std::string& kind) {
  Store store(std::vector<int64_t>(30, 200000));
  ReaderConfig config;
  config.page_bytes = 4096;
  config.chunk_bytes = 8192;
  config.kind = kind;
  Results results;
  auto reader = reader_of(config, results);
  reader->add_file(store.path);
  std::vector<std::unique_ptr<Pages>> pages;
  for (int i = 0; i < 30; ++i) {
    pages.push_back(std::make_unique<Pages>(4096, 200000));
    reader->submit({i, store.infos[i], pages[i]->pages.data(), i % 2 == 0});
  }
  reader->stop();
  const size_t done = results.done.size();
  reader->submit({31, store.infos[0], pages[0]->pages.data(), true});
  CHECK(results.done.size() == done);
}

// A reader whose requests the test itself answers.
class ManualReader final : public Reader {
 public:
  using Reader::finish_chunk;
  using Reader::handle_result;
  using Reader::most_urgent;
  using Reader::Reader;
  bool next(Chunk& chunk) {
    std::lock_guard<std::mutex> lock(mutex_);
    return next_chunk(chunk);
  }
  void stop() override {}
  const char* kind() const override { return "manual"; }

 private:
  void wake() override {}
  int depth() const override { return 4; }
};

// What has been read makes room for the next request before it is verified: a checksum of records
// that came together takes as long as it takes the disk to run dry.
static void test_requests_do_not_wait_for_checksums() {
  Store store({8 * 4096, 8 * 4096, 2 * 4096});
  Results results;
  ReaderConfig config;
  config.page_bytes = 4096;
  config.chunk_bytes = 4096;
  ManualReader reader(config, &results);
  reader.add_file(store.path);
  std::vector<std::unique_ptr<Pages>> pages;
  for (int32_t r = 0; r < 3; ++r) {
    pages.push_back(std::make_unique<Pages>(4096, store.infos[r].bytes));
    if (r < 2) reader.submit({r, store.infos[r], pages[r]->pages.data(), false});
  }
  Chunk running[2], chunk;
  CHECK(reader.next(running[0]) && reader.next(running[1]));
  CHECK(!reader.next(chunk));  // speculation: half of the depth
  CHECK(reader.handle_result(running[0], 4096));
  CHECK(reader.next(chunk));  // although it is not finished
  CHECK(!reader.next(chunk));
  CHECK(!reader.handle_result(running[1], 4096 / 2));  // half of it: still with the kernel
  CHECK(!reader.next(chunk));

  // Of what has ended, demand is verified first.
  reader.submit({2, store.infos[2], pages[2]->pages.data(), true});
  Chunk demanded;
  CHECK(reader.next(demanded) && demanded.demand);
  CHECK(reader.most_urgent({running[0], running[0]}) == 0);
  CHECK(reader.most_urgent({running[0], running[0], demanded}) == 2);
  reader.promote(0);
  CHECK(reader.most_urgent({running[0], demanded}) == 0);
}

static void test_raw_read() {
  Store store({100000});
  CHECK_THROWS(raw_read_seconds(store.path, 0, 100, 4096, 1), std::invalid_argument,
               "multiples of 4096");
  CHECK_THROWS(raw_read_seconds("/nonexistent", 0, 4096, 4096, 1), std::runtime_error,
               "/nonexistent");
  try {
    CHECK(raw_read_seconds(store.path, 0, 102400 / 4096 * 4096, 8192, 3) > 0);
  } catch (const std::runtime_error& error) {  // a file system without O_DIRECT
    CHECK(std::string(error.what()).find(store.path) != std::string::npos);
  }
}

int main() {
  test_raw_read();
  test_crc32c();
  std::printf("crc32c: %s\n", crc32c_isa());
  for (const char* kind : {"threads", "uring"}) {
    test_reads(kind, true);
    test_reads(kind, false);
    test_damage(kind);
    test_stop(kind);
  }
  test_faults();
  test_order();
  test_room_for_demand();
  test_requests_do_not_wait_for_checksums();
  test_files();
  return check_failures != 0;
}

// A device without memory or disk for the tests of the engine's logic: pages hold a tag that says
// which piece of which record was read into them; reads run until the test ends them, well, failed
// or damaged; steps run until the test ends them, and see every page that was published while they
// ran. It throws std::logic_error when the engine touches what it must not.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../engine/backend.h"

namespace comoe {

class FakeBackend final : public Backend {
 public:
  struct Tag {
    int32_t record = -1, index = -1;
    bool good = false;
    bool operator==(const Tag& o) const {
      return record == o.record && index == o.index && good == o.good;
    }
  };
  struct Running {
    std::vector<int32_t> pages;
    bool demand = false;
  };

  FakeBackend(int pages_per_slab, int max_slabs)
      : pages_per_slab_(pages_per_slab), mapped_(max_slabs), tags_(pages_per_slab * max_slabs) {}

  // Controls of the test.
  int slab_limit = 1 << 30;       // mapping more is an error of the engine
  bool refuse_memory = false;     // map_slab fails
  bool reads_begin_late = false;  // cancel_read succeeds
  bool steps_hold = false;        // the running step reads what left while it ran
  std::map<int32_t, Running> running;
  std::map<int32_t, std::vector<int32_t>> published;
  std::vector<std::set<int32_t>> steps;  // running ones, oldest first: pages that each may read

  // The pages of a running read get their bytes; the test then tells the engine.
  void fill(int32_t record, bool good) {
    const Running& read = running.at(record);
    for (size_t i = 0; i < read.pages.size(); ++i)
      tags_.at(read.pages[i]) = {record, static_cast<int32_t>(i), good};
    running.erase(record);
  }
  void launch_step() {
    ++launched_;
    steps.emplace_back();
    for (const auto& [record, pages] : published) steps.back().insert(pages.begin(), pages.end());
  }
  void complete_step() {
    require(!steps.empty(), "no step runs");
    steps.erase(steps.begin());
    ++completed_;
  }
  const Tag& tag(int32_t page) const { return tags_.at(page); }
  bool is_mapped(int32_t page) const { return mapped_.at(page / pages_per_slab_); }
  int mapped_slabs() const {
    return static_cast<int>(std::count(mapped_.begin(), mapped_.end(), true));
  }
  static int32_t page_of(const uint8_t* address) {
    return static_cast<int32_t>(reinterpret_cast<uintptr_t>(address) / 64) - 1;
  }

  // Backend.
  void start(BackendEvents*) override {}
  int32_t add_file(const std::string&) override { return 0; }
  int64_t file_bytes(int32_t) const override { return int64_t{1} << 40; }
  BackendStats stats() const override { return {}; }
  int max_slabs() const override { return static_cast<int>(mapped_.size()); }
  bool map_slab(int slab) override {
    require(!mapped_.at(slab), "map_slab: it is mapped");
    if (refuse_memory) return false;
    mapped_[slab] = true;
    require(mapped_slabs() <= slab_limit, "map_slab: over the budget");
    return true;
  }
  void unmap_slab(int slab) override {
    require(mapped_.at(slab), "unmap_slab: it is not mapped");
    for (int32_t page = slab * pages_per_slab_; page < (slab + 1) * pages_per_slab_; ++page) {
      require_unread(page, "unmap_slab");
      for (const auto& entry : running)
        for (int32_t p : entry.second.pages) require(p != page, "unmap_slab: a read goes there");
      tags_[page] = {};
    }
    mapped_[slab] = false;
  }
  uint8_t* page_address(int32_t page) override {  // never dereferenced
    return reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(page + 1) * 64);
  }
  void copy_page(int32_t from, int32_t to) override {
    require(is_mapped(from) && is_mapped(to), "copy_page: not mapped");
    require_unread(to, "copy_page");
    tags_[to] = tags_[from];
  }
  void start_read(const ReadJob& job) override {
    require(running.count(job.record) == 0, "start_read: it is being read already");
    Running& read = running[job.record];
    read.demand = job.demand;
    for (int64_t i = 0; i < job.info.bytes; ++i) {  // page_bytes is 1 here
      const int32_t page = page_of(job.pages[i]);
      require(is_mapped(page), "start_read: page is not mapped");
      require_unread(page, "start_read");
      tags_[page] = {};  // from now on anything may stand there
      read.pages.push_back(page);
    }
  }
  void promote_read(int32_t record) override {
    require(running.count(record) == 1, "promote_read: it is not being read");
    running[record].demand = true;
  }
  bool cancel_read(int32_t record) override {
    require(running.count(record) == 1, "cancel_read: it is not being read");
    if (reads_begin_late) running.erase(record);
    return reads_begin_late;
  }
  void publish(int32_t record, const std::vector<uint8_t*>* addresses) override {
    published.erase(record);
    if (addresses == nullptr) return;
    std::vector<int32_t>& pages = published[record];
    for (const uint8_t* address : *addresses) pages.push_back(page_of(address));
    for (auto& step : steps) step.insert(pages.begin(), pages.end());
  }
  uint64_t launched() const override { return launched_; }
  uint64_t completed() const override { return completed_; }
  Reuse reuse(uint64_t step) const override {
    return completed_ >= step ? Reuse::now : steps_hold ? Reuse::held : Reuse::later;
  }
  void stop() override {}

  std::string fingerprint() const {
    std::string f;
    for (const Tag& t : tags_) {
      f.push_back(static_cast<char>(t.record));
      f.push_back(static_cast<char>(t.index * 2 + t.good));
    }
    for (const auto& [record, read] : running) {
      f.push_back(static_cast<char>(record));
      f.push_back(static_cast<char>(read.demand));
    }
    for (const auto& step : steps) {
      f.push_back('s');
      for (int32_t page : step) f.push_back(static_cast<char>(page));
    }
    return f;
  }

  static void require(bool condition, const std::string& what) {
    if (!condition) throw std::logic_error("FakeBackend: " + what);
  }

 private:
  void require_unread(int32_t page, const char* op) const {
    for (const auto& step : steps)
      require(step.count(page) == 0, std::string(op) + ": a running step may still read the page");
  }

  int pages_per_slab_;
  std::vector<bool> mapped_;
  std::vector<Tag> tags_;
  uint64_t launched_ = 0, completed_ = 0;
};

}  // namespace comoe

// A small store in a file, and engines over it: on the CPU, and on a device of this process.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../device/device_backend.h"
#include "../engine/engine.h"
#include "../storage/crc32c.h"
#include "check.h"
#include "fake_device.h"

namespace comoe {

// Experts whose records follow one another.
template <class CoreOrEngine>
void add_rows(CoreOrEngine& to, int32_t num_records) {
  std::vector<int32_t> table(num_records);
  for (int32_t r = 0; r < num_records; ++r) table[r] = r;
  CHECK(num_records % to.records_per_expert() == 0);
  to.add_experts(table.data(), num_records / to.records_per_expert());
}

constexpr int kPerExpert = 5;
const std::vector<uint32_t> kMasks{1, 3, 7, 15, 16};

struct Store {
  std::string path;
  std::vector<RecordInfo> infos;
  std::vector<std::vector<uint8_t>> payloads;
  std::vector<std::unique_ptr<FakeDevice>> devices;  // of engine(); they outlive their engines
  explicit Store(int num_experts, std::vector<int64_t> sizes = {9000, 4097, 4096, 20001, 70000}) {
    const char* folder = std::getenv("TMPDIR");
    path = std::string(folder ? folder : "/tmp") + "/comoe_test_engine_XXXXXX";
    const int fd = mkstemp(path.data());
    std::mt19937 random(3);
    int64_t offset = 0;
    for (int i = 0; i < num_experts * kPerExpert; ++i) {
      std::vector<uint8_t> data(sizes[i % kPerExpert]);
      for (auto& byte : data) byte = static_cast<uint8_t>(random());
      infos.push_back(
          {0, offset, static_cast<int64_t>(data.size()), crc32c(data.data(), data.size())});
      CHECK(pwrite(fd, data.data(), data.size(), offset) == static_cast<ssize_t>(data.size()));
      offset += (infos.back().bytes + 4095) / 4096 * 4096;
      payloads.push_back(std::move(data));
    }
    CHECK(ftruncate(fd, offset) == 0);
    close(fd);
  }
  Store(const Store&) = delete;
  ~Store() { unlink(path.c_str()); }
  static EngineConfig config(int slabs) {
    EngineConfig config;
    config.page_bytes = 4096;
    config.slab_bytes = 8 * 4096;
    config.budget_bytes = slabs * config.slab_bytes;
    config.level_masks = kMasks;
    return config;
  }
  void add_to(Engine& engine) const {
    CHECK(engine.add_file(path) == 0);
    CHECK(engine.add_records(infos.data(), static_cast<int64_t>(infos.size())) == 0);
    add_rows(engine, static_cast<int32_t>(infos.size()));
  }
  std::vector<int32_t> rows() const {
    std::vector<int32_t> rows(infos.size());
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i);
    return rows;
  }
  // io: a reader of files, or a device of this process: "device", "unified".
  std::unique_ptr<Engine> engine(int slabs, const std::string& io = "auto") {
    EngineConfig config = Store::config(slabs);
    if (io != "device" && io != "unified") {
      config.io = io;
      auto engine = std::make_unique<Engine>(config);
      add_to(*engine);
      return engine;
    }
    devices.push_back(std::make_unique<FakeDevice>(int64_t{64} << 20, io == "unified"));
    devices.back()->jitter_us = 30;
    DeviceConfig device;
    device.host_bytes = 4 * config.slab_bytes;
    auto backend = std::make_unique<DeviceBackend>(config, device, devices.back().get());
    DeviceBackend* const b = backend.get();
    auto engine = std::make_unique<Engine>(config, std::move(backend));
    add_to(*engine);
    b->make_plane(infos, rows());
    return engine;
  }
  bool holds(const Engine& engine, int32_t expert, int level) const {
    const int32_t first = expert * kPerExpert;
    for (int r = 0; r < kPerExpert; ++r) {
      if (!(kMasks[level] >> r & 1)) continue;
      const auto& payload = payloads[first + r];
      if (engine.pages(first + r) == nullptr) return false;
      std::vector<uint8_t> held(payload.size());
      engine.copy_out(first + r, static_cast<int64_t>(held.size()), held.data());
      if (held != payload) return false;
    }
    return true;
  }
};

}  // namespace comoe
